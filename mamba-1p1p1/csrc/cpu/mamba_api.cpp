#include "common/select.h"
#include "decode.h"
#include "norm.h"
#include "scan.h"

VIM_DECLARE(scan_forward, ScanArgs)
VIM_DECLARE(scan_backward, ScanGradArgs)
VIM_DECLARE(norm_forward, NormArgs)
VIM_DECLARE(norm_backward, NormArgs)
VIM_DECLARE(decode_step, DecodeArgs)

extern "C" {
VIM_EXPORT(scan_forward, ScanArgs)
VIM_EXPORT(scan_backward, ScanGradArgs)
VIM_EXPORT(norm_forward, NormArgs)
VIM_EXPORT(norm_backward, NormArgs)
VIM_EXPORT(decode_step, DecodeArgs)
}
