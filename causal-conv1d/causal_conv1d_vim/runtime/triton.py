"""What the Triton backends share: whether Triton can run, the device of a launch, and a faster interpreter."""

import importlib
from types import ModuleType

import torch

from causal_conv1d_vim.runtime.backend import forced_backend
from causal_conv1d_vim.runtime.tensors import rows, unsupported_dtype

_probed: dict[tuple[str, int | None], str | None] = {}
_interpreting: bool | None = None


def interpreting() -> bool:
    """Whether TRITON_INTERPRET=1 was set when Triton was first imported here: kernels then run on CPU tensors."""
    global _interpreting
    if _interpreting is None:
        try:
            import triton
        except Exception:
            _interpreting = False
        else:
            _interpreting = bool(triton.knobs.runtime.interpret)
            if _interpreting:
                _vectorise_scans()
    return _interpreting


def why_not(x: torch.Tensor) -> str | None:
    """None if Triton kernels can run on x, else the reason. Cheap after the first call for a device."""
    if (reason := unsupported_dtype(x)) is not None:
        return reason
    if not x.is_cuda:
        if x.device.type == "cpu" and forced_backend() == "triton" and interpreting():
            return None
        return f"the tensors are on {x.device.type}, not on a CUDA or ROCm device (nor forced under TRITON_INTERPRET=1)"
    key = ("cuda", x.device.index)
    if key not in _probed:
        _probed[key] = _probe(x.device)
    return _probed[key]


def _probe(device: torch.device) -> str | None:
    """Compile and launch one small kernel: a missing compiler or driver shows now, not in the middle of a model."""
    try:
        kernel = importlib.import_module("causal_conv1d_vim.runtime.triton_kernels")
        out = torch.zeros(32, dtype=torch.float32, device=device)
        with torch.cuda.device(device):
            kernel.probe[(1,)](out, SIZE=32)
        if out.sum().item() != 32.0:
            return "a Triton kernel gave a wrong result on this device"
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    except Exception as error:
        return f"a Triton kernel cannot be built or launched: {str(error).splitlines()[0] if str(error) else error!r}"
    return None


def tokens(t: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """A (B, L, E) or (B, L, G, N) tensor as the kernels take it: with a contiguous last axis, and the other strides.

    They are spread over the kernel's arguments: passing tuples doubles the time that Triton takes to launch.
    """
    if t is None:
        return None, 0, 0
    t = rows(t)
    return t, *t.stride()[:-1]


def multiprocessors(x: torch.Tensor) -> int:
    """Multiprocessors (compute units) of x's device; 1 on a CPU."""
    return torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1


def guard(x: torch.Tensor):
    """Context in which launches go to x's device."""
    return torch.cuda.device(x.device) if x.is_cuda else torch.autograd.profiler.record_function("triton interpreter")


def _vectorise_scans() -> None:
    """Let the interpreter run a scan's combine function on whole slices: element by element it takes minutes.

    The order of combination along the axis is the interpreter's own, so the results are the same bit for bit.
    """
    interpreter: ModuleType = importlib.import_module("triton.runtime.interpreter")
    import numpy as np

    def generic_scan(self, inputs):
        axis = self.axis
        columns = [np.moveaxis(t.handle.data, axis, 0) for t in inputs]
        outputs = [np.empty_like(c) for c in columns]

        def tensors(arrays):
            return tuple(self.to_tensor(a, t.dtype) for a, t in zip(arrays, inputs, strict=True))

        for i in range(columns[0].shape[0]):
            values = [c[i] for c in columns]
            if i:
                left = tensors([o[i - 1] for o in outputs])
                combined = self.combine_fn.fn(*left, *tensors(values))
                combined = combined if isinstance(combined, tuple) else (combined,)
                values = [c.handle.data for c in combined]
            for o, v in zip(outputs, values, strict=True):
                o[i] = v
        return [
            self.to_tensor(np.ascontiguousarray(np.moveaxis(o, 0, axis)), t.dtype)
            for o, t in zip(outputs, inputs, strict=True)
        ]

    interpreter.ScanOps.generic_scan = generic_scan
