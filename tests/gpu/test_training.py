"""Models and `main.py` on a GPU: every backend's logits and gradients, steps with autocast, resuming."""

import numpy as np
import pytest
import timm
import torch
from causal_conv1d_vim.conv import backends as conv_backends
from causal_conv1d_vim.runtime.backend import use_backend
from PIL import Image

import vim  # noqa: F401  registers the models
from vim.engine import run

gpu = pytest.param("cuda", marks=pytest.mark.gpu)


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.slow), gpu])
def device(request):
    """The CPU, where the same steps run everywhere, or the GPU."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no GPU")
    return request.param


@pytest.mark.parametrize("name", ["cpu", pytest.param("triton", marks=pytest.mark.gpu),
                                  pytest.param("cuda", marks=pytest.mark.gpu)])  # fmt: skip
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_model_on_every_backend(name, kind, golden_weights):
    """Logits and gradients of two blocks against the same model in float64 on the reference."""
    device = "cpu" if name == "cpu" or not torch.cuda.is_available() else "cuda"
    with use_backend(name):
        if (reason := conv_backends.module(name).why_not(torch.empty(1, 1, 1, device=device))) is not None:
            pytest.skip(f"{name}: {reason}")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = golden_weights.fill(timm.create_model("vim_nano_patch4_32", depth=2, bimamba_type=kind), "gpu").eval()
    images = golden_weights.standard_normal((2, 3, 32, 32), "gpu")

    def step(model, images):
        model.zero_grad()
        logits = model(images)
        logits.square().sum().backward()
        return [logits, *(p.grad for p in model.parameters())]

    with use_backend("reference"):
        exact = [t.detach().clone() for t in step(model.double(), images.double())]
    # CUDA has no norm, so it is not forced but comes first.
    with use_backend(None if name == "cuda" else name):
        results = step(model.float().to(device), images.to(device))
    for actual, expected in zip(results, exact, strict=True):
        # Float32 through two blocks and back: some hundred roundings and sums of a few thousand terms.
        error = (actual.cpu().double() - expected).norm() / expected.norm().clamp_min(1e-30)
        assert error < 1e-4


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of colour, 16 training and 4 test images each."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 16), ("val", 4)):
        for channel, name in enumerate(("red", "green")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 80, (40, 40, 3), dtype=np.uint8)
                pixels[..., channel] += 150
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return root


def train(device, images, folder, *argv):
    """A run of `main.py` in this process: the last epoch's record and the checkpoint."""
    record = run.run([
        "--model", "vim_nano_patch4_32", "--model-kwargs", "depth=2", "--input-size", "32", "--batch-size", "8",
        "--num_workers", "0", "--device", device, "--data-path", str(images), "--output_dir", str(folder), "--epochs",
        "2", "--warmup-epochs", "0", "--seed", "3", "--aa", "none", "--no-repeated-aug", "--mixup", "0", "--cutmix",
        "0", *argv,
    ])  # fmt: skip
    return record, torch.load(folder / "checkpoint.pth", weights_only=True, map_location="cpu")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_steps_with_autocast(device, images, tmp_path, dtype):
    exact, _ = train(device, images, tmp_path / "exact", "--no_amp")
    record, checkpoint = train(device, images, tmp_path / "amp", "--amp-dtype", dtype)
    assert all(t.dtype == torch.float32 for t in checkpoint["model"].values())
    # Two epochs of a loss about log 2, forward and backward rounded to 2^-9 or less a few dozen times a step.
    assert record["train_loss"] == pytest.approx(exact["train_loss"], rel=0.05)
    assert np.isfinite(record["test_loss"])


@pytest.mark.parametrize("amp", [("--no_amp",), ("--amp-dtype", "float16")], ids=["float32", "float16"])
def test_resuming_is_going_on(device, images, tmp_path, amp):
    """Going on from the first of two epochs, in another run: the same as both in one, optimizer and scaler included."""
    record, whole = train(device, images, tmp_path / "whole", *amp, "--keep-every-epochs", "1")
    (first,) = (tmp_path / "whole").glob("*0001*.pth")
    resumed, parts = train(device, images, tmp_path / "parts", *amp, "--resume", str(first))
    assert resumed["train_loss"] == pytest.approx(record["train_loss"], rel=1e-6)
    for name, value in whole["model"].items():
        # The kernels repeat to the bit; cuDNN's patch convolution may add in another order.
        tolerance = 0 if device == "cpu" else 1e-6
        torch.testing.assert_close(parts["model"][name], value, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize(
    "flags",
    [
        ("--amp-dtype", "bfloat16"),
        ("--amp-dtype", "float16", "--clip-grad", "1"),
        ("--no_amp", "--grad-accum-steps", "2", "--mixup", "0.8", "--cutmix", "1", "--drop-path", "0.2"),
    ],
    ids=["bfloat16", "float16-clipped", "accumulated-mixed-dropped"],
)
def test_cuda_graphs_change_no_bit(images, tmp_path, flags, caplog):
    """Weights, averaged weights and optimizer of a run whose steps are replayed, against the eager run."""
    flags = (*flags, "--batch-size", "4", "--epochs", "3")
    record, eager = train("cuda", images, tmp_path / "eager", *flags)
    replayed, graphed = train("cuda", images, tmp_path / "graphed", *flags, "--cuda-graphs")
    assert "not replayed" not in caplog.text
    assert replayed["train_loss"] == record["train_loss"]
    for part in ("model", "model_ema"):
        for name, value in eager[part].items():
            assert torch.equal(graphed[part][name], value), (part, name)
    for name, moments in eager["optimizer"]["state"].items():
        for key, value in moments.items():
            assert torch.equal(torch.as_tensor(graphed["optimizer"]["state"][name][key]), torch.as_tensor(value)), name
