#!/usr/bin/env bash
# Compile scripts/classify_torch.cpp and the operators that it needs against the libtorch and the native libraries of an
# installed Python. The program itself runs without Python. Usage: scripts/build_classify_torch.sh [PROGRAM]
# Environment: PYTHON (default python), CXX (g++), CXXFLAGS (-O2).
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
folder_of() {
  "${PYTHON:-python}" -c "import importlib.util as u; print(*u.find_spec('$1').submodule_search_locations[:1])"
}
torch=$(folder_of torch)
libraries=()
for folder in "$torch/lib" "$(folder_of causal_conv1d_vim)/_lib" "$(folder_of mamba_ssm_vim)/_lib"; do
  libraries+=("-L$folder" "-Wl,-rpath,$folder")
done
# A package asks for libtorch.so itself, which the program does not need otherwise.
read -ra flags <<<"${CXXFLAGS:--O2}"
"${CXX:-g++}" "${flags[@]}" -std=c++20 -Wall -I"$top/causal-conv1d/csrc" -I"$top/causal-conv1d/csrc/cpu" \
  -I"$top/mamba-1p1p1/csrc" -isystem "$torch/include" "$top/scripts/classify_torch.cpp" \
  "$top/mamba-1p1p1/csrc/torch/operators.cpp" -o "${1:-classify_torch}" "${libraries[@]}" \
  -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10 -lvim_conv -lvim_mamba -ldl
