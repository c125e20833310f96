"""Finds and loads a package's compiled CPU library, and says why if it cannot.

The libraries have a C interface: one function per kernel, taking a pointer to one struct of eight-byte fields. Packing
those fields into a `bytes` object and passing that is the cheapest call that Python can make without a build against
its headers, and safe from several threads because every call has its own struct.
"""

import ctypes
import functools
import logging
import os
import platform
import re
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from causal_conv1d_vim.runtime.backend import BackendError
from causal_conv1d_vim.runtime.tensors import unsupported_dtype

INSTRUCTION_SETS = ("baseline", "avx2", "avx512")

# Parameters of glibc's mallopt, and the values set by `_keep_freed_memory`.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_KEPT_BYTES, _LARGEST_KEPT_BLOCK = 1 << 30, 32 << 20

_logger = logging.getLogger("vision_mamba")
# File names by sys.platform: on Windows GCC and clang write the prefix, Microsoft's compiler does not.
_FILE_NAMES = {"win32": ("lib{}.dll", "{}.dll"), "darwin": ("lib{}.dylib", "lib{}.so")}
MISSING = (
    "the native CPU library was not built; install again with a C++ compiler, "
    "or run scripts/build_native.sh in the source tree"
)


def find(name: str, package_path: Iterable[str]) -> Path | None:
    """The file of a compiled library in the `_lib` folder of a package, or None."""
    names = [form.format(name) for form in _FILE_NAMES.get(sys.platform, ("lib{}.so",))]
    files = (Path(entry) / "_lib" / file for entry in package_path for file in names)
    return next((file for file in files if file.exists()), None)


class Arguments:
    """A struct of the C interface: the names of its eight-byte fields in the order of the header, and how to pack them.

    Args:
        fields: names separated by spaces; `name:double` is a floating-point number, `name:tokens` the four fields of a
            `Tokens` (common/tokens.h), all others are integers or addresses.
        base: the struct with which this one starts.

    Attributes:
        fields: the name of every eight-byte field; those of `Tokens` as `name.data`, `name.dtype` and so on.
        pack: the fields' values, without those of `base`, to bytes.
        size: bytes, `base` included.
    """

    TOKENS = ("data", "dtype", "batch_stride", "token_stride")

    def __init__(self, fields: str, base: "Arguments | None" = None) -> None:
        own: list[str] = []
        codes = "="
        for field in fields.split():
            name, _, kind = field.partition(":")
            own += [f"{name}.{part}" for part in self.TOKENS] if kind == "tokens" else [name]
            codes += {"": "q", "double": "d", "tokens": "4q"}[kind]
        layout = struct.Struct(codes)
        self.fields = (*(base.fields if base else ()), *own)
        self.size = (base.size if base else 0) + layout.size
        self.pack = layout.pack


class Library:
    """A loaded library, or the reason why there is none.

    Attributes:
        reason: None, or why the library cannot be used, in one clause.
        instruction_set: the one that runs here: "baseline", "avx2" or "avx512"; "" without a library.

    Raises:
        BackendError: VIM_CPU_ISA forces an instruction set that is unknown or that this machine lacks.
    """

    def __init__(self, name: str, package_path: Iterable[str]) -> None:
        self.reason: str | None = None
        self.instruction_set = ""
        self._library: ctypes.CDLL | None = None
        file = find(name, package_path)
        if file is None:
            self.reason = MISSING
            _logger.warning("%s: %s; the slow reference backend serves on CPUs", name, self.reason)
            return
        try:
            library = ctypes.CDLL(str(file))
        except OSError as error:
            self.reason = f"the native CPU library does not load: {error}"
            _logger.warning("%s: %s; the slow reference backend serves on CPUs", name, self.reason)
            return
        library.vim_isa.restype = ctypes.c_int64
        chosen = library.vim_isa()
        if chosen < 0:
            wanted = os.environ.get("VIM_CPU_ISA")
            problem = "this machine does not have it" if chosen == -1 else "it is none of baseline, avx2, avx512"
            raise BackendError(f"VIM_CPU_ISA is {wanted!r}, but {problem}; unset it to choose automatically")
        self.instruction_set = INSTRUCTION_SETS[chosen]
        if (parallel := _gomp_parallel()) is not None:
            library.vim_use_openmp.argtypes = [ctypes.c_void_p]
            library.vim_use_openmp.restype = None
            library.vim_use_openmp(parallel)
        self._library = library
        _keep_freed_memory()

    def function(self, name: str, arguments: Arguments) -> Callable[[bytes], None]:
        """The C function `name`, to be called with the bytes of its argument struct.

        Without a library calls raise its reason.

        Raises:
            BackendError: the library was compiled from sources of another version: it lacks the function, or its struct
                of arguments has another size.
        """
        if self._library is None:
            reason = self.reason

            def unavailable(_: bytes) -> None:
                raise RuntimeError(reason)

            return unavailable
        try:
            function, size = getattr(self._library, name), getattr(self._library, f"{name}_size")
        except AttributeError:
            raise BackendError(self._other_sources(f"lacks {name}")) from None
        size.restype = ctypes.c_int64
        if size() != arguments.size:
            problem = f"takes {size()} bytes of arguments in {name} instead of {arguments.size}"
            raise BackendError(self._other_sources(problem))
        function.argtypes = [ctypes.c_char_p]
        function.restype = None
        return function

    def _other_sources(self, problem: str) -> str:
        return (
            f"the native CPU library {self._library._name} {problem}: it was compiled from other sources than these; "
            "install again (pip install -e ., or scripts/build_native.sh)"
        )


@functools.cache
def _keep_freed_memory() -> None:
    """Let glibc's malloc keep up to 1 GiB of freed memory instead of giving it back to the kernel.

    Torch allocates each CPU tensor anew. By default, blocks of some MiB return to the kernel when freed, and the next
    layer faults the same pages in again: up to a sixth of a model's time. VIM_KEEP_MEMORY=0 leaves malloc alone, and so
    does any setting of its own in the environment.
    """
    own = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")
    if os.environ.get("VIM_KEEP_MEMORY") == "0" or any(name in os.environ for name in own):
        return
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BLOCK)
        libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


@functools.cache
def _gomp_parallel() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that torch runs on, or None; loads nothing new.

    libgomp, and LLVM's and Intel's runtimes on Linux, all export it. Wheels rename their copy, so it is looked up among
    the libraries that the process has mapped, torch's own before any other.
    """
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = {line.split(maxsplit=5)[5] for line in maps.splitlines() if len(line.split(maxsplit=5)) == 6}
    runtimes = [p for p in paths if re.match(r"lib(gomp|omp|iomp5)\b", Path(p).name)]
    torch_root = str(Path(torch.__file__).parent)
    for path in sorted(runtimes, key=lambda p: (not p.startswith(torch_root), p)):
        try:
            return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p).value
        except (OSError, AttributeError):
            continue
    return None


def why_not(library: Library, *tensors: torch.Tensor | None) -> str | None:
    """Why the library cannot serve these tensors, or None. The first tensor decides the dtype of the call."""
    if library.reason is not None:
        return library.reason
    for t in tensors:
        if t is not None and not t.is_cpu:
            return f"a tensor is on {t.device.type}"
    return unsupported_dtype(tensors[0])
