#!/usr/bin/env bash
# Fine-tune Vim-Ti at finer granularity (a patch every 8 pixels) by vim/recipes/ft-tiny.yaml, from FINETUNE, the pretrained
# checkpoint. Environment and --dry-run: see scripts/_launch.sh.
# shellcheck source=scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
checkpoint="$(need FINETUNE ft-vim-t)"
launch ft-vim-t train --config recipes/ft-tiny.yaml --finetune "$checkpoint" "$@"
