#!/usr/bin/env bash
# Fine-tune Vim-S at finer granularity (a patch every 8 pixels) by vim/recipes/ft-small.yaml, from FINETUNE, the pretrained
# checkpoint. Environment and --dry-run: see scripts/_launch.sh.
# shellcheck source=scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
checkpoint="$(need FINETUNE ft-vim-s)"
launch ft-vim-s train --config recipes/ft-small.yaml --finetune "$checkpoint" "$@"
