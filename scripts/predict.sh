#!/usr/bin/env bash
# Print and draw the five most likely classes of images: bash scripts/predict.sh IMAGE...
# Environment, with defaults:
#   CKPT      checkpoint of main.py, or another one with --model NAME (output/quickstart/checkpoint.pth)
#   OUTPUT    image to write (output/predictions.png)
#   PYTHON    interpreter (.venv/bin/python if it is there, else python3)
# Further arguments: see python -m vim.analysis.predict --help.

set -euo pipefail
# -P: the scripts are also reached as vim/scripts, a link.
root="$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/_variables.sh
source "$root/scripts/_variables.sh"
clean CKPT OUTPUT PYTHON
if [ $# -lt 1 ]; then
    echo "error: give an image: bash scripts/predict.sh IMAGE..." >&2
    exit 2
fi
checkpoint="${CKPT:-$root/output/quickstart/checkpoint.pth}"
if [ ! -f "$checkpoint" ]; then
    echo "error: there is no checkpoint at $checkpoint: run scripts/quickstart.sh, or CKPT=/path/to/checkpoint.pth" >&2
    exit 2
fi
exec "$(interpreter "$root")" -m vim.analysis.predict --checkpoint="$checkpoint" \
    --out="${OUTPUT:-$root/output/predictions.png}" "$@"
