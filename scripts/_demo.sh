# Sourced by demo_seg.sh and demo_det.sh: runs seg/demo.py or det/demo.py on an image.
# Environment, with defaults:
#   CKPT      checkpoint that train.py wrote; without one, a small model of synthetic shapes is trained first, which takes
#             some minutes on a CPU, and kept under output/
#   CONFIG    its config; required with CKPT
#   OUTPUT    the image to write (output/demo_<seg or det>.png)
#   PYTHON    interpreter (.venv/bin/python if it is there, else python3)

set -euo pipefail
root="$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=scripts/_variables.sh
source "$root/scripts/_variables.sh"

demo() {
    # $1: "seg" or "det"; $2: config of the small model; then the command line
    local task="$1" config="$root/$1/configs/$2.py" folder="$root/output/$2"
    shift 2
    clean CKPT CONFIG OUTPUT PYTHON
    if [ $# -lt 1 ] || [ ! -f "$1" ]; then
        echo "error: give an image: bash scripts/demo_$task.sh IMAGE" >&2
        exit 2
    fi
    if [ -n "${CKPT:-}" ] && [ -z "${CONFIG:-}" ]; then
        echo "error: CKPT is set without CONFIG: give the config that the checkpoint was trained with" >&2
        exit 2
    fi
    local python
    python="$(interpreter "$root")"
    local checkpoint="${CKPT:-}"
    if [ -z "$checkpoint" ]; then
        if [ ! -f "$folder/last_checkpoint" ]; then
            echo "== no CKPT: training a small model of synthetic shapes once (some minutes on a CPU)"
            "$python" "$root/scripts/make_shapes.py" "$root/output/shapes"
            "$python" "$root/$task/train.py" "$config" --data-root "$root/output/shapes" --work-dir "$folder"
        fi
        checkpoint="$(cat "$folder/last_checkpoint")"
    fi
    "$python" "$root/$task/demo.py" "$(path_of "$1")" "$(path_of "${CONFIG:-$config}")" "$(path_of "$checkpoint")" \
        --out="${OUTPUT:-$root/output/demo_$task.png}" "${@:2}"
}
