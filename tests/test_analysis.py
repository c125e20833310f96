"""vim/analysis: hidden attention against autograd's Jacobian, attribution, features."""

import pytest
import timm
import torch
from mamba_ssm_vim.ops.selective_scan.reference import selective_scan_ref

import vim  # noqa: F401  registers the models
from vim.analysis.attention import ScanInputs, capture_hidden, decay_lengths, hidden_attention, scan_inputs, scan_matrix
from vim.analysis.features import (
    accuracy_by_position,
    component_maps,
    logits_with_class_token_at,
    receptive_field,
    side_that_holds,
)
from vim.models.vision_mamba import VisionMamba


@pytest.fixture
def model() -> VisionMamba:
    """Two blocks over 4 × 4 patches and a class token in the middle, weights away from their initial symmetry."""
    torch.manual_seed(0)
    model = timm.create_model("vim_nano_patch4_32", depth=2, img_size=16, num_classes=5, embed_dim=16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("reverse", [False, True])
def test_the_matrix_is_the_jacobian_of_the_reference(reverse: bool) -> None:
    torch.manual_seed(0)
    L, E, N = 7, 3, 4
    u, delta = torch.randn(1, L, E, dtype=torch.double), torch.randn(1, L, E, dtype=torch.double)
    A, D, bias = -torch.rand(E, N).double(), torch.randn(E).double(), torch.randn(E).double()
    B, C = torch.randn(1, L, N).double(), torch.randn(1, L, N).double()
    matrix = scan_matrix(ScanInputs(u, delta, A, B, C, D, bias, reverse))[0]

    def scan(u: torch.Tensor) -> torch.Tensor:
        return selective_scan_ref(
            u, delta, A, B[:, :, None], C[:, :, None], D, None, bias, delta_softplus=True, reverse=reverse
        )[0]

    jacobian = torch.autograd.functional.jacobian(scan, u)[0, :, :, 0]  # (L, E, L, E)
    for e in range(E):
        # float64: some tens of operations per entry of order 1.
        torch.testing.assert_close(matrix[e], jacobian[:, e, :, e], rtol=1e-12, atol=1e-13)
    assert jacobian[:, 0, :, 1].abs().max() == 0


def test_matrices_of_a_block_give_its_scans(model: VisionMamba, images: torch.Tensor) -> None:
    """M u is the reference's output for a trained block's own steps, whatever part of the channels is taken."""
    hidden = capture_hidden(model, images)[1]
    scans = scan_inputs(model.layers[1].mixer, hidden)
    assert [s.reverse for s in scans] == [False, True]
    with torch.no_grad():
        for s in scans:
            expected = selective_scan_ref(
                s.u, s.delta, s.A, s.B[:, :, None], s.C[:, :, None], s.D, None, s.delta_bias,
                delta_softplus=True, reverse=s.reverse,
            )[0]  # fmt: skip
            matrix = torch.cat([scan_matrix(s, slice(0, 5)), scan_matrix(s, slice(5, None))], 1)
            found = torch.einsum("bets,bse->bte", matrix, s.u)
            # 17 tokens and 16 states: some hundred float32 roundings of values of order 1.
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    forward, backward = hidden_attention(model, images, 1)
    assert forward.shape == (3, 17, 17)
    assert torch.equal(forward, forward.tril())
    assert torch.equal(backward, backward.triu())
    with pytest.raises(ValueError, match="layer is 2, expected 0 to 1"):
        hidden_attention(model, images, 2)
    pooled = timm.create_model("fastvim_tiny_patch16_224", depth=1, img_size=32)
    with pytest.raises(ValueError, match="can be taken apart"):
        hidden_attention(pooled, torch.zeros(1, 3, 32, 32), 0)


def test_decay_lengths_of_a_constant_step(model: VisionMamba, images: torch.Tensor) -> None:
    with torch.no_grad():
        for block in model.layers:
            block.mixer.dt_proj.weight.zero_()
            block.mixer.dt_proj.bias.fill_(torch.tensor(0.25).expm1().log())  # softplus of it is 0.25
    forward, backward = decay_lengths(model, images)[0]
    torch.testing.assert_close(forward, 4 / model.layers[0].mixer.A_log.exp())
    assert backward.shape == forward.shape
    assert (backward > 0).all()


def test_receptive_field(model: VisionMamba, images: torch.Tensor) -> None:
    field = receptive_field(model, images)
    torch.testing.assert_close(field.sum(), torch.tensor(1.0))
    assert field.shape == (16, 16)
    # The sequence is scanned both ways: every patch reaches the middle one.
    assert (field.unflatten(0, (4, 4)).unflatten(2, (4, 4)).sum((1, 3)) > 0).all()
    delta = torch.zeros(9, 9)
    delta[4, 4] = 1
    assert side_that_holds(delta, 0.99) == 1 / 9
    assert side_that_holds(torch.ones(9, 9), 1.0) == 1.0
    assert side_that_holds(torch.ones(9, 9), 0.3) == 5 / 9
    torch.nn.init.zeros_(model.patch_embed.proj.weight)
    with pytest.raises(ValueError, match="of no use"):
        receptive_field(model, images)


def test_component_maps(model: VisionMamba, images: torch.Tensor) -> None:
    maps = component_maps(model, images)
    assert maps.shape == (3, 4, 4, 3)
    assert maps.min() == 0
    assert maps.max() == 1
    flat = maps.flatten(0, 2).double() - maps.flatten(0, 2).double().mean(0)
    assert torch.corrcoef(flat.T).fill_diagonal_(0).abs().max() < 1e-4  # principal components do not correlate


def test_class_token_position(model: VisionMamba, images: torch.Tensor) -> None:
    with torch.no_grad():
        plain = model(images)
    torch.testing.assert_close(logits_with_class_token_at(model, images, 8), plain)
    moved = logits_with_class_token_at(model, images, 0)
    assert (moved - plain).abs().max() > 1e-4
    targets = plain.argmax(1)
    found = accuracy_by_position(model, [(images[:2], targets[:2]), (images[2:], targets[2:])], [8, 0])
    assert found[0] == 100
    assert found[1] == pytest.approx(100 * float((moved.argmax(1) == targets).float().mean()))
    with pytest.raises(ValueError, match="expected 0 to 16"):
        logits_with_class_token_at(model, images, 17)
    with pytest.raises(ValueError, match="no image"):
        accuracy_by_position(model, [], [0])
    with pytest.raises(ValueError, match="one class token"):
        logits_with_class_token_at(timm.create_model("mambar_tiny_patch16_224", depth=1, img_size=16), images, 0)


def test_integrated_gradients_add_up(model: VisionMamba, images: torch.Tensor) -> None:
    pytest.importorskip("captum", reason="needs the test extra")
    from vim.analysis.attribution import integrated_gradients

    found, missed = integrated_gradients(model, images, torch.tensor([0, 1, 2]), steps=64)
    with torch.no_grad():
        difference = (model(images) - model(torch.zeros_like(images)))[range(3), range(3)]
    torch.testing.assert_close(found.sum((1, 2, 3)), difference + missed, rtol=1e-4, atol=1e-5)
    assert missed.abs().max() < 0.05 * difference.abs().max() + 1e-3  # Gauss-Legendre with 64 points


def test_class_activation_leaves_the_class_token_out(model: VisionMamba, images: torch.Tensor) -> None:
    pytest.importorskip("pytorch_grad_cam", reason="needs the test extra")
    from vim.analysis.attribution import class_activation

    heat = class_activation(model, images, torch.tensor([0, 1, 2]))
    assert heat.shape == (3, 16, 16)
    assert 0 <= heat.min() <= heat.max() <= 1
    # By hand, from the norm's output before the last mixer, its middle token taken out.
    kept = []
    handle = model.layers[-1].norm.register_forward_hook(lambda m, i, o: kept.append(o))
    logits = model(images)
    (gradient,) = torch.autograd.grad(logits[range(3), range(3)].sum(), kept[0])
    handle.remove()
    patches, slopes = (torch.cat([t[:, :8], t[:, 9:]], 1).detach() for t in (kept[0], gradient))
    expected = (patches * slopes.mean(1, keepdim=True)).sum(2).relu().unflatten(1, (4, 4))
    for ours, theirs in zip(expected, heat, strict=True):
        # The library enlarges the map bilinearly: its cells' means follow the map, to the cell.
        means = theirs.unflatten(0, (4, 4)).unflatten(2, (4, 4)).mean((1, 3))
        assert torch.corrcoef(torch.stack([ours.flatten(), means.flatten()]))[0, 1] > 0.9
