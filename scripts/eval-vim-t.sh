#!/usr/bin/env bash
# Evaluate CKPT, a Vim-Ti checkpoint, on ImageNet's validation set; MODEL names another of its size, such as
# vim_tiny_patch16_stride8_224. Environment and --dry-run: see scripts/_launch.sh.
# shellcheck source=scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
checkpoint="$(need CKPT eval-vim-t)"
launch eval-vim-t eval --eval --resume "$checkpoint" --model "${MODEL:-vim_tiny_patch16_224}" "$@"
