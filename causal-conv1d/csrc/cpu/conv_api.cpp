#include "common/runtime.h"
#include "common/select.h"
#include "conv.h"

VIM_DECLARE(conv_forward, ConvArgs)
VIM_DECLARE(conv_backward, ConvArgs)
VIM_DECLARE(conv_project, ConvProjectArgs)
VIM_DECLARE(conv_rows_forward, ConvArgs)
VIM_DECLARE(conv_rows_backward, ConvArgs)

extern "C" {
VIM_EXPORT(conv_forward, ConvArgs)
VIM_EXPORT(conv_backward, ConvArgs)
VIM_EXPORT(conv_project, ConvProjectArgs)
VIM_EXPORT(conv_rows_forward, ConvArgs)
VIM_EXPORT(conv_rows_backward, ConvArgs)
}
