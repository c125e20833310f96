#!/usr/bin/env bash
# Evaluate CKPT, a Vim-S checkpoint, on ImageNet's validation set; MODEL names another of its size, such as
# vim_small_patch16_stride8_224. Environment and --dry-run: see scripts/_launch.sh.
# shellcheck source=scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
checkpoint="$(need CKPT eval-vim-s)"
launch eval-vim-s eval --eval --resume "$checkpoint" --model "${MODEL:-vim_small_patch16_224}" "$@"
