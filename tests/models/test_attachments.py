"""What users attach to a model acts: hooks, adapters, pruning, parametrisations, quantised and offloaded layers."""

import copy
import re

import pytest
import timm
import torch
from mamba_ssm_vim import Mamba, use_backend
from mamba_ssm_vim.modules.plain import is_plain
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.nn.utils import spectral_norm as old_spectral_norm
from torch.nn.utils import weight_norm as old_weight_norm

from vim.models.layers import Block

# Calling modules one by one sums in another order than the fused kernels: float32 roundings on values of order 1.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
PARTS = ("norm", "mixer.in_proj", "mixer.conv1d", "mixer.x_proj", "mixer.dt_proj", "mixer.out_proj")
PARTS += ("mixer.conv1d_b", "mixer.x_proj_b", "mixer.dt_proj_b")
LINEAR = ("in_proj", "x_proj", "x_proj_b", "dt_proj", "dt_proj_b", "out_proj")


def make(name: str = "vim_nano_patch4_32", **options) -> nn.Module:
    """A model of two blocks whose two directions differ and whose biases are not zero."""
    torch.manual_seed(0)
    model = timm.create_model(name, depth=2, img_size=16, num_classes=5, drop_path_rate=0.0, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv1d))]


def step(model: nn.Module) -> torch.Tensor:
    """Loss of a training step, backward included."""
    model.train()
    loss = model(images()).square().mean()
    loss.backward()
    return loss.detach()


# Hooks


@pytest.mark.parametrize("name", ["vim_nano_patch4_32", "v1", "layernorm", "pooled", "crossed", "mlp"])
def test_hooks_of_every_kind_fire_on_every_module(name: str) -> None:
    options = {
        "v1": {"bimamba_type": "v1", "if_divide_out": False},
        "layernorm": {"rms_norm": False, "residual_in_fp32": False},
        "pooled": {"norm_after_ssm": True, "scan_pool": "mean", "if_cls_token": False, "final_pool_type": "mean"},
        "crossed": {"bimamba_type": "v3"},
        "mlp": {"mlp_dim": 24},
    }.get(name, {})
    model, x = make(**options), images().requires_grad_()
    expected = model(x)
    (expected_gradient,) = torch.autograd.grad(expected.square().sum(), x)
    fired: dict[str, list[str]] = {}
    unused = re.compile(r"drop_path|^(neck|norm_neck)$|^$|layers\.?\d*$")
    names = {n for n, m in model.named_modules() if not unused.search(n)}
    for n, module in model.named_modules():
        if n in names:
            calls = fired.setdefault(n, [])
            module.register_forward_pre_hook(lambda m, i, c=calls: c.append("before"))
            module.register_forward_hook(lambda m, i, o, c=calls: c.append("after"))
            module.register_full_backward_pre_hook(lambda m, g, c=calls: c.append("backward before"))
            module.register_full_backward_hook(lambda m, i, o, c=calls: c.append("backward after"))
    out = model(x)
    torch.testing.assert_close(out, expected, **CLOSE)
    (gradient,) = torch.autograd.grad(out.square().sum(), x)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-3, atol=1e-5)
    every = ["before", "after", "backward before", "backward after"]
    # A feature map is taken from beside the path to the logits, so no gradient comes back through it.
    assert {n: calls for n, calls in fired.items() if calls != (every[:2] if n.endswith(".map") else every)} == {}


@pytest.mark.parametrize("part", [*PARTS, "norm_f"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_hook_may_change_the_output(part: str, compiled: bool) -> None:
    """As feature editing does; and taken off again, the fast path is back, bit for bit."""
    model, x = make(), images()
    plain = model(x)
    module = model.get_submodule(part if part == "norm_f" else f"layers.0.{part}")
    handle = module.register_forward_hook(lambda m, i, o: o * 0)
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    changed = run(x)
    by_weights = copy.deepcopy(model)
    same = by_weights.get_submodule(part if part == "norm_f" else f"layers.0.{part}")
    same._forward_hooks.clear()
    with torch.no_grad():
        for parameter in same.parameters():
            parameter.zero_()
    torch.testing.assert_close(changed, by_weights(x), **CLOSE)
    assert not torch.allclose(changed, plain, atol=1e-4)
    handle.remove()
    assert torch.equal(model(x), plain)


def test_global_hooks_see_every_module() -> None:
    model, seen = make(), set()
    handle = nn.modules.module.register_module_forward_hook(lambda m, i, o: seen.add(m))
    try:
        out = model(images())
    finally:
        handle.remove()
    assert {model.layers[0].get_submodule(p) for p in PARTS} | {model.norm_f} <= seen
    torch.testing.assert_close(out, model(images()), **CLOSE)


def test_steps_call_hooked_modules() -> None:
    torch.manual_seed(0)
    mamba, x = Mamba(24, d_state=8), torch.randn(2, 7, 24)
    expected = mamba(x)
    calls: list[str] = []
    for name, module in mamba.named_children():
        module.register_forward_hook(lambda m, i, o, name=name: calls.append(name))
    states = mamba.allocate_inference_cache(2, 7)
    out = torch.cat([mamba.step(piece, *states)[0] for piece in x.split([3, 1, 2, 1], dim=1)], dim=1)
    torch.testing.assert_close(out, expected, **CLOSE)
    assert sorted(calls) == sorted(4 * list(dict(mamba.named_children())))


def test_plain_models_stay_on_the_fast_path() -> None:
    model = make()
    assert all(is_plain(model.layers[0].get_submodule(p)) for p in PARTS)
    assert is_plain(model.norm_f)


# Adapters


@pytest.mark.parametrize("kind", ["lora", "dora", "ia3"])
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_adapters_act_learn_and_merge(kind: str, compiled: bool) -> None:
    peft = pytest.importorskip("peft", reason="needs the test extra")
    if kind == "ia3":
        config = peft.IA3Config(target_modules=[*LINEAR], feedforward_modules=["x_proj"], init_ia3_weights=False)
    else:
        config = peft.LoraConfig(r=4, target_modules=[*LINEAR], use_dora=kind == "dora", init_lora_weights=False)
    plain = make()(images())
    model = peft.get_peft_model(make(), config).eval()
    torch._dynamo.reset()
    run = torch.compile(model, backend="aot_eager") if compiled else model
    out = run(images())
    assert (out - plain).abs().max() > 1e-2
    run(images()).square().mean().backward()
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(learning) >= 2 * len(LINEAR)
    assert [n for n, p in learning.items() if p.grad is None or not p.grad.any()] == []
    merged = copy.deepcopy(model).merge_and_unload()
    assert is_plain(merged.layers[0].mixer.x_proj)
    torch.testing.assert_close(merged(images()), out, rtol=1e-3, atol=1e-4)


def test_adapters_under_autocast() -> None:
    peft = pytest.importorskip("peft", reason="needs the test extra")
    config = peft.LoraConfig(r=4, target_modules=[*LINEAR], init_lora_weights=False)
    model = peft.get_peft_model(make(), config).eval()
    exact = model(images())
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images())
    out.float().sum().backward()
    # Roundings of bfloat16, 2^-9 each, through two blocks.
    assert (out.float() - exact).abs().max() < 0.05 * exact.abs().max()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


class ScaledLinear(nn.Linear):
    """A subclass as quantisation libraries use: another product than the weight's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


@pytest.mark.parametrize("name", LINEAR)
def test_subclasses_are_called(name: str) -> None:
    model, x = make(), images()
    doubled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in getattr(doubled.layers[0].mixer, name).parameters():
            parameter.mul_(2)
    getattr(model.layers[0].mixer, name).__class__ = ScaledLinear
    torch.testing.assert_close(model(x), doubled(x), **CLOSE)


def test_replaced_layers_are_called() -> None:
    """Other norms, a bias where the mixer has none, no bias where it has one."""
    model, x = make(), images()
    block = model.layers[1]
    plain = model(x)
    block.norm = nn.RMSNorm(model.embed_dim, eps=block.norm.eps)
    block.norm.weight = model.layers[1].norm.weight
    biased = nn.Linear(block.mixer.d_inner, block.mixer.x_proj.out_features)
    biased.weight, biased.bias.data[:] = block.mixer.x_proj.weight, 0.5
    block.mixer.x_proj = biased
    assert (model(x) - plain).abs().max() > 1e-3
    step(model)
    assert biased.bias.grad.abs().sum() > 0
    block.mixer.dt_proj.bias = None
    assert model(x).isfinite().all()


# Parametrisations and pruning


@pytest.mark.parametrize(
    "attach", [old_weight_norm, old_spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm],
    ids=["old weight_norm", "old spectral_norm", "weight_norm", "spectral_norm"],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
def test_parametrised_layers(attach) -> None:
    """Each product is with the weight that the parametrisation computes, step after step."""
    model, x = make(), images()
    for layer in layers(model):
        attach(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(step(model))
        assert [n for n, p in model.named_parameters() if p.grad is None] == []
        optimizer.step()
    assert losses[2] < losses[0]
    model.eval()
    out, copied = model(x), make()
    with torch.no_grad():
        for ours, theirs in zip(layers(model), layers(copied), strict=True):
            theirs.weight.copy_(ours.weight)
        copied.load_state_dict({n: p for n, p in model.state_dict().items() if n in copied.state_dict()}, strict=False)
    torch.testing.assert_close(copied(x), out, rtol=1e-3, atol=1e-4)


class Halved(nn.Module):
    """A parametrisation."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 0.5


@pytest.mark.parametrize("name", ["A_log", "A_b_log", "D", "D_b"])
def test_parametrised_transition(name: str) -> None:
    model, x = make(), images()
    expected = copy.deepcopy(model)
    getattr(expected.layers[0].mixer, name).data.mul_(0.5)
    parametrize.register_parametrization(model.layers[0].mixer, name, Halved())
    torch.testing.assert_close(model(x), expected(x), **CLOSE)
    step(model)
    assert model.layers[0].mixer.parametrizations[name].original.grad.abs().sum() > 0


@pytest.mark.parametrize("method", [prune.random_unstructured, prune.l1_unstructured])
def test_pruning_trains_and_becomes_permanent(method) -> None:
    model, x = make(), images()
    for layer in layers(model):
        method(layer, "weight", 0.3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        step(model)
        optimizer.step()
    model.eval()
    out = model(x)
    for layer in layers(model):
        prune.remove(layer, "weight")
        # A fraction of 0.3, rounded to whole weights.
        assert abs((layer.weight == 0).float().mean().item() - 0.3) <= 0.5 / layer.weight.numel() + 1e-6
    assert is_plain(model.layers[0].mixer.x_proj)
    torch.testing.assert_close(model(x), out, **CLOSE)


# Quantised and offloaded layers


@pytest.mark.filterwarnings("ignore")  # torch announces that its quantisation moves to another package
def test_dynamic_quantisation() -> None:
    model, x = make(), images()
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert not is_plain(small.layers[0].mixer.x_proj)
    expected = model(x)
    # 8 bits for weights and activations: some 1/256 of the largest, through ten products.
    assert 0 < (small(x) - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded_weights(where: str, tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="needs the test extra")
    model, x = make(), images()
    with torch.no_grad():
        expected = model(x)
        if where == "cpu":
            accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
        else:
            accelerate.disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
        assert model.layers[0].mixer.x_proj.weight.is_meta
        torch.testing.assert_close(model(x), expected, **CLOSE)


# Class activation maps


def test_gradcam() -> None:
    cam = pytest.importorskip("pytorch_grad_cam", reason="needs the test extra")
    from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget

    model, x = make(), images()
    rows, columns = model.patch_embed.grid_size

    def to_map(tokens: torch.Tensor) -> torch.Tensor:
        middle = rows * columns // 2
        patches = torch.cat([tokens[:, :middle], tokens[:, middle + 1 :]], dim=1)
        return patches.transpose(1, 2).unflatten(2, (rows, columns))

    # By hand: the norm's output as a leaf of the graph.
    kept = []
    handle = model.layers[-1].norm.register_forward_hook(lambda m, i, o: kept.append(o))
    logits = model(x)
    (gradient,) = torch.autograd.grad(logits[:, 3].sum(), kept[-1])
    handle.remove()
    weights = to_map(gradient).mean((2, 3), keepdim=True)
    heat = (weights * to_map(kept[-1].detach())).sum(1).relu()
    with cam.GradCAM(model, target_layers=[model.layers[-1].norm], reshape_transform=to_map) as grad_cam:
        found = torch.from_numpy(grad_cam(x, targets=[ClassifierOutputTarget(3)] * 2))
    assert found.shape == (2, 16, 16)
    for ours, theirs in zip(heat, found, strict=True):
        scaled = (ours - ours.min()) / (ours.max() - ours.min() + 1e-7)
        # The library enlarges the map bilinearly: compare where its pixels fall on cell centres, to the cell.
        means = theirs.unflatten(0, (rows, -1)).unflatten(2, (columns, -1)).mean((1, 3))
        assert torch.corrcoef(torch.stack([scaled.flatten(), means.flatten()]))[0, 1] > 0.9


# Where nothing else may change


def test_every_backend_serves_modules() -> None:
    model, x = make(), images()
    model.layers[0].mixer.x_proj.register_forward_hook(lambda m, i, o: None)
    with use_backend("reference"):
        expected = model(x)
    torch.testing.assert_close(model(x), expected, **CLOSE)


def test_a_wrapped_mixer_keeps_its_hooks_when_operators_are_counted() -> None:
    """A FLOP counter's own hooks on every module leave the operators visible; a user's hooks still fire."""
    from torch.utils.flop_counter import FlopCounterMode

    model, fired = make(), []
    model.layers[0].mixer.register_forward_hook(lambda m, i, o: fired.append(m))
    with FlopCounterMode(display=False) as counter:
        model(images())
    assert fired == [model.layers[0].mixer]
    assert counter.get_flop_counts()["Global"][torch.ops.vision_mamba.selective_scan] > 0


def test_blocks_work_alone() -> None:
    """A block outside a model, as feature extractors cut it out."""
    block = make().layers[0]
    assert isinstance(block, Block)
    tokens = torch.randn(2, 17, block.mixer.d_model)
    handle = block.norm.register_forward_hook(lambda m, i, o: None)
    hooked = block(tokens, tokens)
    handle.remove()
    for a, b in zip(hooked, block(tokens, tokens), strict=True):
        torch.testing.assert_close(a, b, **CLOSE)
