"""Compile every Triton kernel of the three models for a GPU that is not there, and report registers and spills.

Run as a program: `python triton_aot.py cuda:90 Ti,S,B bfloat16 [quick]` prints a JSON object per kernel. The launches
of the backends themselves are recorded, so what is compiled is what would run.
"""

import json
import os
import re
import subprocess
import sys
import tempfile

import torch
import triton
from causal_conv1d_vim.conv import triton as conv
from causal_conv1d_vim.conv.reference import ConvGradients
from causal_conv1d_vim.runtime import triton as triton_runtime
from mamba_ssm_vim.ops.norm import triton as norm
from mamba_ssm_vim.ops.selective_scan import triton as scan
from mamba_ssm_vim.ops.state_update import triton as state_update
from triton.backends.compiler import GPUTarget
from triton.runtime import jit

WIDTHS = {"Ti": 192, "S": 384, "B": 768}
STATES = 16


class AbsentDevice:
    """What `triton.runtime.driver.active` must answer for a kernel to be compiled but not loaded."""

    def __init__(self, target: GPUTarget) -> None:
        self._target = target

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def record(target: GPUTarget) -> list[tuple[str, object]]:
    """Let every launch compile only; the list gains (kernel name, compiled kernel)."""
    compiled: list[tuple[str, object]] = []
    launch = jit.JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        kernel = launch(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append((self.__name__, kernel))
        return kernel

    jit.JITFunction.run = run
    triton_runtime.multiprocessors = lambda x: 132  # as on an H100: batch 1 is cut in chunks
    triton.runtime.driver.set_active(AbsentDevice(target))
    return compiled


def resources(kernel) -> dict[str, int]:
    """Registers per thread, bytes of local memory per thread (spills and stack) and of shared memory."""
    if "cubin" in kernel.asm:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(kernel.asm["cubin"])
            file.flush()
            tool = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
            text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
        found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL|SHARED):(\d+)", text)}
        return {"registers": found["REG"], "local": found["STACK"] + found["LOCAL"], "shared": found["SHARED"]}
    text = kernel.asm["amdgcn"]
    registers, spills = (int(re.search(rf"\.{key}:\s+(\d+)", text)[1]) for key in ("vgpr_count", "vgpr_spill_count"))
    return {"registers": registers, "local": 4 * spills, "shared": kernel.metadata.shared}


def launch_all(width: int, dtype: torch.dtype, *, quick: bool = False) -> None:
    """Every launch of a training step of one block, with and without initial states, and the long-sequence variant.

    If `quick`, one direction of each.
    """
    inner, rank = 2 * width, width // 16
    f32 = {"dtype": torch.float32}
    A, D, bias = torch.empty(inner, STATES, **f32), torch.empty(inner, **f32), torch.empty(inner, **f32)
    weight = torch.empty(inner, 4, dtype=dtype)
    for batch, seqlen in ((2, 197), (1, 1024)):
        xz = torch.empty(batch, seqlen, 2 * inner, dtype=dtype)
        dbl = torch.empty(batch, seqlen, rank + 2 * STATES, dtype=dtype)
        B, C = (dbl[..., i : i + STATES].unsqueeze(2) for i in (rank, rank + STATES))
        x, z = xz.chunk(2, -1)
        before = torch.empty(batch, 3, inner, dtype=dtype)
        u, delta, dout = (torch.empty(batch, seqlen, inner, dtype=dtype) for _ in range(3))
        for reverse in (seqlen > 197,) if quick else (False, True):
            conv.forward(x, weight, D, None, silu=True, reverse=reverse)
            conv.backward(dout, x, weight, D, None, silu=True, reverse=reverse)
            conv.forward(x, weight, D, before, silu=True, reverse=reverse)
            conv.backward(
                dout, x, weight, D, before, silu=True, reverse=reverse, out=ConvGradients(x=u), accumulate=True
            )
            flags = {"delta_softplus": True, "reverse": reverse}
            out, _, saved = scan.forward(u, delta, A, B, C, D, z, bias, None, **flags, save=True)
            scan.forward(u, delta, A, B, C, D, z, bias, None, **flags, out=out, accumulate=True)
            scan.backward(dout, None, u, delta, A, B, C, D, z, bias, None, saved, **flags)
            given = u, delta, A, B, C, D, z, bias, torch.empty(batch, inner, STATES)
            _, last, saved = scan.forward(*given, **flags, save=True)
            scan.backward(dout, last, *given, saved, **flags)
    row, states = torch.empty(2, inner, dtype=dtype), torch.empty(2, STATES, dtype=dtype)
    state_update.forward(torch.empty(2, inner, STATES), row, row, A, states, states, D, row, bias, dt_softplus=True)
    h, residual, scale = torch.empty(2, 197, width, dtype=dtype), torch.empty(2, 197, width), torch.empty(width)
    for rms in (True, False):
        _, total, mean, rstd = norm.forward(h, residual, scale, None, eps=1e-5, rms=rms, residual_dtype=torch.float32)
        norm.backward(h, residual, total, scale, None, mean, rstd, rms=rms, x_dtype=dtype)


def main() -> None:
    backend, arch = sys.argv[1].split(":")
    target = GPUTarget(backend, int(arch) if backend == "cuda" else arch, 32 if backend == "cuda" else 64)
    compiled = record(target)
    seen = set()
    for model in sys.argv[2].split(","):
        compiled.clear()
        launch_all(WIDTHS[model], getattr(torch, sys.argv[3]), quick="quick" in sys.argv)
        for name, kernel in compiled:
            if (key := (name, model, kernel.hash)) not in seen:
                seen.add(key)
                print(json.dumps({"kernel": name, "model": model, **resources(kernel)}))


if __name__ == "__main__":
    main()
