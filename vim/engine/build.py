"""Builds model, teacher, optimizer and schedule from the flags."""

import difflib
from collections.abc import Callable
from functools import partial
from typing import Any

import timm
import torch
from timm.optim import create_optimizer_v2, param_groups_layer_decay, param_groups_weight_decay
from timm.utils import ModelEmaV3
from torch import nn

from vim.data.images import free_memory
from vim.engine.distributed import DistributedContext, replicate, shard
from vim.engine.inherited import known_config, load_weights, own_flags, read_weights
from vim.engine.losses import Criterion
from vim.engine.schedules import build_scheduler
from vim.engine.state import TrainState
from vim.engine.training import model_options
from vim.errors import UserError
from vim.flags import Flags, Model

# Arguments of models that flags set.
_FLAGS = {
    "num_classes": "--num-classes", "drop_rate": "--drop", "drop_path_rate": "--drop-path", "in_chans": "--in-chans",
    "img_size": "--input-size", "num_frames": "--num-frames",
}  # fmt: skip


def build_model(args: Model, num_classes: int, name: str = "", options: dict[str, Any] | None = None) -> nn.Module:
    """The model that `--model` names, with `--model-kwargs`; or `name`, with `options`.

    Raises:
        UserError: timm does not know it, or it cannot have that image size.
    """
    name, options = (name, options or {}) if name else (args.model, args.model_kwargs)
    if loading := [key for key in options if key.startswith(("pretrained", "cache_dir", "checkpoint_path"))]:
        raise UserError(f"--model-kwargs {loading[0]} loads weights: leave it out and pass --finetune FILE")
    if unfit := [key for key in options if key in ("device", "dtype", "features_only", "feature_cls", "out_indices")]:
        raise UserError(
            f"--model-kwargs {unfit[0]} is not for a classifier of main.py: leave it out (see also --device)"
        )
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3) or timm.list_models("vim_*")
        raise UserError(f"there is no model {name!r}: did you mean {', '.join(close)}?")
    cfg = known_config(name)
    # Models of any image size, such as convolutional ones, have no such argument.
    size = {"img_size": args.image_size} if cfg is not None and cfg.fixed_input_size else {}
    clip = {"num_frames": args.num_frames} if args.data_set == "CLIPS" else {}
    own = {
        "num_classes": num_classes, "drop_rate": args.drop, "drop_path_rate": args.drop_path, "in_chans": args.in_chans,
        **size, **clip,
    }  # fmt: skip
    if twice := [key for key in options if key in own]:
        raise UserError(f"--model-kwargs {twice[0]} has a flag of its own: pass {_FLAGS[twice[0]]}")
    create = partial(timm.create_model, name, **own, **options)
    try:
        # A checkpoint may ask for sizes that fit no memory.
        if (needed := _bytes_of(create)) > (free := free_memory()):
            raise ValueError(f"its weights take {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} are free")
        model = create()
    except (ValueError, AssertionError, MemoryError) as error:
        raise UserError(
            f"{name} cannot be built with --input-size {args.input_size} {_text(options)}: {error}"
        ) from error
    except RuntimeError as error:
        if "memory" not in str(error):
            raise
        raise UserError(f"{name} with {_text(options)} does not fit into memory: choose a smaller one") from error
    except TypeError as error:
        raise UserError(f"{name} cannot be built with {_text(options)}: {error}") from error
    if getattr(model, "num_frames", 0) and not clip:
        raise UserError(f"{name} takes clips, and --data-set {args.data_set} has images: pass --data-set CLIPS")
    return model


def _bytes_of(create: Callable[[], nn.Module]) -> int:
    """Memory that a model's weights will take; 0 for a model that cannot be built without data."""
    try:
        with torch.device("meta"):
            return sum(tensor.nbytes for tensor in create().state_dict().values())
    except (RuntimeError, NotImplementedError):
        return 0


def _text(options: dict[str, Any]) -> str:
    return f"--model-kwargs {' '.join(f'{k}={v}' for k, v in options.items())}" if options else "no --model-kwargs"


def build_training(model: nn.Module, args: Flags, context: DistributedContext) -> TrainState:
    """The state of a new run: optimizer, schedule, averaged weights, scaler, and the distributed model.

    Raises:
        UserError: flags that do not fit the model or each other.
    """
    model_options(args, model)
    if args.attn_only:
        _freeze_all_but_mixers(model, args)
    if args.grad_checkpointing:
        try:
            model.set_grad_checkpointing(True)
        except (AttributeError, AssertionError) as error:
            raise UserError(f"--grad-checkpointing: {args.model} cannot: {error or 'leave it out'}") from error
    ema = None
    if args.model_ema:
        # Copied from the whole model: the parameters of both are then sharded in the same way.
        ema = ModelEmaV3(
            model, decay=args.model_ema_decay, device=torch.device("cpu") if args.model_ema_force_cpu else None,
            foreach=not args.fsdp,
        )  # fmt: skip
    if args.fsdp:
        shard(model)
        if ema is not None:
            shard(ema.module)
    forward = model if args.fsdp else replicate(model, context)
    if args.compile:
        forward = torch.compile(forward)
    optimizer = _build_optimizer(model, args, context)
    scheduler = build_scheduler(optimizer, args)
    if args.start_epoch:
        scheduler.step(args.start_epoch - 1, 0.0)
    scaler = torch.amp.GradScaler(context.device.type) if args.if_amp and args.amp_dtype == "float16" else None
    return TrainState(model, forward, optimizer, scheduler, ema, scaler, epoch=args.start_epoch)


def build_criterion(args: Flags, context: DistributedContext, num_classes: int) -> Criterion:
    """The loss, with its teacher if there is one.

    Raises:
        UserError: flags that exclude each other, or a teacher that cannot be built.
    """
    if args.distillation_type == "none":
        return Criterion(args, num_classes)
    if not args.teacher_path:
        raise UserError(f"--distillation-type {args.distillation_type} needs --teacher-path, the teacher's checkpoint")
    weights = read_weights(args.teacher_path)
    saved = own_flags(weights) or {}
    options = saved.get("model_kwargs", {}) if saved.get("model") == args.teacher_model else {}
    teacher = build_model(args, num_classes, args.teacher_model, options)
    load_weights(teacher, weights)
    return Criterion(args, num_classes, teacher.to(context.device))


def _build_optimizer(model: nn.Module, args: Flags, context: DistributedContext) -> torch.optim.Optimizer:
    global_batch = args.batch_size * context.world_size * args.grad_accum_steps
    lr = args.lr if args.unscale_lr else args.lr * global_batch / 512
    skipped = set(model.no_weight_decay()) if hasattr(model, "no_weight_decay") else set()
    if args.no_a_log_decay:
        skipped |= {"*.A_log", "*.A_b_log"}
    if args.layer_decay is None:
        groups = param_groups_weight_decay(model, args.weight_decay, no_weight_decay_list=skipped)
    else:
        groups = param_groups_layer_decay(
            model, args.weight_decay, no_weight_decay_list=skipped, layer_decay=args.layer_decay
        )
    betas = {"betas": tuple(args.opt_betas)} if args.opt_betas else {}
    # One kernel for all parameters instead of a dozen for each; with shards, only these two optimizers have it.
    fused = {"fused": True} if args.opt.lower() in ("adam", "adamw") else {}
    try:
        return create_optimizer_v2(
            groups, opt=args.opt, lr=lr, weight_decay=0.0, momentum=args.momentum, eps=args.opt_eps, **betas, **fused
        )
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"--opt {args.opt} cannot be built: {error}") from error


def _freeze_all_but_mixers(model: nn.Module, args: Model) -> None:
    """`--attn-only`: train only mixers (DeiT's attention), the head and the embeddings."""
    kept = (".mixer.", ".attn.")
    if not any(part in name for name, _ in model.named_parameters() for part in kept):
        raise UserError(f"--attn-only trains mixers or attention alone, and {args.model} has neither: leave it out")
    trained = (*kept, "head.", "pos_embed", "cls_token")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(part in f".{name}" for part in trained))
