# The CUDA libraries of causal_conv1d_vim and mamba_ssm_vim: C functions on device pointers, the CUDA runtime linked in.
#
# VIM_BUILD_CUDA (option or environment): AUTO builds them if nvcc and a GPU are there, OFF or 0 never, ON or 1 always
# and fails without nvcc.
# VIM_CUDA_ARCHS (option or environment): architectures such as "80;90;100" (commas do too). Default: those of the GPUs
# that nvidia-smi lists, all three without a GPU. Naming them counts as having the GPU. The newest is also included as
# PTX, for later GPUs.
include_guard()

if(NOT DEFINED VIM_BUILD_CUDA)
  set(VIM_BUILD_CUDA "$ENV{VIM_BUILD_CUDA}")
endif()
if(VIM_BUILD_CUDA STREQUAL "")
  set(VIM_BUILD_CUDA AUTO)
endif()
if(NOT VIM_BUILD_CUDA STREQUAL "AUTO" AND NOT VIM_BUILD_CUDA)
  message(STATUS "CUDA kernels: skipped, VIM_BUILD_CUDA is ${VIM_BUILD_CUDA}")
  return()
endif()

if(NOT DEFINED VIM_CUDA_ARCHS)
  set(VIM_CUDA_ARCHS "$ENV{VIM_CUDA_ARCHS}")
endif()
string(REPLACE "," ";" VIM_CUDA_ARCHS "${VIM_CUDA_ARCHS}")
if(NOT VIM_CUDA_ARCHS)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader OUTPUT_VARIABLE capabilities
                  RESULT_VARIABLE status ERROR_QUIET)
  if(status EQUAL 0 AND capabilities MATCHES "^[0-9]")
    string(STRIP "${capabilities}" capabilities)
    string(REGEX REPLACE "[\r\n]+" ";" VIM_CUDA_ARCHS "${capabilities}")
    list(TRANSFORM VIM_CUDA_ARCHS REPLACE "[. ]" "")
    list(REMOVE_DUPLICATES VIM_CUDA_ARCHS)
  elseif(VIM_BUILD_CUDA STREQUAL "AUTO")
    message(STATUS "CUDA kernels: skipped, nvidia-smi lists no GPU; VIM_BUILD_CUDA=1 builds them anyway")
    return()
  else()
    set(VIM_CUDA_ARCHS 80 90 100)
  endif()
endif()

include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  if(NOT VIM_BUILD_CUDA STREQUAL "AUTO")
    message(FATAL_ERROR "VIM_BUILD_CUDA is ${VIM_BUILD_CUDA}, but nvcc was not found: put it on the PATH or set CUDACXX")
  endif()
  message(STATUS "CUDA kernels: skipped, nvcc was not found; GPUs use the Triton kernels")
  return()
endif()

list(SORT VIM_CUDA_ARCHS COMPARE NATURAL)
list(GET VIM_CUDA_ARCHS -1 newest)
if(newest VERSION_LESS 80)
  message(STATUS "CUDA kernels: skipped, they need compute capability 8.0 and the newest asked for is ${newest}")
  return()
endif()
set(CMAKE_CUDA_ARCHITECTURES ${VIM_CUDA_ARCHS})
list(TRANSFORM CMAKE_CUDA_ARCHITECTURES APPEND "-real")
list(APPEND CMAKE_CUDA_ARCHITECTURES "${newest}-virtual")
message(STATUS "CUDA kernels: built for ${VIM_CUDA_ARCHS} with ${CMAKE_CUDA_COMPILER}")

enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)

add_custom_target(vim_cuda)
function(vim_cuda_library name package)
  add_library(${name} SHARED ${ARGN} causal-conv1d/csrc/common/architectures.cu)
  target_include_directories(${name} PRIVATE ${CMAKE_SOURCE_DIR}/causal-conv1d/csrc)
  string(JOIN "\\;" built ${VIM_CUDA_ARCHS})
  target_compile_definitions(${name} PRIVATE "VIM_CUDA_ARCHITECTURES=\"${built}\"")
  if(VIM_ZIG_TARGET)  # linked by the compiler that knows the older libc
    set_target_properties(${name} PROPERTIES LINKER_LANGUAGE CXX)
  endif()
  # 128-D: loops that a template's constants make unreachable.
  target_compile_options(${name} PRIVATE -O3 -diag-suppress=128)
  install(TARGETS ${name} LIBRARY DESTINATION ${package}/_lib)
  add_dependencies(vim_cuda ${name})
endfunction()

vim_cuda_library(causal_conv1d_cuda causal_conv1d_vim causal-conv1d/csrc/cuda/causal_conv1d.cu
                 causal-conv1d/csrc/cuda/conv_pair.cu)
vim_cuda_library(mamba_ssm_cuda mamba_ssm_vim mamba-1p1p1/csrc/cuda/scan_forward.cu
                 mamba-1p1p1/csrc/cuda/scan_stream.cu mamba-1p1p1/csrc/cuda/scan_backward.cu
                 mamba-1p1p1/csrc/cuda/scan_backward_finish.cu
                 mamba-1p1p1/csrc/cuda/mixer_weights.cu)
