#!/usr/bin/env bash
# Train Mamba-R base on ImageNet-1K, one of its stages: STAGE=1 (input 128, the default), then 2 and 3 (input 224), each from
# FINETUNE, the checkpoint of the stage before. Environment and --dry-run: see scripts/_launch.sh.
# shellcheck source=scripts/_launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/_launch.sh"
stage="${STAGE:-1}"
case "$stage" in
1) launch pt-mambar-b-1 train --config recipes/mambar-base-1.yaml "$@" ;;
2 | 3)
    checkpoint="$(need FINETUNE pt-mambar-b)"
    launch "pt-mambar-b-$stage" train --config "recipes/mambar-base-$stage.yaml" --finetune "$checkpoint" "$@"
    ;;
*)
    echo "error: STAGE is $stage, expected 1, 2 or 3" >&2
    exit 2
    ;;
esac
