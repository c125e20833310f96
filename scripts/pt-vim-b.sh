#!/usr/bin/env bash
# Pretrain Vim-B on ImageNet-1K by vim/recipes/pt-base.yaml. Environment and --dry-run: see scripts/_launch.sh.
# shellcheck source=scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch pt-vim-b train --config recipes/pt-base.yaml "$@"
