#!/usr/bin/env bash
# Train UperNet on ADE20K with a Vim-Ti backbone, 60,000 iterations of 32 images (4 GPUs of 8).
# Environment and --dry-run: see scripts/_dense.sh.
# shellcheck source=scripts/_dense.sh
source "$(dirname "${BASH_SOURCE[0]}")/_dense.sh"
dense ft-vim-t-upernet seg train upernet_vim-t_ade20k-512_60k "$@"
