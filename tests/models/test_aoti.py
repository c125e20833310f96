"""A package of AOTInductor: run from C++ without Python it gives the classes of PyTorch, in any batch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

import vim  # noqa: F401  registers the models
from vim.models.aoti import export_aoti

ROOT = Path(__file__).parents[2]


def test_what_cannot_be_packaged_is_refused(tmp_path: Path) -> None:
    model = timm.create_model("vim_nano_patch4_32", depth=1)
    with pytest.raises(ValueError, match=r"\.pt2"):
        export_aoti(model, tmp_path / "vim.so")
    with pytest.raises(ValueError, match=r"\.float\(\)"):
        export_aoti(model.bfloat16(), tmp_path / "vim.pt2")


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None or sys.platform != "linux", reason="compiles with g++ on Linux")
def test_classify_without_python(golden_weights, tmp_path: Path) -> None:
    program, package, picture = (tmp_path / name for name in ("classify_torch", "vim.pt2", "picture.ppm"))
    model = golden_weights.fill(timm.create_model("vim_nano_patch4_32", depth=1), "aoti").eval()
    with torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"}):  # compiles in half the time
        export_aoti(model, package)
    build = ["bash", ROOT / "scripts" / "build_classify_torch.sh", program]
    subprocess.run(build, check=True, env={**os.environ, "PYTHON": sys.executable, "CXXFLAGS": "-O0 -Werror"})
    pixels = torch.randint(0, 256, (32, 32, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    picture.write_bytes(b"P6 32 32 255\n" + pixels.numpy().tobytes())
    mean, deviation = (torch.tensor(t)[:, None, None] for t in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    with torch.no_grad():
        likeliest = model(((pixels.permute(2, 0, 1) / 255 - mean) / deviation)[None]).softmax(-1)[0].topk(5)
    for settings in ({}, {"VIM_BATCH": "3", "VIM_THREADS": "2"}):
        done = subprocess.run([program, package, picture], capture_output=True, text=True, check=False, env=settings)
        assert done.returncode == 0, done.stderr
        found = [line.split() for line in done.stdout.splitlines()]
        assert [int(index) for index, _ in found] == likeliest.indices.tolist()
        # Six digits are printed.
        assert [float(p) for _, p in found] == pytest.approx(likeliest.values.tolist(), abs=2e-6)
    picture.write_bytes(b"P6 16 64 255\n" + pixels.numpy().tobytes())
    for file, words in ((package, "unmatched dim value"), (tmp_path / "none.pt2", "error: ")):
        done = subprocess.run([program, file, picture], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert words in done.stderr
