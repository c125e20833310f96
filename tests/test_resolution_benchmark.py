"""benchmarks/resolution.py: measures, continues, keeps to its time, draws."""

import csv

import pytest
import resolution
from PIL import Image

from vim.analysis.flops import count_flops


def rows(folder):
    with (folder / "resolution.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_measures_continues_and_draws(tmp_path, capsys):
    argv = ["--dtypes", "fp32", "--modes", "eager", "--case-seconds", "0", "--out", str(tmp_path)]
    assert resolution.main([*argv, "--sizes", "32"]) == 0
    first = rows(tmp_path)
    assert [row["model"] for row in first] == ["vim", "deit_fused", "deit_plain"]
    assert all(float(row["ms"]) > 0 and float(row["peak_mib"]) > 0 for row in first)
    assert first[1]["gflops"] == first[2]["gflops"]
    assert resolution.main([*argv, "--sizes", "32", "48", "--seconds", "0"]) == 0
    assert "1 of 2 cases are left" in capsys.readouterr().out
    assert rows(tmp_path) == first
    assert min(Image.open(tmp_path / "resolution.png").size) > 300


def test_operations_are_those_of_the_model():
    model = resolution.build("vim", 32, resolution.DTYPES["fp32"])
    assert resolution.gflops("vim", 32) == count_flops(model) / 1e9


def test_refuses_sizes(tmp_path):
    with pytest.raises(SystemExit) as stop:
        resolution.main(["--sizes", "8", "--out", str(tmp_path)])
    assert stop.value.code == 2
