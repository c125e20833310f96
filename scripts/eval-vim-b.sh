#!/usr/bin/env bash
# Evaluate CKPT, a Vim-B checkpoint, on ImageNet's validation set. A checkpoint of this project holds its own stride.
# Environment and --dry-run: see scripts/_launch.sh.
# shellcheck source=scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
checkpoint="$(need CKPT eval-vim-b)"
launch eval-vim-b eval --eval --resume "$checkpoint" --model "${MODEL:-vim_base_patch16_224}" "$@"
