"""Runs of main.py as forks of one process that has imported everything: each costs no more than its own work.

Reads one JSON object a line: {"argv": flags, "log": file for standard error, "kill": null, {"point": n}, or {"after":
seconds}}. Answers with {"status": of the process, "seconds": it took, "points": passed}. Points are calls by which it
changes what lasts, or is about to.
"""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
import torch.utils.tensorboard

from vim.engine import run, training

POINTS = (
    (training, "_update"), (run, "evaluate"), (torch, "save"), (os, "replace"), (os, "fsync"), (os, "link"),
    (shutil, "copyfile"), (Path, "unlink"), (json, "dumps"),
)  # fmt: skip


def watch(counter, deadly):
    """Count the calls of `POINTS`; die before the deadly one, or in its middle if it writes a file."""

    def wrap(module, name):
        whole = getattr(module, name)

        def watched(*args, **kwargs):
            counter[0] += 1
            if counter[0] == deadly:
                if name in ("save", "copyfile"):
                    whole(*args, **kwargs)
                    os.truncate(args[1], os.path.getsize(args[1]) // 2)
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(*args, **kwargs)

        setattr(module, name, watched)

    for module, name in POINTS:
        wrap(module, name)


def child(order, report):
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    counter = [0]
    watch(counter, (order["kill"] or {}).get("point"))
    status = run.main(order["argv"])
    os.write(report, str(counter[0]).encode())
    return status


def main():
    torch.set_num_threads(1)
    for line in sys.stdin:
        order = json.loads(line)
        begun = time.monotonic()
        read, write = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(read)
            status = 70
            try:
                status = child(order, write)
            finally:
                os._exit(status)
        os.close(write)
        if after := (order["kill"] or {}).get("after"):
            time.sleep(after)
            os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        with os.fdopen(read) as file:
            points = int(file.read() or 0)
        answer = {"status": os.waitstatus_to_exitcode(status), "seconds": time.monotonic() - begun, "points": points}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
