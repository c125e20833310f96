"""Malformed, tampered and odd files and folders through the command line.

Each is refused with one sentence and status 2, or read as what it is; within a minute of processor time, in bounded
memory, without a traceback, without running what a file holds, and without leaving anything behind.
"""

import argparse
import gzip
import io
import json
import os
import pickle
import resource
import shutil
import struct
import tarfile
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from vim.engine import run
from vim.engine.arguments import parse_args

NANO = (
    "--model", "vim_nano_patch4_32", "--model-kwargs", "depth=1", "embed_dim=16", "--input-size", "32", "--batch-size",
    "8", "--num_workers", "0", "--device", "cpu", "--epochs", "1", "--trackers", "none",
)  # fmt: skip


class Touch:
    """Leaves a file when unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


@pytest.fixture(scope="module")
def own(tree, tmp_path_factory):
    """A checkpoint of a run of this project."""
    folder = tmp_path_factory.mktemp("own")
    run.run([*NANO, "--data-path", str(tree), "--output_dir", str(folder)])
    return torch.load(folder / "checkpoint.pth", weights_only=True)


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return timm.create_model("vim_nano_patch4_32", depth=1, embed_dim=16, num_classes=3).state_dict()


@pytest.fixture
def main(tmp_path, capsys):
    """Run `main.py` in this process with bounded memory; gives the error's sentence, or None and the figures."""

    def call(*argv):
        output = tmp_path / "output"
        used = 4096 * int(Path("/proc/self/statm").read_text().split()[0])
        limits = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + 3 * 2**30, limits[1]))
        begun = time.process_time()
        try:
            status = run.main([*map(str, argv), "--output_dir", str(output)])
        finally:
            resource.setrlimit(resource.RLIMIT_AS, limits)
        assert time.process_time() - begun < 60
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        if status == 0:
            shutil.rmtree(output, ignore_errors=True)
            return None, json.loads(captured.out.splitlines()[-1]) if captured.out else None
        assert status == 2
        (error,) = (line for line in captured.err.splitlines() if line.startswith("error: "))
        assert len(error) < 2000
        assert not output.exists()
        return error, None

    return call


def archive(pickled, *, compression=zipfile.ZIP_STORED, name="data.pkl"):
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", compression) as file:
        file.writestr(f"a/{name}", pickled)
        file.writestr("a/byteorder", "little")
        file.writestr("a/version", "3\n")
    return buffer.getvalue()


def saved(content, **options):
    torch.save(content, buffer := io.BytesIO(), **options)
    return buffer.getvalue()


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = [value, value]
    return value


def with_args(own, **flags):
    return saved({**own, "args": {**own["args"], **flags}})


# What a file holds, and words of the sentence that refuses it.
CHECKPOINTS = {
    "empty": (lambda w, o, t: b"", "not a checkpoint"),
    "text": (lambda w, o, t: b"<html>404</html>", "not a checkpoint"),
    "random bytes": (lambda w, o, t: np.random.default_rng(0).bytes(5000), "not a checkpoint"),
    "gzipped": (lambda w, o, t: gzip.compress(saved(w)), "not a checkpoint"),
    "cut": (lambda w, o, t: saved(w)[:9000], "truncated"),
    "end missing": (lambda w, o, t: saved(w)[:-10], "truncated"),
    "zip of nothing": (lambda w, o, t: archive(b"", name="readme.txt"), "truncated or not a checkpoint"),
    "zip that is no pickle": (lambda w, o, t: archive(b"hello"), "a.pth"),
    "code": (lambda w, o, t: saved({"model": w, "x": Touch(t)}), "could run code"),
    "code of the old format": (
        lambda w, o, t: saved({"model": w, "x": Touch(t)}, _use_new_zipfile_serialization=False), "could run code"
    ),
    "bare pickle": (lambda w, o, t: pickle.dumps({"model": Touch(t)}), "could run code"),
    "code in args": (lambda w, o, t: saved({"model": w, "args": argparse.Namespace(a=[Touch(t)])}), "could run code"),
    "unknown type": (lambda w, o, t: saved({"model": w, "x": types.SimpleNamespace()}), "types.SimpleNamespace"),
    "list": (lambda w, o, t: saved([1, 2]), "expected a dictionary"),
    "tensor": (lambda w, o, t: saved(torch.ones(3)), "expected a dictionary"),
    "no weights": (lambda w, o, t: saved({"epoch": 3}), "no weights"),
    "weights of numbers": (lambda w, o, t: saved({"model": dict.fromkeys(w, 1.0)}), "no weights"),
    "nan": (lambda w, o, t: saved(w | {"norm_f.weight": torch.full((16,), float("nan"))}), "norm_f.weight holds 16"),
    "expanded": (lambda w, o, t: saved(w | {"norm_f.weight": torch.ones(1).expand(10**12)}), "expanded"),
    "meta": (lambda w, o, t: saved(w | {"norm_f.weight": torch.ones(10**12, device="meta")}), "meta"),
    "sparse": (lambda w, o, t: saved(w | {"head.weight": torch.eye(3).to_sparse()}), "sparse"),
    "other shapes": (lambda w, o, t: saved(w | {"norm_f.weight": torch.ones(17)}), "(17,) instead of (16,)"),
    "missing": (lambda w, o, t: saved({k: v for k, v in w.items() if k != "cls_token"}), "missing: cls_token"),
    "bomb of lists": (lambda w, o, t: archive(b"\x80\x02" + b"]" * 2**23 + b"."), "values beside its tensors"),
    "zip bomb": (
        lambda w, o, t: archive(b"\x80\x02" + b"]" * 2**28 + b".", compression=zipfile.ZIP_DEFLATED), "is compressed"
    ),
    "bytearray of a terabyte": (
        lambda w, o, t: archive(b"\x80\x02cbuiltins\nbytearray\n(\x8a\x06\0\0\0\0\0\1tR."), "truncated or not"
    ),
    "args None": (lambda w, o, t: saved({**o, "args": None}), "its args is a NoneType"),
    "args list": (lambda w, o, t: saved({**o, "args": [1]}), "its args is a list"),
    "args of billions": (lambda w, o, t: with_args(o, model_kwargs={"depth": nested(60)}), "model-kwargs"),
    "epochs of billions": (lambda w, o, t: with_args(o, epochs=nested(60)), "expected one value"),
    "command as path": (
        lambda w, o, t: with_args(o, data_set="wds/x", data_path=f"pipe:touch {t}", num_classes=3),
        "a file may not choose",
    ),
    "states of a billion": (lambda w, o, t: with_args(o, model_kwargs={"d_state": 10**9}), "at most 1,024"),
    "weights of terabytes": (
        lambda w, o, t: with_args(o, model_kwargs={"depth": 512, "embed_dim": 2**16}), "its weights take"
    ),
    "states by the thousand": (
        lambda w, o, t: with_args(o, model_kwargs={"depth": 1, "embed_dim": 16, "d_state": 1000}), "instead of"
    ),
    "another version": (lambda w, o, t: saved({**o, "format_version": 99}), "format version 99"),
    "optimizer of a list": (lambda w, o, t: saved({**o, "optimizer": []}), "its optimizer is a list"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(main, weights, own, tree, tmp_path, name):
    make, words = CHECKPOINTS[name]
    path, touched = tmp_path / "a.pth", tmp_path / "touched"
    path.write_bytes(make(weights, own, touched))
    flags = () if "with_args" in make.__code__.co_names else (*NANO, "--data-path", tree)
    error, _ = main(*flags, "--eval", "--resume", path)
    assert error is not None
    assert words in error
    assert not touched.exists()


SAFETENSORS = {
    "cut": lambda content: content[:-5],
    "length of the header": lambda content: struct.pack("<Q", 2**60) + content[8:],
    "no JSON": lambda content: content[:8] + b"x" + content[9:],
    "empty": lambda content: b"",
}


@pytest.mark.parametrize("name", SAFETENSORS)
def test_safetensors(main, weights, tree, tmp_path, name):
    path = tmp_path / "a.safetensors"
    path.write_bytes(SAFETENSORS[name](safetensors.torch.save(weights)))
    error, _ = main(*NANO, "--data-path", tree, "--eval", "--resume", path)
    assert "not a complete safetensors file" in error


ODD = {
    "old format": lambda w: saved({"model": w}, _use_new_zipfile_serialization=False),
    "namespaces and numpy": lambda w: saved(
        {"model": w, "args": argparse.Namespace(a=argparse.Namespace(b=np.float64(1), c=Path("/x"))), "r": np.ones(3)}
    ),
    "Lightning": lambda w: saved(
        {"state_dict": {**{f"model.{k}": v for k, v in w.items()}, "loss.weight": torch.ones(2)}, "loops": {}}
    ),
    "args of billions": lambda w: saved({"model": w, "args": nested(60), "epoch": nested(60)}),
    "data parallel": lambda w: saved({"state_dict": {f"module.net.{k}": v for k, v in w.items()}}),
    "requires gradients": lambda w: saved({k: torch.nn.Parameter(v) for k, v in w.items()}),
    "views of one storage": lambda w: saved({k: torch.stack([v, v])[1] for k, v in w.items()}),
    "double precision": lambda w: saved({k: v.double() for k, v in w.items()}),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_checkpoints_load(main, weights, tree, tmp_path, name):
    """The same figures as of the plain state dict."""
    plain, odd = tmp_path / "plain.pth", tmp_path / "odd.pth"
    torch.save(weights, plain)
    odd.write_bytes(ODD[name](weights))
    figures = []
    for path in (plain, odd):
        error, record = main(*NANO, "--data-path", tree, "--eval", "--resume", path)
        assert error is None
        figures.append({k: v for k, v in record.items() if not k.endswith("_s")})
    assert figures[0] == figures[1]


def damaged_images(folder):
    """Files that are no images of 8 or 16 bits, and names."""
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)).save(folder / "good.png")
    png = (folder / "good.png").read_bytes()
    width = png.index(b"IHDR") + 4
    Image.fromarray(np.ones((8, 8), np.float32)).save(folder / "float.tif")
    Image.fromarray(np.full((8, 8), 2**20, np.int32)).save(folder / "int.tif")
    files = {
        "cut.png": png[: len(png) // 2], "empty.jpg": b"", "text.jpg": b"hello", "zeros.png": bytes(1000),
        "huge.png": png[:width] + struct.pack(">II", 2**31 - 1, 2**31 - 1) + png[width + 8 :],
        "wide.png": png[:width] + struct.pack(">II", 60_000, 60_000) + png[width + 8 :],
        "page.webp": b"<html></html>", "archive.bmp": archive(b"x"), "header.ppm": b"P6\n99999 99999\n255\n",
    }  # fmt: skip
    for name, content in files.items():
        (folder / name).write_bytes(content)
    (folder / "good.png").unlink()
    return ["float.tif", "int.tif", *files]


def test_images(main, weights, tree, tmp_path):
    """Each by itself stops an evaluation and is named; all together are left out by --on-bad-image replace."""
    torch.save(weights, checkpoint := tmp_path / "weights.pth")
    (store := tmp_path / "store").mkdir()
    names = damaged_images(store)
    assert len(names) == 11
    data = Path(shutil.copytree(tree, tmp_path / "data"))
    for name in names:
        shutil.copy(store / name, data / "val" / "red" / name)
        error, _ = main(*NANO, "--data-path", data, "--eval", "--resume", checkpoint)
        assert f"red/{name}" in error
        (data / "val" / "red" / name).unlink()
    for name in names:
        shutil.copy(store / name, data / "val" / "red" / name)
    argv = ("--eval", "--resume", checkpoint, "--on-bad-image", "replace")
    error, record = main(*NANO, "--data-path", data, *argv)
    assert error is None
    assert record["test_images"] == 12


def no_folder(root):
    shutil.rmtree(root / "val")


def empty_split(root):
    for path in (root / "val").iterdir():
        shutil.rmtree(path)


def hidden_alone(root):
    empty_split(root)
    (root / "val" / ".cache").mkdir()


def file_as_split(root):
    no_folder(root)
    (root / "val").write_text("x")


def empty_class(root):
    (root / "val" / "violet").mkdir()


def class_of_texts(root):
    (root / "val" / "violet").mkdir()
    (root / "val" / "violet" / "a.txt").write_text("x")


def dangling_link(root):
    (root / "val" / "red" / "a.jpg").symlink_to(root / "absent.jpg")


def fifo_of_a_class(root):
    (root / "val" / "violet").mkdir()
    os.mkfifo(root / "val" / "violet" / "a.txt")


FOLDERS = {
    no_folder: "is not a folder", empty_split: "is empty", hidden_alone: "is empty", file_as_split: "is not a folder",
    empty_class: "violet has no images", class_of_texts: "violet has no images", dangling_link: "a.jpg cannot be read",
    fifo_of_a_class: "violet has no images",
}  # fmt: skip


@pytest.mark.parametrize("change", FOLDERS, ids=lambda f: f.__name__)
def test_folders(main, weights, tree, tmp_path, change):
    torch.save(weights, checkpoint := tmp_path / "weights.pth")
    data = Path(shutil.copytree(tree, tmp_path / "data"))
    change(data)
    error, _ = main(*NANO, "--data-path", data, "--eval", "--resume", checkpoint)
    assert FOLDERS[change] in error


def test_archives_and_idx_files(main, weights, tmp_path):
    torch.save(weights, checkpoint := tmp_path / "weights.pth")
    with tarfile.open(tmp_path / "validation.tar", "w") as file:
        file.addfile(tarfile.TarInfo("a/b.txt"))
    argv = (*NANO, "--data-path", tmp_path, "--eval", "--resume", checkpoint)
    assert "validation.tar is damaged" in main(*argv, "--data-set", "tar/")[0]
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(2**20))[:-8])
    assert "cannot be read" in main(*argv, "--data-set", "FMNIST")[0]
    (tmp_path / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(b"\0\0\x08\x03" + b"\xff" * 12))
    assert "is truncated" in main(*argv, "--data-set", "FMNIST")[0]
    (tmp_path / "categories.json").write_bytes(b"[" * 10**5)
    assert "does not hold iNaturalist" in main(*argv, "--data-set", "INAT")[0]
    (tmp_path / "categories.json").write_bytes("ä".encode("latin-1"))
    assert "does not hold iNaturalist" in main(*argv, "--data-set", "INAT")[0]


def laughs():
    lines = ["a0: &a0 [ha, ha]"] + [f"a{k}: &a{k} [*a{k - 1}, *a{k - 1}]" for k in range(1, 60)]
    return "\n".join(lines)


CONFIGS = {
    "deep": (b"epochs: " + b"[" * 10**5, "nested too deeply"),
    "laughs": (laughs().encode(), "unknown flags"),
    "laughs in a flag": (laughs().replace("a59:", "model-kwargs: {depth: *a58}\nepochs:").encode(), "unknown flags"),
    "laughs in kwargs": (
        b"model-kwargs: {a: &a [x, x], b: &b [*a, *a], c: &c [*b, *b], d: [*c, *c]}",
        "expected a map",
    ),
    "laughs as epochs": (b"epochs: [&a [1, 1], &b [*a, *a], &c [*b, *b], &d [*c, *c]]", "expected one value"),
    "Latin-1": ("output-dir: Läufe\n".encode("latin-1"), "not in UTF-8"),
    "large": (b"#" * 2**20, "more than 256 KiB"),
    "object": (b"epochs: !!python/object/apply:os.system ['true']", "cannot be read as YAML"),
    "control characters": (b"epochs: \x00\x01", "cannot be read as YAML"),
    "list": (b"[1, 2]", "one mapping"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs(main, tree, tmp_path, name):
    content, words = CONFIGS[name]
    (tmp_path / "recipe.yaml").write_bytes(content)
    error, _ = main("--config", tmp_path / "recipe.yaml", "--data-path", tree)
    assert words in error


def test_folders_in_place_of_files(main, tree, tmp_path):
    """A path that is a folder, wherever a file is expected."""
    argv = (*NANO, "--data-path", tree)
    for flags, words in (
        (("--eval", "--resume", tmp_path), "there is no checkpoint at"),
        (("--finetune", tmp_path), "there is no checkpoint at"),
        (("--config", tmp_path), "cannot be read as YAML"),
    ):
        assert words in main(*argv, *flags)[0]
    assert parse_args([str(a) for a in argv]).epochs == 1
