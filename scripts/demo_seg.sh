#!/usr/bin/env bash
# Draw the classes of all pixels over an image: bash scripts/demo_seg.sh IMAGE. Environment: see scripts/_demo.sh.
# shellcheck source=scripts/_demo.sh
source "$(dirname "${BASH_SOURCE[0]}")/_demo.sh"
demo seg upernet_vim-nano_shapes "$@"
