"""Every flag: its published name and default, its row in docs/training.md, and what it changes."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from nano import CONTEXT, parsed, training

from vim.data import build_datasets, seed_all
from vim.engine.arguments import build_parser, documentation, notices
from vim.engine.build import build_model, build_training
from vim.engine.distributed import choose_context
from vim.engine.training import model_options
from vim.errors import UserError
from vim.flags import GROUPS, Flags, flag_table

REPOSITORY = Path(__file__).parents[2]


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
         "vim/engine", "vim/data", "vim/flags"],
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


# Processes and precision


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
