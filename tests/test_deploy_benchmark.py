"""benchmarks/deploy.py runs every ONNX runtime and says how far its logits are."""

import re

import pytest

pytest.importorskip("onnxruntime", reason="needs the export extra")
pytest.importorskip("onnxscript", reason="needs the export extra")
import deploy


@pytest.mark.slow
def test_table(capsys, monkeypatch):
    small = deploy.timm.create_model("vim_nano_patch4_32", depth=1)
    monkeypatch.setattr(deploy.timm, "create_model", lambda name: small)
    deploy.main(["--models", "nano", "--batches", "1", "3", "--threads", "1", "--rounds", "1", "--without", "aot"])
    out = capsys.readouterr().out
    rows = re.findall(r"^  (\S.*?) {2,}[\d.]+ ms +[\d.]+ +([\d.e+-]+)", out, re.M)
    assert [name for name, _ in rows[:5]] == [name for name, _ in rows[5:]]
    assert len(rows) == 10
    for name, distance in rows:
        # A few roundings of float32, of bfloat16 (2^-9 each) or to 1/255 of a range.
        bound = 0.1 if "int8" in name or "bfloat16" in name else 1e-5
        assert float(distance) < bound, name
