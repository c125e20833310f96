"""Vision Mamba on a GPU in one command: how fast are the kernels, and how fast are the models.

    python benchmarks/gpu.py [--only kernels,mixer,models] [--quick] [--out gpu-results]
    TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny        # on a CPU, to see that everything runs

Writes results.csv (after every section), and ends with a table. Times are medians of CUDA events; kernels
and models also are replayed from CUDA graphs. The floor of a kernel is the larger of its bytes over the bandwidth of
a large copy and its special-function operations (exp2, log2, reciprocal) over their measured rate. A section that fails
says so and the others go on, and the exit status is 1. `pytest -m gpu` checks the same kernels' results.
"""

import argparse
import contextlib
import csv
import functools
import importlib
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from causal_conv1d_vim.conv import backends as conv_backends
from causal_conv1d_vim.runtime import triton as triton_runtime
from causal_conv1d_vim.runtime.backend import use_backend
from gpu_kernels import N, available, make_directions, mixer_step, scan_inputs, short
from mamba_ssm_vim.ops.mixer import mixer
from mamba_ssm_vim.ops.norm import backends as norm_backends
from mamba_ssm_vim.ops.selective_scan import backends as scan_backends

SECTIONS = ("kernels", "mixer", "models")
COLUMNS = ("section", "what", "backend", "dtype", "batch", "size", "ms", "images_s", "peak_gb", "of_floor", "note")


class Bench:
    """Device, results and clock of one run."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.gpu = self.device == "cuda"
        self.rows: list[dict] = []
        self.failures: list[str] = []
        self.started = time.monotonic()
        self.bandwidth = self.special_rate = None

    def spare(self) -> bool:
        """Whether time is left; what would start later is skipped, with a line."""
        left = self.options.seconds - (time.monotonic() - self.started)
        if left <= 0:
            print("  skipped: the time given with --seconds is used up", flush=True)
        return left > 0

    def add(self, section: str, what: str, **values) -> None:
        row = {"section": section, "what": what, **values}
        self.rows.append(row)
        print(
            "  " + "  ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in list(row.values())[1:]), flush=True
        )

    def time(self, function: Callable, *, graph: bool, rounds: int = 7, repeats: int = 10) -> float:
        """Median seconds of a call."""
        if not self.gpu:
            function()
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        function()
        torch.cuda.synchronize()
        run, count = function, 1
        if graph:
            try:
                run, count = self._captured(function, repeats), repeats
            except RuntimeError as error:
                torch.cuda.synchronize()
                print(f"  not captured in a graph: {str(error).splitlines()[0]}", flush=True)
        run()
        times = []
        for _ in range(rounds):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            run()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3 / count)
        return sorted(times)[len(times) // 2]

    @staticmethod
    def _captured(function: Callable, repeats: int) -> Callable:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            function()
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            for _ in range(repeats):
                function()
        return captured.replay

    def floor(self, moved: float, special: float) -> float | None:
        """Seconds below which a kernel cannot go."""
        if self.bandwidth is None:
            return None
        return max(moved / self.bandwidth, special / self.special_rate)


def describe(bench: Bench) -> None:
    """Names and ceilings of the device: copy bandwidth, and the rate of exp2."""
    triton_version = getattr(sys.modules.get("triton"), "__version__", "none")
    print(f"torch {torch.__version__}, triton {triton_version}, device {bench.device}")
    if not bench.gpu:
        return
    properties = torch.cuda.get_device_properties(0)
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    bench.bandwidth = 2 * source.nbytes / bench.time(functools.partial(target.copy_, source), graph=False)
    clock = getattr(properties, "clock_rate", 1.98e6) * 1e3
    # 16 special-function results per clock and multiprocessor from compute capability 7.5 on.
    bench.special_rate = 16 * properties.multi_processor_count * clock
    print(f"{properties.name}: {properties.multi_processor_count} multiprocessors at {clock / 1e9:.2f} GHz")
    rates = f"{bench.bandwidth / 1e12:.2f} TB/s copied, {bench.special_rate / 1e12:.2f} T special functions/s"
    print(rates, flush=True)


def shapes(bench: Bench) -> dict[str, tuple[int, int, int, int]]:
    """name → batch, tokens, inner channels, rank."""
    if bench.options.tiny:
        return {"tiny": (1, 9, 40, 4)}
    made = {"Ti 224": (128, 197, 384, 12), "Ti 1248": (1, 6085, 384, 12)}
    return made if bench.options.quick else made | {"S 224": (128, 197, 768, 24), "Ti 224 b1": (1, 197, 384, 12)}


def kernels(bench: Bench) -> None:
    """Scan, convolution and norm, each alone."""
    for name, (batch, seqlen, dim, _) in shapes(bench).items():
        for dtype in (
            (torch.bfloat16,) if bench.options.quick or bench.options.tiny else (torch.bfloat16, torch.float32)
        ):
            if not bench.spare():
                return
            item, cells = dtype.itemsize, batch * seqlen * dim
            tensors = scan_inputs(bench.device, batch, seqlen, dim, N, 1, dtype)
            tensors[8] = None
            x, dout = tensors[0], torch.randn(batch, seqlen, dim, device=bench.device).to(dtype)
            weight, bias = torch.randn(dim, 4, device=bench.device), torch.randn(dim, device=bench.device)
            half = dim // 2
            h, residual = dout[..., :half].contiguous(), torch.randn(batch, seqlen, half, device=bench.device)
            scale = torch.ones(half, device=bench.device)
            common = {"batch": batch, "size": name, "dtype": short(dtype)}

            def measure(what, backend, function, moved, special, common=common):
                seconds = bench.time(function, graph=True)
                floor = bench.floor(moved, special)
                share = None if floor is None else floor / seconds
                bench.add("kernels", what, backend=backend, **common, ms=seconds * 1e3, of_floor=share)

            flags = {"delta_softplus": True, "reverse": False}
            for backend, module in available(scan_backends, x, *tensors[2:5]):
                for reverse in (False, True):
                    flags = {"delta_softplus": True, "reverse": reverse}
                    what = "scan forward" + " reverse" * reverse
                    measure(
                        what,
                        backend,
                        functools.partial(module.forward, *tensors, **flags),
                        4 * cells * item,
                        19 * cells,
                    )
                flags["reverse"] = False
                saved = module.forward(*tensors, **flags, save=True)[2]
                measure("scan backward", backend,
                        functools.partial(module.backward, dout, None, *tensors, saved, **flags),
                        7 * cells * item, 22 * cells)  # fmt: skip
                if backend == "cuda":
                    boundaries = cells * N * 4 / module.TILE
                    measure("scan forward, saving", backend,
                            functools.partial(module.forward, *tensors, **flags, save=True),
                            4 * cells * item + boundaries, 19 * cells)  # fmt: skip
                    measure("both scans", backend, both_scans(module, tensors), 7 * cells * item, 36 * cells)
            flags = {"silu": True, "reverse": False}
            for backend, module in available(conv_backends, x):
                args = (x, weight, bias, None)
                measure(
                    "conv forward",
                    backend,
                    functools.partial(module.forward, *args, **flags),
                    2 * cells * item,
                    2 * cells,
                )
                measure("conv backward", backend, functools.partial(module.backward, dout, *args, **flags),
                        3 * cells * item, 2 * cells)  # fmt: skip
            for backend, module in available(norm_backends, h):
                forward = functools.partial(
                    module.forward, h, residual, scale, None, eps=1e-5, rms=True, residual_dtype=torch.float32
                )
                _, total, mean, rstd = forward()
                backward = functools.partial(
                    module.backward, h, residual, total, scale, None, mean, rstd, rms=True, x_dtype=dtype
                )
                measure("norm forward", backend, forward, cells // 2 * (2 * item + 8), 0)
                measure("norm backward", backend, backward, cells // 2 * (2 * item + 12), 0)
    original(bench)


def both_scans(module, tensors: list) -> Callable:
    """The CUDA mixer's scan: both directions in one launch."""
    names = ("u", "delta", "A", "B", "C", "D", None, "delta_bias", "initial_state")
    direction = {n: t for n, t in zip(names, tensors, strict=True) if n} | {"last_state": None}
    directions = [direction | {"reverse": reverse} for reverse in (False, True)]
    out, flags = torch.empty_like(tensors[0]), {"delta_softplus": True, "scale": 0.5, "save": False}
    return functools.partial(module.launch_forward, directions, tensors[6], out, **flags)


def original(bench: Bench) -> None:
    """The scan of an importable `mamba_ssm`, if there is one that is not this project's."""
    try:
        theirs = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    except Exception as problem:
        print(f"  no mamba_ssm to compare with: {problem}", flush=True)
        return
    for name, (batch, seqlen, dim, _) in shapes(bench).items():
        u, delta, A, B, C, D, z, bias, _ = scan_inputs(bench.device, batch, seqlen, dim, N, 1, torch.bfloat16)
        u, delta, z, B, C = (t.squeeze(2).transpose(1, 2).contiguous().requires_grad_() for t in (u, delta, z, B, C))
        common = {"backend": "mamba_ssm", "dtype": "bfloat16", "batch": batch, "size": name}
        run = functools.partial(theirs, u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True)
        with torch.no_grad():
            bench.add("kernels", "scan forward", **common, ms=bench.time(run, graph=True) * 1e3)
        out = run()
        dout = torch.randn_like(out)
        grads = functools.partial(torch.autograd.grad, out, (u, delta, z, B, C), dout, retain_graph=True)
        bench.add("kernels", "scan backward", **common, ms=bench.time(grads, graph=False) * 1e3)


def mixers(bench: Bench) -> None:
    """The bidirectional mixer, forward and forward with backward."""
    for name, (batch, seqlen, dim, rank) in shapes(bench).items():
        dtype = torch.bfloat16
        xz = torch.randn(batch, seqlen, 2 * dim, device=bench.device).to(dtype).requires_grad_()
        dout = torch.randn(batch, seqlen, dim, device=bench.device).to(dtype)
        directions = make_directions(bench.device, dim, rank)
        probe = scan_inputs(bench.device, 1, 2, 4, N, 1, dtype)
        for backend, _ in available(scan_backends, probe[0], *probe[2:5]):
            if not bench.spare():
                return
            with use_backend(backend):
                cells = batch * seqlen * dim
                with torch.no_grad():
                    seconds = bench.time(functools.partial(mixer, xz, directions, scale=0.5), graph=True)
                floor = bench.floor(3 * cells * dtype.itemsize, 40 * cells)
                common = {"backend": backend, "dtype": short(dtype), "batch": batch, "size": name}
                share = None if floor is None else floor / seconds
                bench.add("mixer", "mixer forward", **common, ms=seconds * 1e3, of_floor=share)
                seconds = bench.time(functools.partial(mixer_step, xz, directions, dout), graph=True, repeats=3)
                bench.add("mixer", "mixer forward and backward", **common, ms=seconds * 1e3)


# name, batch, size, training step or not: the cases in which Vim and DeiT are compared.
CASES = (
    ("tiny", 128, 224, False), ("tiny", 128, 224, True), ("small", 128, 224, False), ("small", 128, 224, True),
    ("tiny", 32, 512, False), ("tiny", 32, 512, True), ("tiny", 32, 1248, False), ("tiny", 8, 1248, False),
    ("tiny", 8, 1248, True),
)  # fmt: skip
PEERS = ("vim", "deit", "deit, plain attention")


def make_model(bench: Bench, peer: str, size: str, resolution: int) -> torch.nn.Module:
    """A model of `PEERS` in one of the published sizes."""
    import timm
    from timm.layers import set_fused_attn

    import vim.models  # noqa: F401 - registers the models

    torch.manual_seed(0)
    if peer == "vim":
        name = "vim_nano_patch4_32" if size == "nano" else f"vim_{size}_patch16_224"
        return timm.create_model(name, img_size=resolution).to(bench.device)
    set_fused_attn(peer == "deit")
    try:
        width = {"embed_dim": 32, "depth": 1, "num_heads": 1, "patch_size": 8} if size == "nano" else {}
        name = f"deit_{'tiny' if size == 'nano' else size}_patch16_224"
        return timm.create_model(name, img_size=resolution, **width).to(bench.device)
    finally:
        set_fused_attn(True)


def run_model(
    bench: Bench, what: str, model: torch.nn.Module, batch: int, size: int, *, train: bool = False, mode: str = "eager",
    dtype: torch.dtype = torch.bfloat16, backend: str | None = None,
) -> None:  # fmt: skip
    """One row: forward, or forward, backward and gradient reset; eager, from a CUDA graph, or compiled."""
    images = torch.randn(batch, 3, size, size, device=bench.device)
    labels = torch.randint(10, (batch,), device=bench.device)
    narrow = torch.autocast(bench.device, dtype=dtype, enabled=dtype != torch.float32)
    model.train(train)
    call = torch.compile(model, mode="reduce-overhead") if mode == "compiled" else model

    def forward():
        with torch.no_grad(), narrow:
            return call(images)

    def step():
        with narrow:
            loss = F.cross_entropy(call(images).float(), labels)
        loss.backward()
        for p in model.parameters():
            p.grad = None

    run = step if train else forward
    row = {"backend": backend or "auto", "dtype": short(dtype), "batch": batch, "size": size, "note": mode}
    what = f"{what} {'training step' if train else 'inference'}"
    try:
        if bench.gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        with use_backend(backend) if backend else contextlib.nullcontext():
            if mode == "compiled":
                for _ in range(3):  # compiles, warms up, records its graphs
                    run()
            seconds = bench.time(run, graph=mode == "graph", rounds=5, repeats=3)
        memory = torch.cuda.max_memory_allocated() / 1e9 if bench.gpu else None
        bench.add("models", what, **row, ms=seconds * 1e3, images_s=batch / seconds, peak_gb=memory)
    except torch.cuda.OutOfMemoryError:
        bench.add("models", what, **(row | {"note": f"{mode}: out of memory"}))
        torch.cuda.empty_cache()


def models(bench: Bench) -> None:
    """Vim beside DeiT with fused and with plain attention: eager, from a CUDA graph, compiled (reduce-overhead)."""
    tiny, quick = bench.options.tiny, bench.options.quick
    for size, batch, resolution, train in (("nano", 1, 32, False), ("nano", 1, 32, True)) if tiny else CASES:
        for peer in PEERS[:2] if quick else PEERS:
            # Compiling takes a minute a model, and plain attention is there for the paper's comparison alone.
            compiled = (size, resolution) == ("tiny", 224) and peer != PEERS[2]
            modes = ("graph",) if peer == PEERS[2] else ("eager", "graph", *(("compiled",) if compiled else ()))
            model = make_model(bench, peer, size, resolution)
            for mode in modes:
                if not bench.spare():
                    return
                run_model(bench, f"{peer}-{size}", model, batch, resolution, train=train, mode=mode)
                torch.compiler.reset()
            del model
    if tiny or quick:
        return
    model = make_model(bench, "vim", "tiny", 224)
    for batch, more in (
        (1, {}), (8, {}), (128, {"dtype": torch.float32}), (128, {"dtype": torch.float32, "train": True}),
        (128, {"backend": "triton"}), (128, {"backend": "triton", "train": True}),
    ):  # fmt: skip
        if not bench.spare():
            return
        run_model(bench, "vim-tiny", model, batch, 224, mode="graph", **more)


def write(bench: Bench) -> None:
    with open(bench.options.out / "results.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=COLUMNS)
        writer.writeheader()
        writer.writerows(bench.rows)


def table(bench: Bench) -> None:
    header = f"{'what':36} {'backend':9} {'dtype':8} {'batch':>5} {'size':>9}"
    print(f"\n{header} {'ms':>9} {'img/s':>8} {'GB':>6} {'/floor':>6}")
    for row in bench.rows:
        r = SimpleNamespace(**{c: row.get(c) for c in COLUMNS})
        number = lambda value, form: "" if value is None else format(value, form)  # noqa: E731
        print(
            f"{r.what[:36]:36} {r.backend or '':9} {r.dtype or '':8} {number(r.batch, 'd'):>5} {r.size or '':>9} "
            f"{number(r.ms, '.3f'):>9} {number(r.images_s, '.0f'):>8} {number(r.peak_gb, '.2f'):>6} "
            f"{number(r.of_floor, '.2f'):>6} {r.note or ''}"
        )
    print("\n".join(bench.failures) or "no failures")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"sections, of {', '.join(SECTIONS)}")
    parser.add_argument("--quick", action="store_true", help="fewer shapes, dtypes and resolutions")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU with TRITON_INTERPRET=1")
    parser.add_argument("--out", type=Path, default=Path("gpu-results"), help="folder for results.csv")
    parser.add_argument("--seconds", type=float, default=540, help="start nothing new after this time")
    options = parser.parse_args(argv)
    wanted = options.only.split(",")
    if unknown := set(wanted) - set(SECTIONS):
        parser.error(f"--only has {', '.join(sorted(unknown))}; the sections are {', '.join(SECTIONS)}")
    bench = Bench(options)
    if not bench.gpu and not (options.tiny and triton_runtime.interpreting()):
        parser.error("there is no GPU; to try this on a CPU run TRITON_INTERPRET=1 python benchmarks/gpu.py --tiny")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.backends.cudnn.benchmark = True  # the patch convolution, of Vim and DeiT alike
    triton_runtime.interpreting()
    describe(bench)
    for name, section in zip(SECTIONS, (kernels, mixers, models), strict=True):
        if name not in wanted or not bench.spare():
            continue
        print(f"{name}: {section.__doc__}", flush=True)
        start = time.monotonic()
        try:
            section(bench)
        except Exception:
            bench.failures.append(f"section {name}: {traceback.format_exc(limit=1).splitlines()[-1]}")
            traceback.print_exc(file=sys.stdout)
        print(f"  {name} took {time.monotonic() - start:.0f} s", flush=True)
        write(bench)
        if bench.gpu:
            torch.cuda.empty_cache()
    table(bench)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
