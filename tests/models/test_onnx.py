"""`torch.onnx.export` of models and operators without extra steps, by both of its exporters, run by ONNX Runtime."""

import itertools

import pytest
import timm
import torch
from causal_conv1d_vim import causal_conv1d
from mamba_ssm_vim import add_norm, selective_scan
from timm.utils.onnx import onnx_export

import vim  # noqa: F401  registers the models

onnx = pytest.importorskip("onnx", reason="needs the export extra")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs the export extra")
pytestmark = pytest.mark.filterwarnings("ignore")  # the older exporter is deprecated, and says so in many ways

BATCH, SEQLEN, DIM, N, W = 2, 5, 4, 3, 3


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class Operator(torch.nn.Module):
    """A function as a module: its first argument is the input, the rest are parameters."""

    def __init__(self, function, *parameters):
        super().__init__()
        self.function = function
        self.rest = torch.nn.ParameterList([torch.nn.Parameter(p) for p in parameters])

    def forward(self, x):
        return self.function(x, *self.rest)


def scan(groups, constant, reverse, initial):
    B = randn(DIM, N, seed=1) if constant else randn(BATCH, SEQLEN, groups, N, seed=1)

    def function(u, delta, A, B, C, D, z, bias, state):
        return selective_scan(
            u, delta, -A.exp(), B, C, D, z, bias, delta_softplus=True, reverse=reverse, return_last_state=True,
            initial_state=state if initial else None,
        )  # fmt: skip

    tokens = randn(BATCH, SEQLEN, DIM, seed=2), randn(BATCH, SEQLEN, DIM, seed=6)
    rest = randn(DIM, seed=5), tokens[1], randn(DIM, seed=7), randn(BATCH, DIM, N, seed=8)
    return Operator(function, tokens[0], randn(DIM, N, seed=3), B, randn(BATCH, SEQLEN, groups, N, seed=4), *rest)


def convolution(reverse, initial):
    def function(x, weight, bias, state):
        state = state if initial else None
        return causal_conv1d(x, weight, bias, activation="silu", initial_state=state, reverse=reverse)

    return Operator(function, randn(DIM, W), randn(DIM), randn(BATCH, W - 1, DIM))


def norm(rms, with_bias):
    def function(x, residual, weight, bias):
        return add_norm(x, residual, weight, bias if with_bias else None, rms=rms)

    return Operator(function, randn(BATCH, SEQLEN, DIM, seed=1), randn(DIM), randn(DIM, seed=2))


BOTH = (False, True)
exporters = pytest.mark.parametrize("dynamo", [False, pytest.param(True, marks=pytest.mark.slow)])
OPERATORS = {
    **{
        f"scan groups={groups} constant={constant} reverse={reverse} initial={initial}":
            scan(groups, constant, reverse, initial)
        for groups, constant, reverse, initial in
        [(1, False, False, False), (1, False, True, True), (2, False, True, False), (2, True, False, True)]
    },
    **{f"convolution reverse={r} initial={i}": convolution(r, i) for r, i in itertools.product(BOTH, BOTH)},
    **{f"norm rms={r} bias={b}": norm(r, b) for r, b in itertools.product(BOTH, BOTH)},
}  # fmt: skip


def session_of(file):
    model = onnx.load(file)
    assert {node.domain for node in model.graph.node} == {""}, "operators that are not ONNX's own"
    assert not model.functions
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def run(session, x):
    return [torch.from_numpy(y) for y in session.run(None, {session.get_inputs()[0].name: x.numpy()})]


@exporters
@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name, dynamo, tmp_path):
    module, x = OPERATORS[name], randn(BATCH, SEQLEN, DIM)
    torch.onnx.export(module, (x,), tmp_path / "op.onnx", dynamo=dynamo, external_data=False, verbose=False)
    outputs = module(x)
    outputs = [outputs] if isinstance(outputs, torch.Tensor) else outputs
    # Numbers of order 1 to 10, a dozen float32 roundings on either side.
    for actual, expected in zip(run(session_of(tmp_path / "op.onnx"), x), outputs, strict=True):
        torch.testing.assert_close(actual, expected.detach(), rtol=1e-5, atol=1e-5)


@exporters
@pytest.mark.parametrize("options", [
    {}, {"bimamba_type": "v1", "rms_norm": False},
    {"if_cls_token": False, "if_rope": True, "if_rope_residual": True, "init_layer_scale": 0.1},
], ids=["v2", "v1-layernorm", "rope"])  # fmt: skip
def test_timm_exports_models(options, dynamo, golden_weights, tmp_path):
    """What timm's onnx_export.py calls, for a model that it has created by name; any batch afterwards."""
    model = timm.create_model("vim_nano_patch4_32", depth=2, exportable=True, **options)
    model = golden_weights.fill(model, "onnx").eval()
    file = str(tmp_path / "vim.onnx")
    onnx_export(model, file, batch_size=2, input_size=(3, 32, 32), use_dynamo=dynamo, check=True)
    session = session_of(file)
    for batch in (1, 3):
        x = randn(batch, 3, 32, 32, seed=batch)
        with torch.no_grad():
            torch.testing.assert_close(run(session, x)[0], model(x), rtol=1e-5, atol=1e-5)
