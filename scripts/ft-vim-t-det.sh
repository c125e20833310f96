#!/usr/bin/env bash
# Train Cascade Mask R-CNN on COCO with a Vim-Ti backbone, 184,375 iterations of 64 images (8 GPUs of 8).
# Environment and --dry-run: see scripts/_dense.sh.
# shellcheck source=scripts/_dense.sh
source "$(dirname "${BASH_SOURCE[0]}")/_dense.sh"
dense ft-vim-t-det det train cascade-mask-rcnn_vim-t-rope_lsj-184k "$@"
