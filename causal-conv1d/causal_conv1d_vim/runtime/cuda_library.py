"""Finds and loads a package's CUDA library with ctypes: C functions on device pointers and a stream.

The library contains its own CUDA runtime, uses neither torch nor Python, and loads on machines without a GPU.
"""

import ctypes
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from causal_conv1d_vim.runtime.tensors import unsupported_dtype

int64, int32, float32, pointer = ctypes.c_int64, ctypes.c_int32, ctypes.c_float, ctypes.c_void_p


class CudaLibrary:
    """One package's CUDA library, loaded when first asked for.

    Args:
        paths: directories of the package (its `__path__`); the library lies in `_lib` under one of them.
        name: file name.
        launchers: names of functions `int f(const Args*, void* stream)`.
        queries: names of functions of integers that return an int64, with their argument types.
    """

    def __init__(self, paths: Sequence[str], name: str, launchers: Sequence[str], queries: Mapping[str, list]) -> None:
        self._paths, self._name = paths, name
        self._launchers, self._queries = launchers, queries
        self._library: ctypes.CDLL | None = None
        self._reason: str | None = None
        self._architectures: list[tuple[int, int]] = []
        self._checked: dict[int, str | None] = {}

    def _load(self) -> None:
        found = [p for path in self._paths if (p := Path(path) / "_lib" / self._name).is_file()]
        if not found:
            self._reason = (
                f"the CUDA library {self._name} was not built; install with nvcc on the PATH and a GPU or "
                "VIM_BUILD_CUDA=1"
            )
            return
        try:
            self.bind(ctypes.CDLL(str(found[0])))
        except (OSError, AttributeError) as error:
            self._reason = f"the CUDA library {found[0]} does not load: {error}"

    def bind(self, library: ctypes.CDLL) -> None:
        """Take the functions from a loaded library."""
        for name in self._launchers:
            function = getattr(library, name)
            function.restype, function.argtypes = ctypes.c_int, [pointer, pointer]
        for name, types in self._queries.items():
            function = getattr(library, name)
            function.restype, function.argtypes = int64, types
        library.vim_cuda_architectures.restype = ctypes.c_char_p
        numbers = [int(a) for a in library.vim_cuda_architectures().decode().split(";") if a]
        self._architectures = sorted((n // 10, n % 10) for n in numbers)
        self._library, self._reason, self._checked = library, None, {}

    def why_not(self, x: torch.Tensor) -> str | None:
        """None if this library can run on x's device and takes its dtype, else the reason."""
        if not x.is_cuda or torch.version.hip is not None:
            return f"the tensors are on {x.device.type if not x.is_cuda else 'a ROCm device'}, not on a CUDA device"
        if self._library is None and self._reason is None:
            self._load()
        if self._reason is not None:
            return self._reason
        index = x.device.index
        if index not in self._checked:
            self._checked[index] = self._why_not_device(torch.cuda.get_device_capability(index))
        return self._checked[index] or unsupported_dtype(x)

    def _why_not_device(self, capability: tuple[int, int]) -> str | None:
        """Machine code for X.Y runs on X.Z with Z >= Y; the newest is also included as PTX, for later GPUs."""
        newest = self._architectures[-1]
        if capability >= newest or any(capability[0] == a[0] and capability >= a for a in self._architectures):
            return None
        built = ", ".join(f"{major}.{minor}" for major, minor in self._architectures)
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the CUDA library was built for {built}"

    def _function(self, name: str):
        """A function of the library, which is loaded now if `why_not` has not done so."""
        if self._library is None:
            if self._reason is None:
                self._load()
            if self._reason is not None:
                raise RuntimeError(self._reason)
        return getattr(self._library, name)

    def query(self, name: str, *args: int) -> int:
        """Result of an integer function of the library.

        Raises:
            RuntimeError: the library is missing or does not load.
        """
        return self._function(name)(*args)

    def launch(self, name: str, args: ctypes.Structure, x: torch.Tensor) -> None:
        """Run a launcher on the current stream of x's device.

        Raises:
            RuntimeError: the launch failed (the message has CUDA's error number), or the library is missing.
        """
        if x.device.index == torch.cuda.current_device():
            status = self._run(name, args, torch.cuda.current_stream(x.device).cuda_stream)
        else:
            with torch.cuda.device(x.device):
                status = self._run(name, args, torch.cuda.current_stream(x.device).cuda_stream)
        self.check(name, status)

    def _run(self, name: str, args: ctypes.Structure, stream: int) -> int:
        return self._function(name)(ctypes.byref(args), stream)

    def check(self, name: str, status: int) -> None:
        """Raise if a launcher's status says that it failed."""
        if status == -1:
            raise RuntimeError(
                f"{name} does not support these sizes or strides; force another backend with VIM_BACKEND"
            )
        if status != 0:
            raise RuntimeError(f"{name} failed with CUDA error {status} (see cudaError_t)")
