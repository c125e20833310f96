"""Environment variables: numbers that launchers set, and the choice of kernels."""

import importlib
import os

from causal_conv1d_vim.runtime.backend import forced_backend

from vim.errors import UserError


def number(name: str, default: int, low: int, high: int) -> int:
    """The whole number in an environment variable, `default` where it is not set or empty.

    Raises:
        UserError: it is no whole number in [low, high].
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    try:
        value = int(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise UserError(
            f"the environment variable {name} is {text[:40]!r}, expected a whole number from {low} to {high:,}: "
            "launchers such as torchrun set it, unset it to run a single process"
        )
    return value


def check_kernels(device: str) -> None:
    """Raise what the operators would, but before there is any output.

    Args:
        device: type of the device that the model will run on.

    Raises:
        BackendError: VIM_BACKEND or VIM_CPU_ISA asks for what there is not.
    """
    forced_backend()
    if device == "cpu":
        importlib.import_module("mamba_ssm_vim.cpu_library")
