"""Command lines of det/ and seg/: a config and flags in, mmengine's Runner out."""

import argparse
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vim.dense.stack import require_stack
from vim.errors import UserError

# Package and registry scope of each task.
TASKS = {"seg": "mmseg", "det": "mmdet"}


def run_main(main: Callable[[list[str] | None], Any], argv: list[str] | None = None) -> int:
    """Run a command line: 0, or 2 after a user's error, said in one sentence."""
    from vim.models.checkpoint import CheckpointError

    try:
        main(argv)
    except (UserError, CheckpointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser(description: str) -> argparse.ArgumentParser:
    from mmengine.config import DictAction

    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", help="config file, e.g. from configs/")
    parser.add_argument("--work-dir", help="folder for logs and checkpoints (default: output/<name of the config>)")
    parser.add_argument("--data-root", help="folder of the data set, in place of the config's")
    parser.add_argument("--launcher", choices=("none", "pytorch", "slurm", "mpi"), default="none")
    parser.add_argument("--local-rank", "--local_rank", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument(
        "--cfg-options", nargs="+", action=DictAction, metavar="KEY=VALUE", help="entries of the config to override"
    )
    return parser


def load_config(task: str, args: argparse.Namespace) -> Any:
    """The config of a command line, with the flags that all commands share put in.

    Raises:
        UserError: no such file, or not a config of the task.
    """
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    from vim.dense.checks import replace_types, set_data_root

    if not Path(args.config).is_file():
        raise UserError(f"there is no config at {args.config}: see {task}/configs/")
    try:
        cfg = Config.fromfile(args.config)
    except (SyntaxError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{args.config} is not a config that mmengine can read: {error}") from error
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    if "model" not in cfg:
        raise UserError(f"{args.config} has no `model`: expected a config such as those in {task}/configs/")
    init_default_scope(cfg.get("default_scope", TASKS[task]))
    if args.data_root:
        set_data_root(cfg, args.data_root)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("output") / Path(args.config).stem)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    if args.launcher == "none":
        # Outside a process group there is nothing to synchronise with, and on a CPU SyncBN cannot run.
        replace_types(cfg.model, "SyncBN", "BN")
    if not torch.cuda.is_available():
        cfg.env_cfg.dist_cfg.backend = "gloo"
    return cfg


def _use_amp(cfg: Any, dtype: str | None) -> None:
    if not torch.cuda.is_available():
        if dtype:
            raise UserError(f"--amp {dtype} needs a GPU: leave it out on a CPU")
        if cfg.optim_wrapper.get("type") == "AmpOptimWrapper":
            logging.getLogger("vision_mamba").warning("no GPU: training in float32 instead of mixed precision")
            cfg.optim_wrapper.type = "OptimWrapper"
            for name in ("dtype", "loss_scale"):
                cfg.optim_wrapper.pop(name, None)
        return
    if dtype:
        cfg.optim_wrapper.type = "AmpOptimWrapper"
        cfg.optim_wrapper.dtype = dtype
        # bfloat16 has the range of float32, so its gradients need no scaling.
        cfg.optim_wrapper.loss_scale = "dynamic" if dtype == "float16" else 1.0


def train(task: str, argv: list[str] | None = None) -> None:
    """Train as the flags say.

    Args:
        task: "seg" or "det".
        argv: flags; those of the process by default.

    Raises:
        UserError: see `load_config`, `vim.dense.checks.check_data`, `vim.dense.stack.require_stack`.
        CheckpointError: a backbone checkpoint that does not fit.
    """
    require_stack(TASKS[task])
    from mmengine.runner import Runner

    from vim.dense.checks import check_data

    parser = _parser(f"Train a {task} model with a Vim backbone on mmengine's Runner.")
    parser.add_argument("--finetune", metavar="CHECKPOINT", help="classification checkpoint to start the backbone from")
    parser.add_argument(
        "--resume", nargs="?", const="auto", metavar="CHECKPOINT",
        help="go on from a checkpoint of this trainer; alone: from the last one in the work folder",
    )  # fmt: skip
    parser.add_argument(
        "--amp", nargs="?", const="bfloat16", choices=("bfloat16", "float16"), help="mixed precision (bfloat16)"
    )
    parser.add_argument("--auto-scale-lr", action="store_true", help="scale the rate to the batch in use")
    parser.add_argument("--seed", type=int, help="of all random numbers")
    args = parser.parse_args(argv)
    cfg = load_config(task, args)
    _use_amp(cfg, args.amp)
    if args.seed is not None:
        cfg.randomness = {"seed": args.seed}
    if args.auto_scale_lr:
        if "auto_scale_lr" not in cfg:
            raise UserError(f"--auto-scale-lr needs auto_scale_lr.base_batch_size, which {args.config} does not set")
        cfg.auto_scale_lr.enable = True
    if args.finetune:
        cfg.model.backbone.init_cfg = {"type": "Pretrained", "checkpoint": args.finetune}
    check_data(cfg, ("train_dataloader", "val_dataloader"))
    if args.resume:
        cfg.resume = True
        cfg.load_from = None if args.resume == "auto" else _existing(args.resume, "--resume")
        if args.resume == "auto" and not (Path(cfg.work_dir) / "last_checkpoint").is_file():
            logging.getLogger("vision_mamba").warning("%s holds no checkpoint yet: starting afresh", cfg.work_dir)
    _runner(Runner, cfg).train()


def evaluate(task: str, argv: list[str] | None = None) -> dict[str, float]:
    """Evaluate as the flags say; gives the metrics.

    Args:
        task: "seg" or "det".
        argv: flags; those of the process by default.

    Raises:
        UserError: see `train`.
    """
    require_stack(TASKS[task])
    from mmengine.runner import Runner

    from vim.dense.checks import check_data

    parser = _parser(f"Evaluate a {task} model with a Vim backbone.")
    parser.add_argument("checkpoint", help="checkpoint that train.py wrote")
    parser.add_argument("--tta", action="store_true", help="several scales and mirror images")
    parser.add_argument("--show-dir", help="folder to draw the predictions into")
    args = parser.parse_args(argv)
    cfg = load_config(task, args)
    check_data(cfg, ("test_dataloader",))
    cfg.load_from = _existing(args.checkpoint, "the checkpoint")
    # The backbone's weights are in the checkpoint.
    cfg.model.backbone.init_cfg = None
    if args.show_dir:
        cfg.default_hooks.visualization.draw = True
        cfg.default_hooks.visualization.interval = 1
        cfg.visualizer.save_dir = args.show_dir
        if task == "det":
            cfg.default_hooks.visualization.test_out_dir = "predictions"
    if args.tta:
        if "tta_pipeline" not in cfg or "tta_model" not in cfg:
            raise UserError(f"--tta needs tta_pipeline and tta_model, which {args.config} does not set")
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.tta_model.module = cfg.model
        cfg.model = cfg.tta_model
    return _runner(Runner, cfg).test()


def _existing(path: str, what: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"{what} names {path}, where there is no file: give a checkpoint that train.py wrote")
    return path


def _runner(runner_class: Any, cfg: Any) -> Any:
    from mmengine.utils import import_modules_from_strings

    import_modules_from_strings(["vim.dense"])
    return runner_class.from_cfg(cfg)
