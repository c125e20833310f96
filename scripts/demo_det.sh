#!/usr/bin/env bash
# Draw boxes and masks of what is found in an image: bash scripts/demo_det.sh IMAGE. Environment: see scripts/_demo.sh.
# shellcheck source=scripts/_demo.sh
source "$(dirname "${BASH_SOURCE[0]}")/_demo.sh"
demo det mask-rcnn_vim-nano_shapes "$@"
