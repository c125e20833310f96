#!/usr/bin/env bash
# Compile the CUDA libraries next to the Python sources, to work in a checkout. Usage: VIM_CUDA_ARCHS=90 scripts/build_cuda.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
generator=()
command -v ninja >/dev/null && generator=(-G Ninja)
cmake -S . -B build/cuda "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DVIM_BUILD_CUDA=ON
cmake --build build/cuda --target vim_cuda --parallel
for package in causal-conv1d/causal_conv1d_vim mamba-1p1p1/mamba_ssm_vim; do mkdir -p $package/_lib; done
cp build/cuda/libcausal_conv1d_cuda.so causal-conv1d/causal_conv1d_vim/_lib/
cp build/cuda/libmamba_ssm_cuda.so mamba-1p1p1/mamba_ssm_vim/_lib/
