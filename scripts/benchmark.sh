#!/usr/bin/env bash
# Measure Vim against DeiT by resolution on this machine and draw it: bash scripts/benchmark.sh [--seconds 600]
# A second call continues. Environment: PYTHON (interpreter with this project; by default that of .venv, which is made if
# it is not there).
# Further arguments: see python benchmarks/resolution.py --help.

set -euo pipefail
# -P: the scripts are also reached as vim/scripts, a link.
root="$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/_variables.sh
source "$root/scripts/_variables.sh"
clean PYTHON
if [ -z "${PYTHON:-}" ] && [ ! -x "$root/.venv/bin/python" ]; then
    # shellcheck source=scripts/_setup.sh
    source "$root/scripts/_setup.sh"
    install_project ""
    cd "$OLDPWD"
fi
exec "$(interpreter "$root")" "$root/benchmarks/resolution.py" "$@"
