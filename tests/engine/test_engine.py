"""Runs of a few steps in this process: clipping, accumulation, precision, losses that are not finite, checkpoints."""

import json
import time

import pytest
import timm
import torch

from vim.data import build_datasets, build_loaders
from vim.engine import checkpoints, run, training
from vim.engine.arguments import parse_args
from vim.engine.build import build_model, build_training
from vim.engine.checkpoints import CheckpointManager
from vim.engine.distributed import DistributedContext
from vim.flags import parse_interval

CONTEXT = DistributedContext(torch.device("cpu"))
NANO = (
    "--model", "vim_nano_patch4_32", "--input-size", "32", "--batch-size", "8", "--num_workers", "0", "--device", "cpu",
    "--warmup-epochs", "0", "--aa", "none", "--no-repeated-aug", "--epochs", "1",
)  # fmt: skip
# Without what draws one random number per batch or per image of a batch.
PLAIN = ("--mixup", "0", "--cutmix", "0", "--drop-path", "0", "--no-model-ema")


def flags(tree, *argv):
    return [*NANO, "--data-path", str(tree), *map(str, argv)]


def trained(tree, folder, *argv):
    """Run; gives the record of the last epoch and the checkpoint."""
    record = run.run(flags(tree, "--output_dir", folder, *argv))
    return record, torch.load(folder / "checkpoint.pth", weights_only=True)


def assert_close(first, second, rtol, atol):
    for name, value in first["model"].items():
        torch.testing.assert_close(
            second["model"][name], value, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_clipping():
    """Norm, value and AGC bounds against their definitions, on synthetic gradients."""

    def clipped(*argv):
        args = parse_args([*NANO, *map(str, argv)])
        state = build_training(build_model(args, 3), args, CONTEXT)
        generator = torch.Generator().manual_seed(0)
        grads = {n: torch.randn(p.shape, generator=generator) for n, p in state.model.named_parameters()}
        for name, parameter in state.model.named_parameters():
            parameter.grad = grads[name].clone()
        norm = training._clip(state, args)
        whole = torch.cat([g.flatten() for g in grads.values()]).norm()
        torch.testing.assert_close(norm, whole)
        return grads, {n: p.grad for n, p in state.model.named_parameters()}, whole, state.model

    grads, result, _, _ = clipped()
    assert all(torch.equal(grads[n], result[n]) for n in grads)
    grads, result, norm, _ = clipped("--clip-grad", 2.0)
    # clip_grad_norm_ divides by norm + 1e-6.
    assert all(torch.allclose(result[n], grads[n] * 2 / norm, rtol=1e-5) for n in grads)
    grads, result, _, _ = clipped("--clip-grad", 0.5, "--clip-mode", "value")
    assert all(torch.equal(result[n], grads[n].clamp(-0.5, 0.5)) for n in grads)
    grads, result, _, model = clipped("--clip-grad", 0.1, "--clip-mode", "agc")
    weight, name = model.head.weight, "head.weight"
    # Each output unit's gradient is at most a tenth of its weights' norm, the latter at least 1e-3.
    bound = 0.1 * weight.detach().norm(dim=1, keepdim=True).clamp(min=1e-3)
    norms = grads[name].norm(dim=1, keepdim=True)
    torch.testing.assert_close(result[name], torch.where(norms > bound, grads[name] * bound / norms, grads[name]))


def test_accumulation_equals_a_larger_batch(tree, tmp_path):
    """Two batches of 4 make the update of one batch of 8; sums in another order differ by float32's rounding."""
    sgd = (*PLAIN, "--opt", "sgd", "--lr", "0.5", "--clip-grad", "1.0")
    one, whole = trained(tree, tmp_path / "one", *sgd)
    two, halves = trained(tree, tmp_path / "two", *sgd, "--batch-size", 4, "--grad-accum-steps", 2)
    assert two["train_loss"] == pytest.approx(one["train_loss"], rel=1e-5)
    assert two["train_grad_norm"] == pytest.approx(one["train_grad_norm"], rel=1e-4)
    # Three updates of at most lr × clip = 0.5 × 8 / 512; rounding of 2^-23 of sums of a few hundred terms, with room.
    assert_close(whole, halves, rtol=1e-4, atol=1e-6)
    third, _ = trained(tree, tmp_path / "three", *sgd, "--batch-size", 4, "--grad-accum-steps", 4)
    assert third["train_loss"] != one["train_loss"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_trains(tree, tmp_path, dtype):
    """Parameters stay float32, the loss is that of float32 within the type's rounding, float16 has a loss scaler."""
    exact, _ = trained(tree, tmp_path / "exact", *PLAIN)
    record, checkpoint = trained(tree, tmp_path / dtype, *PLAIN, "--amp-dtype", dtype)
    assert {v.dtype for v in checkpoint["model"].values()} == {torch.float32}
    # Rounding of 2^-8 in each of some ten layers' activations.
    assert record["train_loss"] == pytest.approx(exact["train_loss"], rel=0.05)
    assert record["train_loss"] != exact["train_loss"]
    assert (checkpoint["scaler"] is not None) is (dtype == "float16")


def test_scaler_skips_an_overflow_and_goes_on(tree, tmp_path, monkeypatch):
    """An overflow of scaled float16 gradients lowers the scale and is no reason to stop."""
    small = torch.amp.GradScaler
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: small(device, init_scale=2.0**120))
    record, checkpoint = trained(tree, tmp_path, *PLAIN, "--amp-dtype", "float16")
    assert checkpoint["scaler"]["scale"] == 2.0**117
    assert record["skipped_updates"] == 3


def test_grad_checkpointing_trains_the_same(tree, tmp_path):
    _, kept = trained(tree, tmp_path / "kept", *PLAIN)
    _, recomputed = trained(tree, tmp_path / "recomputed", *PLAIN, "--grad-checkpointing")
    assert_close(kept, recomputed, rtol=0, atol=0)


@pytest.mark.slow
def test_compiled_model_trains_the_same(tree, tmp_path):
    sgd = (*PLAIN, "--opt", "sgd", "--lr", "0.5", "--model-kwargs", "depth=2")
    plain, eager = trained(tree, tmp_path / "eager", *sgd)
    record, compiled = trained(tree, tmp_path / "compiled", *sgd, "--compile")
    assert record["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-4)
    assert_close(eager, compiled, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(timm.create_model("resnet10t", num_classes=3).state_dict(), path)
    return path


@pytest.mark.parametrize(
    "recipe",
    [
        "--bce-loss", "--cosub --drop-path 0.2", "--ThreeAugment --src", "--attn-only", "--opt lamb --layer-decay 0.8",
        "--distillation-type soft --distillation-tau 3", "--distillation-type hard", "--model-ema-force-cpu",
        "--if_random_cls_token_position", "--if_random_token_rank --repeated-aug", "--clip-grad 0.1 --clip-mode agc",
        "--no-a-log-decay --weight-decay 0.3 --aa original", "--train-interpolation random --remode rand",
    ],
)  # fmt: skip
def test_every_part_of_the_recipe_trains(tree, tmp_path, teacher, recipe):
    """An epoch with it moves the weights to finite values; a second one goes on from its checkpoint."""
    argv = [*recipe.split(), "--teacher-model", "resnet10t", "--teacher-path", teacher, "--lr", "0.01"]
    _, first = trained(tree, tmp_path, *argv)
    record, second = trained(tree, tmp_path, *argv, "--epochs", 2, "--resume", "auto")
    assert record["epoch"] == 1
    assert all(torch.isfinite(v).all() for v in second["model"].values())
    assert any(not torch.equal(v, first["model"][k]) for k, v in second["model"].items())


# Losses that are not finite


def broken(monkeypatch, at_step):
    """The loss of this step of every epoch is NaN."""
    whole = training._accumulate

    def accumulate(state, *args):
        loss, seconds = whole(state, *args)
        return (loss * float("nan") if state.step == at_step else loss), seconds

    monkeypatch.setattr(training, "_accumulate", accumulate)


def test_loss_that_is_not_finite_stops_and_can_be_reproduced(tree, tmp_path, capsys):
    """A learning rate out of all bounds: the run stops, and its saved state stops again at the same step."""
    argv = flags(tree, "--output_dir", tmp_path, "--opt", "sgd", "--lr", "1e6", "--unscale-lr", *PLAIN)
    assert run.main(argv) == 2
    message = capsys.readouterr().err
    assert "in epoch 0, step 1" in message
    assert "nonfinite.pth" in message
    assert "--if_continue_inf" in message
    saved = torch.load(tmp_path / "nonfinite.pth", weights_only=True)
    assert (saved["epoch"], saved["step"]) == (0, 1)
    args = parse_args(argv)
    loader, _ = build_loaders(args, *build_datasets(args)[:2], world_size=1, rank=0)
    assert saved["nonfinite"]["indices_rank_step"] == [[loader.batch_indices(1)]]
    assert run.main(["--resume", str(tmp_path / "nonfinite.pth"), "--output_dir", str(tmp_path / "again")]) == 2
    assert "in epoch 0, step 1" in capsys.readouterr().err
    again = torch.load(tmp_path / "again" / "nonfinite.pth", weights_only=True)
    assert all(torch.equal(saved["model"][k], again["model"][k]) for k in saved["model"])


def test_loss_that_is_not_finite_is_skipped_and_counted(tree, tmp_path, monkeypatch):
    broken(monkeypatch, at_step=1)
    record, checkpoint = trained(tree, tmp_path, *PLAIN, "--if_continue_inf", "--epochs", 2)
    assert record["skipped_updates"] == checkpoint["skipped"] == 2
    assert all(torch.isfinite(v).all() for v in checkpoint["model"].values())
    assert {v["step"].item() for v in checkpoint["optimizer"]["state"].values()} == {4}


# Checkpoints


def test_checkpoint_interval(tree, tmp_path, monkeypatch):
    """`--checkpoint-interval` saves inside an epoch, by steps or by minutes."""
    seen = []
    write = checkpoints.save_atomically
    monkeypatch.setattr(
        checkpoints, "save_atomically", lambda content, path: seen.append((content["epoch"], content["step"])) or
        write(content, path)
    )  # fmt: skip
    trained(tree, tmp_path, *PLAIN, "--checkpoint-interval", 2, "--epochs", 2)
    assert seen == [(0, 2), (1, 0), (1, 2), (2, 0)]
    assert parse_interval("2.5min") == (0, 150.0)
    assert parse_interval("3 steps") == (3, 0.0)
    for text in ("often", "0", "-5", "5h"):
        with pytest.raises(ValueError, match="expected whole steps"):
            parse_interval(text)
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    manager = CheckpointManager(None, parse_args(flags(tree, "--checkpoint-interval", "10min")), CONTEXT)
    assert not manager.due(1000)
    now[0] += 601
    assert manager.due(1)


def test_retention(tree, tmp_path):
    """The last, the one before it, the best by top-1, every second epoch's; nothing else."""
    run.run(flags(tree, "--output_dir", tmp_path, *PLAIN, "--epochs", 5, "--keep-every-epochs", 2, "--lr", 0.05))
    files = {p.name for p in tmp_path.glob("*.pth")}
    assert files == {
        "checkpoint.pth", "previous_checkpoint.pth", "best_checkpoint.pth", "checkpoint_0002.pth", "checkpoint_0004.pth"
    }  # fmt: skip
    epoch = {name: torch.load(tmp_path / name, weights_only=True)["epoch"] for name in files}
    records = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    best = max(range(5), key=lambda k: records[k]["test_acc1"])
    assert epoch == {
        "checkpoint.pth": 5, "previous_checkpoint.pth": 4, "best_checkpoint.pth": best + 1, "checkpoint_0002.pth": 2,
        "checkpoint_0004.pth": 4,
    }  # fmt: skip
    last = torch.load(tmp_path / "checkpoint.pth", weights_only=True)
    assert last["best"] == records[best]["test_acc1"] == records[-1]["best_acc1"]
