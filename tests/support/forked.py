"""Command lines as processes of their own that need not import torch again.

A server process imports the modules of `PRELOAD` once; each command is a fork of it that runs a script or a piece of
code as `python` would: with its arguments, folder and environment, its output in files, an exit status, and a process
id that takes signals. What a command changes dies with it.
"""

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.connection import wait
from pathlib import Path

PRELOAD = ["vim.engine.run", "vim.engine.trackers", "torch.distributed.tensor", "torch.utils.tensorboard"]

_context = multiprocessing.get_context("forkserver")


def preload(*modules: str) -> None:
    """Import these too before the first command."""
    PRELOAD.extend(modules)
    _context.set_forkserver_preload(PRELOAD)


preload()


def _run(command: Sequence[str], cwd: str, env: Mapping[str, str], out: str, err: str) -> None:
    """In the fork: become `python *command`."""
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for path, descriptor in ((out, 1), (err, 2)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
        os.close(file)
    multiprocessing.set_start_method(None, force=True)  # a fork server's children would take it for theirs
    import torch

    # OpenMP has read its variable before the fork.
    if "OMP_NUM_THREADS" in env:
        torch.set_num_threads(int(env["OMP_NUM_THREADS"]))
    try:
        if command[0] == "-c":
            sys.argv, sys.path[0] = ["-c", *command[2:]], ""
            exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
        else:
            sys.argv, sys.path[0] = list(command), str(Path(command[0]).resolve().parent)
            runpy.run_path(command[0], run_name="__main__")
    finally:
        # A fork of multiprocessing leaves these out.
        atexit._run_exitfuncs()


class Forked:
    """`python *command`, started; the part of `subprocess.Popen` that tests use."""

    def __init__(self, *command: object, cwd: Path, env: Mapping[str, str]) -> None:
        self.args = [str(part) for part in command]
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self._files = [str(Path(self._folder.name, name)) for name in ("out", "err")]
        self._process = _context.Process(target=_run, args=(self.args, str(cwd), dict(env), *self._files))
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    returncode = property(poll)

    def send_signal(self, signum: int) -> None:
        os.kill(self.pid, signum)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Standard output and error, once the process has ended; a process that takes longer is killed."""
        if not wait([self._process.sentinel], timeout):
            self.send_signal(signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.args, timeout)
        self._process.join()
        out, err = (Path(file).read_text() if Path(file).exists() else "" for file in self._files)
        return out, err


def run(*command: object, cwd: Path, env: Mapping[str, str], timeout: float = 300) -> subprocess.CompletedProcess:
    """`subprocess.run` of `python *command`, with text captured."""
    process = Forked(*command, cwd=cwd, env=env)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
