"""What flags do to the optimizer, to weight decay and to the learning rate."""

import pytest
import torch
from nano import CONTEXT, parsed, training

from vim.engine.build import build_model, build_training
from vim.errors import UserError


def test_optimizer():
    state = training("--opt", "sgd", "--momentum", 0.7, "--weight-decay", 0.3)
    assert isinstance(state.optimizer, torch.optim.SGD)
    assert {g["momentum"] for g in state.optimizer.param_groups} == {0.7}
    assert {g["weight_decay"] for g in state.optimizer.param_groups} == {0.0, 0.3}
    group = training("--opt-eps", 1e-5, "--opt-betas", 0.8, 0.9).optimizer.param_groups[0]
    assert (group["eps"], tuple(group["betas"])) == (1e-5, (0.8, 0.9))
    assert isinstance(training().optimizer, torch.optim.AdamW)
    with pytest.raises(UserError, match="--opt is 'adamv': timm has no such optimizer"):
        training("--opt", "adamv")


def decayed(*argv):
    state = training("--weight-decay", 0.1, *argv)
    names = {id(p): n for n, p in state.model.named_parameters()}
    return {names[id(p)] for g in state.optimizer.param_groups if g["weight_decay"] for p in g["params"]}


def test_what_is_decayed():
    """Published: every matrix, A_log too; neither vectors nor position embedding and class token."""
    names = decayed()
    model = build_model(parsed(), 10)
    assert {"layers.0.mixer.A_log", "layers.3.mixer.A_b_log", "head.weight"} <= names
    assert names == {n for n, p in model.named_parameters() if p.dim() > 1} - {"pos_embed", "cls_token"}
    assert names - decayed("--no-a-log-decay") == {f"layers.{i}.mixer.A{b}_log" for i in range(6) for b in ("", "_b")}


def test_layer_decay():
    state = training("--layer-decay", 0.5, "--unscale-lr", "--lr", 1.0, "--warmup-epochs", 0)
    names = {id(p): n for n, p in state.model.named_parameters()}
    rate = {names[id(p)]: g["lr_scale"] for g in state.optimizer.param_groups for p in g["params"]}
    # Stem, six blocks, final norm and head: the head at the whole rate, each layer below at half of the one above.
    assert rate["head.weight"] == 1
    assert rate["layers.5.mixer.A_log"] / rate["layers.4.mixer.A_log"] == 2
    assert rate["layers.0.norm.weight"] / rate["pos_embed"] == 2
    assert {g["lr"] for g in state.optimizer.param_groups} == {g["lr_scale"] for g in state.optimizer.param_groups}


def test_learning_rate_is_scaled_by_the_images_of_an_update():
    def rate(*argv, context=CONTEXT):
        args = parsed("--lr", 0.1, "--warmup-epochs", 0, "--sched", "step", *argv)
        state = build_training(build_model(args, 10), args, CONTEXT)
        del context
        return state.optimizer.param_groups[0]["lr"]

    assert rate() == pytest.approx(0.1 * 64 / 512)
    assert rate("--grad-accum-steps", 4) == pytest.approx(0.1 * 256 / 512)
    assert rate("--unscale-lr") == 0.1


def schedule(*argv, epochs=10):
    """Learning rate of each epoch as the run steps the schedule: by the index of the epoch just finished."""
    state = training("--unscale-lr", "--lr", 1.0, "--epochs", epochs, *argv)
    rates = []
    for epoch in range(epochs):
        rates.append(state.optimizer.param_groups[0]["lr"])
        state.scheduler.step(epoch, 50.0)
    return rates


def test_cosine_schedule_with_warmup():
    rates = schedule("--warmup-epochs", 2, "--warmup-lr", 0.25, "--min-lr", 0.125)
    # The second epoch still runs at the first one's rate; the cosine runs over all ten epochs, warm-up inside.
    cosine = [0.125 + 0.4375 * (1 + torch.cos(torch.tensor(torch.pi * t / 10)).item()) for t in range(10)]
    assert rates == pytest.approx([0.25, 0.25, 0.625, *cosine[2:9]])


def test_step_schedule():
    rates = schedule("--sched", "step", "--decay-epochs", 3, "--decay-rate", 0.5, "--warmup-epochs", 0)
    assert rates == pytest.approx([1, 1, 1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25])
    assert schedule("--sched", "step", "--decay-epochs", 3, "--dr", 0.5, "--warmup-epochs", 0) == rates


def test_plateau_schedule():
    """A metric that never improves: one drop after the epochs of patience, then the epochs of rest."""
    flags = ("--sched", "plateau", "--patience-epochs", 1, "--cooldown-epochs", 2, "--decay-rate", 0.5)
    rates = schedule(*flags, "--warmup-epochs", 0, "--min-lr", 0.0, epochs=12)
    drops = [k for k in range(1, 12) if rates[k] < rates[k - 1]]
    assert rates[drops[0]] == 0.5
    # Patience of one (two epochs that do not improve) after two epochs of rest.
    assert drops[1] - drops[0] == 4


def test_plateau_schedule_goes_on_where_it_was():
    flags = ("--sched", "plateau", "--patience-epochs", 2, "--warmup-epochs", 0, "--lr", 1.0, "--unscale-lr")
    whole, halves = training(*flags), training(*flags)
    for epoch in range(2):
        whole.scheduler.step(epoch, 50.0)
        halves.scheduler.step(epoch, 50.0)
    resumed = training(*flags)
    resumed.scheduler.load_state_dict(halves.scheduler.state_dict())
    for epoch in range(2, 4):
        whole.scheduler.step(epoch, 50.0)
        resumed.scheduler.step(epoch, 50.0)
        assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]
    assert whole.optimizer.param_groups[0]["lr"] < 1


def test_multistep_and_constant_schedules():
    flags = ("--sched", "multistep", "--decay-milestones", 2, 5, "--decay-rate", 0.5, "--warmup-epochs", 0)
    assert schedule(*flags) == [1, 1, 0.5, 0.5, 0.5, 0.25, 0.25, 0.25, 0.25, 0.25]
    assert schedule("--sched", "constant", "--warmup-epochs", 0) == [1] * 10


def test_learning_rate_noise():
    flags = ("--sched", "step", "--decay-epochs", 100, "--warmup-epochs", 0, "--lr-noise-pct", 0.5)
    rates = schedule(*flags, "--lr-noise", 0.5, 1.0, "--lr-noise-std", 0.2)
    # Noise from half of the run to its end, bounded by the fraction; the seed makes it repeat.
    assert rates[:6] == [1] * 6
    assert all(r != 1 and 0.5 <= r <= 1.5 for r in rates[6:])
    assert schedule(*flags, "--lr-noise", 0.5, 1.0, "--lr-noise-std", 0.2) == rates
    assert schedule(*flags, "--lr-noise", 0.5, 1.0, "--lr-noise-std", 0.1) != rates
    assert schedule(*flags) == [1] * 10


def test_start_epoch():
    rates = schedule("--warmup-epochs", 0)
    state = training("--unscale-lr", "--lr", 1.0, "--epochs", 10, "--warmup-epochs", 0, "--start_epoch", 4)
    assert state.epoch == 4
    assert state.optimizer.param_groups[0]["lr"] == pytest.approx(rates[4])
