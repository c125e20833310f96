#!/usr/bin/env bash
# Install the OpenMMLab packages that det/ and seg/ build on: mmengine, mmcv, mmdet and mmseg.
# Usage: scripts/install_openmmlab.sh [--compile]
# By default mmcv comes without compiled operators (mmcv-lite) and torchvision serves nms, batched_nms, RoIAlign and
# sigmoid_focal_loss in their place (vim/dense/operators.py), which is all that the configs of det/ and seg/ need.
# --compile builds all of mmcv's operators from its source release, once: 13 to 22 minutes on 2 cores. The wheel is kept in
# ${XDG_CACHE_HOME:-$HOME/.cache}/vision-mamba/wheels and reused while Python, PyTorch and the kind of device stay the same.
# Environment: PYTHON (the interpreter to install into; default .venv/bin/python, which is made if missing);
# with --compile also FORCE_CUDA=1 or 0 (mmcv's CUDA operators or not; default: if a GPU is there) and MAX_JOBS.
set -euo pipefail
root="$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

compile=0
case "${1:-}" in
    "") ;;
    --compile) compile=1 ;;
    *)
        echo "error: unknown argument $1; usage: scripts/install_openmmlab.sh [--compile]" >&2
        exit 2
        ;;
esac

mmcv=2.1.0
requirements=("mmengine==0.10.7" "mmdet==3.3.0" "mmsegmentation==1.2.2")
# What these import and need not have: mmengine asks for opencv-python, whose windows need libraries servers lack.
# pkg_resources, which mmcv imports, left setuptools in version 81.
dependencies=("setuptools<81" "numpy>=2" "opencv-python-headless>=4.10,<5" addict yapf termcolor
    pyyaml rich matplotlib packaging pycocotools scipy shapely six terminaltables tqdm prettytable ftfy regex)

if [ -z "${PYTHON:-}" ]; then
    PYTHON="$root/.venv/bin/python"
    if [ ! -x "$PYTHON" ] || ! "$PYTHON" -c "import torch, vim" 2>/dev/null; then
        # shellcheck source=scripts/_setup.sh
        (unset PYTHON && source "$root/scripts/_setup.sh" && install_project "")
    fi
fi
if ! "$PYTHON" -c "import torch, vim" 2>/dev/null; then
    echo "error: $PYTHON has no torch or no vision-mamba: run pip install -r requirements.txt and pip install . with it" \
        "first, or leave PYTHON unset to use .venv" >&2
    exit 2
fi
pip=("$PYTHON" -m pip --disable-pip-version-check)

echo "== installing ${requirements[*]} and what they need"
"${pip[@]}" install --quiet --progress-bar on "${dependencies[@]}"
"${pip[@]}" install --quiet --no-deps "${requirements[@]}"

install_mmcv() {
    # $1: requirement or wheel. Two distributions hold the package mmcv: the other one goes first.
    "${pip[@]}" uninstall --quiet --yes mmcv mmcv-lite 2>/dev/null
    "${pip[@]}" install --quiet --no-deps "$1"
}

build_mmcv() {
    # $1: folder for the wheel, $2: device, "cpu" or CUDA with its version and architectures
    local wheels="$1" device="$2"
    local work log
    work="$(mktemp -d)"
    log="$work/build.log"
    "${pip[@]}" download --quiet --no-binary mmcv --no-deps --no-build-isolation --dest "$work" "mmcv==$mmcv"
    tar -xf "$work/mmcv-$mmcv.tar.gz" -C "$work"
    # The headers of PyTorch 2.15 are C++20; mmcv asks for C++14 or C++17.
    sed -i 's/-std=c++1[47]/-std=c++20/g' "$work/mmcv-$mmcv/setup.py"
    grep -q -- '-std=c++20' "$work/mmcv-$mmcv/setup.py"
    # Most of the time goes into PyTorch's headers, once per file: 57 small files that only dispatch are joined into 6.
    (
        cd "$work/mmcv-$mmcv/mmcv/ops/csrc/pytorch"
        mkdir joined
        mv ./*.cpp joined/
        i=0
        for file in joined/*.cpp; do
            echo "#include \"$file\"" >>"joined_$((i % 6)).cpp"
            i=$((i + 1))
        done
    )
    # Python's own flags ask for debugging symbols, which double the time.
    export CFLAGS="${CFLAGS:-} -g0"
    export MMCV_WITH_OPS=1 MAX_JOBS="${MAX_JOBS:-$(nproc)}"
    if [ "$device" = cpu ]; then
        # CUDA_VISIBLE_DEVICES: mmcv compiles for CUDA whenever it sees a GPU.
        export FORCE_CUDA=0 CUDA_VISIBLE_DEVICES=""
    else
        export FORCE_CUDA=1
    fi
    echo "== compiling mmcv $mmcv for $device with $MAX_JOBS compilers (log: $log)"
    # From ninja's lines only the count and the file's name are shown.
    if ! PATH="$(dirname "$PYTHON"):$PATH" "${pip[@]}" wheel --verbose --no-deps --no-build-isolation \
        --wheel-dir "$work/wheel" "$work/mmcv-$mmcv" 2>&1 | tee "$log" |
        sed -nuE 's|^ *(\[[0-9]+/[0-9]+\]) .*/([A-Za-z0-9_]+)\.o .*|\1 \2|p'; then
        grep -E "error|Error" "$log" | head -20 >&2 || true
        echo "error: mmcv did not compile; the whole log is $log. A C++20 compiler (gcc >= 11) is needed," \
            "and nvcc for CUDA (FORCE_CUDA=0 compiles for CPUs only)" >&2
        exit 1
    fi
    mkdir -p "$wheels"
    mv "$work"/wheel/mmcv-*.whl "$wheels/"
    rm -rf "$work"
}

if [ "$compile" = 0 ]; then
    install_mmcv "mmcv-lite==$mmcv"
else
    device="$("$PYTHON" - <<'PYTHON'
import os

import torch

cuda = os.environ.get("FORCE_CUDA", "1" if torch.cuda.is_available() else "0") == "1"
if cuda and torch.version.cuda:
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST") or ".".join(map(str, torch.cuda.get_device_capability()))
    print(f"cu{torch.version.cuda}-sm{archs}".replace(" ", "_").replace(";", "_"))
else:
    print("cpu")
PYTHON
    )"
    tag="$("$PYTHON" -c 'import sys, platform, torch
print(f"cp{sys.version_info[0]}{sys.version_info[1]}-torch{torch.__version__}-{platform.machine()}")')"
    wheels="${XDG_CACHE_HOME:-$HOME/.cache}/vision-mamba/wheels/mmcv-$mmcv-$tag-$device"
    if compgen -G "$wheels/mmcv-*.whl" >/dev/null; then
        echo "== mmcv $mmcv: using the wheel in $wheels"
    else
        "${pip[@]}" install --quiet wheel ninja
        build_mmcv "$wheels" "$device"
    fi
    install_mmcv "$(compgen -G "$wheels/mmcv-*.whl" | head -1)"
fi

"$PYTHON" - <<'PYTHON'
import torch

from vim.dense.stack import require_stack

require_stack("mmdet", "mmseg")
import mmcv
import mmdet
import mmengine
import mmseg
from mmcv.ops import get_compiler_version, nms, roi_align

boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0], [1.0, 1.0, 9.0, 9.0], [20.0, 20.0, 30.0, 30.0]])
kept = nms(boxes, torch.tensor([0.9, 0.8, 0.7]), 0.5)[1]
assert kept.tolist() == [0, 2], kept
assert roi_align(torch.ones(1, 1, 8, 8), torch.tensor([[0.0, 0.0, 0.0, 4.0, 4.0]]), 2).shape == (1, 1, 2, 2)
versions = ", ".join(f"{m.__name__} {m.__version__}" for m in (mmengine, mmcv, mmdet, mmseg))
print(f"ready: {versions}; mmcv's operators work, compiled by: {get_compiler_version()}")
PYTHON
