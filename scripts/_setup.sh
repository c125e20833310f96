# Sourced by the other scripts: a virtual environment in .venv with what requirements.txt pins and this project.
# Environment: PYTHON (interpreter to make .venv with, default python3).

set -euo pipefail
# -P: the scripts are also reached as vim/scripts, a link.
root="$(cd -P "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

install_project() {
    # $1: extras to install, e.g. "test"
    if [ ! -x .venv/bin/python ]; then
        echo "== making .venv"
        "${PYTHON:-python3}" -m venv .venv
        .venv/bin/python -m pip install --quiet --upgrade pip
    fi
    echo "== installing requirements.txt (PyTorch with CUDA is a download of several GB the first time)"
    .venv/bin/python -m pip install --quiet --progress-bar on -r requirements.txt
    echo "== installing vision-mamba, compiling its native kernels"
    if [ -z "${VIM_BUILD_CUDA:-}${VIM_CUDA_ARCHS:-}" ] && ! nvidia-smi -L >/dev/null 2>&1; then
        echo "CUDA kernels: not compiled, there is no GPU (VIM_BUILD_CUDA=1 compiles them anyway)"
    fi
    .venv/bin/python -m pip install --quiet -e ".${1:+[$1]}"
    .venv/bin/python - <<'PYTHON'
from mamba_ssm_vim.cpu_library import library

print("CPU kernels:", library.instruction_set or f"none, {library.reason}")
PYTHON
}
