#!/usr/bin/env bash
# Build the CPU libraries with AddressSanitizer and UndefinedBehaviorSanitizer in a copy of the tree, and run the CPU
# kernels' tests with them. Usage: scripts/test_sanitizers.sh [pytest arguments]; PYTHON chooses the interpreter.
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python}
cxx=${CXX:-g++}
runtime=$("$cxx" -print-file-name=libasan.so)
if [ ! -e "$runtime" ]; then
  echo "test_sanitizers.sh: $cxx has no AddressSanitizer runtime (libasan.so)" >&2
  exit 1
fi
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -r "$top/CMakeLists.txt" "$top/pyproject.toml" "$top/cmake" "$top/scripts" "$top/causal-conv1d" "$top/mamba-1p1p1" "$copy/"
VIM_BUILD_CUDA=0 VIM_BUILD_DIR="$copy/build" CXX="$cxx" bash "$copy/scripts/build_native.sh" \
  -DVIM_SANITIZE=address,undefined
# The interpreter itself is not instrumented: the runtime is loaded before it, and its own leaks are not looked for.
# The C++ runtime comes along so that torch's exceptions find the real __cxa_throw.
cd "$copy"
export PYTHONPATH="$copy/mamba-1p1p1:$copy/causal-conv1d" PYTHONDONTWRITEBYTECODE=1
export ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
LD_PRELOAD="$runtime $("$cxx" -print-file-name=libstdc++.so)" "$python" -m pytest --import-mode=importlib -q \
  -p no:cacheprovider -m "not slow" causal-conv1d/tests/conv/test_conv_cpu.py \
  mamba-1p1p1/tests/ops/{selective_scan/test_selective_scan,norm/test_norm,mixer/test_mixer}_cpu.py \
  mamba-1p1p1/tests/models/test_native_decoder.py "$@"
