"""Command lines of detection and segmentation without OpenMMLab: train, evaluate, or draw on an image."""

import argparse
import importlib
import logging
import math
from pathlib import Path
from typing import Any

import torch

from vim.errors import UserError
from vim.flags import Flag, pairs
from vim.flags.entry import Bounds

_logger = logging.getLogger("vision_mamba")

INSTALL = "pip install 'vision-mamba[dense]'"
_PACKAGES = ("torchmetrics", "pycocotools", "transformers", "accelerate", "scipy")
_COUNT, _RATE, _SHARE = Bounds(1, 10**9), Bounds(0, open_low=True), Bounds(0, 1)

FLAGS = {
    "data": Flag('folder of the data set, or "shapes": synthetic shapes, made on first use', str),
    "output-dir": Flag("folder for checkpoints and logs", str, may_be_empty=False),
    "arch": Flag("registered Vim model of the backbone", str),
    "model-kwargs": Flag("further arguments of the backbone, e.g. drop_path_rate=0.1 if_rope=True", dict),
    "head": Flag("model around the backbone", str),
    "width": Flag("channels of pyramid and heads", int, bounds=Bounds(16, 4096)),
    "img-size": Flag("side of the training images in pixels", int, bounds=Bounds(32, 8192)),
    "no-jitter": Flag("leave the scale of training images as it is", bool),
    "finetune": Flag("classification checkpoint to start the backbone from: file or hf-hub:owner/repository/file", str),
    "use-ema": Flag("take the averaged weights of --finetune", bool),
    "grad-checkpointing": Flag("recompute the backbone's blocks in the backward pass, to save memory", bool),
    "iterations": Flag("steps of the optimizer", int, bounds=_COUNT),
    "batch-size": Flag("images per step and process", int, bounds=_COUNT),
    "lr": Flag("highest learning rate", float, bounds=_RATE),
    "weight-decay": Flag("of AdamW", float, bounds=Bounds(0)),
    "layer-decay": Flag(
        "factor of the learning rate from each block to the one before", float, bounds=Bounds(0, 1, True)
    ),
    "clip-grad": Flag("largest norm of the gradient, 0 for any", float, bounds=Bounds(0)),
    "warmup": Flag("steps in which the learning rate rises", int, bounds=Bounds(0, 10**9)),
    "eval-interval": Flag("steps from evaluation to evaluation, each with a checkpoint", int, bounds=_COUNT),
    "amp": Flag("mixed precision", str, choices=("no", "bf16", "fp16")),
    "num-workers": Flag("loader processes", int, bounds=Bounds(0, 1024)),
    "seed": Flag("of all random numbers", int, bounds=Bounds(0, 2**31)),
    "resume": Flag("continue from the last checkpoint in --output-dir, if there is one", bool),
    "checkpoint": Flag("checkpoint for --eval and --demo (the best one in --output-dir)", str),
    "eval": Flag("evaluate --checkpoint and stop", bool),
    "demo": Flag("draw on this image what --checkpoint finds in it, and stop", str),
    "out": Flag("image that --demo writes", str),
    "score": Flag("least score of an instance that --demo draws", float, bounds=_SHARE),
    "opacity": Flag("of the colours that --demo draws", float, bounds=_SHARE),
}

# Beside the defaults of each task, what --data shapes starts from: a small model, learnt on a CPU in minutes.
_COMMON: dict[str, Any] = {
    "data": None, "arch": "vim_tiny_patch16_224", "model-kwargs": {}, "no-jitter": False, "finetune": None,
    "use-ema": False, "grad-checkpointing": False, "batch-size": 8, "weight-decay": 0.1, "eval-interval": 5000,
    "amp": "no", "num-workers": 4, "seed": 0, "resume": False, "checkpoint": None, "eval": False,
    "demo": None, "score": 0.5, "opacity": 0.5,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "det": {
        **_COMMON, "output-dir": "output/det-torchvision", "head": "mask-rcnn", "width": 256, "img-size": 1024,
        "iterations": 184375, "lr": 1e-4, "layer-decay": 0.837, "clip-grad": 1.0, "warmup": 250,
        "out": "output/demo_det.png",
    },
    "seg": {
        **_COMMON, "output-dir": "output/seg-transformers", "head": "upernet", "width": 192, "img-size": 512,
        "iterations": 60000, "lr": 2e-4, "layer-decay": 0.92, "clip-grad": 1.0, "warmup": 1500,
        "out": "output/demo_seg.png",
    },
}  # fmt: skip
_SMALL = {
    "arch": "vim_nano_patch4_32", "model-kwargs": {"patch_size": 8, "stride": 8}, "weight-decay": 0.05,
    "layer-decay": 0.95, "warmup": 30, "num-workers": 0, "no-jitter": True,
}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "det": {**_SMALL, "width": 64, "img-size": 96, "iterations": 400, "lr": 1e-3, "clip-grad": 5.0},
    "seg": {**_SMALL, "width": 32, "img-size": 64, "iterations": 300, "lr": 2e-3},
}


def _task(name: str) -> Any:
    for package in _PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise UserError(f"{package} cannot be imported ({error}): {INSTALL}") from error
    if name == "det":
        from vim.dense.standalone.detection import Detection

        return Detection()
    from vim.dense.standalone.segmentation import Segmentation

    return Segmentation()


def _parse(task: str, argv: list[str] | None) -> tuple[dict[str, Any], set[str]]:
    """All flags' values, and the names of those that were given."""
    what = {"det": "Mask R-CNN of torchvision", "seg": "UperNet or Mask2Former of transformers"}[task]
    parser = argparse.ArgumentParser(
        description=f"Train {what} with a Vim backbone; evaluate it with --eval, draw with --demo IMAGE.",
        allow_abbrev=False,
    )
    for name, flag in FLAGS.items():
        published, small = DEFAULTS[task][name], SHAPES[task].get(name)
        text = f"{flag.help} (default: {published}" if published not in (None, False, {}) else flag.help
        if text is not flag.help:
            text += f"; with --data shapes: {small})" if small is not None and small != published else ")"
        options: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text.replace("%", "%%")}
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('-', '_')}"))
        if flag.kind is bool:
            parser.add_argument(*spellings, action="store_true", **options)
        else:
            shown = "{" + ",".join(flag.choices) + "}" if flag.choices else flag.kind.__name__.upper()
            metavar = "KEY=VALUE" if flag.kind is dict else shown
            parser.add_argument(*spellings, nargs="+" if flag.kind is dict else None, metavar=metavar, **options)
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        flag = FLAGS[name]
        given[name] = flag.convert(pairs(value, f"--{name}") if flag.kind is dict else value, f"--{name}")
    values = {**DEFAULTS[task], **(SHAPES[task] if given.get("data") == "shapes" else {}), **given}
    if "eval-interval" not in given and values["data"] == "shapes":
        values["eval-interval"] = values["iterations"]
    return values, set(given)


def run(task_name: str, argv: list[str] | None = None) -> Any:
    """Train, or evaluate with `--eval`, or draw with `--demo`; gives metrics, or the file that was written.

    Args:
        task_name: "det" or "seg".
        argv: flags; those of the process by default.

    Raises:
        UserError: something in flags, data or files is wrong.
        CheckpointError: a checkpoint that cannot be read, or does not fit.
    """
    values, given = _parse(task_name, argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    task = _task(task_name)
    if values["head"] not in task.heads:
        raise UserError(f"--head is {values['head']!r}, expected one of {', '.join(task.heads)}")
    if values["demo"] is not None:
        return _demo(task, values)
    if values["data"] is None:
        raise UserError("--data is missing: give the folder of a data set, or --data shapes for synthetic ones")
    return _evaluate(task, values) if values["eval"] else _train(task, values, given)


def _train(task: Any, values: dict[str, Any], given: set[str]) -> dict[str, float]:
    from vim.dense.standalone.data import find_data
    from vim.dense.standalone.task import Spec, features_of
    from vim.dense.standalone.training import LAST, Schedule, Trainer, read, say
    from vim.engine.lock import locked

    root, folder, size = (
        find_data(values["data"], Path("output/shapes")),
        Path(values["output-dir"]),
        values["img-size"],
    )
    options = {"img_size": size, "jitter": not values["no-jitter"]}
    train_data = task.data(root, "training", train=True, **options)
    eval_data = task.data(root, "validation", train=False, **options)
    if train_data.classes != eval_data.classes:
        raise UserError(f"the splits of {root} have other classes: {train_data.classes} and {eval_data.classes}")
    spec = Spec(
        values["arch"],
        size,
        list(train_data.classes),
        values["head"],
        values["width"],
        options["jitter"],
        values["model-kwargs"],
    )
    last = folder / LAST
    if last.exists() and not values["resume"]:
        raise UserError(f"{folder} already holds a run: pass --resume to continue it, or another --output-dir")
    if values["resume"] and last.exists() and read(last)["spec"] != vars(spec):
        raise UserError(f"{last} is of another model or other classes than the flags: give the run's own flags")
    torch.manual_seed(values["seed"])
    model = _build(task, spec, values["grad-checkpointing"])
    if values["finetune"]:
        features_of(model)[1].load_file(values["finetune"], use_ema=values["use-ema"])
    elif "use-ema" in given:
        raise UserError("--use-ema says which weights of --finetune are taken: pass that too")
    names = ("iterations", "lr", "warmup", "seed", "amp")
    schedule = Schedule(
        batch_size=values["batch-size"], weight_decay=values["weight-decay"], layer_decay=values["layer-decay"],
        clip_grad=values["clip-grad"], interval=values["eval-interval"], num_workers=values["num-workers"],
        **{name: values[name] for name in names},
    )  # fmt: skip
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made ({error.strerror}): give another --output-dir") from error
    trainer = Trainer(task, model, spec, schedule, train_data, eval_data, folder)
    with locked(folder if trainer.accelerator.is_main_process else None):
        if last.exists():
            trainer.resume(last)
        metrics = trainer.train()
    if not all(math.isfinite(v) for v in metrics.values()):
        raise UserError("a metric is not a number: the validation images have no annotations")
    if trainer.accelerator.is_main_process:
        print(f"{folder / LAST}: {say(metrics) or 'not evaluated yet'}")
    return metrics


def _build(task: Any, spec: Any, grad_checkpointing: bool = False) -> torch.nn.Module:
    try:
        return task.build(spec, grad_checkpointing=grad_checkpointing)
    except (ValueError, TypeError) as error:
        raise UserError(f"this model cannot be built: {error}") from error


def _trained(task: Any, values: dict[str, Any]) -> tuple[torch.nn.Module, Any]:
    """The model of `--checkpoint` in evaluation mode, and what it was built from."""
    from vim.dense.standalone.task import Spec
    from vim.dense.standalone.training import BEST, load_weights, read

    path = Path(values["checkpoint"] or Path(values["output-dir"]) / BEST)
    if not path.is_file():
        raise UserError(f"there is no checkpoint at {path}: train first, or give one by --checkpoint")
    content = read(path)
    if content.get("task") != task.name:
        raise UserError(f"{path} is of the task {content.get('task')}, expected {task.name}")
    spec = Spec(**content["spec"])
    model = _build(task, spec)
    load_weights(model, content, path)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval(), spec


def _evaluate(task: Any, values: dict[str, Any]) -> dict[str, float]:
    from vim.dense.standalone.data import find_data
    from vim.dense.standalone.training import say

    model, spec = _trained(task, values)
    root = find_data(values["data"], Path("output/shapes"))
    data = task.data(root, "validation", spec.img_size, train=False, jitter=False)
    if list(data.classes) != spec.classes:
        raise UserError(f"{root} has other classes than the checkpoint: {data.classes} instead of {spec.classes}")
    metrics = task.evaluate(model, spec, data, range(len(data)))
    print(say(metrics))
    return metrics


def _demo(task: Any, values: dict[str, Any]) -> Path:
    from PIL import Image

    from vim.dense.standalone.data import read_image

    image = read_image(Path(values["demo"]))
    model, spec = _trained(task, values)
    image = image.to(next(model.parameters()).device)
    picture, found = task.draw(model, image, spec, score=values["score"], opacity=values["opacity"])
    out = Path(values["out"])
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()).save(out)
    except (OSError, ValueError) as error:
        raise UserError(f"{out} cannot be written ({error}): give another --out") from error
    print(f"wrote {out}: {found}")
    return out
