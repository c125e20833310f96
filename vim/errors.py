"""Errors that the user can fix, and how command lines say them."""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from causal_conv1d_vim.runtime.backend import BackendError
from mamba_ssm_vim.utils.files import CheckpointError

# What shells expect of a process that Ctrl-C ended: 128 and the signal's number.
INTERRUPTED = 130


class UserError(Exception):
    """Something in the command, the data or a file is wrong. The message is one sentence: what was wrong, what was
    expected, how to fix it. Command lines print it and exit with status 2."""


# What command lines answer with one line: an environment variable may also force a backend that cannot run.
USER_ERRORS = (UserError, CheckpointError, BackendError)

_SHARED_MEMORY = re.compile(r"[Bb]us error|shared memory|</?torch_|/dev/shm|torch_shm")
_WORKER = re.compile(r"DataLoader worker \(pid(?:\(s\))? ([\d, ]+)\)(?: is killed by signal: ([\w ]+))?")
_NO_MEMORY = re.compile(r"CUDA out of memory|can't allocate memory|not enough memory|std::bad_alloc")


def fault_of_the_machine(error: BaseException) -> str:
    """The sentence for an error that the machine caused, such as a full disk or a killed process; "" for any other."""
    text = str(error)
    if isinstance(error, OSError | RuntimeError) and (worker := _WORKER.search(text)):
        which = f"the loader process {worker[1].strip()} {f'got the signal {worker[2]}' if worker[2] else 'died'}"
        if "Bus error" in text:
            return f"{which}, {_say_shared_memory()}"
        return f"{which}: memory may be short, so pass fewer --num_workers; --resume auto continues the run"
    if isinstance(error, OSError | RuntimeError) and _SHARED_MEMORY.search(text):
        return f"a tensor could not be shared between processes, {_say_shared_memory()}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and _NO_MEMORY.search(text)
    ):
        return (
            "memory ran out: pass a smaller --batch-size with more --grad-accum-steps, --grad-checkpointing, or fewer "
            f"--num_workers{f' ({_first_line(text)})' if text else ''}"
        )
    if isinstance(error, torch.distributed.DistError) or (
        isinstance(error, RuntimeError) and "Connection closed by peer" in text
    ):
        return f"another process of the run ended or cannot be reached ({_first_line(text)}): look at its message"
    if isinstance(error, OSError) and error.errno:
        what = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, str | bytes) else ""
        return f"{what}{error.strerror or os.strerror(error.errno)} (of the operating system)"
    return ""


def _say_shared_memory() -> str:
    return "shared memory (/dev/shm) is full: give a container more (docker run --shm-size 8g), or pass --num_workers 0"


def _first_line(text: str) -> str:
    return text.strip().splitlines()[0][:200] if text.strip() else ""


def exit_status(command: Callable[[], Any]) -> int:
    """Run a command line: 0; 2 after an error of the user or a fault of the machine; 130 after Ctrl-C.

    The last two are said in one line on standard error. Any other exception is a fault of the program and passes.
    """
    try:
        with _quiet_threads():
            command()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except USER_ERRORS as error:
        # A loader's worker passes its error on with its traceback before it.
        print(f"error: {str(error).rsplit('UserError: ', 1)[-1].strip()}", file=sys.stderr)
        return 2
    except Exception as error:
        if not (sentence := fault_of_the_machine(error)):
            raise
        print(f"error: {sentence}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _quiet_threads() -> Iterator[None]:
    """Inside, threads of libraries that cannot write a file print no traceback: their callers get the error too."""
    before = threading.excepthook

    def hook(args: Any) -> None:
        if not isinstance(args.exc_value, OSError):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
