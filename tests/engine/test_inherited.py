"""What a run takes over from a checkpoint, and what it refuses: flags, options, classes, optimizer, weights."""

import copy
import json
import resource
import shutil
from pathlib import Path

import pytest
import torch

from vim.data import build_datasets
from vim.engine import checkpoints, run
from vim.engine.arguments import parse_args
from vim.engine.checkpoints import CheckpointManager
from vim.engine.distributed import DistributedContext
from vim.engine.reporting import to_json
from vim.errors import UserError

NANO = (
    "--model", "vim_nano_patch4_32", "--input-size", "32", "--batch-size", "8", "--num_workers", "0", "--device", "cpu",
    "--warmup-epochs", "0", "--aa", "none", "--no-repeated-aug", "--epochs", "1", "--trackers", "tensorboard",
)  # fmt: skip
SMALL = ("--model-kwargs", "depth=1", "embed_dim=32")
OPTIONS = (*SMALL, "if_divide_out=False")


def flags(tree, *argv):
    return [*NANO, "--data-path", str(tree), *map(str, argv)]


@pytest.fixture(scope="module")
def trained(tree, tmp_path_factory):
    """Folder of a run of one epoch, with an option that no weight's shape shows."""
    folder = tmp_path_factory.mktemp("run")
    run.run(flags(tree, *OPTIONS, "--lr", 0.05, "--output_dir", folder, "--keep-every-epochs", 1))
    return folder


@pytest.fixture
def content(trained):
    return torch.load(trained / "checkpoint.pth", weights_only=True)


@pytest.fixture
def folder(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def saved(tmp_path, content):
    path = tmp_path / "changed.pth"
    torch.save(content, path)
    return path


def evaluated(path, *argv):
    return run.run(["--eval", "--resume", str(path), *map(str, argv)])


# The optimizer's state


def test_another_image_size_is_refused(folder, tree):
    """The position embedding would be resampled, but not what AdamW knows of it."""
    with pytest.raises(
        UserError, match=r"a grid of 8 × 8 patches and this run's is 10 × 10.*--finetune starts from the weights"
    ):
        run.run(["--resume", str(folder / "checkpoint.pth"), "--input-size", "40", "--epochs", "2"])


def _shape(optimizer):
    optimizer["state"]["head.weight"]["exp_avg"] = torch.zeros(1, 32)


def _dtype(optimizer):
    optimizer["state"]["head.bias"]["exp_avg_sq"] = torch.zeros(3, dtype=torch.float64)


def _expanded(optimizer):
    optimizer["state"]["head.weight"]["exp_avg"] = torch.zeros(1).expand(3, 32)


def _unknown(optimizer):
    optimizer["state"]["tail.weight"] = optimizer["state"]["head.weight"]


def _missing(optimizer):
    del optimizer["state"]["head.bias"]["exp_avg"]


def _groups(optimizer):
    optimizer["param_groups"][0]["params"].append(optimizer["param_groups"][1]["params"].pop())


def _group_count(optimizer):
    optimizer["param_groups"].append(optimizer["param_groups"][0])


def _text(optimizer):
    optimizer["param_groups"][0]["lr"] = "fast"


def _names(optimizer):
    optimizer["param_groups"][0]["params"] = 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_shape, r"head\.weight: exp_avg is \(1, 32\)"), (_dtype, "head.bias: exp_avg_sq is .*float64"),
        (_expanded, "an expanded tensor"), (_unknown, "a state of tail.weight, which the model has not"),
        (_missing, "head.bias has other entries"), (_groups, "groups of"), (_group_count, "groups of"),
        (_text, "lr is no number"), (_names, "name no parameters"),
    ],
)  # fmt: skip
def test_tampered_optimizer_states_are_refused(content, tmp_path, change, words):
    change(content["optimizer"])
    with pytest.raises(UserError, match=words) as caught:
        run.run(["--resume", str(saved(tmp_path, content)), "--epochs", "2"])
    assert "--finetune" in str(caught.value)


@pytest.mark.parametrize(
    ("entry", "value", "words"),
    [
        ("epoch", "1", "its epoch is a str"), ("step", -1, "its step is -1"), ("world_size", 0, "its world_size is 0"),
        ("optimizer", None, "its optimizer is a NoneType"), ("model", [], "its model is a list"),
        ("args", None, "its args is a NoneType"), ("args", [1], "its args is a list"),
        ("best", {}, "its best is a dict"),
        ("lr_scheduler", {"t": 1}, "the schedule has other entries"), ("format_version", "x", "format version x"),
    ],
)  # fmt: skip
def test_entries_of_other_types_are_refused(content, tmp_path, entry, value, words):
    content[entry] = value
    with pytest.raises(UserError, match=words):
        run.run(["--resume", str(saved(tmp_path, content))])
    del content[entry]
    if entry != "format_version":
        with pytest.raises(UserError, match=f"lacks {entry}"):
            run.run(["--resume", str(saved(tmp_path, content))])


# Flags


def _laughs():
    value = "ha"
    for _ in range(40):
        value = [value, value]
    return value


@pytest.mark.parametrize(
    ("flag", "value", "words"),
    [
        ("epochs", [1], "epochs of the checkpoint's args is .*expected one value"),
        ("epochs", _laughs(), "expected one value"),
        ("model_kwargs", {"depth": _laughs()}, "expected a mapping of argument names"),
        ("model_kwargs", [], "expected a mapping"), ("batch_size", "many", "expected a whole number"),
        ("opt_betas", [_laughs()], "takes 2 to 3 values"), ("mixup", {}, "expected one value"),
        ("cache", "yes", "true or false"),
        ("data_path", 3.5, "3.5"), ("input_size", 10**6, "."), ("inat_category", "colour", "expected one of"),
    ],
)  # fmt: skip
def test_flags_of_other_types_are_refused(content, tmp_path, flag, value, words):
    content["args"][flag] = value
    with pytest.raises(UserError, match=words) as caught:
        evaluated(saved(tmp_path, content))
    assert len(str(caught.value)) < 2000


def test_flags_that_this_version_does_not_know_are_passed_over(content, tmp_path):
    content["args"]["flag_of_another_version"] = _laughs()
    assert evaluated(saved(tmp_path, content))["test_images"] == 12


@pytest.mark.parametrize("by", ["set", "path", "split"])
def test_a_checkpoint_cannot_name_a_command(content, tmp_path, by):
    """webdataset runs what follows `pipe:`; where the data is comes from the command line alone."""
    pytest.importorskip("webdataset")
    touched = tmp_path / "touched"
    command = f"pipe:touch {touched}"
    places = {
        "set": {"data_set": "wds/x", "data_path": command},
        "path": {"data_path": command, "eval_split": "shard-0.tar|8"},
        "split": {"data_set": "wds/x", "data_path": str(tmp_path), "eval_split": f"{command}.tar|8"},
    }  # fmt: skip
    content["args"] |= {**places[by], "num_classes": 3}
    argv = {"set": [], "path": ["--data-set", "wds/x"], "split": ["--data-set", "wds/x", "--data-path", tmp_path]}[by]
    with pytest.raises(UserError, match=r"pass --data-set and --data-path|needs --data-path|cannot be read"):
        evaluated(saved(tmp_path, content), *argv)
    assert not touched.exists()


def test_models_that_fit_no_memory_are_refused(content, tmp_path):
    content["args"]["model_kwargs"] = {"d_state": 10**9}
    with pytest.raises(UserError, match=r"d_state is 1000000000, expected .* at most 1,024"):
        evaluated(saved(tmp_path, content))
    content["args"]["model_kwargs"] = {"embed_dim": 2**16, "depth": 100}
    with pytest.raises(UserError, match=r"its weights take .* GiB"):
        evaluated(saved(tmp_path, content))
    content["args"]["model_kwargs"] = {"pretrained_cfg_overlay": {"file": "/etc/passwd"}}
    with pytest.raises(UserError, match="loads weights"):
        evaluated(saved(tmp_path, content))


# Model options


def test_options_are_compared_for_finetune(trained, tree, caplog):
    """Evaluated as trained or not at all: `if_divide_out` halves what every block adds and has no weight."""
    path = trained / "checkpoint.pth"
    expected = evaluated(path)
    with pytest.raises(UserError, match="trained with --model-kwargs if_divide_out=False, which this command does not"):
        run.run(flags(tree, "--eval", "--finetune", path, *SMALL))
    assert "the checkpoint is of" not in caplog.text
    record = run.run(flags(tree, "--eval", "--finetune", path, *OPTIONS))
    assert record["test_loss"] == expected["test_loss"]
    assert "the checkpoint is of" not in caplog.text
    other = run.run(flags(tree, "--eval", "--finetune", path, *SMALL, "if_divide_out=True"))
    assert other["test_loss"] != expected["test_loss"]
    assert "the checkpoint is of vim_nano_patch4_32" in caplog.text


# Classes


def test_classes_and_grid_are_stored(content):
    assert content["classes"] == ["blue", "green", "red"]
    assert content["grid"] == (8, 8)


def reordered(content, order):
    """The same model with its classes numbered otherwise, as of a data set that does not sort its names."""
    content = copy.deepcopy(content)
    content["classes"] = [content["classes"][k] for k in order]
    moments = content["optimizer"]["state"]
    for name in ("head.weight", "head.bias"):
        for context, key in (
            (content["model"], name), (content["model_ema"], name), (moments[name], "exp_avg"),
            (moments[name], "exp_avg_sq"),
        ):  # fmt: skip
            context[key] = context[key][order]
    return content


def test_a_permutation_is_matched_by_name(content, trained, tmp_path):
    """Evaluated, continued and fine-tuned as if the numbers were the folders'."""
    path = saved(tmp_path, reordered(content, [2, 0, 1]))
    for key in ("test_loss", "ema_test_loss"):
        # Another order of the sum in the softmax.
        assert evaluated(path)[key] == pytest.approx(evaluated(trained / "checkpoint.pth")[key], rel=1e-5)
    losses = []
    for start in (path, trained / "checkpoint.pth"):
        argv = ("--resume", str(start), "--epochs", "2", "--output_dir", str(tmp_path / start.stem))
        losses.append(run.run(list(argv))["train_loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert torch.load(tmp_path / "changed" / "checkpoint.pth", weights_only=True)["classes"] == ["red", "blue", "green"]


def test_finetune_matches_the_head_by_name(content, trained, tree, tmp_path, caplog):
    argv = flags(tree, *OPTIONS, "--lr", 0, "--min-lr", 0, "--warmup-lr", 0, "--weight-decay", 0, "--finetune")
    paths = saved(tmp_path, reordered(content, [2, 0, 1])), trained / "checkpoint.pth"
    records = [run.run([*argv, str(path)]) for path in paths]
    assert records[0]["test_loss"] == pytest.approx(records[1]["test_loss"], rel=1e-5)
    assert "matched by name" in caplog.text
    content["classes"] = ["cat", "dog", "red"]
    record = run.run([*argv, str(saved(tmp_path, content))])
    assert "other classes (blue, green, red) than the checkpoint (cat, dog, red): the head starts afresh" in caplog.text
    assert record["test_loss"] != records[1]["test_loss"]


@pytest.fixture
def subset(tree, tmp_path):
    """The folders of two of the three classes."""
    root = Path(shutil.copytree(tree, tmp_path / "subset"))
    for split in ("train", "val"):
        shutil.rmtree(root / split / "blue")
    return root


def test_a_subset_is_matched_by_name(trained, subset, tree):
    """Two of three classes get their own outputs: the figures of an index file that says the same."""
    index = subset / "index.txt"
    index.write_text("green 1\nred 2\n")
    record = evaluated(trained / "checkpoint.pth", "--data-path", subset)
    by_index = evaluated(trained / "checkpoint.pth", "--data-path", subset, "--class-index", index)
    assert record["test_loss"] == by_index["test_loss"]
    assert record["test_images"] == 8
    args = parse_args([*flags(tree), "--eval", "--resume", "x"])
    assert build_datasets(args)[2] == 3


def test_other_classes_are_refused(trained, subset):
    for split in ("train", "val"):
        (subset / split / "green").rename(subset / split / "violet")
    for argv, words in ((["--eval"], "pass --class-index FILE"), (["--epochs", "2"], "--finetune starts with new")):
        with pytest.raises(UserError, match=rf"1 of the data's 2 classes .*\(violet; it knows blue.*{words}"):
            run.run(["--resume", str(trained / "checkpoint.pth"), "--data-path", str(subset), *argv])


# Figures that are not finite


def test_evaluation_that_is_not_finite_is_refused(content, tmp_path, capsys):
    """Weights that hold NaN are named; finite ones whose outputs overflow are told by the loss."""
    table = tmp_path / "classes.csv"
    content["model"]["head.weight"] = torch.full((3, 32), 3e38)
    path = saved(tmp_path, content)
    assert run.main(["--eval", "--resume", str(path), "--per-class-csv", str(table)]) == 2
    captured = capsys.readouterr()
    assert "error: the loss over the 12 test images is nan: the model's outputs are not finite" in captured.err
    assert captured.out == ""
    assert not table.exists()
    content["model"]["head.weight"][1, 2] = float("nan")
    assert run.main(["--eval", "--resume", str(saved(tmp_path, content))]) == 2
    captured = capsys.readouterr()
    assert "head.weight holds 1 values that are not finite" in captured.err
    assert captured.out == ""


def test_json_knows_no_nan():
    line = to_json({"a": float("nan"), "b": float("-inf"), "c": 1.5, "d": 3, "e": "x"})
    assert json.loads(line, parse_constant=pytest.fail) == {"a": None, "b": None, "c": 1.5, "d": 3, "e": "x"}


# The folder


def test_auto_falls_back_from_a_flipped_bit(folder, caplog):
    """The last checkpoint has another bit somewhere in its tensors: the epoch's own serves."""
    path = folder / "checkpoint.pth"
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 16
    path.unlink()
    path.write_bytes(damaged)
    checkpoint = checkpoints.read("auto", str(folder))
    assert "does not match its checksum" in caplog.text
    assert checkpoint["epoch"] == 1


def test_nothing_to_evaluate_is_said(tree, tmp_path):
    with pytest.raises(UserError, match="found no checkpoint to evaluate in"):
        run.run(flags(tree, "--eval", "--resume", "auto", "--output_dir", tmp_path))


def test_leftovers_of_killed_saves_are_removed(folder):
    args = parse_args([*NANO, "--data-path", "x"])
    for name in (".checkpoint.pth.tmp", ".best_checkpoint.pth.tmp", ".mine"):
        (folder / name).write_bytes(b"half")
    CheckpointManager(folder, args, DistributedContext(torch.device("cpu"), rank=1, world_size=2))
    assert (folder / ".checkpoint.pth.tmp").exists()
    CheckpointManager(folder, args, DistributedContext(torch.device("cpu")))
    assert sorted(p.name for p in folder.glob(".*")) == [".mine"]


def test_a_full_disk_keeps_the_checkpoint_before(folder, capsys):
    """Files may not grow beyond 100 KiB: the run ends with one sentence, and the old file is whole."""
    before = (folder / "checkpoint.pth").read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100 * 1024, limits[1]))
    try:
        assert run.main(["--resume", "auto", "--output_dir", str(folder), "--epochs", "2", "--num_workers", "0"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    error = capsys.readouterr().err
    assert "checkpoint.pth cannot be written (the disk is full" in error
    assert "Traceback" not in error
    assert (folder / "checkpoint.pth").read_bytes() == before
    assert not list(folder.glob(".*"))
    assert checkpoints.read("auto", str(folder))["epoch"] == 1


def test_resume_applies_the_flags_of_the_optimizer(folder):
    path = folder / "checkpoint.pth"
    run.run(["--resume", str(path), "--epochs", "2", "--weight-decay", "0.3", "--opt-eps", "1e-6", "--opt-betas",
             "0.8", "0.9", "--output_dir", str(folder)])  # fmt: skip
    groups = torch.load(path, weights_only=True)["optimizer"]["param_groups"]
    assert {g["weight_decay"] for g in groups} == {0.0, 0.3}
    assert {(g["eps"], tuple(g["betas"])) for g in groups} == {(1e-6, (0.8, 0.9))}
    with pytest.raises(UserError, match=r"trained with --opt adamw and this run has --opt lamb"):
        run.run(["--resume", str(path), "--epochs", "3", "--opt", "lamb"])
