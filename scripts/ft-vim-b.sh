#!/usr/bin/env bash
# Fine-tune Vim-B at finer granularity (a patch every 8 pixels) by vim/recipes/ft-base.yaml, from FINETUNE, the pretrained
# checkpoint. Environment and --dry-run: see scripts/_launch.sh.
# shellcheck source=scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
checkpoint="$(need FINETUNE ft-vim-b)"
launch ft-vim-b train --config recipes/ft-base.yaml --finetune "$checkpoint" "$@"
