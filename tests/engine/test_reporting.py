"""What a run leaves: JSON lines, plain lines, TensorBoard's events, other trackers, the summary, pictures."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vim.engine import run
from vim.engine.arguments import parse_args
from vim.engine.reporting import Reporter
from vim.engine.trackers import picture
from vim.errors import UserError

REPOSITORY = Path(__file__).parents[2]
NANO = (
    "--model", "vim_nano_patch4_32", "--input-size", "32", "--batch-size", "8", "--num_workers", "0", "--device", "cpu",
    "--warmup-epochs", "0", "--no-repeated-aug", "--print-every-steps", "1", "--epochs", "2",
)  # fmt: skip


def train(tree, folder, *argv):
    return run.run([*NANO, "--data-path", str(tree), "--output_dir", str(folder), *map(str, argv)])


@pytest.fixture(scope="module")
def finished(tree, tmp_path_factory):
    """Folder of a run of two epochs of three steps, with histograms."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    train(tree, folder, "--histograms")
    return folder


def records(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def events(folder):
    accumulator = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    return accumulator.Reload()


def test_json_lines(finished):
    names = {
        "epoch", "train_loss", "train_grad_norm", "train_lr", "train_images_per_s", "train_s", "train_data_wait_s",
        "train_memory_mib", "skipped_updates", "bad_images", "test_loss", "test_acc1", "test_acc5", "test_images",
        "test_images_per_s", "ema_test_acc1", "best_acc1", "train_device_wait_s",
    }  # fmt: skip
    for k, record in enumerate(records(finished)):
        assert names <= set(record)
        assert record["epoch"] == k
        assert record["train_images_per_s"] == pytest.approx(24 / record["train_s"])
        assert 0 <= record["train_data_wait_s"] + record["train_device_wait_s"] <= record["train_s"]
        # A process with torch in it, and not a machine's worth.
        assert 50 < record["train_memory_mib"] < 1e6


def test_tensorboard(finished):
    """Each figure of the log under its name, figures of single steps, the first batch's images, histograms."""
    found = events(finished)
    tags = found.Tags()
    for name in ("train_loss", "test_acc1", "test_acc5", "train_lr", "train_grad_norm", "train_images_per_s",
                 "train_memory_mib", "train_data_wait_s", "ema_test_acc1"):  # fmt: skip
        scalars = found.Scalars(name)
        assert [s.step for s in scalars] == [0, 1]
        assert [s.value for s in scalars] == pytest.approx([r[name] for r in records(finished)], rel=1e-6)
    for name in ("loss", "lr", "grad_norm", "images_per_s", "step_ms", "data_wait_ms", "device_wait_ms", "memory_mib"):
        assert [s.step for s in found.Scalars(f"step/{name}")] == [1, 2, 3, 4, 5, 6]
    mean = sum(s.value for s in found.Scalars("step/loss")[:3]) / 3
    assert mean == pytest.approx(records(finished)[0]["train_loss"], rel=1e-5)
    assert tags["images"] == ["samples"]
    # Eight images of 32 pixels in rows of four, two pixels apart.
    assert (found.Images("samples")[0].width, found.Images("samples")[0].height) == (138, 70)
    assert {"weights/head.weight", "gradients/layers.0.mixer.A_log"} <= set(tags["histograms"])
    assert len(found.Histograms("weights/head.weight")) == 2


def test_plain_lines(finished):
    """The lines of a log file: each step with its rate, its time, the wait in it and what is left; then the summary."""
    text = (finished / "run.log").read_text()
    line = next(line for line in text.splitlines() if "epoch 1/2  1/3" in line)
    assert re.search(
        r"^[\d-]+ [\d:,]+  epoch 1/2  1/3  loss \d\.\d{4}  \d+ images/s  step \d+ ms \(data \d+\)"
        r"  lr \d\.\d\de-\d\d  \d+ s left$", line
    ), line  # fmt: skip
    best = max(r["test_acc1"] for r in records(finished))
    assert re.search(r"done: 2 epochs in 0:\d\d:\d\d: \d+ s of training at \d+ images/s", text)
    assert f"best {best:.2f} %" in text
    for record in records(finished):
        assert f"averaged {record['ema_test_acc1']:.2f} %" in text
    assert "0 updates skipped, 0 bad images" in text
    assert f"checkpoints and log in {finished}" in text


def test_parts_of_a_step_on_a_gpu(tree, tmp_path, monkeypatch, caplog):
    """The wait for data, the host's own time, and the wait for the device add up to the step."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    reporter = Reporter(None, parse_args([]), enabled=True)
    reporter.start("epoch 1/1", 2)
    with caplog.at_level("INFO"):
        for _ in range(2):
            reporter.step(loss=1.0, images=8, train={"lr": 1e-3}, data_wait=10.0, device_wait=20.0)
    data, host, device = map(int, re.search(r"\(data (\d+), host (\d+), GPU (\d+)\)", caplog.text).groups())
    assert (data, host, device) == (10_000, 0, 20_000)


def test_profile(tree, tmp_path):
    """A trace of the steps after the first five, and a table of what takes the time."""
    folder = tmp_path / "run"
    train(tree, folder, "--profile", 2, "--epochs", 3, "--batch-size", 8)
    with gzip.open(folder / "profile" / "trace.json.gz", "rt") as file:
        names = [event.get("name") for event in json.load(file)["traceEvents"]]
    assert {name for name in names if str(name).startswith("ProfilerStep")} == {"ProfilerStep#5", "ProfilerStep#6"}
    table = (folder / "profile" / "table.txt").read_text()
    assert "# of Calls" in table
    assert "aten::_fused_adamw_" in table


def test_profile_of_a_short_run(tree, tmp_path, caplog):
    train(tree, tmp_path / "run", "--profile", 2, "--epochs", 1)
    assert "the run ended within its first 5 steps" in caplog.text
    assert not (tmp_path / "run" / "profile").exists()


def test_live_bar(tree, tmp_path, monkeypatch, capsys):
    """On a terminal a bar takes the place of the steps' lines, which still reach the file."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    train(tree, tmp_path, "--epochs", 1)
    shown = capsys.readouterr().err
    assert "1/3" in (tmp_path / "run.log").read_text()
    assert "s left" not in shown
    assert "epoch 1/1" in shown


def test_resumed_run_goes_on_with_its_log(tree, tmp_path):
    train(tree, tmp_path, "--epochs", 1)
    train(tree, tmp_path, "--resume", "auto", "--epochs", 2)
    assert [r["epoch"] for r in records(tmp_path)] == [0, 1]
    found = events(tmp_path)
    assert [s.step for s in found.Scalars("step/loss")] == [1, 2, 3, 4, 5, 6]
    assert [s.step for s in found.Scalars("test_acc1")] == [0, 1]
    assert len(found.Images("samples")) == 1


def test_no_trackers(tree, tmp_path):
    train(tree, tmp_path, "--epochs", 1, "--trackers", "none")
    assert not (tmp_path / "tensorboard").exists()
    assert len(records(tmp_path)) == 1


def test_picture():
    images = torch.rand(20, 1, 4, 5)
    shown = picture(images * 2 - 1, (0.5,), (0.5,), count=4)
    assert shown.shape == (3, 4 + 4, 4 * (5 + 2) + 2)
    # Two pixels of margin; grey images in all three channels.
    torch.testing.assert_close(shown[:, 2:6, 2:7], images[0].expand(3, 4, 5))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_missing_tracker_is_named_before_anything_is_written(name, monkeypatch, tmp_path):
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf"pip install 'vision-mamba\[{name}\]'"):
        parse_args([*NANO, "--trackers", "tensorboard", name, "--output_dir", str(tmp_path)])
    parse_args([*NANO, "--trackers", name, "--eval", "--resume", "run.pth"])
    monkeypatch.setattr("importlib.util.find_spec", lambda module: object())
    with pytest.raises(UserError, match="pass --output-dir"):
        parse_args([*NANO, "--trackers", name])


def test_wandb(tree, tmp_path, monkeypatch):
    """A real run of Weights & Biases without a network, read back from its own file."""
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    train(tree, tmp_path / "run", "--trackers", "wandb", "--project", "synthetic", "--histograms", "--epochs", 1)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb"))
    assert wandb.run is None


def test_mlflow(tree, tmp_path, monkeypatch):
    """A real run of MLflow in files, read back through its client: parameters, figures, the picture; then resumed."""
    import mlflow

    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    flags = ("--trackers", "mlflow", "--project", "synthetic", "--histograms")
    train(tree, tmp_path / "run", *flags, "--epochs", 1)
    train(tree, tmp_path / "run", *flags, "--epochs", 2, "--resume", "auto")
    client = mlflow.MlflowClient((tmp_path / "run" / "mlruns").as_uri())
    experiment = client.get_experiment_by_name("synthetic")
    (found,) = client.search_runs([experiment.experiment_id])
    assert found.data.params["model"] == "vim_nano_patch4_32"
    history = client.get_metric_history(found.info.run_id, "test_acc1")
    assert [(m.step, m.value) for m in history] == [(r["epoch"], r["test_acc1"]) for r in records(tmp_path / "run")]
    assert [a.path for a in client.list_artifacts(found.info.run_id)] == ["samples.png"]


def test_plot_of_several_runs(finished, tree, tmp_path):
    train(tree, tmp_path / "other", "--epochs", 1)
    picture_path = tmp_path / "curves.png"
    command = [sys.executable, REPOSITORY / "scripts" / "plot_run.py"]
    done = subprocess.run(
        [*command, finished, tmp_path / "other", "--output", picture_path], text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert picture_path.read_bytes().startswith(b"\x89PNG")
    done = subprocess.run([*command, tmp_path / "absent"], text=True, capture_output=True)
    assert done.returncode == 2
    assert "cannot be read as a run's log" in done.stderr
    assert "Traceback" not in done.stderr


def test_report(finished):
    """Pictures of a finished run beside its checkpoint."""
    done = subprocess.run(
        [sys.executable, "-m", "vim.analysis.report", finished], text=True, capture_output=True, cwd=REPOSITORY
    )
    assert done.returncode == 0, done.stderr
    for name in ("curves.png", "predictions.png", "confusion.png"):
        assert (finished / name).read_bytes().startswith(b"\x89PNG")
    last = records(finished)[-1]
    assert f"top-1 {last['test_acc1']:.2f} %" in done.stdout
