"""The benchmarks of generation: figures that make sense, and the original's command line through compat."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import generation
import pytest
import tokenizers
import torch
import transformers
from mamba_ssm_vim import MambaLMHeadModel
from mamba_ssm_vim.models.config_mamba import MambaConfig

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "benchmark_generation_mamba_simple.py"


def test_rows_of_other_cases_are_kept(tmp_path, monkeypatch, capsys):
    before = torch.get_num_threads()
    monkeypatch.setitem(generation.SIZES, "tiny", (16, 1, 96, 2, 3, 4))
    monkeypatch.setattr(generation, "CASES", ["tiny-fp32", "tiny-bf16"])
    fixed = ["--threads", "1", "--rounds", "1", "--device", "cpu", "--out", str(tmp_path)]
    try:
        for case in ("tiny-fp32", "tiny-bf16", "tiny-fp32"):
            generation.main(["--cases", case, *fixed])
    finally:
        torch.set_num_threads(before)
    with (tmp_path / "generation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["case"] for row in rows] == ["tiny-bf16", "tiny-fp32"]
    assert all(float(row["token_ms_transformers"]) > 0 for row in rows)
    assert "tiny-fp32" in capsys.readouterr().out


def script(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    MambaLMHeadModel(MambaConfig(d_model=16, n_layer=2, vocab_size=5)).save_pretrained(folder)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "once": 1, "upon": 2, "a": 3, "time": 4}, "?"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_the_original_command_line(folder):
    done = script(
        "--model-name", folder, "--prompt", "once upon a", "--genlen", 6, "--temperature", 0.7, "--topk", 3,
        "--topp", 0.9, "--minp", 0.05, "--repetition-penalty", 1.2, "--batch", 2,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert re.fullmatch(r"Number of parameters: \d+", lines[0])
    assert lines[1].count("once upon a") == 2
    assert lines[2] == "Prompt length: 3, generation length: 6"
    assert re.fullmatch(rf"{folder} prompt processing \+ decoding time: \d+ms", lines[3])
    done = script("--model-name", folder, "--promptlen", 7, "--genlen", 4)
    assert done.stdout.splitlines()[1] == "Prompt length: 7, generation length: 4"


@pytest.mark.slow
def test_what_cannot_be_run_is_said_in_one_line(folder, tmp_path):
    done = script("--model-name", tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"error: {tmp_path} holds none of config.json")
    done = script("--model-name", folder, "--genlen", 0)
    assert done.stderr == "error: --batch, --promptlen and --genlen must be at least 1\n"
