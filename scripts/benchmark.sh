#!/usr/bin/env bash
# Measure Vim against DeiT by resolution on this machine and draw it: bash scripts/benchmark.sh [--seconds 600]
# A second call continues. Environment: PYTHON (interpreter; .venv/bin/python if it is there, else python3).
# Further arguments: see python benchmarks/resolution.py --help.

set -euo pipefail
# -P: the scripts are also reached as vim/scripts, a link.
root="$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/_variables.sh
source "$root/scripts/_variables.sh"
clean PYTHON
exec "$(interpreter "$root")" "$root/benchmarks/resolution.py" "$@"
