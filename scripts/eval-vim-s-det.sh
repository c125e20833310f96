#!/usr/bin/env bash
# Evaluate CKPT, Cascade Mask R-CNN with a Vim-S backbone, on COCO.
# Environment and --dry-run: see scripts/_dense.sh.
# shellcheck source=scripts/_dense.sh
source "$(dirname "${BASH_SOURCE[0]}")/_dense.sh"
dense eval-vim-s-det det test cascade-mask-rcnn_vim-s-rope_lsj-184k "$@"
