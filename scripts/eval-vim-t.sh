#!/usr/bin/env bash
# Evaluate CKPT, a Vim-Ti checkpoint, on ImageNet's validation set. Environment and --dry-run: see scripts/_launch.sh.
# shellcheck source=scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
checkpoint="$(need CKPT eval-vim-t)"
launch eval-vim-t eval --eval --resume "$checkpoint" --model vim_tiny_patch16_224 "$@"
