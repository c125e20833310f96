"""What a run inherits from a checkpoint: flags, model options, class names and weights."""

import logging
from typing import Any

import timm
from torch import nn

from vim.engine.arguments import known_flags, parse_args
from vim.errors import UserError
from vim.flags import FACTORY_PREFIXES, Flags, Model
from vim.models import CheckpointError, extract_state_dict, load_checkpoint, load_into
from vim.models.checkpoint import stored_grid
from vim.models.registry import check_tag

_logger = logging.getLogger("vision_mamba")

# Flags that belong to the machine or to one command, and are not taken from a checkpoint.
_OF_THE_COMMAND = (
    "config", "resume", "eval", "finetune", "output_dir", "device", "num_workers", "start_epoch", "local_rank", "fsdp",
    "distributed", "world_size", "dist_url", "per_class_csv", "class_index", "profile", "cuda_graphs",
)  # fmt: skip
# Where the data is. Behind a prefix of timm's these are more than names of local files: addresses, even commands.
_OF_THE_DATA = ("data_set", "data_path", "train_split", "eval_split")


def own_flags(checkpoint: dict[str, Any]) -> dict[str, Any] | None:
    """The flags of the run of this project that wrote a checkpoint, each of its type; None if another program wrote it.

    Raises:
        UserError: they are not valid flags of this project.
    """
    if "format_version" not in checkpoint:
        return None
    flags = checkpoint.get("args")
    if not isinstance(flags, dict):
        raise UserError(f"the checkpoint's args are a {type(flags).__name__}, expected a mapping of flags to values")
    return known_flags(flags, "the checkpoint's args")


def continue_flags(checkpoint: dict[str, Any], argv: list[str] | None) -> Flags:
    """The flags of the run that wrote the checkpoint, overridden by those of the command line.

    Raises:
        UserError: see `parse_args`; or the checkpoint alone names a data set that is more than a local folder.
    """
    saved = own_flags(checkpoint) or {}
    inherited = {name: value for name, value in saved.items() if name not in _OF_THE_COMMAND}
    named = saved.get("data_set", "")
    if named.startswith(FACTORY_PREFIXES) or parse_args(argv).data_set.startswith(FACTORY_PREFIXES):
        inherited = {name: value for name, value in inherited.items() if name not in _OF_THE_DATA}
    args = parse_args(argv, inherited)
    if named.startswith(FACTORY_PREFIXES) and not args.data_path:
        raise UserError(
            f"the checkpoint's data set is {named}, whose place a file may not choose: pass --data-set and --data-path"
        )
    _warn_of_other_model(saved, args)
    return args


def _warn_of_other_model(saved: dict[str, Any], args: Model) -> None:
    trained = saved.get("model", args.model), saved.get("model_kwargs", {})
    if trained != (args.model, args.model_kwargs):
        _logger.warning("the checkpoint is of %s %s, not of %s %s", *trained, args.model, args.model_kwargs)


def check_model_options(checkpoint: dict[str, Any], args: Model) -> None:
    """Compare the model options of the run that wrote the weights of `--finetune` with this run's.

    They change what a model computes without changing the shape of any weight.

    Raises:
        UserError: the run that wrote them set one that this command does not name.
    """
    saved = own_flags(checkpoint)
    if saved is None:
        return
    options = saved.get("model_kwargs", {})
    if unnamed := [f"{name}={value}" for name, value in options.items() if name not in args.model_kwargs]:
        raise UserError(
            f"the checkpoint was trained with --model-kwargs {' '.join(unnamed)}, which this command does not name: "
            "pass it too, or another value of it"
        )
    _warn_of_other_model(saved, args)


def class_names(checkpoint: dict[str, Any]) -> list[str] | None:
    """The names of a checkpoint's classes by number, if it has them."""
    names = checkpoint.get("classes")
    if isinstance(names, list | tuple) and names and all(isinstance(name, str) for name in names):
        return list(names)
    return None


def match_classes(checkpoint: dict[str, Any], data: Any, *, training: bool) -> list[int] | None:
    """The checkpoint's number of each class of a data set; None where both are the same or one has no names.

    Raises:
        UserError: the data has a class that is not in the checkpoint.
    """
    known, names = class_names(checkpoint), getattr(data, "classes", None)
    if known is None or names is None or known == list(names):
        return None
    numbers = {name: number for number, name in enumerate(known)}
    if unknown := [name for name in names if name not in numbers]:
        advice = (
            "--resume keeps the classes (--class-index is for evaluations), --finetune starts with new ones"
            if training
            else "pass --class-index FILE with the model's class number of each folder"
        )
        raise UserError(
            f"{len(unknown)} of the data's {len(names)} classes are none of the checkpoint's {len(known)} "
            f"({_some(unknown)}; it knows {_some(known)}): {advice}"
        )
    _logger.warning("the data has %d of the checkpoint's %d classes: matched by name", len(names), len(known))
    return [numbers[name] for name in names]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def read_weights(path: str) -> dict[str, Any]:
    """`load_checkpoint`, raising UserError."""
    try:
        return load_checkpoint(path)
    except CheckpointError as error:
        raise UserError(str(error)) from error


def load_weights(
    model: nn.Module,
    checkpoint: dict[str, Any],
    *,
    reset_head: bool = False,
    use_ema: bool = False,
    classes: list[str] | None = None,
) -> None:
    """`load_into`, raising UserError.

    Args:
        model: to load into.
        checkpoint: with the weights.
        reset_head: whether a head of another number of classes is left as it is, see `load_into`.
        use_ema: the averaged weights.
        classes: names of the model's classes, where the rows of the head are to be matched by name with the
            checkpoint's; where the names differ, the head stays as it is.

    Raises:
        UserError: weights that do not fit.
    """
    try:
        state = extract_state_dict(checkpoint, use_ema=use_ema)
        if classes is not None:
            _match_head(model, state, class_names(checkpoint), classes)
        load_into(model, state, reset_head=reset_head, grid=stored_grid(checkpoint))
    except CheckpointError as error:
        raise UserError(str(error)) from error


def _head_names(classifier: str | tuple[str, ...] | None) -> list[str]:
    """Names of the heads' parameters, of the `classifier` of a timm configuration."""
    heads = classifier or ()
    return [f"{head}.{kind}" for head in ((heads,) if isinstance(heads, str) else heads) for kind in ("weight", "bias")]


def _match_head(model: nn.Module, state: dict[str, Any], known: list[str] | None, classes: list[str]) -> None:
    own = model.state_dict()
    heads = [
        n
        for n in _head_names((getattr(model, "pretrained_cfg", None) or {}).get("classifier"))
        if n in own and n in state
    ]
    if known is None or known == classes or any(len(state[name]) != len(known) for name in heads):
        return
    numbers = {name: number for number, name in enumerate(known)}
    if all(name in numbers for name in classes):
        rows = [numbers[name] for name in classes]
        state.update({name: state[name][rows] for name in heads})
        _logger.warning("the data has %d of the checkpoint's %d classes: matched by name", len(classes), len(known))
    elif len(classes) == len(known):
        state.update({name: own[name] for name in heads})
        _logger.warning(
            "the data has other classes (%s) than the checkpoint (%s): the head starts afresh",
            _some(classes), _some(known),
        )  # fmt: skip


def known_config(name: str) -> Any:
    """timm's configuration of a model that it knows, None where it has none.

    Raises:
        UserError: the name ends with weights that the model has not.
    """
    try:
        check_tag(name)
    except ValueError as error:
        raise UserError(f"--model: {error}, and pass --finetune FILE to load weights") from error
    return timm.get_pretrained_cfg(name)


def head_size(args: Model, checkpoint: dict[str, Any]) -> int:
    """Number of classes of a checkpoint's head.

    Raises:
        UserError: its head cannot be found.
    """
    if args.num_classes:
        return args.num_classes
    cfg = known_config(args.model) if timm.is_model(args.model) else None
    state = extract_state_dict(checkpoint)
    size = next((len(state[name]) for name in _head_names(getattr(cfg, "classifier", None)) if name in state), 0)
    if not size:
        raise UserError(f"the head of {args.model} was not found in the checkpoint: pass --num-classes")
    return size
