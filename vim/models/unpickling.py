"""What a checkpoint's pickle may hold beside tensors and Python's plain types: data, built without running its code.

Each entry of `DATA_TYPES` stands in for the type that a file names. numpy's own constructors are not among them: they
trust the sizes and layouts that a pickle states.
"""

import argparse
import pickle
import re
from collections.abc import Callable
from math import prod
from pathlib import PurePath, PureWindowsPath
from typing import Any

import numpy as np


class _DType:
    """`numpy.dtype` of plain numbers and text."""

    def __init__(self, code: str, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[biufcSU]\d{1,6}", code):
            raise pickle.UnpicklingError(f"a numpy array of dtype {str(code)[:20]!r} is no plain value")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class Array(np.ndarray):
    """A numpy array that a checkpoint holds."""

    def __setstate__(self, state: tuple) -> None:
        version, shape, kind, fortran, data = state
        if not isinstance(data, bytes) or len(data) != prod(shape) * kind.dtype.itemsize:
            raise pickle.UnpicklingError(f"a numpy array of shape {str(shape)[:40]} has another number of bytes")
        super().__setstate__((version, shape, kind.dtype, fortran, data))


def _new_array(*_: Any) -> Array:
    return np.ndarray.__new__(Array, (0,))


def _scalar(kind: _DType, data: bytes) -> np.generic:
    return np.frombuffer(data, kind.dtype, count=1)[0]


def _empty_bytes() -> bytes:
    return b""


DATA_TYPES: list[type | tuple[Callable, str]] = [
    # Published files keep their command line in it.
    argparse.Namespace,
    # Empty `bytes`, which protocol 2 writes as a call.
    (_empty_bytes, "builtins.bytes"),
    (_DType, "numpy.dtype"),
    (Array, "numpy.ndarray"),
    *((_new_array, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")),
    *((_scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")),
    # The module's name differs between versions of Python.
    *((PurePath, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
      for name in ("Path", "PurePath", "PosixPath", "PurePosixPath")),
    *((PureWindowsPath, f"{module}.{name}") for module in ("pathlib", "pathlib._local")
      for name in ("WindowsPath", "PureWindowsPath")),
]  # fmt: skip
