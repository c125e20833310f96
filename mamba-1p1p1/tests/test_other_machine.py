"""The CPU kernels on aarch64: calls recorded here are replayed there, under an emulator, and give the same numbers."""

import gc
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from causal_conv1d_vim import causal_conv1d, causal_conv1d_fn
from causal_conv1d_vim.conv import cpu as conv
from causal_conv1d_vim.runtime.tensors import DTYPES
from mamba_ssm_vim import Direction, add_norm, bimamba_inner, selective_scan
from mamba_ssm_vim.ops.norm import cpu as norm
from mamba_ssm_vim.ops.selective_scan import cpu as scan

ROOT = Path(__file__).parents[2]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
PASSES = ("forward", "backward")
KERNELS = [
    *((conv, f"_{name}", f"vim_conv_{name}") for name in (*PASSES, "rows_forward", "rows_backward", "project")),
    *((scan, f"_{name}", f"vim_scan_{name}") for name in PASSES),
    *((norm, f"_{name}", f"vim_norm_{name}") for name in PASSES),
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(conv.library.reason is not None, reason=str(conv.library.reason)),
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and shutil.which(EMULATOR)),
        reason="needs Debian's g++-aarch64-linux-gnu and qemu-user",
    ),
]
BATCH, SEQLEN, DIM, STATES, RANK = 2, 37, 24, 5, 3


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


class Recorder:
    """Writes each call of a kernel: its arguments, and the memory that they point to before and after."""

    def __init__(self):
        self.calls = []
        self.names = set()

    def wrap(self, kernel, name):
        def call(packed):
            values = struct.unpack(f"={len(packed) // 8}q", packed)
            tensors = {}
            for t in gc.get_objects():
                if type(t) is torch.Tensor and t.dtype in DTYPES:
                    tensors.setdefault(t.untyped_storage().data_ptr(), t)
            found, pointers = {}, []
            for index, value in enumerate(values):
                for start, t in tensors.items():
                    if start <= value < start + t.untyped_storage().nbytes():
                        found.setdefault(start, t)
                        pointers.append((8 * index, list(found).index(start), value - start))
                        break
            before = [self.content(t) for t in found.values()]
            kernel(packed)
            parts = [struct.pack("=q", len(name)), name.encode(), struct.pack("=q", len(packed)), packed]
            parts.append(struct.pack("=q", len(found)))
            for t, content in zip(found.values(), before, strict=True):
                parts += [struct.pack("=qq", DTYPES[t.dtype], len(content)), content, self.content(t)]
            parts.append(struct.pack("=q", len(pointers)))
            parts += [struct.pack("=qqq", *p) for p in pointers]
            self.calls.append(b"".join(parts))
            self.names.add(name)

        return call

    @staticmethod
    def content(t):
        return bytes(torch.empty(0, dtype=torch.uint8).set_(t.untyped_storage()).tolist())


def exercise():
    """Every kernel, forwards and backwards: odd sizes, both directions, two dtypes."""
    for dtype in (torch.float32, torch.bfloat16):
        xz = randn(BATCH, SEQLEN, 2 * DIM, dtype=dtype)
        directions = [
            Direction(
                conv_weight=randn(DIM, 4), conv_bias=randn(DIM), x_proj_weight=randn(RANK + 2 * STATES, DIM),
                dt_proj_weight=randn(DIM, RANK), dt_bias=randn(DIM), A=-torch.rand(DIM, STATES), D=randn(DIM),
                reverse=reverse,
            ) for reverse in (False, True)
        ]  # fmt: skip
        bimamba_inner(xz, *directions).sum().backward()
        x = randn(BATCH, SEQLEN, DIM, dtype=dtype)
        causal_conv1d(x, randn(DIM, 3), None, initial_state=randn(BATCH, 2, DIM)).sum().backward()
        causal_conv1d_fn(randn(BATCH, DIM, SEQLEN, dtype=dtype), randn(DIM, 4), randn(DIM)).sum().backward()
        add_norm(x, randn(BATCH, SEQLEN, DIM), randn(DIM), randn(DIM))[0].sum().backward()
        add_norm(x, None, randn(DIM), rms=True)[0].sum().backward()
        B, C = randn(DIM, STATES), randn(BATCH, SEQLEN, 2, STATES)
        arguments = x, randn(BATCH, SEQLEN, DIM), -torch.rand(DIM, STATES), B, C, randn(DIM), x, randn(DIM)
        selective_scan(*arguments, delta_softplus=True, initial_state=randn(BATCH, DIM, STATES)).sum().backward()


def test_aarch64(tmp_path, monkeypatch):
    torch.manual_seed(0)
    recorder = Recorder()
    for module, attribute, name in KERNELS:
        monkeypatch.setattr(module, attribute, recorder.wrap(getattr(module, attribute), name))
    gc.freeze()  # so that the recorder looks at new objects only
    try:
        exercise()
    finally:
        gc.unfreeze()
    assert recorder.names == {name for *_, name in KERNELS}
    (tmp_path / "calls").write_bytes(struct.pack("=q", len(recorder.calls)) + b"".join(recorder.calls))
    conv_sources, mamba_sources = ROOT / "causal-conv1d" / "csrc", ROOT / "mamba-1p1p1" / "csrc" / "cpu"
    sources = [*conv_sources.glob("cpu/*.cpp"), *mamba_sources.glob("*.cpp"), conv_sources / "common" / "runtime.cpp"]
    command = [
        COMPILER, "-O1", "-std=gnu++17", "-static", "-pthread", "-ffp-contract=fast", "-Wno-psabi", "-DVIM_X86=0",
        "-DVIM_ISA=baseline", "-I", conv_sources, *sources, ROOT / "causal-conv1d/tests/support/replay.cpp",
        "-o", tmp_path / "replay",
    ]  # fmt: skip
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr[-2000:]
    done = subprocess.run(
        [EMULATOR, tmp_path / "replay", tmp_path / "calls"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == len(recorder.calls)
