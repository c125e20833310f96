"""Checkpoints as files: what is data loads, what could run code or is damaged is refused, and all ends soon."""

import argparse
import pathlib
import pickle
import resource
import types
import zipfile

import numpy as np
import pytest
import timm
import torch
from timm.models import adapt_input_conv

from vim.models import CheckpointError, extract_state_dict, load_checkpoint, load_into

NANO = "vim_nano_patch4_32"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return timm.create_model(NANO, depth=1).state_dict()


def saved(path, content):
    torch.save(content, path)
    return path


def test_plain_values_of_other_libraries_are_data(tmp_path):
    """numpy scalars and arrays, paths, devices and nested Namespaces load with the values they were saved with."""
    arrays = {
        "float": np.arange(6.0).reshape(2, 3), "fortran": np.asfortranarray(np.arange(6).reshape(2, 3)),
        "big endian": np.arange(3, dtype=">i2"), "bool": np.array([True, False]), "text": np.array(["a", "bcd"]),
        "empty": np.zeros((0, 4), np.float32), "bytes": np.array([b"xy"]),
    }  # fmt: skip
    content = {
        "best": np.float64(81.25), "count": np.int32(-7), "flag": np.bool_(True), "arrays": arrays, "bytes": b"",
        "path": pathlib.Path("/data/imagenet"), "windows": pathlib.PureWindowsPath("C:/data"),
        "device": torch.device("cuda", 1), "dtype": torch.bfloat16,
        "args": argparse.Namespace(model=argparse.Namespace(depth=24, where=pathlib.Path("x")), lr=np.float32(0.5)),
    }  # fmt: skip
    loaded = load_checkpoint(saved(tmp_path / "data.pth", content))
    for name, array in arrays.items():
        assert isinstance(loaded["arrays"][name], np.ndarray)
        assert loaded["arrays"][name].dtype == array.dtype.newbyteorder("="), name
        np.testing.assert_array_equal(loaded["arrays"][name], array)
    assert (loaded["best"], loaded["count"], loaded["flag"], loaded["bytes"]) == (81.25, -7, True, b"")
    assert loaded["path"] == pathlib.PurePath("/data/imagenet")
    assert loaded["windows"] == pathlib.PureWindowsPath("C:/data")
    assert (loaded["device"], loaded["dtype"]) == (torch.device("cuda", 1), torch.bfloat16)
    assert (loaded["args"].model.depth, loaded["args"].lr) == (24, 0.5)
    assert loaded["args"].model.where == pathlib.PurePath("x")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (types.SimpleNamespace(a=1), "types.SimpleNamespace"),
        (np.random.default_rng(0), "numpy.random"),
        (np.array([{"a": 1}], dtype=object), "dtype 'O8'"),
        (print, "print"),
    ],
    ids=["namespace", "generator", "objects", "function"],
)
def test_refused_types_are_named(tmp_path, value, name, legacy):
    path = tmp_path / "file.pth"
    torch.save({"model": {}, "extra": value}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(CheckpointError, match=name) as caught:
        load_checkpoint(path)
    assert "\n" not in str(caught.value)


def test_arrays_that_lie_about_their_size_are_refused(tmp_path):
    """numpy would allocate what the pickle states."""

    class Huge:
        def __reduce__(self):
            return np._core.multiarray._reconstruct, (np.ndarray, (2**40,), b"b")

    class Wrong:
        def __reduce__(self):
            state = (1, (2**40,), np.dtype("f8"), False, b"12345678")
            return np._core.multiarray._reconstruct, (np.ndarray, (0,), b"b"), state

    assert load_checkpoint(saved(tmp_path / "huge.pth", {"a": Huge()}))["a"].size == 0
    with pytest.raises(CheckpointError, match="another number of bytes"):
        load_checkpoint(saved(tmp_path / "wrong.pth", {"a": Wrong()}))


def test_every_part_is_compared_with_its_checksum(weights, tmp_path):
    path = saved(tmp_path / "good.pth", {"model": weights})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        part = next(p for p in archive.infolist() if p.filename.endswith("data/3"))
        at = content.index(archive.read(part))
    content[at + 1] ^= 1
    path.write_bytes(content)
    torch.load(path, weights_only=True)  # torch itself takes it
    with pytest.raises(CheckpointError, match="data/3 does not match its checksum"):
        load_checkpoint(path)


def test_files_without_checksums_load(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "plain.pth", {"a": torch.arange(5)})
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(load_checkpoint(path)["a"], torch.arange(5))


def test_weights_that_are_not_finite_are_refused(weights):
    for value in (float("nan"), float("inf")):
        spoilt = {**weights, "norm_f.weight": weights["norm_f.weight"].index_fill(0, torch.tensor([1, 5]), value)}
        with pytest.raises(CheckpointError, match=r"norm_f\.weight holds 2 values that are not finite"):
            extract_state_dict({"model": spoilt})


def test_tensors_that_stand_for_more_than_they_hold(weights):
    for tensor, words in (
        (torch.zeros(1).expand(2**40), "expanded tensor"),
        (torch.zeros(2**20, 2**20, device="meta"), "meta tensor"),
        (torch.eye(3).to_sparse(), "sparse"),
        (torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8), "quantized"),
    ):
        with pytest.raises(CheckpointError, match=words):
            extract_state_dict({"model": {**weights, "head.weight": tensor}})


def _limited(limit_bytes, function):
    """Run a function in a fork whose address space may grow by this much; gives what it printed of an error."""
    import os

    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.close(read)
        used = 4096 * int(pathlib.Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (used + limit_bytes, used + limit_bytes))
        resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
        try:
            function()
            message = "loaded"
        except CheckpointError as error:
            message = f"refused: {error}"
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(write, message[:1000].encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        message = file.read()
    os.waitpid(child, 0)
    return message


def _archive(path, pickled, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("a/data.pkl", pickled)
        archive.writestr("a/byteorder", "little")
        archive.writestr("a/version", "3\n")
    return path


@pytest.mark.parametrize("bomb", ["compressed", "long", "bytearray", "nested", "references", "legacy"])
def test_bombs_end_in_bounded_memory(tmp_path, bomb):
    """Within 2 GiB and a minute of one core: refused, or loaded as the little that they are."""
    path = tmp_path / "bomb.pth"
    if bomb == "compressed":
        _archive(path, b"\x80\x02}" + b"]0" * 2**26 + b".", zipfile.ZIP_DEFLATED)
    elif bomb == "long":
        _archive(path, b"\x80\x02}(" + b"]" * (40 * 2**20) + b".")
    elif bomb == "bytearray":
        _archive(path, b"\x80\x02cbuiltins\nbytearray\n(\x8a\x06\x00\x00\x00\x00\x00\x01tR.")
    elif bomb == "nested":
        _archive(path, b"\x80\x02}U\x01a" + b"]" * 10**6 + b"a" * (10**6 - 1) + b"s.")
    elif bomb == "references":
        # Forty lists, each of two references to the one before: 2^40 elements to whoever walks them.
        content = []
        for _ in range(40):
            content = [content, content]
        saved(path, {"model": {"a": torch.ones(1)}, "args": content, "epoch": content})
    else:
        path.write_bytes(pickle.dumps({"a": bytearray(10)}, 2) + b"]" * 10**6)
    message = _limited(2 * 2**30, lambda: extract_state_dict(load_checkpoint(path)))
    if bomb in ("references",):
        assert message == "loaded"
    else:
        assert message.startswith("refused: "), message
        assert "\n" not in message
    words = {"compressed": "compressed", "long": "40 MiB of values beside its tensors", "nested": "no weights"}
    assert words.get(bomb, "") in message


FORMS = {
    "net": lambda w: {"net." + k: v for k, v in w.items()},
    "backbone beside a neck": lambda w: {**{"backbone." + k: v for k, v in w.items()}, "neck.weight": torch.ones(3)},
    "Lightning": lambda w: {
        "epoch": 3, "global_step": 7, "pytorch-lightning_version": "2.4.0", "optimizer_states": [], "loops": {},
        "state_dict": {**{"model." + k: v for k, v in w.items()}, "criterion.weight": torch.ones(3)},
    },
    "compiled Lightning": lambda w: {
        "state_dict": {**{"model._orig_mod." + k: v for k, v in w.items()}, "ema.count": torch.ones(1)},
    },
    "model_state_dict": lambda w: {"model_state_dict": w, "optimizer_state_dict": {"state": {}}},
    "state_dict_ema alone": lambda w: {"epoch": 3, "state_dict_ema": {"module." + k: v for k, v in w.items()}},
    "module in module": lambda w: {"module.model." + k: v for k, v in w.items()},
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_other_projects(weights, tmp_path, form):
    path = saved(tmp_path / "w.pth", FORMS[form](weights))
    for fresh in (
        timm.create_model(NANO, depth=1),
        timm.create_model(NANO, depth=1, pretrained=True, pretrained_cfg_overlay={"file": str(path)}),
    ):
        load_into(fresh, extract_state_dict(load_checkpoint(path)))
        for name, tensor in fresh.state_dict().items():
            assert torch.equal(tensor, weights[name]), name


def test_what_lies_outside_of_the_prefix_is_said(weights, caplog):
    state = extract_state_dict(
        {"state_dict": {**{"model." + k: v for k, v in weights.items()}, "ema.n": torch.ones(1)}}
    )
    assert state.keys() == weights.keys()
    assert "the model's weights begin with 'model.': ema.n left out" in caplog.text


def test_colour_filters_fit_other_channels_as_in_timm(weights, caplog):
    """One channel takes the sum over the colours: a grey image in three equal channels gives the same output."""
    for channels in (1, 2, 4):
        model = timm.create_model(NANO, depth=1, in_chans=channels)
        load_into(model, weights)
        expected = adapt_input_conv(channels, weights["patch_embed.proj.weight"])
        assert torch.equal(model.patch_embed.proj.weight, expected)
        assert f"of 3 channels is converted to the model's {channels}" in caplog.text
    grey, colour = timm.create_model(NANO, depth=1, in_chans=1).eval(), timm.create_model(NANO, depth=1).eval()
    load_into(grey, weights)
    load_into(colour, weights)
    image = torch.randn(2, 1, 32, 32)
    # The sum of three products, in float32, in another order.
    torch.testing.assert_close(grey(image), colour(image.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5)


def test_grid_is_taken_from_the_checkpoint_and_a_guess_is_said(tmp_path, caplog):
    """64 positions of a grid of 4 × 16, which could be 8 × 8."""
    wide = timm.create_model(NANO, depth=1, img_size=(16, 64))
    expected = timm.create_model(NANO, depth=1, img_size=(16, 64))
    expected.load_state_dict(wide.state_dict())
    expected.set_input_size((24, 40))
    path = saved(tmp_path / "own.pth", {"model": wide.state_dict(), "grid": (4, 16)})
    loaded = timm.create_model(
        NANO, depth=1, img_size=(24, 40), pretrained=True, pretrained_cfg_overlay={"file": str(path)}
    )
    assert torch.equal(loaded.pos_embed, expected.pos_embed)
    loaded = timm.create_model(NANO, depth=1, img_size=(24, 40))
    load_into(loaded, wide.state_dict(), grid=(4, 16))
    assert torch.equal(loaded.pos_embed, expected.pos_embed)
    square = timm.create_model(NANO, depth=1)
    load_into(square, wide.state_dict(), grid=(4, 16))
    assert not torch.equal(square.pos_embed, wide.pos_embed)
    assert "taken for" not in caplog.text
    load_into(loaded, wide.state_dict())
    assert "which grid its 64 patches form: taken for a square of 8 × 8" in caplog.text
    load_into(wide, wide.state_dict())
    assert "taken for the model's 4 × 16" in caplog.text
