"""The CUDA C++ kernels one by one on a GPU: correctness against the float64 reference, repeatability, time over floor.

    python benchmarks/cuda_kernels.py [--quick] [--csv out.csv]

The floor of a kernel is the larger of two times: the bytes that it must move over the bandwidth of a large device copy,
and its special-function operations (16 per clock and multiprocessor) at the highest clock of the card.
"""

import argparse
import csv
import itertools
import sys

import torch
from causal_conv1d_vim.conv import cuda as conv
from causal_conv1d_vim.conv import reference as conv_reference
from mamba_ssm_vim.ops.mixer import Direction
from mamba_ssm_vim.ops.mixer import cuda as mixer
from mamba_ssm_vim.ops.selective_scan import cuda as scan
from mamba_ssm_vim.ops.selective_scan import reference as scan_reference

DSTATE = 16
# name: batch, tokens, inner channels, dt rank
SIZES = {
    "Ti 224 batch 128": (128, 197, 384, 12),
    "S 224 batch 128": (128, 197, 768, 24),
    "Ti 1248 batch 8": (8, 6085, 384, 12),
    "Ti 1248 batch 1": (1, 6085, 384, 12),
    "Ti 224 batch 1": (1, 197, 384, 12),
}


def time_of(function, *, rounds: int = 5, repeats: int = 20) -> float:
    """Median over rounds of the mean time of a call, in seconds; the calls are replayed from a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            function()
    graph.replay()
    times = []
    for _ in range(rounds):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3 / repeats)
    return sorted(times)[len(times) // 2]


def error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖, NaN if any element of `actual` is."""
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def scan_inputs(batch, seqlen, dim, dstate, groups, dtype):
    u, delta, z = torch.randn(batch, seqlen, 3 * dim, device="cuda").to(dtype).split(dim, -1)
    rows = torch.randn(batch, seqlen, 5 + 2 * groups * dstate, device="cuda").to(dtype)
    B, C = rows[..., 5:].unflatten(-1, (2, groups, dstate)).unbind(2)
    A = -torch.rand(dim, dstate, device="cuda") * 4 - 0.1
    D, bias = torch.randn(dim, device="cuda"), torch.randn(dim, device="cuda") - 3
    return [u, delta, A, B, C, D, z, bias, torch.randn(batch, dim, dstate, device="cuda")]


def directions(dim: int, rank: int) -> list[Direction]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device="cuda") * 0.2

    return [
        Direction(
            normal(dim, 4), normal(dim), normal(rank + 2 * DSTATE, dim), normal(dim, rank), normal(dim) - 4,
            -torch.arange(1.0, DSTATE + 1, device="cuda").repeat(dim, 1), normal(dim), reverse=reverse,
        )
        for reverse in (False, True)
    ]  # fmt: skip


def check(quick: bool) -> list[str]:
    """One line for each failed comparison."""
    failures = []
    limits = {torch.float32: 2e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}

    def judge(what: str, actual, expected, limit: float) -> None:
        for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
            if e is not None and not error(a, e) <= limit:
                failures.append(f"{what}, tensor {index}: relative error {error(a, e):.1e}, limit {limit:.0e}")

    shapes = [(2, 37, 70, 16, 1), (3, 197, 384, 16, 1), (1, 5, 3, 8, 1), (2, 700, 96, 16, 2)]
    shapes += [] if quick else [(1, 40, 20, 32, 1), (1, 64, 20, 64, 1), (1, 1025, 384, 16, 1)]
    for shape, dtype, reverse in itertools.product(shapes, limits, (False, True)):
        name = f"scan {shape} {dtype} reverse={reverse}"
        tensors = scan_inputs(*shape, dtype)
        flags = {"delta_softplus": True, "reverse": reverse}
        wide = [t.double() for t in tensors]
        out, last, saved = scan.forward(*tensors, **flags, save=True)
        dout, dlast = torch.randn_like(out), torch.randn_like(last)
        grads = scan.backward(dout, dlast, *tensors, saved, **flags)
        exact = scan_reference.forward(*wide, **flags)[:2]
        judge(name, (out, last), exact, limits[dtype])
        judge(name + " gradient", grads, scan_reference.backward(dout.double(), dlast.double(), *wide, [], **flags),
              limits[dtype])  # fmt: skip
        again = scan.backward(dout, dlast, *tensors, saved, **flags)
        if not all(torch.equal(a, b) for a, b in zip(grads, again, strict=True)):
            failures.append(f"{name}: two backward passes differ")
    for (batch, seqlen, dim, width), dtype, reverse in itertools.product(
        [(2, 67, 10, 4), (1, 2, 7, 4), (2, 197, 384, 4), (1, 130, 258, 3)], limits, (False, True)
    ):
        name = f"conv {(batch, seqlen, dim, width)} {dtype} reverse={reverse}"
        x = torch.randn(batch, seqlen, 2 * dim, device="cuda").to(dtype)[..., dim:]
        tensors = [x, torch.randn(dim, width, device="cuda"), torch.randn(dim, device="cuda"),
                   torch.randn(batch, width - 1, dim, device="cuda").to(dtype)]  # fmt: skip
        flags = {"silu": True, "reverse": reverse}
        wide = [t.double() for t in tensors]
        dout = torch.randn(batch, seqlen, dim, device="cuda").to(dtype)
        judge(name, [conv.forward(*tensors, **flags)], [conv_reference.forward(*wide, **flags)], limits[dtype])
        judge(name + " gradient", conv.backward(dout, *tensors, **flags),
              conv_reference.backward(dout.double(), *wide, **flags), limits[dtype])  # fmt: skip
    for (batch, seqlen, dim), dtype in itertools.product([(2, 197, 384), (2, 37, 70), (1, 1100, 96)], limits):
        # The projections round to dtype between the kernels on both sides, but at different places.
        limit = 1e-4 if dtype == torch.float32 else 3 * limits[dtype]
        xz = torch.randn(batch, seqlen, 2 * dim, device="cuda").to(dtype)
        both = directions(dim, 12)
        parts = []
        for way in both:
            x, z = xz.chunk(2, -1)
            u = conv.forward(x, way.conv_weight, way.conv_bias, None, silu=True, reverse=way.reverse)
            low = torch.nn.functional.linear(u, way.x_proj_weight.to(dtype))
            delta = torch.nn.functional.linear(low[..., :12], way.dt_proj_weight.to(dtype))
            B, C = (t.double().unsqueeze(2) for t in low[..., 12:].split(DSTATE, -1))
            parts.append(
                scan_reference.forward(
                    u.double(), delta.double(), way.A.double(), B, C, way.D.double(), z.double(), way.dt_bias.double(),
                    None, delta_softplus=True, reverse=way.reverse,
                )[0]
            )  # fmt: skip
        out, _ = mixer.forward(xz, both, scale=0.5, save=False)
        judge(f"mixer {(batch, seqlen, dim)} {dtype}", [out], [sum(parts) * 0.5], limit)
    return failures


def copy_bandwidth() -> float:
    """Bytes per second of a large device-to-device copy, read plus written."""
    source = torch.empty(1 << 28, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    return 2 * source.nbytes / time_of(lambda: target.copy_(source), repeats=5)


def measure(sizes: list[str], dtypes: list[torch.dtype]) -> list[dict]:
    """Rows of (size, dtype, kernel, time, floors)."""
    properties = torch.cuda.get_device_properties(0)
    clock = getattr(properties, "clock_rate", 1980e3) * 1e3
    special = 16 * properties.multi_processor_count * clock
    bandwidth = copy_bandwidth()
    rows = []
    conv_flags = {"silu": True, "reverse": False}
    flags = {"delta_softplus": True, "reverse": False}

    def add(size, dtype, kernel, function, bytes_moved, operations):
        seconds = time_of(function)
        floors = bytes_moved / bandwidth, operations / special
        rows.append({
            "size": size, "dtype": str(dtype).removeprefix("torch."), "kernel": kernel, "us": seconds * 1e6,
            "bytes_floor_us": floors[0] * 1e6, "special_floor_us": floors[1] * 1e6,
            "of_floor": max(floors) / seconds,
        })  # fmt: skip

    for size, dtype in itertools.product(sizes, dtypes):
        batch, seqlen, dim, rank = SIZES[size]
        item = torch.empty(0, dtype=dtype).element_size()
        cells = batch * seqlen * dim
        xz = torch.randn(batch, seqlen, 2 * dim, device="cuda").to(dtype)
        x, z = xz.chunk(2, -1)
        both = directions(dim, rank)
        ahead = both[0]
        conv_args = (x, ahead.conv_weight, ahead.conv_bias, None)
        dout = torch.randn_like(x)
        add(
            size, dtype, "conv forward", lambda a=conv_args: conv.forward(*a, **conv_flags), 2 * cells * item, 2 * cells
        )
        add(size, dtype, "conv backward", lambda a=conv_args, d=dout: conv.backward(d, *a, **conv_flags),
            3 * cells * item, 2 * cells)  # fmt: skip
        sides = []
        for way in both:
            u = conv.forward(x, way.conv_weight, way.conv_bias, None, silu=True, reverse=way.reverse)
            low = torch.nn.functional.linear(u, way.x_proj_weight.to(dtype))
            delta = torch.nn.functional.linear(low[..., :rank], way.dt_proj_weight.to(dtype))
            B, C = low[..., rank:].unsqueeze(2).split(DSTATE, -1)
            sides.append([u, delta, way.A, B, C, way.D, z, way.dt_bias, None])
        boundary = cells * DSTATE * 4 / scan.TILE
        add(size, dtype, "scan forward", lambda s=sides: scan.forward(*s[0], **flags), 4 * cells * item, 19 * cells)
        add(size, dtype, "scan forward, saving", lambda s=sides: scan.forward(*s[0], **flags, save=True),
            4 * cells * item + boundary, 19 * cells)  # fmt: skip
        saved = scan.forward(*sides[0], **flags, save=True)[2]
        add(size, dtype, "scan backward", lambda s=sides, d=dout, b=saved: scan.backward(d, None, *s[0], b, **flags),
            7 * cells * item + boundary, 22 * cells)  # fmt: skip
        names = ("u", "delta", "A", "B", "C", "D", None, "delta_bias", "initial_state")
        pair = [
            {n: t for n, t in zip(names, side, strict=True) if n} | {"last_state": None, "reverse": way.reverse}
            for side, way in zip(sides, both, strict=True)
        ]
        out = torch.empty_like(x)
        for pairs in (True, False):
            add(size, dtype, f"both scans, {1 + pairs} channels a thread",
                lambda p=pair, z=z, o=out, n=pairs: scan.launch_forward(
                    p, z, o, delta_softplus=True, scale=0.5, save=False, pairs=n),
                8 * cells * item, 36 * cells)  # fmt: skip
        add(size, dtype, "mixer forward", lambda a=xz, w=both: mixer.forward(a, w, scale=0.5, save=False),
            3 * cells * item, 40 * cells)  # fmt: skip
        kept = mixer.forward(xz, both, scale=0.5, save=True)[1]
        add(size, dtype, "mixer backward", lambda d=dout, a=xz, w=both, k=kept: mixer.backward(d, a, w, k, scale=0.5),
            5 * cells * item, 50 * cells)  # fmt: skip
        del kept, saved, sides, pair
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer shapes and sizes")
    parser.add_argument("--csv", help="also write the table to this file")
    parser.add_argument("--no-check", action="store_true", help="measure only")
    options = parser.parse_args()
    torch.manual_seed(0)
    if (reason := scan.library.why_not(torch.zeros(1, device="cuda"))) is not None:
        print(f"the CUDA kernels cannot run: {reason}", file=sys.stderr)
        return 2
    failures = [] if options.no_check else check(options.quick)
    print("\n".join(failures) or "all comparisons passed", flush=True)
    sizes = list(SIZES)[:1] if options.quick else list(SIZES)
    rows = measure(sizes, [torch.bfloat16] if options.quick else [torch.bfloat16, torch.float32])
    print(f"{'size':18} {'dtype':9} {'kernel':34} {'us':>9} {'bytes':>8} {'special':>8} {'of floor':>8}")
    for row in rows:
        print(f"{row['size']:18} {row['dtype']:9} {row['kernel']:34} {row['us']:9.1f} {row['bytes_floor_us']:8.1f} "
              f"{row['special_floor_us']:8.1f} {row['of_floor']:8.2f}")  # fmt: skip
    if options.csv:
        with open(options.csv, "w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
