#!/usr/bin/env bash
# Evaluate CKPT, UperNet with a Vim-S backbone, on ADE20K; --tta adds scales and mirror images.
# Environment and --dry-run: see scripts/_dense.sh.
# shellcheck source=scripts/_dense.sh
source "$(dirname "${BASH_SOURCE[0]}")/_dense.sh"
dense eval-vim-s-upernet seg test upernet_vim-s_ade20k-512_60k "$@"
