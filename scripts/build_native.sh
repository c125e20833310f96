#!/usr/bin/env bash
# Compile the native CPU libraries next to the Python sources, to work in a checkout without installing.
# Usage: scripts/build_native.sh [cmake options, e.g. -DVIM_SANITIZE=address,undefined]
set -euo pipefail
top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
build=${VIM_BUILD_DIR:-$top/build/native}
generator=()
if command -v ninja >/dev/null; then generator=(-G Ninja); fi
cmake -S "$top" -B "$build" "${generator[@]}" -DCMAKE_BUILD_TYPE=Release -DVIM_IN_PLACE=ON "$@" >/dev/null
cmake --build "$build" --parallel
cmake --install "$build" >/dev/null
