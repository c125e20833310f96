#!/usr/bin/env bash
# Pretrain Vim-Ti on ImageNet-1K by vim/recipes/pt-tiny.yaml. Environment and --dry-run: see scripts/_launch.sh.
# shellcheck source=scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
launch pt-vim-t train --config recipes/pt-tiny.yaml "$@"
