"""Command lines that make no sense, all in one process: each gets its sentence and status 2, and leaves nothing."""

import shlex
import time

import pytest
import torch

from vim.engine import run

NANO = (
    "--model vim_nano_patch4_32 --model-kwargs depth=1 embed_dim=16 --input-size 16 --batch-size 8 --num_workers 0 "
    "--device cpu --epochs 1 --trackers none"
)
# The flags after those above, and words of the sentence.
VALUES = {
    "--min-lr nan": "--min-lr is nan, expected a number in [0, 1e+06]",
    "--min-lr -1e-5": "--min-lr",
    "--lr inf": "--lr is inf",
    "--lr=-1": "--lr is -1",
    "--warmup-lr nan": "--warmup-lr is nan",
    "--epochs 0": "--epochs is 0, expected a whole number in [1, 1,000,000]",
    "--epochs 1.5": "--epochs is '1.5', expected a whole number",
    "--epochs=-3": "--epochs is -3",
    "--epochs ''": "--epochs is ''",
    "--start_epoch 5": "--start-epoch is 5, expected one below --epochs",
    "--opt-betas 0.9": "--opt-betas is ['0.9']: it takes 2 to 3 values",
    "--opt-betas 0.9 1.0": "--opt-betas is 1.0",
    "--opt-betas 0.9 nan": "--opt-betas is nan",
    "--opt-betas 0.9 0.9 0.9 0.9": "it takes 2 to 3 values",
    "--opt-eps -1": "--opt-eps",
    "--cutmix inf": "--cutmix is inf",
    "--cutmix nan": "--cutmix is nan",
    "--cutmix-minmax 0.5": "--cutmix-minmax is ['0.5']: it takes 2 values",
    "--cutmix-minmax 0.9 0.1": "the first number must not be above the second",
    "--cutmix-minmax 0.1 1.5": "--cutmix-minmax is 1.5",
    "--aa rubbish": "timm knows no such",
    "--aa rand-m9-zz9": "timm knows no such",
    "--input-size 100000": "--input-size is 100000, expected a whole number in [1, 8,192]",
    "--input-size 0": "--input-size is 0",
    "--input-size 16 32 48": "it takes 1 to 2 values",
    "--input-size 16.5": "--input-size is '16.5'",
    "--input-size 3": "patch size",
    f"--seed {2**64}": "--seed is 18446744073709551616",
    "--seed=-1": "--seed is -1",
    "--sched step --decay-epochs 0": "--decay-epochs is 0, expected a number in [1, 1,000,000]",
    "--sched step --decay-rate 1": "lowers no rate",
    "--sched cosin": "expected one of cosine",
    "--decay-rate 0": "--decay-rate is 0",
    "--decay-milestones -5": "--decay-milestones",
    "--opt adamz": "timm has no such optimizer, did you mean",
    "--opt adahessian": "second derivatives",
    "--opt ''": "--opt",
    "--smoothing 2": "--smoothing is 2, expected a number in [0, 1)",
    "--smoothing nan": "--smoothing is nan",
    "--mixup=-1": "--mixup is -1",
    "--mixup nan": "--mixup is nan",
    "--mixup-prob 2": "--mixup-prob is 2, expected a number in [0, 1]",
    "--mixup-switch-prob=-0.1": "--mixup-switch-prob is -0.1",
    "--mixup-mode half": "expected one of batch, pair, elem",
    "--reprob 2": "--reprob is 2",
    "--recount 0": "--recount is 0",
    "--model-ema-decay 1.5": "--model-ema-decay is 1.5, expected a number in [0, 1]",
    "--weight-decay=-1": "--weight-decay is -1",
    "--momentum nan": "--momentum is nan",
    "--momentum 1": "--momentum is 1",
    "--drop 1": "--drop is 1",
    "--drop-path=-0.1": "--drop-path is -0.1",
    "--color-jitter 2": "--color-jitter is 2",
    "--num-classes 7": "--num-classes is 7 and the data set has 3 classes",
    "--num-classes=-1": "--num-classes is -1",
    "--patience-epochs=-1": "--patience-epochs is -1",
    "--cooldown-epochs=-1": "--cooldown-epochs is -1",
    "--warmup-epochs=-1": "--warmup-epochs is -1",
    "--lr-noise 0.5 2": "--lr-noise is 2",
    "--lr-noise 0.9 0.1": "the first number must not be above the second",
    "--lr-noise-std=-1": "--lr-noise-std is -1",
    "--checkpoint-interval 0.5": "--checkpoint-interval is '0.5'",
    "--checkpoint-interval soon": "--checkpoint-interval is 'soon'",
    "--keep-every-epochs=-1": "--keep-every-epochs is -1",
    "--print-every-steps 0": "--print-every-steps is 0",
    "--clip-grad 0": "--clip-grad is 0, expected a number above 0",
    "--layer-decay 0": "--layer-decay is 0",
    "--layer-decay 1.5": "--layer-decay is 1.5",
    "--grad-accum-steps 0": "--grad-accum-steps is 0",
    "--batch-size 0": "--batch-size is 0",
    "--batch-size 7": "must be even",
    "--batch-size 1000000": "fewer than one batch",
    "--num_workers=-1": "--num-workers is -1",
    "--eval-crop-ratio 0": "--eval-crop-ratio is 0",
    "--eval-crop-ratio 1.5": "--eval-crop-ratio is 1.5",
    "--distillation-type warm": "expected one of none, soft, hard",
    "--distillation-type soft": "needs --teacher-path",
    "--distillation-tau 0": "--distillation-tau is 0",
    "--amp-dtype float8": "expected one of bfloat16, float16",
    "--in-chans 2": "expected one of 1, 3",
    "--max-image-pixels 0": "--max-image-pixels is 0",
    "--device tpu": "expected one of cuda, cpu",
    "--trackers paper": "expected one of tensorboard",
    "--on-bad-image cry": "expected one of stop, replace",
    "--world_size 0": "--world-size is 0",
    "--world_size 4": "start with torchrun",
    "--local-rank=-1": "--local-rank is -1",
}
COMBINATIONS = {
    "--modle x": "unrecognized arguments: --modle",
    "--epoch 3": "unrecognized arguments: --epoch",
    "--nb_classes 3": "--num-classes",
    "--img-size 32": "it is --input-size",
    "stray": "unrecognized arguments: stray",
    "--lr": "a value that begins with - is written --flag=value",
    "--lr -1e-3": "a value that begins with - is written --flag=value",
    "--model vim_tiny_patch16_224.nonsense": "leave out .nonsense",
    "--model vim_tinny_patch16_224": "did you mean vim_tiny_patch16_224",
    "--model ''": "--model is empty",
    "--model-kwargs depth": "expected KEY=VALUE",
    "--model-kwargs =3": "expected KEY=VALUE",
    "--model-kwargs depht=2": "cannot be built",
    "--model-kwargs depth=0": "depth",
    "--model-kwargs d_state=100000": "d_state is 100000, expected a whole number of at least 1 and at most 1,024",
    "--model-kwargs embed_dim=10000000": "embed_dim is 10000000, expected",
    "--model-kwargs embed_dim=65536 depth=8": "GiB, and",
    "--model-kwargs depth=100000000": "depth is 100000000, expected",
    "--model-kwargs num_registers=10000000 if_cls_token=False": "num_registers is 10000000, expected",
    "--model-kwargs img_size=32": "img_size has a flag of its own: pass --input-size",
    "--model-kwargs drop_rate=0.1": "pass --drop",
    "--model-kwargs num_classes=5": "pass --num-classes",
    "--model-kwargs device=meta": "is not for a classifier",
    "--model-kwargs features_only=True": "is not for a classifier",
    "--model-kwargs depth=True": "depth is True, expected a whole number",
    "--model-kwargs norm_epsilon=nan": "norm_epsilon is",
    "--model-kwargs norm_epsilon=-1": "norm_epsilon is -1",
    "--model-kwargs merge_ratio=x": "merge_ratio is 'x'",
    "--model-kwargs merge_ratio=0.3 merge_blocks=3": "merge_blocks is 3",
    "--model-kwargs ssm_cfg=3": "ssm_cfg is 3, expected a mapping",
    "--model vim_nano_patch4_32.": "there is no model vim_nano_patch4_32.:",
    "--model videomamba_tiny_patch16_f8_224 --model-kwargs depth=1": "takes clips",
    "--model-kwargs pretrained=True": "pass --finetune FILE",
    "--model-kwargs checkpoint_path=/etc/passwd": "pass --finetune FILE",
    "--resplit": "no splits",
    "--src": "--ThreeAugment",
    "--distributed": "start with torchrun",
    "--fsdp": "start with torchrun",
    "--per-class-csv x.csv": "pass --eval too",
    "--class-index x.json": "pass --eval too",
    "--eval": "--eval needs a checkpoint",
    "--eval --resume auto": "no checkpoint to evaluate",
    "--resume {own} --finetune {own}": "pass one of them",
    "--resume {tree}": "there is no checkpoint at",
    "--resume {tmp}/absent.pth": "there is no checkpoint at",
    "--finetune {tmp}/absent.pth": "there is no checkpoint at",
    "--resume {own} --input-size 32": "--finetune starts from the weights alone",
    "--resume {own} --opt sgd": "sgd",
    "--resume {own} --model-kwargs depth=2 embed_dim=16": "missing: layers.1.",
    "--eval --resume {own} --class-index {tmp}/absent.json": "--class-index",
    "--eval --resume {own} --per-class-csv {tmp}/absent/x.csv": "cannot be written",
    "--data-path {tmp}/absent": "is not a folder",
    "--data-path {own}": "is not a folder",
    "--data-set IMAGENET": "--data-set is 'IMAGENET'",
    "--data-set wds/x --data-path pipe:true": "--data-set wds/x",
    "--data-set tar/ --data-path {own}": "is missing",
    "--data-set FMNIST --data-path {tree}": "Fashion-MNIST's four idx files",
    "--data-set CIFAR": "does not hold CIFAR-100",
    "--data-set INAT": "does not hold iNaturalist",
    "--config {tmp}/absent.yaml": "cannot be read",
    "--config {own}": "--config",
    "--trackers wandb mlflow --output_dir ''": "--trackers",
}


@pytest.fixture(scope="module")
def own(tree, tmp_path_factory):
    """A checkpoint of a run of this project."""
    folder = tmp_path_factory.mktemp("own")
    assert run.main([*shlex.split(NANO), "--data-path", str(tree), "--output_dir", str(folder)]) == 0
    return folder / "checkpoint.pth"


def test_there_are_enough():
    assert len(VALUES) + len(COMBINATIONS) >= 120


@pytest.mark.parametrize("flags", [*VALUES, *COMBINATIONS])
def test_command_lines(flags, tree, own, tmp_path, capsys):
    words = (VALUES | COMBINATIONS)[flags]
    output = tmp_path / "output"
    further = shlex.split(flags.format(tree=tree, own=own, tmp=tmp_path))
    threads, begun = torch.get_num_threads(), time.process_time()
    status = run.main([*shlex.split(NANO), "--data-path", str(tree), "--output_dir", str(output), *further])
    captured = capsys.readouterr()
    assert status == 2, captured.err
    assert "Traceback" not in captured.err
    (error,) = (line for line in captured.err.splitlines() if line.startswith("error: "))
    assert words in error
    assert len(error) < 1000
    assert captured.out == ""
    assert not output.exists()
    assert torch.get_num_threads() == threads
    # Nothing is computed for what makes no sense: far less than a minute, on any machine.
    assert time.process_time() - begun < 60
