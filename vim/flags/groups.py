"""The table of flags: a field for each, in typed groups. Functions take the group that they read."""

# ruff: noqa: RUF009
# The defaults come from a helper that calls dataclasses.field, so none is shared between instances.

import dataclasses
import inspect
import re
from dataclasses import dataclass, field
from typing import Any

from vim.flags.entry import Bounds, Flag

DATA_SETS = ("IMNET", "CIFAR", "INAT", "INAT19", "FMNIST", "CLIPS")
PRETRAININGS = ("none", "arm", "masked")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
# Readers of timm, chosen by prefix: `--data-set hfds/NAME --data-path FOLDER`.
FACTORY_PREFIXES = ("tar/", "hfds/", "wds/", "tfds/", "hfids/")
BAD_IMAGE = ("stop", "replace")
# Pillow's own limit against decompression bombs.
MAX_IMAGE_PIXELS = 178_956_970
TRACKERS = ("tensorboard", "wandb", "mlflow", "none")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "plateau", "poly", "constant")

_LARGEST_COUNT = 10**9
SHARE = Bounds(0, 1)
NOT_NEGATIVE = Bounds(0)
ABOVE_0 = Bounds(0, open_low=True)
COUNT = Bounds(0, _LARGEST_COUNT)
FROM_1 = Bounds(1, _LARGEST_COUNT)


def _flag(default: Any, help: str, bounds: Bounds | None = None, **options: Any) -> Any:
    """A field with its entry of the table; the type is that of the default unless `kind` says another."""
    entry = Flag(help, options.pop("kind", type(default)), bounds=bounds, **options)
    if isinstance(default, list | dict):
        return field(default_factory=default.copy, metadata={"flag": entry})
    return field(default=default, metadata={"flag": entry})


def _policy_fault(policy: str) -> str:
    """Why timm builds no augmentation of a policy's name, or ""."""
    if policy in ("", "none"):
        return ""
    from timm.data.transforms_factory import transforms_imagenet_train

    try:
        transforms_imagenet_train(32, auto_augment=policy)
    except Exception as error:  # assertions, and whatever its parsing of text runs into
        return f"timm knows no such augmentation policy ({type(error).__name__}), rand-m9-mstd0.5-inc1 is one"
    return "" if policy.startswith(("rand", "original", "v0", "3a", "augmix")) else "timm knows no such policy"


def _optimizer_fault(name: str) -> str:
    """Why timm builds no optimizer of this name for a training loop without closures, or ""."""
    import difflib

    from timm.optim import get_optimizer_info, list_optimizers

    known = name.lower().removeprefix("lookahead_")
    try:
        info = get_optimizer_info(known)
    except ValueError:
        near = difflib.get_close_matches(known, list_optimizers(), n=3) or ["adamw", "sgd", "lamb"]
        return f"timm has no such optimizer, did you mean {', '.join(near)}"
    return "it needs second derivatives, which this loop does not compute" if info.second_order else ""


def _interval_fault(text: str) -> str:
    try:
        parse_interval(text)
    except ValueError as error:
        return str(error)
    return ""


def parse_interval(text: str) -> tuple[int, float]:
    """`--checkpoint-interval` → (steps, seconds), the other one 0: "500" or "500steps", "10min".

    Raises:
        ValueError: neither.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(steps?|m|min|minutes?)?", text)
    if not text:
        return 0, 0.0
    if match is not None and float(match[1]) > 0:
        if (match[2] or "steps").startswith("m"):
            return 0, 60 * float(match[1])
        if "." not in match[1]:
            return int(match[1]), 0.0
    raise ValueError("expected whole steps as in 500 or 500steps, or minutes as in 10min")


def _range_fault(values: list[float] | None) -> str:
    return "" if values is None or values == sorted(values) else "the first number must not be above the second"


@dataclass(kw_only=True)
class Common:
    """Flags that several parts of a run share."""

    batch_size: int = _flag(64, "images of each process in one step", Bounds(1, 2**20))
    seed: int = _flag(0, "seed of all random numbers", Bounds(0, 2**32 - 1))
    eval: bool = _flag(False, "evaluate the checkpoint of --resume or --finetune, and stop")
    input_size: int | list[int] = _flag(
        224, "side of the images in pixels, or height and width", Bounds(1, 8192), counts=(1, 2), single=True, kind=int
    )
    data_set: str = _flag(
        "IMNET", f"{', '.join(DATA_SETS)}, or a name with a prefix of timm's readers: {', '.join(FACTORY_PREFIXES)}",
        may_be_empty=False,
    )  # fmt: skip
    num_frames: int = _flag(8, "frames of a clip of --data-set CLIPS", Bounds(1, 1024))
    in_chans: int = _flag(3, "colour channels: 1 for grey images, 3 for colour", choices=(1, 3))
    num_classes: int = _flag(0, "number of classes, if the data set does not state it", Bounds(0, 10**7))

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the model's images."""
        size = self.input_size
        return (size, size) if isinstance(size, int) else (size[0], size[-1])


@dataclass(kw_only=True)
class Augmentation(Common):
    """From a decoded image to the model's input."""

    color_jitter: float = _flag(0.3, "strength of the colour jitter, where --aa does not replace it", Bounds(0, 1))
    aa: str = _flag("rand-m9-mstd0.5-inc1", "AutoAugment or RandAugment policy of timm, or none", check=_policy_fault)
    smoothing: float = _flag(0.1, "share of each label that is spread over all classes", Bounds(0, 1, open_high=True))
    train_interpolation: str = _flag(
        "bicubic", "interpolation of training crops", choices=("random", "bilinear", "bicubic")
    )
    repeated_aug: bool = _flag(
        True, "train on three differently augmented copies of a third of the images per epoch",
        off=("--no-repeated-aug",),
    )  # fmt: skip
    train_mode: bool = _flag(
        True, "augment training images and keep dropout and stochastic depth on; off: plain images, and none of these",
        off=("--no-train-mode",),
    )  # fmt: skip
    ThreeAugment: bool = _flag(False, "DeiT III's augmentation: grey scale, solarisation or blur, then colour jitter")
    src: bool = _flag(False, "the simple random crop of --ThreeAugment in place of the random resized one")
    reprob: float = _flag(0.25, "probability that random erasing changes an image", SHARE)
    remode: str = _flag("pixel", "what random erasing fills its boxes with", choices=("const", "rand", "pixel"))
    recount: int = _flag(1, "boxes that random erasing draws in an image", Bounds(1, 100))
    resplit: bool = _flag(False, "not supported: it exempts a split from erasing, and the recipe has no splits")
    mixup: float = _flag(0.8, "alpha of mixup, 0 for none", Bounds(0, 1000))
    cutmix: float = _flag(1.0, "alpha of CutMix, 0 for none", Bounds(0, 1000))
    cutmix_minmax: list[float] | None = _flag(
        None, "smallest and largest side of CutMix's box as shares of the image, in place of its alpha", SHARE,
        kind=float, counts=(2, 2), check=_range_fault,
    )  # fmt: skip
    mixup_prob: float = _flag(1.0, "probability that a batch is mixed", SHARE)
    mixup_switch_prob: float = _flag(0.5, "probability of CutMix in place of mixup where both are on", SHARE)
    mixup_mode: str = _flag("batch", "what shares one mixing ratio", choices=("batch", "pair", "elem"))
    eval_crop_ratio: float = _flag(
        0.875, "side of the evaluated centre crop as a share of the resized image", Bounds(0.01, 1)
    )


@dataclass(kw_only=True)
class Data(Augmentation):
    """Where the images come from, and how they are transformed."""

    data_path: str = _flag("", "folder of the data set; FMNIST needs none")
    train_split: str = _flag("train", "training split of a data set with a prefix", may_be_empty=False)
    eval_split: str = _flag("validation", "evaluation split of a data set with a prefix", may_be_empty=False)
    inat_category: str = _flag("name", "level of the taxonomy that labels iNaturalist", choices=INAT_CATEGORIES)
    class_index: str = _flag("", "with --eval: file with the model's class number of each class folder", metavar="FILE")
    on_bad_image: str = _flag(
        "stop", "stop at an image that cannot be read, or replace it by the next (an evaluation leaves it out)",
        choices=BAD_IMAGE,
    )  # fmt: skip
    max_image_pixels: int = _flag(MAX_IMAGE_PIXELS, "images of more pixels count as unreadable", Bounds(1, 2**40))
    cache: bool = _flag(False, "decode an indexed data set into memory before the first step")
    num_workers: int = _flag(
        10, "loader processes, at most as many as there are cores", Bounds(0, 4096), names=("--num_workers",)
    )
    pin_mem: bool = _flag(True, "pin the loader's memory for faster copies to the GPU", off=("--no-pin-mem",))
    dist_eval: bool = _flag(False, "accepted for old scripts: evaluation is always distributed, and exact")


@dataclass(kw_only=True)
class Model(Common):
    """The network and its average."""

    model: str = _flag("deit_base_patch16_224", "name of a model registered with timm", may_be_empty=False)
    model_kwargs: dict[str, Any] = _flag({}, "arguments of the model's constructor", metavar="KEY=VALUE")
    finetune: str = _flag("", "checkpoint whose weights to start from; image size, patches and classes may differ")
    pretrain: str = _flag(
        "none", "pretrain the encoder of --model without labels: autoregressive (arm) or masked", choices=PRETRAININGS
    )
    decoder_dim: int = _flag(512, "width of the decoder of --pretrain arm, a multiple of 64", Bounds(1, 2**16))
    drop: float = _flag(0.0, "dropout rate after the position embedding", Bounds(0, 1, open_high=True))
    drop_path: float = _flag(0.1, "rate of stochastic depth in the last block", Bounds(0, 1, open_high=True))
    model_ema: bool = _flag(True, "keep a moving average of the weights, and evaluate it too", off=("--no-model-ema",))
    model_ema_decay: float = _flag(0.99996, "share of the average that stays at an update", SHARE)
    model_ema_force_cpu: bool = _flag(False, "keep the average of the weights on the CPU")
    if_random_cls_token_position: bool = _flag(
        False, "put the class token at a new random position in each forward pass",
        names=("--if_random_cls_token_position",), off=("--no_random_cls_token_position",),
    )  # fmt: skip
    if_random_token_rank: bool = _flag(
        False, "shuffle the tokens in each forward pass", names=("--if_random_token_rank",),
        off=("--no_random_token_rank",),
    )  # fmt: skip
    attn_only: bool = _flag(False, "train the mixers, the embeddings and the head; freeze everything else")
    compile: bool = _flag(False, "compile the model by torch.compile")
    cuda_graphs: bool = _flag(
        False, "replay forward and backward from a CUDA graph, on one GPU: the host launches them in one call"
    )
    grad_checkpointing: bool = _flag(False, "recompute each block in the backward pass to save memory")


@dataclass(kw_only=True)
class Optimisation(Common):
    """The loss, the optimizer and the precision."""

    bce_loss: bool = _flag(False, "binary cross-entropy in which every class of a mixture counts as present")
    cosub: bool = _flag(
        False, "train two sub-models with other layers dropped, on the labels and on each other, by BCE"
    )
    teacher_model: str = _flag("regnety_160", "timm model to distil from", may_be_empty=False)
    teacher_path: str = _flag("", "checkpoint of the teacher")
    distillation_type: str = _flag(
        "none", "what the student learns from the teacher: its distribution (soft) or its decision (hard)",
        choices=("none", "soft", "hard"),
    )  # fmt: skip
    distillation_alpha: float = _flag(0.5, "weight of the teacher's part of the loss", SHARE)
    distillation_tau: float = _flag(1.0, "temperature of soft distillation", Bounds(0, 1e6, open_low=True))
    opt: str = _flag("adamw", "optimizer of timm", check=_optimizer_fault, may_be_empty=False)
    opt_eps: float = _flag(1e-8, "term that keeps the optimizer's divisions finite", Bounds(0, 1))
    opt_betas: list[float] | None = _flag(
        None, "decay rates of the optimizer's moments; by default the optimizer's own",
        Bounds(0, 1, open_high=True), kind=float, counts=(2, 3),
    )  # fmt: skip
    momentum: float = _flag(0.9, "momentum of SGD and its relatives", Bounds(0, 1, open_high=True))
    weight_decay: float = _flag(0.05, "weight decay of matrices; vectors and embeddings have none", Bounds(0, 1000))
    no_a_log_decay: bool = _flag(False, "no weight decay for A_log and A_b_log either, which published runs decay")
    layer_decay: float | None = _flag(
        None, "factor of the learning rate from each block to the one below", Bounds(0, 1, open_low=True), kind=float
    )
    clip_grad: float | None = _flag(
        None, "bound of the gradients, of the kind that --clip-mode names; none by default", ABOVE_0, kind=float
    )
    clip_mode: str = _flag(
        "norm", "what --clip-grad bounds: the norm, each value, or each unit's norm relative to its weights (agc)",
        choices=("norm", "value", "agc"),
    )  # fmt: skip
    grad_accum_steps: int = _flag(1, "batches per update of the weights", Bounds(1, 2**20))
    if_amp: bool = _flag(False, "compute in lower precision (autocast) where it is safe", names=("--if_amp",))
    amp_dtype: str | None = _flag(
        None, "precision of autocast, which this turns on: bfloat16 (also without this flag), or float16 with a loss "
        "scaler", kind=str, choices=("bfloat16", "float16"),
    )  # fmt: skip
    if_continue_inf: bool = _flag(
        False, "skip and count updates whose loss or gradient is not finite, in place of stopping",
        names=("--if_continue_inf",), off=("--no_continue_inf",),
    )  # fmt: skip
    if_nan2num: bool = _flag(
        False, "replace NaN and infinity in the model's output", names=("--if_nan2num",), off=("--no_nan2num",)
    )


@dataclass(kw_only=True)
class Schedule(Common):
    """How long to train, and the learning rate."""

    epochs: int = _flag(300, "epochs of the run and of its schedule", Bounds(1, 10**6))
    start_epoch: int = _flag(
        0, "first epoch, counted from 0; --resume sets it", Bounds(0, 10**6), names=("--start_epoch",)
    )
    lr: float = _flag(5e-4, "learning rate for 512 images per update", Bounds(0, 1e6))
    unscale_lr: bool = _flag(False, "take --lr as it is, without scaling by the images of an update / 512")
    sched: str = _flag("cosine", "schedule of timm, which moves once per epoch", choices=SCHEDULES)
    lr_noise: list[float] | None = _flag(
        None, "start, or start and end, of the epochs with a noisy learning rate, as shares of the run", SHARE,
        kind=float, counts=(1, 2), check=_range_fault,
    )  # fmt: skip
    lr_noise_pct: float = _flag(0.67, "largest change by the noise, as a share of the learning rate", SHARE)
    lr_noise_std: float = _flag(1.0, "standard deviation of the noise of the learning rate", Bounds(0, 1000))
    warmup_lr: float = _flag(1e-6, "learning rate at the start of the warm-up", Bounds(0, 1e6))
    min_lr: float = _flag(1e-5, "learning rate at the end of the schedule", Bounds(0, 1e6))
    decay_epochs: float = _flag(30.0, "epochs between two drops of the step schedule", Bounds(1, 10**6))
    decay_milestones: list[int] = _flag(
        [90, 180, 270], "epochs at which the multistep schedule drops", Bounds(0, 10**6), kind=int, counts=(1, 1000)
    )
    warmup_epochs: int = _flag(5, "epochs of warm-up, counted within the schedule", Bounds(0, 10**6))
    cooldown_epochs: int = _flag(
        10, "epochs after a drop that do not count towards --patience-epochs", Bounds(0, 10**6)
    )
    patience_epochs: int = _flag(10, "epochs without improvement before the plateau schedule drops", Bounds(0, 10**6))
    decay_rate: float = _flag(
        0.1, "factor of the learning rate at a drop; exponent of the poly schedule", Bounds(0, 100, open_low=True),
        names=("--decay-rate", "--dr"),
    )  # fmt: skip


@dataclass(kw_only=True)
class Run(Common):
    """Files, processes and logs of one command."""

    config: str | None = _flag(
        None, "YAML file of flags by name; the command line overrides it", kind=str, metavar="FILE", may_be_empty=False
    )
    output_dir: str = _flag("", "folder for checkpoints, logs and the resolved configuration", names=("--output_dir",))
    resume: str = _flag("", "checkpoint to continue or to evaluate; auto: the newest good one of --output-dir")
    device: str = _flag("cuda", "device to run on; without a GPU, the CPU is used", choices=("cuda", "cpu"))
    distributed: bool = _flag(False, "require several processes, started by a launcher such as torchrun")
    world_size: int = _flag(1, "number of processes, compared with the launcher's", FROM_1, names=("--world_size",))
    dist_url: str = _flag(
        "env://", "address at which processes find each other", names=("--dist_url",), may_be_empty=False
    )
    local_rank: int = _flag(0, "GPU of this process, where the launcher does not set LOCAL_RANK", Bounds(0, 1023))
    fsdp: bool = _flag(False, "shard parameters, gradients and optimizer over the processes (FSDP2)")
    per_class_csv: str = _flag("", "with --eval: file for the accuracy of each class", metavar="FILE")
    checkpoint_interval: str = _flag(
        "", "interval between checkpoints inside an epoch: 500 (steps) or 10min", check=_interval_fault
    )
    keep_every_epochs: int = _flag(0, "also keep the checkpoint of every N-th epoch", COUNT)
    print_every_steps: int = _flag(50, "steps between two lines of the log", FROM_1)
    trackers: list[str] = _flag(
        ["tensorboard"], "trackers that get the figures, besides log.txt", kind=str, counts=(1, 4), choices=TRACKERS
    )
    project: str = _flag("vision-mamba", "project of Weights & Biases, experiment of MLflow", may_be_empty=False)
    profile: int = _flag(
        0,
        "profile N training steps after the first few: a trace and a table in --output-dir",
        Bounds(0, 1000),
        metavar="N",
    )
    histograms: bool = _flag(False, "send weights and gradients of each epoch to the trackers as histograms")


@dataclass(kw_only=True)
class Flags(Data, Model, Optimisation, Schedule, Run):
    """All flags of a run."""


GROUPS = (Common, Data, Augmentation, Model, Optimisation, Schedule, Run)


def flag_table() -> dict[str, Flag]:
    """Every flag by the name of its value, with its names on the command line filled in."""
    table = {}
    for entry in dataclasses.fields(Flags):
        flag: Flag = entry.metadata["flag"]
        names = flag.names or ("--" + entry.name.replace("_", "-"),)
        table[entry.name] = dataclasses.replace(flag, names=names)
    return table


def group_of(name: str) -> type:
    """The group that defines a flag."""
    return next(group for group in GROUPS if name in inspect.get_annotations(group))


def defaults() -> dict[str, Any]:
    """The published defaults, by the name of the value."""
    return vars(Flags())
