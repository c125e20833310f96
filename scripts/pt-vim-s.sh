#!/usr/bin/env bash
# Pretrain Vim-S on ImageNet-1K by vim/recipes/pt-small.yaml. Environment and --dry-run: see scripts/_launch.sh.
# shellcheck source=scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch pt-vim-s train --config recipes/pt-small.yaml "$@"
