"""Command lines of det/ and seg/: a config and flags in, mmengine's Runner out."""

import argparse
import logging
import os
from pathlib import Path
from typing import Any

import torch

from vim.dense.stack import require_stack
from vim.errors import UserError

# Package and registry scope of each task.
TASKS = {"seg": "mmseg", "det": "mmdet"}


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


def read_config(
    task: str, path: str, *, options: dict[str, Any] | None = None, data_root: str | None = None, launcher: str = "none"
) -> Any:
    """A config of the task, its scope made the current one.

    Args:
        task: "seg" or "det".
        path: the file.
        options: entries to override, by dotted name.
        data_root: folder of the data sets, in place of the config's.
        launcher: how processes are started; "none" turns SyncBN into BN.

    Raises:
        UserError: no such file, or not a config of the task.
    """
    from mmengine.config import Config
    from mmengine.registry import init_default_scope

    from vim.dense.checks import replace_types, set_data_root

    if not Path(path).is_file():
        raise UserError(f"there is no config at {path}: see {task}/configs/")
    try:
        cfg = Config.fromfile(path)
    except (SyntaxError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{path} is not a config that mmengine can read: {error}") from error
    if options:
        cfg.merge_from_dict(options)
    scope = cfg.get("default_scope")
    if "model" not in cfg or scope != TASKS[task]:
        raise UserError(f"{path} is not a config for {task}: expected one such as those in {task}/configs/")
    init_default_scope(scope)
    if data_root:
        set_data_root(cfg, data_root)
    if launcher == "none":
        # Outside a process group there is nothing to synchronise with, and on a CPU SyncBN cannot run.
        replace_types(cfg.model, "SyncBN", "BN")
    return cfg


def check_weights(model: Any, path: str) -> dict[str, Any]:
    """Content of a checkpoint of train.py, if its weights are those of the model.

    mmengine itself would warn of other names and shapes, and continue with initial weights.

    Args:
        model: a built model, or its config.
        path: the file.

    Raises:
        CheckpointError: it cannot be read, or was written by another trainer.
        UserError: weights of another model, listed.
    """
    from mmengine.registry import MODELS

    from vim.models.checkpoint import load_checkpoint

    content = load_checkpoint(path)
    state = content.get("state_dict")
    if not isinstance(state, dict):
        raise UserError(f"{path} was not written by train.py (it has no state_dict): a classifier goes to --finetune")
    own = (MODELS.build(model) if isinstance(model, dict) else model).state_dict()
    other = [
        f"{name} {tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if own[name].shape != state[name].shape
    ]
    other += [f"{name} is missing" for name in own.keys() - state.keys()]
    other += [f"{name} is too many" for name in state.keys() - own.keys()]
    if other:
        raise UserError(
            f"{path} holds weights of another model than the config's ({len(other)} differences, such as "
            f"{min(other)}): give the config that it was trained with"
        )
    return content


def load_config(task: str, args: argparse.Namespace) -> Any:
    """The config of a command line, with the flags that all commands share put in.

    Raises:
        UserError: see `read_config`.
    """
    cfg = read_config(task, args.config, options=args.cfg_options, data_root=args.data_root, launcher=args.launcher)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get("work_dir") or str(Path("output") / Path(args.config).stem)
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
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
    from mmengine.runner import Runner, find_latest_checkpoint

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
        if args.resume == "auto" and not find_latest_checkpoint(cfg.work_dir):
            logging.getLogger("vision_mamba").warning("%s holds no checkpoint yet: starting afresh", cfg.work_dir)
    runner = _runner(Runner, cfg)
    checkpoint = find_latest_checkpoint(cfg.work_dir) if args.resume == "auto" else args.resume
    if checkpoint:
        check_weights(_bare(runner.model), checkpoint)
    runner.train()


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
    parser.add_argument("--tta", action="store_true", help="several scales and mirror images; in detection boxes alone")
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
        if task == "det":
            # mmdet merges boxes alone, and refuses predictions with masks.
            cfg.test_evaluator.metric = ["bbox"]
        cfg.tta_model.module = cfg.model
        cfg.model = cfg.tta_model
    runner = _runner(Runner, cfg)
    check_weights(_bare(_bare(runner.model)), cfg.load_from)
    if args.tta and task == "det":
        runner.load_or_resume()
        _bare(_bare(runner.model)).roi_head.mask_head = None
    return runner.test()


def _bare(model: Any) -> Any:
    """The model inside what distribution and test-time augmentation wrap around it."""
    return getattr(model, "module", model)


def _existing(path: str, what: str) -> str:
    if not Path(path).is_file():
        raise UserError(f"{what} names {path}, where there is no file: give a checkpoint that train.py wrote")
    return path


def _runner(runner_class: Any, cfg: Any) -> Any:
    from mmengine.utils import import_modules_from_strings

    import_modules_from_strings("vim.dense.register")
    return runner_class.from_cfg(cfg)
