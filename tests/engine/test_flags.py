"""Every flag: its published name and default, its row in docs/training.md, and what it changes."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from timm.data.auto_augment import AutoAugment, RandAugment
from timm.data.random_erasing import RandomErasing
from torchvision import transforms as tv

from vim.data import build_datasets, build_loaders, seed_all
from vim.data.transforms import build_transform
from vim.engine.arguments import build_parser, documentation, notices, parse_args
from vim.engine.build import build_criterion, build_model, build_training
from vim.engine.distributed import DistributedContext, choose_context
from vim.engine.training import model_options
from vim.errors import UserError
from vim.flags import GROUPS, Flags, flag_table

REPOSITORY = Path(__file__).parents[2]
CONTEXT = DistributedContext(torch.device("cpu"))
NANO = (
    "--model", "vim_nano_patch4_32", "--input-size", "32", "--data-set", "FMNIST", "--device", "cpu", "--batch-size",
    "64", "--num_workers", "0",
)  # fmt: skip


def parsed(*argv):
    return parse_args([*NANO, *map(str, argv)])


def training(*argv):
    args = parsed(*argv)
    return build_training(build_model(args, 10), args, CONTEXT)


# Names, defaults and documentation


def published():
    with (Path(__file__).parent / "published_flags.tsv").open() as file:
        return list(csv.DictReader(file, delimiter="\t"))


def by_spelling():
    """Actions of the parser by each of their spellings, help left out."""
    return {s: a for a in build_parser()._actions for s in a.option_strings if s not in ("-h", "--help")}


@pytest.mark.parametrize("row", published(), ids=lambda row: row["flags"])
def test_published_flag(row):
    """Each published flag is there under its names, in both spellings, with its default, type, choices and count."""
    actions, names = by_spelling(), row["flags"].split()
    action = actions[names[0]]
    for name in names:
        word = name.removeprefix("--")
        assert actions[name] is actions["--" + word.replace("-", "_")] is actions["--" + word.replace("_", "-")]
        assert actions[name] is action
    kind = row["type"]
    if names == ["--no_amp"]:
        assert (action.nargs, parsed("--no_amp").if_amp) == (0, False)
        return
    flag, default = flag_table()[action.dest], getattr(Flags(), action.dest)
    if kind.startswith("switch"):
        value, dest = kind.removeprefix("switch:").split("->")
        assert (action.nargs, action.const, action.dest) == (0, value == "true", dest)
        assert default is (row["default"] == "True")
        return
    assert flag.kind.__name__ == kind
    assert default == (None if row["default"] == "None" else flag.kind(row["default"].strip("'")))
    # One value more than published: height and width of rectangles.
    assert action.nargs == (row["nargs"] or ("+" if names == ["--input-size"] else None))
    named = {*(flag.choices or ()), "CIFAR", "IMNET", "INAT", "INAT19"}
    assert set(re.findall(r"'(\w+)'", row["choices"])) <= named


def test_table_of_the_documentation_is_that_of_the_parser():
    text = (REPOSITORY / "docs" / "training.md").read_text()
    assert f"<!-- flags -->\n{documentation()}\n<!-- /flags -->" in text, "run python scripts/update_flag_table.py"
    spelt = set(by_spelling())
    assert set(re.findall(r"`(--[\w-]+)`", documentation())) <= spelt
    assert {min(a.option_strings) for a in by_spelling().values()} <= {
        s for name in re.findall(r"`(--[\w-]+)`", documentation()) for s in by_spelling()[name].option_strings
    }


def test_every_flag_has_a_test():
    rows = list(csv.DictReader((Path(__file__).parent / "flag_tests.tsv").open(), delimiter="\t"))
    actions = by_spelling()
    tested = {actions[row["flag"]].dest for row in rows}
    assert tested == {action.dest for action in actions.values()}
    for row in rows:
        for reference in row["tests"].split():
            file, function = reference.split("::")
            source = (REPOSITORY / "tests" / f"{file}.py").read_text()
            assert f"def {function}(" in source, f"{row['flag']}: no {function} in {file}"


@pytest.mark.slow
def test_functions_read_only_the_flags_of_their_group():
    """mypy sees the groups in the signatures; an attribute of another group would be an error."""
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--config-file=", "--follow-imports=silent", "--ignore-missing-imports",
         "vim/engine", "vim/data", "vim/flags.py"],
        cwd=REPOSITORY, text=True, capture_output=True,
    )  # fmt: skip
    groups = "|".join(group.__name__ for group in (*GROUPS, Flags))
    wrong = [line for line in done.stdout.splitlines() if re.search(rf'"({groups})".*(attribute|argument)', line)]
    assert "Found" in done.stdout or "Success" in done.stdout, done.stderr
    assert not wrong, wrong


def test_help_says_every_default():
    text = " ".join(build_parser().format_help().split())
    assert text.count("(default: ") == len(flag_table())


@pytest.mark.parametrize("name", [n for n, f in flag_table().items() if f.kind in (int, float)])
def test_every_number_has_bounds(name):
    """NaN, infinity, text, nothing, and numbers beyond any sense are refused by the name of the flag."""
    flag = flag_table()[name]
    assert flag.bounds is not None or flag.choices is not None
    count = flag.counts[0] if flag.counts else 1
    spelt = flag.names[0].replace("_", "-")
    for value in ("nan", "inf", "-inf", "1e400", "9" * 400, "x", "", "1,5", "-1e9", "0x10", "\0"):
        with pytest.raises(UserError, match=f"{spelt} (is|holds)"):
            parsed(f"{flag.names[0]}={value}", *["1"] * (count - 1)) if count == 1 else flag.convert(
                [value] * count, spelt
            )


@pytest.mark.parametrize("name", [n for n, f in flag_table().items() if f.kind is str])
def test_no_text_holds_nul(name):
    flag = flag_table()[name]
    with pytest.raises(UserError, match=r"NUL|expected one of"):
        parsed(f"{flag.names[0]}=a\0b")


def test_values_of_a_recipe_are_checked_like_those_of_the_command_line(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "lr: 5e-4\nmodel-kwargs: {stride: 2}\nopt_betas: [0.9, 0.99]\nThreeAugment: true\nclip-grad: null"
    )
    args = parsed("--config", recipe, "--lr", "1.0")
    assert (args.lr, args.model_kwargs, args.opt_betas, args.ThreeAugment) == (1.0, {"stride": 2}, [0.9, 0.99], True)
    assert parsed("--config", recipe).lr == 5e-4
    for text, words in (
        ("epochs: 2.5", "expected a whole number"),
        ("epochs: many", "expected a whole number"),
        ("smoothing: .nan", r"expected a number in \[0, 1\)"),
        ("momentum: -0.1", r"expected a number in \[0, 1\)"),
        ("eval: 1", "true or false"),
        ("sched: cosin", "expected one of cosine"),
        ("opt-betas: 0.9", "expected a list"),
        ("model-kwargs: 3", "expected a mapping"),
        ("learning-rate: 3", "unknown flags"),
    ):
        recipe.write_text(text)
        with pytest.raises(UserError, match=words):
            parsed("--config", recipe)


# Model


def test_dropout_and_stochastic_depth():
    model = build_model(parsed("--drop", 0.25, "--drop-path", 0.3), 10)
    assert model.pos_drop.p == 0.25
    # 6 blocks: rates 0, 0.06, ... shifted by one, the final add with the whole rate.
    rates = [getattr(layer.drop_path, "drop_prob", 0.0) for layer in model.layers]
    assert rates == pytest.approx([0, 0, 0.06, 0.12, 0.18, 0.24])
    assert model.drop_path.drop_prob == 0.3


def test_size_channels_and_classes():
    args = parsed("--input-size", 28, "--in-chans", 1, "--data-path", "", "--num-classes", 10)
    model = build_model(args, 10)
    assert model.patch_embed.img_size == (28, 28)
    assert model.patch_embed.proj.weight.shape[1] == 1
    _, data, classes = build_datasets(args)
    assert (data[0][0].shape, classes) == ((1, 28, 28), 10)


def test_model_kwargs():
    model = build_model(parsed("--model-kwargs", "stride=2", "depth=4"), 10)
    assert (model.patch_embed.stride, len(model.layers)) == ((2, 2), 4)
    with pytest.raises(UserError, match="expected KEY=VALUE"):
        parsed("--model-kwargs", "stride")
    with pytest.raises(UserError, match="strid"):
        build_model(parsed("--model-kwargs", "strid=2"), 10)


def test_average_of_the_weights():
    assert training("--no-model-ema").ema is None
    state = training("--model-ema-decay", 0.75, "--model-ema-force-cpu")
    assert state.ema.device == torch.device("cpu")
    name, parameter = next(iter(state.model.named_parameters()))
    before = parameter.detach().clone()
    with torch.no_grad():
        parameter += 1
    state.ema.update(state.model)
    assert training().ema.decay == 0.99996
    torch.testing.assert_close(dict(state.ema.module.named_parameters())[name], before + 0.25)


def test_attn_only_trains_mixers_embeddings_and_head():
    state = training("--attn-only", "--no-model-ema")
    frozen = {n for n, p in state.model.named_parameters() if not p.requires_grad}
    assert frozen == {*(f"layers.{i}.norm.weight" for i in range(6)), "norm_f.weight", "patch_embed.proj.weight",
                      "patch_embed.proj.bias"}  # fmt: skip
    assert sum(len(g["params"]) for g in state.optimizer.param_groups) == len(list(state.model.parameters())) - 9
    args = parsed("--attn-only", "--model", "resnet10t")
    with pytest.raises(UserError, match="neither"):
        build_training(build_model(args, 10), args, CONTEXT)


def test_random_class_token_position_and_token_rank():
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model = build_model(parsed(), 10).eval()
    for flag in ("--if_random_cls_token_position", "--if_random_token_rank"):
        options = model_options(parsed(flag), model)
        outputs = []
        for seed in (0, 0, 1):
            seed_all(seed)
            outputs.append(model(image, **options))
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.allclose(outputs[0], outputs[2], atol=1e-7)
        off = flag.replace("--if", "--no")
        assert model_options(parsed(flag, off), model) == {}
        with pytest.raises(UserError, match="for Vision Mamba models"):
            model_options(parsed(flag, "--model", "resnet10t"), torch.nn.Identity())


def test_grad_checkpointing():
    assert training("--grad-checkpointing").model.grad_checkpointing
    assert not training().model.grad_checkpointing


# Optimizer and schedule


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


# Augmentation


def transform(*argv, train=True):
    built = build_transform(train, parsed("--input-size", 48, *argv))
    return {type(t): t for t in built.transforms}


def test_augmentation():
    steps = transform("--train-interpolation", "bilinear", "--reprob", 0.5, "--remode", "const", "--recount", 3)
    crop = next(t for kind, t in steps.items() if kind.__name__ == "RandomResizedCropAndInterpolation")
    assert crop.interpolation == tv.InterpolationMode.BILINEAR
    erasing = steps[RandomErasing]
    assert (erasing.probability, erasing.max_count) == (0.5, 3)
    assert not erasing.per_pixel
    assert not erasing.rand_color
    assert transform("--remode", "rand")[RandomErasing].rand_color
    assert transform()[RandomErasing].per_pixel
    assert RandomErasing not in transform("--reprob", 0)
    assert len(transform()[RandAugment].ops) == 15
    assert transform("--aa", "rand-m3-n4")[RandAugment].num_layers == 4
    assert AutoAugment in transform("--aa", "original")
    jitter = transform("--aa", "none", "--color-jitter", 0.2)[tv.ColorJitter]
    assert jitter.brightness == (0.8, 1.2)
    assert not {RandAugment, tv.ColorJitter} & set(transform("--aa", "none", "--color-jitter", 0))


@pytest.mark.parametrize("policy", ["rand-m10-mstd0.5-inc1", "original"])
def test_posterize_to_no_bits_is_black(policy):
    """At full magnitude the published policy keeps no bit of a colour, which newer versions of Pillow refuse."""
    found = 0
    for kind, step in transform("--aa", policy).items():
        if kind not in (RandAugment, AutoAugment):
            continue
        for op in step.ops if kind is RandAugment else [op for sub in step.policy for op in sub]:
            if "Posterize" in op.name:
                found += 1
                image = tv.ToPILImage()(torch.full((3, 4, 4), 0.9))
                assert not any(map(any, op.aug_fn(image, 0).getextrema()))
                assert op.aug_fn(image, 1).getextrema() == ((128, 128),) * 3
    assert found


def test_three_augment():
    steps = transform("--ThreeAugment", "--color-jitter", 0.4)
    choices = {type(t) for t in steps[tv.RandomChoice].transforms}
    assert choices == {tv.Grayscale, tv.RandomSolarize, tv.GaussianBlur}
    assert steps[tv.ColorJitter].contrast == (0.6, 1.4)
    assert tv.RandomResizedCrop in steps
    simple = transform("--ThreeAugment", "--src")
    assert tv.RandomCrop in simple
    assert tv.RandomResizedCrop not in simple
    seed_all(0)
    image = tv.ToPILImage()(torch.rand(3, 60, 70))
    assert build_transform(True, parsed("--ThreeAugment", "--src"))(image).shape == (3, 32, 32)


def test_small_images_get_a_padded_crop():
    built = build_transform(True, parsed("--input-size", 32)).transforms[0]
    assert [type(t) for t in built.transforms] == [tv.Resize, tv.RandomCrop]
    assert built.transforms[1].padding == 4


def test_evaluation_crop_and_train_mode():
    steps = transform("--eval-crop-ratio", 0.75, train=False)
    assert steps[tv.Resize].size == 64
    assert steps[tv.CenterCrop].size == (48, 48)
    assert set(transform("--no-train-mode")) == set(steps)


def test_mixup():
    flags = ("--mixup", 0.1, "--cutmix", 0.2, "--mixup-prob", 0.3, "--mixup-switch-prob", 0.4, "--mixup-mode", "elem")
    mix = build_criterion(parsed(*flags, "--smoothing", 0.15), CONTEXT, 10).mixup
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.mix_prob, mix.switch_prob, mix.mode, mix.label_smoothing) == (
        0.1, 0.2, 0.3, 0.4, "elem", 0.15,
    )  # fmt: skip
    ranged = build_criterion(parsed("--cutmix-minmax", 0.2, 0.8), CONTEXT, 10).mixup
    assert list(ranged.cutmix_minmax) == [0.2, 0.8]
    assert build_criterion(parsed("--mixup", 0, "--cutmix", 0), CONTEXT, 10).mixup is None


# Loaders and processes


def test_repeated_augmentation():
    """Three copies of a third of the samples, in place of each sample once."""
    args = parsed("--batch-size", 16)
    train_set, eval_set, _ = build_datasets(args)
    for flags, copies in (((), 3), (("--no-repeated-aug",), 1)):
        loader, _ = build_loaders(parsed(*flags), train_set, eval_set, world_size=1, rank=0)
        indices = [index for _, _, index in loader.sampler]
        counts = torch.bincount(torch.tensor(indices), minlength=len(train_set))
        # The last sample of all may be cut short of its copies by the rounding to whole batches.
        assert (counts[counts > 0] == copies).sum() >= (counts > 0).sum() - 1


def test_workers_and_pinning(monkeypatch):
    monkeypatch.setattr("vim.data.loaders._cores", lambda: 4)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    train_set, eval_set, _ = build_datasets(parsed())
    for flags, workers, pinned in ((("--num_workers", 9), 4, True), (("--num_workers", 3, "--no-pin-mem"), 3, False)):
        loaders = build_loaders(parsed(*flags), train_set, eval_set, world_size=1, rank=0)
        for loader in (loaders[0].loader, loaders[1]):
            assert (loader.num_workers, loader.pin_memory) == (workers, pinned)


def test_seed():
    def first(seed):
        train_set, eval_set, _ = build_datasets(parsed())
        args = parsed("--seed", seed)
        loader, _ = build_loaders(args, train_set, eval_set, world_size=1, rank=0)
        return next(iter(loader))[0]

    assert torch.equal(first(1), first(1))
    assert not torch.equal(first(1), first(2))


def test_processes_need_a_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert choose_context(parsed("--world_size", 1, "--dist_url", "env://", "--local-rank", 0)).world_size == 1
    for flags in (("--distributed",), ("--world_size", 2)):
        with pytest.raises(UserError, match="torchrun"):
            choose_context(parsed(*flags))
    with pytest.raises(UserError, match="--fsdp shards"):
        choose_context(parsed("--fsdp"))
    with pytest.raises(UserError, match="expected one of cuda, cpu"):
        choose_context(parsed("--device", "tpu"))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UserError, match="launcher started 3"):
        choose_context(parsed("--world_size", 2))


def test_precision_flags():
    assert not parsed().if_amp
    assert (parsed("--if_amp").if_amp, parsed("--if_amp").amp_dtype) == (True, "bfloat16")
    assert parsed("--amp-dtype", "float16").if_amp
    undone = parsed("--amp-dtype", "float16", "--no_amp")
    assert (undone.if_amp, undone.amp_dtype) == (False, None)
    assert training("--amp-dtype", "bfloat16").scaler is None
    assert training("--amp-dtype", "float16").scaler is not None


def test_what_cannot_work_in_a_short_run_is_said():
    said = notices(parsed("--epochs", 3), 12)
    assert len(said) == 2
    assert "warms up for 5 epochs and the run has 3" in said[0]
    assert "after the 36 updates" in said[1]
    assert notices(parsed("--epochs", 300), 2000) == []
