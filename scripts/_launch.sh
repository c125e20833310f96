# Sourced by the launchers: runs main.py from vim/, under torchrun where there are several processes.
# Environment, with defaults:
#   DATA       folder of ImageNet (train/ and val/); required, but for `--data-set FMNIST`, which is embedded
#   OUTPUT     folder for checkpoints and logs (output/<name of the launcher>)
#   GPUS       processes on this node, one per GPU (all GPUs; 1 without any)
#   NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT   for several nodes (1, 0, 127.0.0.1, 29500)
#   PYTHON     interpreter (.venv/bin/python if it is there, else python3)
# Arguments: --dry-run prints the command and stops; all others go to main.py, after the recipe's.

set -euo pipefail
# -P: the scripts are also reached as vim/scripts, a link.
root="$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/_variables.sh
source "$root/scripts/_variables.sh"
processes
clean DATA OUTPUT FINETUNE CKPT MODEL STAGE
one_word MODEL

launch() {
    # $1: name of the run; $2: "train" or "eval"; then flags of main.py
    local name="$1" kind="$2" dry_run=""
    shift 2
    local flags=() data=() arg
    for arg in "$@"; do
        if [ "$arg" = "--dry-run" ]; then dry_run=1; else flags+=("$arg"); fi
    done
    if [ -n "${DATA:-}" ]; then
        data=(--data-path "$(realpath -m -- "$DATA")")
    elif [[ ! " $* " =~ " --data"[-_]"set"[=\ ]"FMNIST " ]]; then
        echo "error: DATA is not set: DATA=/path/to/imagenet bash scripts/$name.sh" >&2
        exit 2
    fi
    local python
    python="$(interpreter "$root")"
    local gpus="${GPUS:-$(nvidia-smi --list-gpus 2>/dev/null | wc -l)}"
    gpus=$((10#$gpus))
    if [ "$gpus" -lt 1 ]; then gpus=1; fi
    local command=("$python")
    if [ "$gpus" -gt 1 ] || [ "${NODES:-1}" -gt 1 ]; then
        command+=(-m torch.distributed.run "--nnodes=${NODES:-1}" "--node-rank=${NODE_RANK:-0}"
            "--nproc-per-node=$gpus" "--master-addr=${MASTER_ADDR:-127.0.0.1}" "--master-port=${MASTER_PORT:-29500}")
    fi
    command+=(main.py "${data[@]}")
    if [ "$kind" = train ]; then
        command+=(--output-dir "$(realpath -m -- "${OUTPUT:-$root/output/$name}")")
    fi
    command+=("${flags[@]}")
    cd "$root/vim"
    if [ -n "$dry_run" ]; then
        printf '%q ' "${command[@]}"
        echo
        return
    fi
    "${command[@]}"
}

need() {
    # $1: name of a variable that must hold a checkpoint; $2: name of the launcher
    if [ -z "${!1:-}" ]; then
        echo "error: $1 is not set: $1=/path/to/checkpoint.pth DATA=/path/to/imagenet bash scripts/$2.sh" >&2
        exit 2
    fi
    realpath -m -- "${!1}"
}
