#include "common/select.h"
#include "norm.h"
#include "scan.h"

VIM_DECLARE(scan_forward, ScanArgs)
VIM_DECLARE(scan_backward, ScanGradArgs)
VIM_DECLARE(norm_forward, NormArgs)
VIM_DECLARE(norm_backward, NormArgs)

extern "C" {
VIM_EXPORT(scan_forward, ScanArgs)
VIM_EXPORT(scan_backward, ScanGradArgs)
VIM_EXPORT(norm_forward, NormArgs)
VIM_EXPORT(norm_backward, NormArgs)
}
