#include "common/select.h"
#include "norm.h"
#include "probe.h"
#include "scan.h"

VIM_DECLARE(scan_forward, ScanArgs)
VIM_DECLARE(scan_backward, ScanGradArgs)
VIM_DECLARE(norm_forward, NormArgs)
VIM_DECLARE(norm_backward, NormArgs)
VIM_DECLARE(fma_rate, ProbeArgs)

extern "C" {
VIM_EXPORT(scan_forward, ScanArgs)
VIM_EXPORT(scan_backward, ScanGradArgs)
VIM_EXPORT(norm_forward, NormArgs)
VIM_EXPORT(norm_backward, NormArgs)
VIM_EXPORT(fma_rate, ProbeArgs)
}
