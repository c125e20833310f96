// Architectures with machine code in this library, as "80;90;100"; the newest is there as PTX too.
#ifndef VIM_CUDA_ARCHITECTURES
#define VIM_CUDA_ARCHITECTURES ""
#endif
extern "C" const char *vim_cuda_architectures() { return VIM_CUDA_ARCHITECTURES; }
