#!/usr/bin/env bash
# Set up .venv, train a small Vision Mamba on the embedded images, evaluate it and draw the result.
# Environment: OUTPUT (default output/quickstart), PYTHON (interpreter to make .venv with, default python3).
# shellcheck source=scripts/_setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/_setup.sh"
install_project ""

# shellcheck source=scripts/_variables.sh
source scripts/_variables.sh
clean OUTPUT DEVICE
output="$(path_of "${OUTPUT:-output/quickstart}")"
mkdir -p "$output"
# A relative folder counts from where the command was typed, not from vim/.
output="$(cd "$output" && pwd)"
rm -f "$output/log.txt"

echo "== training"
cd vim
SECONDS=0
../.venv/bin/python main.py --config recipes/quickstart.yaml --device="${DEVICE:-cuda}" --output-dir "$output" "$@"
echo "== trained in $SECONDS s; evaluating"
../.venv/bin/python main.py --eval --resume "$output/checkpoint.pth"
../.venv/bin/python -m vim.analysis.report "$output"
echo
echo "evaluate it again:  cd vim && ../.venv/bin/python main.py --eval --resume $output/checkpoint.pth"
