"""The command line. Its flags override those of `--config`, these a checkpoint's, and these the published defaults."""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import yaml

from vim.engine.trackers import check_trackers
from vim.errors import UserError
from vim.flags import GROUPS, Flag, Flags, defaults, flag_table, group_of, pairs

_LARGEST_CONFIG = 256 * 1024
_OTHER_SPELLINGS = {
    "--nb_classes": "it is --num-classes, needed only where the data set does not say how many there are",
    "--workers": "it is --num-workers",
    "--data-dir": "it is --data-path",
    "--img-size": "it is --input-size",
}


class _Parser(argparse.ArgumentParser):
    """A parser that takes every flag with `-` or `_` between words, and no abbreviations."""

    def __init__(self) -> None:
        super().__init__(
            prog="main.py",
            description="Train, fine-tune and evaluate Vision Mamba image classifiers.",
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        if "expected" in message and "argument" in message:
            message += " (a value that begins with - is written --flag=value)"
        for theirs, ours in _OTHER_SPELLINGS.items():
            if re.search(f"{theirs.replace('_', '[-_]')}\\b", message):
                message = f"{theirs} is the spelling of another project: {ours}"
        raise UserError(f"{message}; see --help for the flags")


class _NoAmp(argparse.Action):
    """`--no_amp`: undoes `--if_amp` and `--amp-dtype` before it, such as a recipe's."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, *_: Any) -> None:
        namespace.if_amp, namespace.amp_dtype = False, None


def _spellings(names: tuple[str, ...]) -> list[str]:
    words = [name.removeprefix("--") for name in names]
    return list(dict.fromkeys("--" + spelt for w in words for spelt in (w, w.replace("-", "_"), w.replace("_", "-"))))


def _shown(value: Any) -> str:
    """A default as the help and the documentation show it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if value in (None, "", {}):
        return "none"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def build_parser() -> argparse.ArgumentParser:
    """Parser of `main.py`, made from the table of flags; it collects text, which `parse_args` converts and checks."""
    parser = _Parser()
    sections = {group: parser.add_argument_group(group.__doc__.rstrip(".")) for group in GROUPS}
    published = defaults()
    for name, flag in flag_table().items():
        section = sections[group_of(name)]
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS}
        text = f"{flag.help} (default: {_shown(published[name])})".replace("%", "%%")
        if flag.kind is bool:
            section.add_argument(*_spellings(flag.names), action="store_true", help=text, **options)
            if flag.off:
                section.add_argument(*_spellings(flag.off), action="store_false", help=argparse.SUPPRESS, **options)
        else:
            metavar = flag.metavar or ("{" + ",".join(map(str, flag.choices)) + "}" if flag.choices else None)
            several = "+" if flag.counts is not None or flag.kind is dict else None
            section.add_argument(
                *_spellings(flag.names), nargs=several, metavar=metavar or name.upper(), help=text, **options
            )
    parser.add_argument(
        *_spellings(("--no_amp",)), action=_NoAmp, nargs=0, dest="no_amp", default=argparse.SUPPRESS,
        help="compute in float32 throughout, whatever a recipe says",
    )  # fmt: skip
    return parser


def documentation() -> str:
    """The table of flags in docs/training.md."""
    published = defaults()
    lines = ["| flag | default | values | meaning |", "| --- | --- | --- | --- |"]
    for group in GROUPS:
        lines.append(f"| **{group.__doc__.rstrip('.')}** | | | |")
        for name, flag in flag_table().items():
            if group_of(name) is not group:
                continue
            names = ", ".join(f"`{n}`" for n in (*flag.names, *flag.off))
            default = _shown(published[name])
            if flag.kind is not bool and default != "none":
                default = f"`{default}`"
            lines.append(f"| {names} | {default} | {_values(flag)} | {flag.help} |")
            if name == "if_amp":
                lines.append("| `--no_amp` | off | switch | compute in float32 throughout, whatever a recipe says |")
    return "\n".join(lines)


def _values(flag: Flag) -> str:
    if flag.kind is bool:
        return "switch"
    if flag.kind is dict:
        return "`KEY=VALUE`; a mapping in YAML"
    words = ", ".join(f"`{c}`" for c in flag.choices) if flag.choices else flag.expected
    if flag.counts is None:
        return words
    least, most = flag.counts
    return f"{least if least == most else f'{least} to {most}' if most < 10 else 'several'}: {words}"


def _flags_of(config: Path) -> dict[str, Any]:
    """Checked flags of a YAML file by the name of their value.

    Raises:
        UserError: the file cannot be read, or has an unknown flag or a value of the wrong type.
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
    if unknown := sorted(set(flags) - set(flag_table())):
        raise UserError(f"--config {config} has unknown flags: {', '.join(unknown)}")
    return known_flags(flags, f"--config {config}")


def known_flags(flags: dict[str, Any], source: str) -> dict[str, Any]:
    """Checked flags by the name of their value; those that this version does not know are left out.

    Args:
        flags: of a run, such as a checkpoint holds.
        source: what to call them in errors.

    Raises:
        UserError: a value of the wrong type, or out of bounds.
    """
    table, published, known = flag_table(), defaults(), {}
    for name, value in flags.items():
        if name not in table:
            continue
        if value is None and published[name] is None:
            known[name] = None
        else:
            known[name] = table[name].convert(value, f"{name.replace('_', '-')} of {source}")
    return known


def parse_args(argv: list[str] | None = None, defaults: dict[str, Any] | None = None) -> Flags:
    """All flags: those of the command line override `--config`, which overrides `defaults` and the published defaults.

    Args:
        argv: the command line; None means that of the process.
        defaults: values by name, such as those that a checkpoint was trained with.

    Raises:
        UserError: an unknown or misspelt flag, a value out of range, or flags that exclude each other.
    """
    argv = sys.argv[1:] if argv is None else argv
    table = flag_table()
    given = vars(build_parser().parse_args(argv))
    typed = {}
    for name, value in given.items():
        flag, spelt = table[name], table[name].names[0].replace("_", "-")
        # `--no_amp` sets None, which needs no conversion.
        if value is not None:
            value = flag.convert(pairs(value, spelt) if flag.kind is dict else value, spelt)
        typed[name] = value
    config = _flags_of(Path(typed["config"])) if "config" in typed else {}
    flags = Flags(**{**(defaults or {}), **config, **typed})
    flags.if_amp = flags.if_amp or flags.amp_dtype is not None
    if flags.if_amp and flags.amp_dtype is None:
        flags.amp_dtype = "bfloat16"
    _check(flags)
    return flags


def _check(flags: Flags) -> None:
    """Raise UserError for flags that exclude each other."""
    if flags.resplit:
        raise UserError(
            "--resplit exempts an augmentation split from erasing, and the recipe has no splits: leave it out"
        )
    check_trackers(flags)
    if flags.src and not flags.ThreeAugment:
        raise UserError("--src is the simple crop of --ThreeAugment: pass both, or leave --src out")
    if flags.sched in ("step", "multistep", "plateau") and flags.decay_rate >= 1:
        raise UserError(
            f"--decay-rate is {flags.decay_rate}, which lowers no rate: --sched {flags.sched} needs one below 1"
        )
    if flags.start_epoch >= flags.epochs and not flags.resume and not flags.eval:
        raise UserError(f"--start-epoch is {flags.start_epoch}, expected one below --epochs, which is {flags.epochs}")
    if flags.profile and not flags.output_dir:
        raise UserError("--profile writes a trace and a table: pass --output-dir, the folder for them")
    if flags.fsdp and flags.histograms:
        raise UserError("--histograms needs whole parameters, and --fsdp shards them: leave one of them out")
    if flags.fsdp and (flags.amp_dtype == "float16" or flags.clip_mode == "agc" or flags.model_ema_force_cpu):
        raise UserError("--fsdp goes with neither --amp-dtype float16, --clip-mode agc nor --model-ema-force-cpu")
    if (flags.per_class_csv or flags.class_index) and not flags.eval:
        raise UserError("--per-class-csv and --class-index belong to an evaluation: pass --eval too")
    if flags.resume not in ("", "auto") and flags.finetune:
        raise UserError("--resume continues a run and --finetune starts one from given weights: pass one of them")
    if flags.eval and flags.pretrain != "none":
        raise UserError("--eval measures a classifier: fine-tune the pretrained encoder first, with --finetune")
    if flags.eval and not flags.resume and not flags.finetune:
        raise UserError("--eval needs a checkpoint to evaluate: pass --resume FILE")


def notices(flags: Flags, steps_per_epoch: int) -> list[str]:
    """One sentence for each thing that cannot work in a run as short as this one.

    Args:
        flags: of the run.
        steps_per_epoch: batches of an epoch.
    """
    said = []
    if 0 < flags.epochs <= flags.warmup_epochs:
        said.append(
            f"the learning rate warms up for {flags.warmup_epochs} epochs and the run has {flags.epochs}, so it never "
            "reaches --lr: pass fewer --warmup-epochs"
        )
    updates = flags.epochs * math.ceil(steps_per_epoch / flags.grad_accum_steps)
    if flags.model_ema and updates and (left := flags.model_ema_decay**updates) > 0.5:
        said.append(
            f"after the {updates} updates of this run the averaged weights are still {100 * left:.1f} % those it "
            f"started from: pass --model-ema-decay {max(1 - 10 / updates, 0.5):.4g}, or --no-model-ema"
        )
    return said


def save_config(flags: Flags, path: Path) -> None:
    """Write the resolved flags so that `--config` replays the run."""
    kept = {k: v for k, v in sorted(vars(flags).items()) if k not in ("config", "resume", "eval")}
    path.write_text(yaml.safe_dump(kept, sort_keys=False))
