"""Selective scan on NVIDIA GPUs: the CUDA C++ kernels of csrc/cuda, called through ctypes."""

import ctypes
import math

import torch
from causal_conv1d_vim.runtime.cuda_library import CudaLibrary, float32, int32, int64, pointer
from causal_conv1d_vim.runtime.tensors import DTYPES, address, cast_like, plain, rows

import mamba_ssm_vim
from mamba_ssm_vim.ops.selective_scan.reference import ScanGradients

MAX_STATES = 64
TILE = 16  # tokens between two saved states (kTile in scan.h)
BACKWARD_BLOCKS = 2  # of the backward scan that a multiprocessor holds (kBackwardBlocks in scan.h)

library = CudaLibrary(
    mamba_ssm_vim.__path__,
    "libmamba_ssm_cuda.so",
    launchers=["vim_scan_forward", "vim_scan_backward", "vim_mixer_weights"],
    queries={
        "vim_scan_boundary_floats": [int64, int64, int64, int32],
        "vim_scan_backward_workspace": [int64, int64, int64, int32, int32, int32, int32],
        "vim_scan_backward_blocks": [int64, int32, int32],
        "vim_scan_backward_shared_bytes": [int32],
        "vim_scan_forward_blocks": [int64, int32, int32],
    },
)


class ScanDirection(ctypes.Structure):
    """`vim::ScanDirection` of csrc/cuda/scan.h: one direction's tensors."""

    _fields_ = (
        *((name, pointer) for name in ("u", "delta", "B", "C", "A", "D", "delta_bias", "initial_state")),
        *((name, pointer) for name in ("last_state", "boundaries")),
        *((f"{name}_{axis}", int64) for name in ("u", "delta") for axis in ("batch", "token")),
        *((f"{name}_{axis}", int64) for name in ("B", "C") for axis in ("batch", "token", "group")),
        ("reverse", int32),
        ("reserved", int32),
    )


class ScanForwardArgs(ctypes.Structure):
    """`vim::ScanForwardArgs` of csrc/cuda/scan.h."""

    _fields_ = (
        ("direction", ScanDirection * 2),
        *((name, pointer) for name in ("z", "addend", "out", "ungated", "chunk_steps")),
        *((f"{name}_{axis}", int64) for name in ("z", "addend", "out") for axis in ("batch", "token")),
        *((name, int64) for name in ("batch", "seqlen", "dim")),
        *((name, int32) for name in ("dstate", "groups", "directions", "type", "softplus", "chunk_tiles", "save")),
        ("scale", float32),
    )


class ScanBackwardDirection(ctypes.Structure):
    """`vim::ScanBackwardDirection` of csrc/cuda/scan.h: one direction's inputs and gradients."""

    _fields_ = (
        ("inputs", ScanDirection),
        *((name, pointer) for name in ("du", "ddelta", "dB", "dC", "dA", "dD", "ddelta_bias", "dinitial_state")),
        ("dlast_state", pointer),
    )


class ScanBackwardArgs(ctypes.Structure):
    """`vim::ScanBackwardArgs` of csrc/cuda/scan.h."""

    _fields_ = (
        ("direction", ScanBackwardDirection * 2),
        *((name, pointer) for name in ("z", "ungated", "dout", "dz", "workspace")),
        *((f"{name}_{axis}", int64) for name in ("z", "dout", "dz") for axis in ("batch", "token")),
        *((name, int64) for name in ("dbc_token", "dbc_group", "batch", "seqlen", "dim")),
        *((name, int32) for name in ("dstate", "groups", "directions", "type", "softplus", "chunk_tiles")),
        ("scale", float32),
        ("reserved", int32),
    )


def why_not(u: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor) -> str | None:
    """None if these kernels can serve u (B, L, E), A (E, N), B and C, else the reason."""
    if (reason := library.why_not(u)) is not None:
        return reason
    if A.is_complex():
        return "A is complex"
    if A.shape[1] > MAX_STATES:
        return f"{A.shape[1]} states are more than {MAX_STATES}"
    if B.dim() != 4 or C.dim() != 4:
        return "B or C is constant over time"
    if B.shape[2] != C.shape[2]:
        return "B and C have different numbers of groups"
    return None


def as_rows(t: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """The tensor in `dtype` with its last axis contiguous; a copy only where that does not hold already."""
    return None if t is None else rows(t.to(dtype))


def common_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """The one type that the kernel reads its (B, L, ...) inputs in: theirs, or float32 if they differ."""
    types = {t.dtype for t in tensors if t is not None}
    return types.pop() if len(types) == 1 else torch.float32


def chunk_tiles(warps: int, seqlen: int, multiprocessors: int) -> int:
    """Tiles of 16 tokens per chunk when a long sequence is cut in time, 0 if one block walks the whole of it.

    Cutting makes every exponential twice, so it pays only where the `warps` of the uncut grid leave the chip mostly
    idle: fewer than one for each of a multiprocessor's four schedulers, and at least 512 tokens to share out. Cut,
    there are up to 40 per multiprocessor, some more than fit at a time, which evens out the end; chunks have 128 tokens
    or more.
    """
    if warps >= 4 * multiprocessors or seqlen < 512:
        return 0
    wanted = math.ceil(40 * multiprocessors / warps)
    return max(8, math.ceil(math.ceil(seqlen / TILE) / wanted))


def backward_chunk_tiles(blocks: int, seqlen: int, multiprocessors: int) -> int:
    """Tiles of 16 tokens per chunk of the backward scan, 0 if one block walks the whole sequence.

    Cutting adds a pass over the adjoint, a third of the work. It pays where a chip holds at least twice the `blocks` of
    the uncut grid; there are then as many chunks as fill it once, each of 128 tokens or more.
    """
    chunks = BACKWARD_BLOCKS * multiprocessors // blocks
    if chunks < 2 or seqlen < 512:
        return 0
    return max(8, math.ceil(math.ceil(seqlen / TILE) / chunks))


def fill_direction(
    direction: ScanDirection, u, delta, A, B, C, D, delta_bias, initial_state, last_state, boundaries, *, reverse: bool
) -> list[torch.Tensor | None]:
    """Write one direction's tensors into `direction`; returns what must outlive the launch."""
    named = {
        "u": u, "delta": delta, "B": B, "C": C, "A": plain(A), "D": plain(D), "delta_bias": plain(delta_bias),
        "initial_state": plain(initial_state), "last_state": last_state, "boundaries": boundaries,
    }  # fmt: skip
    for name, t in named.items():
        setattr(direction, name, address(t))
    for name in ("u", "delta", "B", "C"):
        t = named[name]
        setattr(direction, f"{name}_batch", t.stride(0))
        setattr(direction, f"{name}_token", t.stride(1))
    direction.B_group, direction.C_group = B.stride(2), C.stride(2)
    direction.reverse = reverse
    return list(named.values())


def _set_strided(args: ctypes.Structure, name: str, t: torch.Tensor | None) -> None:
    setattr(args, name, address(t))
    if t is not None:
        setattr(args, f"{name}_batch", t.stride(0))
        setattr(args, f"{name}_token", t.stride(1))


def boundary_floats(batch: int, seqlen: int, dim: int, dstate: int) -> int:
    """Floats of one direction's boundary states, as `vim_scan_boundary_floats` counts them, for symbolic sizes too."""
    padded = 16 if dstate <= 16 else 32 if dstate <= 32 else 64
    return batch * -(-seqlen // TILE) * dim * padded


def launch_forward(
    directions: list[dict], z: torch.Tensor | None, out: torch.Tensor, addend: torch.Tensor | None = None, *,
    delta_softplus: bool, scale: float, save: bool, cut: int | None = None,
) -> list[torch.Tensor]:  # fmt: skip
    """One scan, or both directions of a mixer, into `out` (B, L, E).

    Returns, if `save`, what `launch_backward` needs: boundary states per direction and, with a gate, the ungated sum.

    Args:
        directions: keyword arguments of `fill_direction` (boundaries excepted) for one or two directions; u, delta, B,
            C, z, out and addend have one dtype.
        cut: tiles per chunk of time; None chooses.
    """
    u, A, B = directions[0]["u"], directions[0]["A"], directions[0]["B"]
    batch, seqlen, dim = u.shape
    dstate, groups = A.shape[1], B.shape[2]
    args = ScanForwardArgs()
    if cut is None:
        blocks = library.query("vim_scan_forward_blocks", dim, groups, 2)
        cut = chunk_tiles(batch * blocks * 2 * len(directions), seqlen, multiprocessors(u.device))
    boundaries: list[torch.Tensor] = []
    alive: list[torch.Tensor | None] = []
    for direction, tensors in zip(args.direction, directions, strict=False):
        states = None
        if save or cut:
            floats = library.query("vim_scan_boundary_floats", batch, seqlen, dim, dstate)
            states = torch.empty(floats, dtype=torch.float32, device=u.device)
            boundaries.append(states)
        alive += fill_direction(direction, boundaries=states, **tensors)
    if cut:
        chunks = math.ceil(math.ceil(seqlen / TILE) / cut)
        steps = torch.empty(len(directions) * batch * chunks * dim, dtype=torch.float32, device=u.device)
        args.chunk_steps = address(steps)
    kept = list(boundaries) if save else []
    if save and z is not None:
        kept.append(torch.empty(u.shape, dtype=u.dtype, device=u.device))
        args.ungated = address(kept[-1])
    _set_strided(args, "z", z)
    _set_strided(args, "addend", addend)
    _set_strided(args, "out", out)
    args.batch, args.seqlen, args.dim, args.dstate, args.groups = batch, seqlen, dim, dstate, groups
    args.directions, args.type, args.softplus = len(directions), DTYPES[u.dtype], delta_softplus
    args.chunk_tiles, args.save, args.scale = cut, save, scale
    library.launch("vim_scan_forward", args, u)
    return kept


def launch_backward(
    directions: list[dict], grads: list[ScanGradients], z: torch.Tensor | None, dout: torch.Tensor,
    dz: torch.Tensor | None, saved: list[torch.Tensor], *, dlast_state: torch.Tensor | None = None,
    delta_softplus: bool, scale: float, cut: int | None = None,
) -> None:  # fmt: skip
    """Gradients of one scan, or of both directions of a mixer, written into the tensors of `grads` and into `dz`.

    Args:
        directions: keyword arguments of `fill_direction` (boundaries excepted) for each direction.
        grads: for each direction u and delta, contiguous (B, L, E); B and C (B, L, G, N), alike column slices of
            (B, L, ...) tensors; these in the inputs' one dtype; A, D, delta_bias and initial_state float32, contiguous,
            the last three None where they are not wanted.
        z, dout: (B, L, E) of that dtype, channels adjacent; z None without a gate.
        dz: where z's gradient goes, channels adjacent; None exactly if z is.
        saved: what `launch_forward` returned.
        dlast_state: gradient of the last state of a single direction.
        cut: tiles per chunk of time; None chooses.
    """
    u, A, B = directions[0]["u"], directions[0]["A"], directions[0]["B"]
    batch, seqlen, dim = u.shape
    dstate, groups, count = A.shape[1], B.shape[2], len(directions)
    if cut is None:
        blocks = batch * count * library.query("vim_scan_backward_blocks", dim, dstate, groups)
        cut = backward_chunk_tiles(blocks, seqlen, multiprocessors(u.device))
    args = ScanBackwardArgs()
    alive: list[torch.Tensor | None] = [plain(dlast_state)]
    args.direction[0].dlast_state = address(alive[0])
    for direction, tensors, boundaries, of_direction in zip(args.direction, directions, saved, grads, strict=False):
        alive += fill_direction(direction.inputs, boundaries=boundaries, **tensors)
        for name, t in of_direction._asdict().items():
            if name != "z":  # the directions share it
                setattr(direction, f"d{name}", address(t))
    args.dbc_token, args.dbc_group = grads[0].B.stride(1), grads[0].B.stride(2)
    floats = library.query("vim_scan_backward_workspace", batch, seqlen, dim, dstate, groups, count, cut)
    workspace = torch.empty(floats, dtype=torch.float32, device=u.device)
    args.workspace = address(workspace)
    if z is not None:
        args.ungated = address(saved[count])
    for name, t in (("z", z), ("dout", dout), ("dz", dz)):
        _set_strided(args, name, t)
    args.batch, args.seqlen, args.dim, args.dstate, args.groups = batch, seqlen, dim, dstate, groups
    args.directions, args.type, args.softplus = count, DTYPES[u.dtype], delta_softplus
    args.chunk_tiles, args.scale = cut, scale
    library.launch("vim_scan_backward", args, u)


_multiprocessor_counts: dict[torch.device, int] = {}


def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a CUDA device; 1 for a CPU."""
    if device not in _multiprocessor_counts:
        is_cuda = device.type == "cuda"
        count = torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 1
        _multiprocessor_counts[device] = count
    return _multiprocessor_counts[device]


def forward(
    u, delta, A, B, C, D, z, delta_bias, initial_state, *, delta_softplus, reverse, out_scale=1.0,
    out=None, accumulate=False, save=False,
):  # fmt: skip
    """`selective_scan_ref` under the signature that backends share; `saved` holds the state on entering each tile."""
    dtype = common_dtype(u, delta, B, C, z)
    in_place = out is not None and out.dtype is dtype and out.stride(-1) == 1
    result = out if in_place else torch.empty(u.shape, dtype=dtype, device=u.device)
    batch, _, dim = u.shape
    last_state = torch.empty(batch, dim, A.shape[1], dtype=torch.float32, device=u.device)
    if u.numel() == 0:
        last_state.copy_(initial_state) if initial_state is not None else last_state.zero_()
        return u.new_empty(u.shape) if out is None else out, last_state, []
    direction = {
        "u": as_rows(u, dtype), "delta": as_rows(delta, dtype), "A": A, "B": as_rows(B, dtype), "C": as_rows(C, dtype),
        "D": D, "delta_bias": delta_bias, "initial_state": initial_state, "last_state": last_state, "reverse": reverse,
    }  # fmt: skip
    saved = launch_forward(
        [direction], as_rows(z, dtype), result, as_rows(out, dtype) if accumulate else None,
        delta_softplus=delta_softplus, scale=out_scale, save=save,
    )  # fmt: skip
    if out is None:
        out = result.to(u.dtype)
    elif not in_place:
        out.copy_(result)
    return out, last_state, saved


def backward(
    dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, initial_state, saved, *, delta_softplus, reverse,
    out_scale=1.0, out=ScanGradients(), accumulate=False,
):  # fmt: skip
    """The gradients by name, each in its input's dtype.

    Args:
        out: `z` (B, L, E) with channel stride 1, in the inputs' one dtype.
        accumulate: add to `out.z` instead of overwriting it.
    """
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if u.numel() == 0:
        grads = [None if t is None else torch.zeros_like(t) for t in inputs]
        if initial_state is not None and dlast_state is not None:
            grads[8] = dlast_state.to(initial_state.dtype)
        return ScanGradients(*grads)
    dtype = common_dtype(u, delta, B, C, z)

    def empty(like: torch.Tensor | None, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        return None if like is None else torch.empty(like.shape, dtype=dtype, device=u.device)

    direction = {
        "u": as_rows(u, dtype), "delta": as_rows(delta, dtype), "A": A, "B": as_rows(B, dtype), "C": as_rows(C, dtype),
        "D": D, "delta_bias": delta_bias, "initial_state": None, "last_state": None, "reverse": reverse,
    }  # fmt: skip
    found = ScanGradients(
        u=empty(u, dtype), delta=empty(delta, dtype), A=empty(A), B=empty(B, dtype), C=empty(C, dtype), D=empty(D),
        z=empty(z, dtype) if out.z is None or accumulate else out.z, delta_bias=empty(delta_bias),
        initial_state=empty(initial_state),
    )  # fmt: skip
    launch_backward(
        [direction], [found], as_rows(z, dtype), as_rows(dout, dtype), found.z, saved, dlast_state=dlast_state,
        delta_softplus=delta_softplus, scale=out_scale,
    )  # fmt: skip
    if accumulate:
        found = found._replace(z=out.z.add_(found.z))
    return ScanGradients(*map(cast_like, found, inputs))
