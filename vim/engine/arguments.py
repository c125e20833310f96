"""The command line: published flags with their names and defaults, then the project's own."""

import argparse
import re
import reprlib
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml
from timm.utils import ParseKwargs

from vim.data import BAD_IMAGE, DATA_SETS, FACTORY_PREFIXES, INAT_CATEGORIES, MAX_IMAGE_PIXELS
from vim.engine.trackers import TRACKERS, check_trackers
from vim.errors import UserError

_LARGEST_CONFIG = 256 * 1024


class _Parser(argparse.ArgumentParser):
    """A parser that takes every flag with `-` or `_` between words, and nothing abbreviated."""

    def __init__(self) -> None:
        super().__init__(
            prog="main.py",
            description="Train, fine-tune and evaluate Vision Mamba image classifiers.",
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
            allow_abbrev=False,
        )

    def add_argument(self, *names: str, **kwargs: Any) -> argparse.Action:
        spellings = []
        for name in names:
            word = name.removeprefix("--")
            spellings += [name]
            if word != name:
                spellings += ["--" + word.replace("-", "_"), "--" + word.replace("_", "-")]
        return super().add_argument(*dict.fromkeys(spellings), **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help for the flags")


class _NoAmp(argparse.Action):
    """`--no_amp`: undoes `--if_amp` and `--amp-dtype` before it, such as a recipe's."""

    def __init__(self, option_strings: list[str], dest: str, **kwargs: Any) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, **kwargs)

    def __call__(self, parser: Any, namespace: argparse.Namespace, *_: Any) -> None:
        namespace.if_amp, namespace.amp_dtype = False, None


class _ModelKwargs(ParseKwargs):
    """`--model-kwargs stride=8 depth=12`."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        if bad := [value for value in values if "=" not in value]:
            parser.error(f"--model-kwargs has {bad[0]!r}, expected KEY=VALUE")
        super().__call__(parser, namespace, values, option_string)


def build_parser() -> argparse.ArgumentParser:
    """Parser of `main.py`; its defaults are the published ones."""
    parser = _Parser()
    flag = parser.add_argument

    def switch(dest: str, on: str | None, off: str | None, default: bool, help: str) -> None:
        if on:
            flag(on, dest=dest, action="store_true", default=default, help=help)
        if off:
            flag(off, dest=dest, action="store_false", default=default, help=argparse.SUPPRESS if on else help)

    flag("--config", default=None, metavar="FILE", help="YAML file of flags; the command line overrides it")
    # Run
    flag("--model", default="deit_base_patch16_224", help="name of a model registered with timm")
    flag("--batch-size", type=int, default=64, help="images per process and step")
    flag("--epochs", type=int, default=300, help="epochs")
    flag("--output_dir", default="", help="folder for checkpoints, logs and the resolved configuration")
    flag("--device", default="cuda", help="cuda or cpu; the CPU serves where there is no GPU")
    flag("--seed", type=int, default=0, help="seed of everything random")
    flag("--pretrain", default="none", choices=("none", "arm", "masked"), help="pretrain --model without labels")
    flag("--decoder-dim", type=int, default=512, help="width of the decoder of --pretrain arm, a multiple of 64")
    flag("--resume", default="", help="checkpoint to continue or to evaluate; auto: the last in --output-dir")
    flag("--finetune", default="", help="checkpoint whose weights to start from; another image or head size is fine")
    flag("--start_epoch", type=int, default=0, help="first epoch, counted from 0; --resume sets it")
    switch("eval", "--eval", None, False, "evaluate and stop")
    # Data
    readers = ", ".join(FACTORY_PREFIXES)
    flag("--data-set", default="IMNET", help=f"{', '.join(DATA_SETS)}, or a name behind a prefix of timm's: {readers}")
    flag("--data-path", default="", help="folder of the data set; FMNIST needs none")
    flag("--train-split", default="train", help="training split of a data set with a prefix")
    flag("--eval-split", default="validation", help="its evaluation split")
    flag("--inat-category", default="name", choices=INAT_CATEGORIES, help="level of iNaturalist's labels")
    flag("--num-classes", type=int, default=0, help="classes, for data sets that do not say")
    flag("--on-bad-image", default="stop", choices=BAD_IMAGE, help="what an image does that cannot be read")
    flag("--max-image-pixels", type=int, default=MAX_IMAGE_PIXELS, help="images of more pixels count as unreadable")
    switch("cache", "--cache", None, False, "keep the decoded images in memory, for sets that fit")
    flag("--num-frames", type=int, default=8, help="frames of a clip of --data-set CLIPS")
    flag("--input-size", type=int, default=224, help="side of the image in pixels")
    flag("--in-chans", type=int, default=3, choices=(1, 3), help="1 for grey images, 3 for colour")
    flag("--num_workers", type=int, default=10, help="loader processes")
    switch("pin_mem", "--pin-mem", "--no-pin-mem", True, "pin host memory for the GPU")
    flag("--eval-crop-ratio", type=float, default=0.875, help="part of the resized image's side that is evaluated")
    switch("dist_eval", "--dist-eval", None, False, "accepted; evaluation is always shared out, exactly")
    # Augmentation
    flag("--color-jitter", type=float, default=0.3, help="strength; RandAugment replaces it")
    flag("--aa", default="rand-m9-mstd0.5-inc1", help="AutoAugment policy, or none")
    flag("--smoothing", type=float, default=0.1, help="label smoothing")
    flag("--train-interpolation", default="bicubic", choices=("random", "bilinear", "bicubic"), help="of crops")
    switch("repeated_aug", "--repeated-aug", "--no-repeated-aug", True, "three augmented copies of a third of the set")
    switch("train_mode", "--train-mode", "--no-train-mode", True, "training transforms and layers")
    switch("ThreeAugment", "--ThreeAugment", None, False, "DeiT III's augmentation")
    switch("src", "--src", None, False, "simple random crop for --ThreeAugment")
    flag("--reprob", type=float, default=0.25, help="probability of random erasing")
    flag("--remode", default="pixel", choices=("const", "rand", "pixel"), help="fill of random erasing")
    flag("--recount", type=int, default=1, help="boxes of random erasing")
    switch("resplit", "--resplit", None, False, "refused: the recipe has no augmentation splits to spare from erasing")
    flag("--mixup", type=float, default=0.8, help="mixup alpha, 0 for none")
    flag("--cutmix", type=float, default=1.0, help="cutmix alpha, 0 for none")
    flag("--cutmix-minmax", type=float, nargs="+", default=None, help="range of cutmix's ratio, in place of alpha")
    flag("--mixup-prob", type=float, default=1.0, help="probability of mixing a batch")
    flag("--mixup-switch-prob", type=float, default=0.5, help="probability of cutmix where both are on")
    flag("--mixup-mode", default="batch", choices=("batch", "pair", "elem"), help="what shares one ratio")
    # Model
    flag("--model-kwargs", nargs="+", default={}, action=_ModelKwargs, metavar="KEY=VALUE", help="of its constructor")
    flag("--drop", type=float, default=0.0, help="dropout")
    flag("--drop-path", type=float, default=0.1, help="stochastic depth")
    switch("model_ema", "--model-ema", "--no-model-ema", True, "keep an average of the weights")
    flag("--model-ema-decay", type=float, default=0.99996, help="of the average, per step")
    switch("model_ema_force_cpu", "--model-ema-force-cpu", None, False, "keep the average on the CPU")
    switch("if_random_cls_token_position", "--if_random_cls_token_position", "--no_random_cls_token_position", False,
           "class token at a random place")  # fmt: skip
    switch("if_random_token_rank", "--if_random_token_rank", "--no_random_token_rank", False, "shuffle the tokens")
    switch("attn_only", "--attn-only", None, False, "train the mixers, the head and the embeddings alone")
    # Loss and optimisation
    switch("bce_loss", "--bce-loss", None, False, "binary cross-entropy over the classes")
    switch("cosub", "--cosub", None, False, "co-train two sub-models that drop other layers (implies BCE)")
    flag("--teacher-model", default="regnety_160", help="timm model to distil from")
    flag("--teacher-path", default="", help="its checkpoint")
    flag("--distillation-type", default="none", choices=("none", "soft", "hard"), help="what the teacher teaches")
    flag("--distillation-alpha", type=float, default=0.5, help="weight of the teacher's loss")
    flag("--distillation-tau", type=float, default=1.0, help="temperature of soft distillation")
    flag("--opt", default="adamw", help="timm optimizer")
    flag("--opt-eps", type=float, default=1e-8, help="its epsilon")
    flag("--opt-betas", type=float, nargs="+", default=None, help="its betas; the optimizer's own by default")
    flag("--momentum", type=float, default=0.9, help="of SGD")
    flag("--weight-decay", type=float, default=0.05, help="of matrices; vectors and embeddings have none")
    switch(
        "no_a_log_decay",
        "--no-a-log-decay",
        None,
        False,
        "no weight decay for A_log and A_b_log; published runs have it",
    )
    flag("--layer-decay", type=float, default=None, help="factor of the learning rate from each block to the one below")
    flag("--clip-grad", type=float, default=None, help="bound of --clip-mode; none by default")
    flag("--clip-mode", default="norm", choices=("norm", "value", "agc"), help="what --clip-grad bounds")
    flag("--grad-accum-steps", type=int, default=1, help="batches per update of the weights")
    switch("unscale_lr", "--unscale-lr", None, False, "do not scale lr by images per update / 512")
    flag("--lr", type=float, default=5e-4, help="learning rate per 512 images")
    flag(
        "--sched",
        default="cosine",
        choices=("cosine", "tanh", "step", "multistep", "plateau", "poly", "constant"),
        help="timm schedule",
    )
    flag("--lr-noise", type=float, nargs="+", default=None, help="span of the run with a noisy lr, in parts of it")
    flag("--lr-noise-pct", type=float, default=0.67, help="bound of the noise")
    flag("--lr-noise-std", type=float, default=1.0, help="its deviation")
    flag("--warmup-lr", type=float, default=1e-6, help="lr at the start of warm-up")
    flag("--min-lr", type=float, default=1e-5, help="lr at the end of the cosine")
    flag("--decay-epochs", type=float, default=30, help="period of the step schedule")
    flag("--decay-milestones", type=int, nargs="+", default=[90, 180, 270], help="epochs of multistep's drops")
    flag("--warmup-epochs", type=int, default=5, help="epochs of warm-up, inside the schedule")
    flag("--cooldown-epochs", type=int, default=10, help="epochs of rest after a drop, of plateau")
    flag("--patience-epochs", type=int, default=10, help="of the plateau schedule")
    flag("--decay-rate", "--dr", type=float, default=0.1, help="of step schedules")
    switch("if_amp", "--if_amp", None, False, "autocast")
    flag("--no_amp", action=_NoAmp, help="float32 throughout")
    flag("--amp-dtype", default=None, choices=("bfloat16", "float16"), help="of autocast, turns it on; else bfloat16")
    switch("compile", "--compile", None, False, "torch.compile the model")
    switch("grad_checkpointing", "--grad-checkpointing", None, False, "recompute each block in the backward pass")
    switch("if_continue_inf", "--if_continue_inf", "--no_continue_inf", False,
           "skip and count steps whose loss is not finite, rather than stop")  # fmt: skip
    switch("if_nan2num", "--if_nan2num", "--no_nan2num", False, "replace NaN and infinity in the model's output")
    # Distributed; torchrun sets the environment that processes find each other by
    switch("distributed", "--distributed", None, False, "insist on a launcher's environment")
    flag("--world_size", type=int, default=1, help="processes, to be checked against the launcher's")
    flag("--dist_url", default="env://", help="where processes meet")
    flag("--local-rank", type=int, default=0, help="GPU of this process, where the launcher does not say LOCAL_RANK")
    switch("fsdp", "--fsdp", None, False, "shard parameters, gradients and optimizer over the processes (FSDP2)")
    # Evaluation, checkpoints and log
    flag("--per-class-csv", default="", metavar="FILE", help="with --eval: accuracy of each class")
    flag("--class-index", default="", metavar="FILE", help="with --eval: the model's class number of each class folder")
    flag("--checkpoint-interval", default="", help="between checkpoints inside an epoch: 500 (steps) or 10min")
    flag("--print-every-steps", type=int, default=50, help="steps between lines of the log")
    flag("--trackers", nargs="+", default=["tensorboard"], choices=TRACKERS, help="where figures go beside log.txt")
    flag("--project", default="vision-mamba", help="project of Weights & Biases, experiment of MLflow")
    switch("histograms", "--histograms", None, False, "weights and gradients of each epoch to the trackers")
    flag("--keep-every-epochs", type=int, default=0, help="also keep the checkpoint of every N-th epoch")
    return parser


def parse_interval(text: str) -> tuple[int, float]:
    """`--checkpoint-interval` → (steps, seconds), the one not asked for 0: "500" or "500steps", "10min".

    Raises:
        UserError: neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(steps?|m|min|minutes?)?", text)
    if not text:
        return 0, 0.0
    if match is None or float(match[1]) <= 0:
        raise UserError(f"--checkpoint-interval is {text!r}, expected steps as in 500 or 500steps, or minutes as 10min")
    if (match[2] or "steps").startswith("m"):
        return 0, 60 * float(match[1])
    return int(float(match[1])), 0.0


def _flags_of(config: Path, parser: argparse.ArgumentParser) -> dict[str, Any]:
    """The flags of a YAML file by destination, each with a value that its flag takes.

    Raises:
        UserError: the file cannot be read, or has an unknown flag or a value of another kind.
    """
    try:
        if config.stat().st_size > _LARGEST_CONFIG:
            raise UserError(f"--config {config} has more than {_LARGEST_CONFIG // 1024} KiB, which no recipe needs")
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"--config {config} is not in UTF-8: save it in that encoding ({error.reason})") from error
    except RecursionError as error:
        raise UserError(f"--config {config} is nested too deeply for a mapping of flags to values") from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"--config {config} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {config} must hold one mapping of flags to values")
    flags = {str(k).replace("-", "_"): v for k, v in content.items()}
    if unknown := sorted(set(flags) - set(_actions(parser))):
        raise UserError(f"--config {config} has unknown flags: {', '.join(unknown)}")
    return _checked_flags(flags, f"--config {config}", parser)


def known_flags(flags: dict[str, Any], source: str) -> dict[str, Any]:
    """Flags by destination, each with a value that its flag takes; without those that this version does not know.

    Args:
        flags: of a run, such as a checkpoint holds.
        source: what to call them in errors.

    Raises:
        UserError: a value of another kind.
    """
    parser = build_parser()
    known = _actions(parser)
    return _checked_flags({name: value for name, value in flags.items() if name in known}, source, parser)


def _actions(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    return {action.dest: action for action in parser._actions if action.dest != "help"}


def _checked_flags(flags: dict[str, Any], source: str, parser: argparse.ArgumentParser) -> dict[str, Any]:
    actions = _actions(parser)
    return {name: _checked(value, actions[name], source) for name, value in flags.items()}


def _is_plain(value: Any, depth: int = 3) -> bool:
    """Whether a value is text, a number or None, or a short nest of lists and mappings of these.

    A file of a few lines can nest references so that a walk over them, or their text, never ends.
    """
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list | tuple):
        return depth > 0 and len(value) <= 1000 and all(_is_plain(v, depth - 1) for v in value)
    return value is None or isinstance(value, str | int | float)


def _checked(value: Any, action: argparse.Action, source: str) -> Any:
    """A YAML value as the flag's type; argparse itself takes defaults as they come."""
    name = f"{action.dest.replace('_', '-')} of {source}"
    shown = reprlib.repr(value)
    if value is None and action.default is None:
        return None
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise UserError(f"{name} is {shown}, expected true or false")
        return value
    if isinstance(action, _ModelKwargs):
        if not isinstance(value, dict) or not all(isinstance(k, str) for k in value) or not _is_plain(value):
            raise UserError(f"{name} is {shown}, expected a mapping of argument names to values")
        return value
    if (action.nargs == "+") != isinstance(value, list):
        raise UserError(f"{name} is {shown}, expected {'a list' if action.nargs == '+' else 'one value'}")
    kind = action.type or str
    values = value if action.nargs == "+" else [value]
    if not all(isinstance(v, str | int | float) for v in values):
        raise UserError(f"{name} is {shown}, expected {kind.__name__}")
    try:
        # Text such as 5e-4, which YAML does not take for a number, is converted; 2.5 epochs are not cut to 2.
        values = [kind(str(v)) for v in values]
    except ValueError as error:
        raise UserError(f"{name} is {shown}, expected {kind.__name__}") from error
    if action.choices is not None and (bad := [v for v in values if v not in action.choices]):
        raise UserError(f"{name} is {reprlib.repr(bad[0])}, expected one of {', '.join(map(str, action.choices))}")
    return values if action.nargs == "+" else values[0]


def parse_args(argv: list[str] | None = None, defaults: dict[str, Any] | None = None) -> argparse.Namespace:
    """Flags of the command line over those of `--config` over `defaults` over the published defaults.

    Args:
        argv: the command line; None takes the process's.
        defaults: values by destination, such as those a checkpoint was made with.

    Raises:
        UserError: an unknown or misspelt flag, a value that makes no sense, or a flag that is not implemented yet.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = build_parser()
    parser.set_defaults(**(defaults or {}))
    known, _ = parser.parse_known_args(argv)
    if known.config:
        parser.set_defaults(**_flags_of(Path(known.config), parser))
    args = parser.parse_args(argv)
    if args.resplit:
        raise UserError(
            "--resplit spares an augmentation split from erasing, and the recipe has no splits: leave it out"
        )
    args.if_amp = args.if_amp or args.amp_dtype is not None
    if args.if_amp and args.amp_dtype is None:
        args.amp_dtype = "bfloat16"
    parse_interval(args.checkpoint_interval)
    check_trackers(args)
    positive = {"batch_size": 1, "epochs": 0, "input_size": 1, "num_workers": 0, "warmup_epochs": 0, "recount": 1,
                "grad_accum_steps": 1, "start_epoch": 0, "keep_every_epochs": 0,
                "max_image_pixels": 1, "num_frames": 1}  # fmt: skip
    for name, least in positive.items():
        if getattr(args, name) < least:
            raise UserError(f"--{name.replace('_', '-')} is {getattr(args, name)}, expected at least {least}")
    if not 0 < args.eval_crop_ratio <= 1:
        raise UserError(f"--eval-crop-ratio is {args.eval_crop_ratio}, expected a number in (0, 1]")
    if args.src and not args.ThreeAugment:
        raise UserError("--src is the simple crop of --ThreeAugment: pass both, or leave --src out")
    if args.clip_grad is not None and args.clip_grad <= 0:
        raise UserError(f"--clip-grad is {args.clip_grad}, expected a number above 0, or leave it out")
    if args.layer_decay is not None and not 0 < args.layer_decay <= 1:
        raise UserError(f"--layer-decay is {args.layer_decay}, expected a number in (0, 1]")
    if args.fsdp and args.histograms:
        raise UserError("--histograms needs whole parameters, and --fsdp shards them: leave one of them out")
    if args.fsdp and (args.amp_dtype == "float16" or args.clip_mode == "agc" or args.model_ema_force_cpu):
        raise UserError("--fsdp goes with neither --amp-dtype float16, --clip-mode agc nor --model-ema-force-cpu")
    if (args.per_class_csv or args.class_index) and not args.eval:
        raise UserError("--per-class-csv and --class-index belong to an evaluation: pass --eval too")
    if args.resume not in ("", "auto") and args.finetune:
        raise UserError("--resume continues a run and --finetune starts one from given weights: pass one of them")
    if args.eval and args.pretrain != "none":
        raise UserError("--eval measures a classifier: fine-tune the pretrained encoder first, with --finetune")
    if args.eval and not args.resume and not args.finetune:
        raise UserError("--eval needs a checkpoint to evaluate: pass --resume FILE")
    return args


def save_config(args: argparse.Namespace, path: Path) -> None:
    """Write the resolved flags so that `--config` replays the run."""
    flags = {k: v for k, v in sorted(vars(args).items()) if k not in ("config", "resume", "eval")}
    path.write_text(yaml.safe_dump(flags, sort_keys=False))
