# Sourced by the launchers of detection and segmentation: runs det/ or seg/ train.py and test.py, under torchrun where
# there are several processes.
# Environment, with defaults:
#   DATA       folder of the data set (ADE20K's ADEChallengeData2016, or COCO's with annotations/); required
#   FINETUNE   classification checkpoint that the backbone starts from; required for training
#   CKPT       checkpoint that train.py wrote; required for evaluation
#   CONFIG     another config than the launcher's
#   OUTPUT     folder for checkpoints and logs (output/<name of the launcher>)
#   GPUS, NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, PYTHON   as in scripts/_launch.sh
# Arguments: --dry-run prints the command and stops; all others go to train.py or test.py.

set -euo pipefail
# -P: the scripts are also reached as vim/scripts, a link.
root="$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/_variables.sh
source "$root/scripts/_variables.sh"

dense() {
    # $1: name of the launcher; $2: "seg" or "det"; $3: "train" or "test"; $4: config; then flags
    local name="$1" task="$2" kind="$3" config="$4" dry_run="" variable
    shift 4
    processes
    clean DATA OUTPUT FINETUNE CKPT CONFIG
    local flags=() arg
    for arg in "$@"; do
        if [ "$arg" = "--dry-run" ]; then dry_run=1; else flags+=("$arg"); fi
    done
    variable=FINETUNE
    if [ "$kind" = test ]; then variable=CKPT; fi
    if [ -z "${DATA:-}" ]; then
        echo "error: DATA is not set: $variable=/path/to/checkpoint.pth DATA=/path/to/data bash scripts/$name.sh" >&2
        exit 2
    fi
    if [ -z "${!variable:-}" ]; then
        echo "error: $variable is not set: $variable=/path/to/checkpoint.pth DATA=$DATA bash scripts/$name.sh" >&2
        exit 2
    fi
    local checkpoint="${!variable}"
    if [[ "$checkpoint" != hf-hub:* ]]; then checkpoint="$(realpath -m -- "$checkpoint")"; fi
    local python
    python="$(interpreter "$root")"
    local gpus="${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"
    gpus=$((10#$gpus))
    if [ "$gpus" -lt 1 ]; then gpus=1; fi
    local command=("$python") launcher=none
    if [ "$gpus" -gt 1 ] || [ "${NODES:-1}" -gt 1 ]; then
        launcher=pytorch
        command+=(-m torch.distributed.run "--nnodes=${NODES:-1}" "--node-rank=${NODE_RANK:-0}"
            "--nproc-per-node=$gpus" "--master-addr=${MASTER_ADDR:-127.0.0.1}" "--master-port=${MASTER_PORT:-29500}")
    fi
    command+=("$task/$kind.py" "$(path_of "${CONFIG:-$task/configs/$config.py}")")
    if [ "$kind" = test ]; then command+=("$checkpoint"); else command+=(--finetune "$checkpoint"); fi
    command+=(--data-root "$(realpath -m -- "$DATA")" --work-dir "$(realpath -m -- "${OUTPUT:-$root/output/$name}")"
        --launcher "$launcher" "${flags[@]}")
    cd "$root"
    if [ -n "$dry_run" ]; then
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    "${command[@]}"
}
