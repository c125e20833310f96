"""Submit a training run to SLURM: `python scripts/slurm/submit.py pt-tiny --data /imagenet --output /runs/pt-tiny`.

The first argument names a recipe of vim/recipes; flags that this script does not know go to main.py. There is one task
per GPU. Before the time limit or a preemption SLURM sends a signal. The run then saves its state and stops; the job
requeues itself and continues from there.
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))


class Training:
    """One task of the job, pickled and run by submitit on a node.

    Args:
        argv: flags of main.py.
    """

    def __init__(self, argv: list[str]) -> None:
        self.argv = argv

    def __call__(self) -> dict[str, Any]:
        import submitit

        # RANK, LOCAL_RANK, WORLD_SIZE and the rest, as torchrun would set them.
        environment = submitit.helpers.TorchDistributedEnvironment().export(overwrite=True)
        sys.path.insert(0, str(ROOT))
        os.chdir(ROOT / "vim")
        from vim.engine.run import run, set_up_logging

        set_up_logging()
        record = run(self.argv)
        if record.get("stopped") and environment.rank == 0 and "SLURM_JOB_ID" in os.environ:
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        return record


def _at_least(least: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, got {text!r}")
        return int(text)

    return parse


def _hours(text: str) -> float:
    with suppress(ValueError):
        if 0 < float(text) < 24 * 365:
            return float(text)
    raise argparse.ArgumentTypeError(f"expected hours, above 0 and below a year, got {text!r}")


def build_parser() -> argparse.ArgumentParser:
    """Flags of the submission."""
    recipes = sorted(p.stem for p in (ROOT / "vim" / "recipes").glob("*.yaml"))
    parser = argparse.ArgumentParser(prog="submit.py", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("recipe", choices=recipes, help="of vim/recipes")
    parser.add_argument("--data", type=Path, default=None, help="folder of the data set")
    parser.add_argument("--output", type=Path, required=True, help="folder of the run; SLURM's logs go to its slurm/")
    parser.add_argument("--finetune", type=Path, default=None, help="checkpoint to start from, of ft- recipes")
    parser.add_argument("--nodes", type=_at_least(1), default=1, help="nodes")
    parser.add_argument(
        "--gpus-per-node", type=_at_least(0), default=8, help="GPUs, and tasks, of each; 0: one task on its CPU"
    )
    parser.add_argument("--tasks-per-node", type=_at_least(0), default=0, help="tasks of each node; 0: one per GPU")
    parser.add_argument("--cpus-per-task", type=_at_least(1), default=10, help="cores of each task")
    parser.add_argument("--hours", type=_hours, default=72.0, help="time limit; the run goes on in a next job")
    parser.add_argument(
        "--signal-s", type=_at_least(1), default=180, help="seconds before the limit at which to save and stop"
    )
    parser.add_argument("--partition", default=None, help="partition")
    parser.add_argument("--account", default=None, help="account")
    parser.add_argument("--constraint", default=None, help="kind of node")
    parser.add_argument(
        "--executor", default="slurm", choices=("slurm", "local"), help="local: on this machine, and wait"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the job and submit nothing")
    return parser


def command(args: argparse.Namespace, further: list[str]) -> list[str]:
    """Flags of main.py for the job."""
    argv = ["--config", f"recipes/{args.recipe}.yaml", "--output-dir", str(args.output.resolve()), "--resume", "auto"]
    if args.data is not None:
        argv += ["--data-path", str(args.data.resolve())]
    if args.finetune is not None:
        argv += ["--finetune", str(args.finetune.resolve())]
    return argv + further


def parameters(args: argparse.Namespace) -> dict[str, Any]:
    """What submitit requests from SLURM."""
    requested: dict[str, Any] = {
        "nodes": args.nodes,
        "tasks_per_node": args.tasks_per_node or max(args.gpus_per_node, 1),
        "timeout_min": max(1, round(60 * args.hours)),
    }
    if args.gpus_per_node:
        requested["gpus_per_node"] = args.gpus_per_node
    if args.executor == "slurm":
        requested |= {
            "name": args.output.name, "cpus_per_task": args.cpus_per_task, "slurm_signal_delay_s": args.signal_s,
            "slurm_partition": args.partition, "slurm_account": args.account, "slurm_constraint": args.constraint,
            "slurm_additional_parameters": {"requeue": True, "open-mode": "append"},
        }  # fmt: skip
    return {name: value for name, value in requested.items() if value is not None}


def submit(argv: list[str] | None) -> None:
    """Submit, or run on this machine with `--executor local`.

    Raises:
        UserError: flags of main.py that are wrong, no submitit or SLURM, or a job that SLURM or the machine refuses.
    """
    from vim.engine.arguments import parse_args
    from vim.errors import UserError

    args, further = build_parser().parse_known_args(argv)
    flags = command(args, further)
    here = os.getcwd()
    try:
        # A misspelt flag is better known now than when the job starts.
        os.chdir(ROOT / "vim")
        parse_args(flags)
    finally:
        os.chdir(here)
    requested = parameters(args)
    if args.dry_run:
        for name, value in requested.items():
            print(f"{name}={value}")
        print(shlex.join(["main.py", *flags]))
        return
    try:
        import submitit
    except ImportError as error:
        raise UserError("submitting needs submitit: pip install 'vision-mamba[slurm]'") from error
    folder = args.output / "slurm"
    kind = submitit.LocalExecutor if args.executor == "local" else submitit.AutoExecutor
    try:
        executor = kind(folder=str(folder)) if args.executor == "local" else kind(folder=str(folder), cluster="slurm")
    except RuntimeError as error:
        raise UserError(
            f"there is no SLURM here ({error}): submit from a login node, or pass --executor local"
        ) from error
    executor.update_parameters(**requested)
    try:
        job = executor.submit(Training(flags))
    except submitit.core.utils.FailedJobError as error:
        raise UserError(f"SLURM does not take the job: {str(error).strip().splitlines()[-1]}") from error
    print(f"job {job.job_id}: logs in {folder}")
    if args.executor == "local":
        try:
            records = job.results()
        except submitit.core.utils.FailedJobError as error:
            raise UserError(f"the run failed: {_last_error(str(error))}; its logs are in {folder}") from error
        print(records[0])


def _last_error(text: str) -> str:
    """The line of an exception in the output of a failed job, which ends with its traceback."""
    lines = [line.strip() for line in text.splitlines() if re.match(r"\w[\w.]*(Error|Exception|Interrupt)\b", line)]
    return lines[-1] if lines else text.strip().splitlines()[0]


def main(argv: list[str] | None = None) -> int:
    """Exit status: 0, or 2 after an error of the user or a fault of the machine."""
    from vim.errors import exit_status

    return exit_status(lambda: submit(argv))


if __name__ == "__main__":
    sys.exit(main())
