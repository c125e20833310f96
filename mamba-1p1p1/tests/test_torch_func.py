"""`torch.func` over the operators: gradients, Jacobians and vmap against loops and the references, nested as well."""

import functools

import pytest
import torch
from causal_conv1d_vim import causal_conv1d, causal_conv1d_fn
from mamba_ssm_vim import Mamba, add_norm, rms_norm_fn, selective_scan, selective_scan_fn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap

OPS = torch.ops.vision_mamba
DIM, SEQLEN, N, W = 3, 4, 2, 3


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 10 * len(shape)))


def scan_inputs():
    u, delta, z = (randn(1, SEQLEN, DIM, seed=s) for s in range(3))
    B, C = randn(1, SEQLEN, 1, N, seed=4), randn(1, SEQLEN, 1, N, seed=5)
    return u, delta, -randn(DIM, N, seed=6).abs(), B, C, randn(DIM, seed=7), z, randn(DIM, seed=8)


def channel_first(t):
    return t.transpose(1, 2)


def published_scan(u, delta, A, B, C, D, z, bias):
    B, C = (t.permute(0, 2, 3, 1) for t in (B, C))
    return selective_scan_fn(*map(channel_first, (u, delta)), A, B, C, D, channel_first(z), bias, delta_softplus=True)


# Each: a function of tensors only, and inputs; any of these may be differentiated or batched.
FUNCTIONS = {
    "scan": (functools.partial(selective_scan, delta_softplus=True), scan_inputs()),
    "registered scan": (lambda *t: OPS.selective_scan(*t, None, True, True)[0], scan_inputs()),
    "published scan": (published_scan, scan_inputs()),
    "convolution": (
        lambda x, weight, bias, past: causal_conv1d(x, weight, bias, activation="silu", initial_state=past),
        (randn(2, SEQLEN, DIM), randn(DIM, W), randn(DIM), randn(2, W - 1, DIM, seed=1)),
    ),
    "published convolution": (
        lambda x, weight: causal_conv1d_fn(x, weight, activation="silu"),
        (randn(2, DIM, SEQLEN), randn(DIM, W)),
    ),
    "rms norm": (lambda x, r, w: torch.cat(add_norm(x, r, w)), (randn(2, DIM), randn(2, DIM, seed=1), randn(DIM))),
    "layer norm": (
        lambda x, w, b: add_norm(x, None, w, b, rms=False)[0],
        (randn(2, DIM), randn(DIM), randn(DIM, seed=1)),
    ),
    "published norm": (lambda x, w: rms_norm_fn(x, w, None), (randn(2, DIM), randn(DIM))),
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)


def loss(function, inputs):
    # Weighted, so that each output counts differently.
    out = function(*inputs)
    return (out * torch.linspace(0.5, 1.5, out.numel()).view(out.shape)).square().sum()


def ordinary_gradients(function, inputs):
    leaves = [t.clone().requires_grad_() for t in inputs]
    return torch.autograd.grad(loss(function, leaves), leaves)


def close(actual, expected):
    # The same kernels on the same numbers; only torch's own reductions around them may differ.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@every_function
def test_gradients(name):
    function, inputs = FUNCTIONS[name]
    every = tuple(range(len(inputs)))
    close(grad(lambda *t: loss(function, t), argnums=every)(*inputs), ordinary_gradients(function, inputs))


@every_function
def test_jacobians(name):
    """One row per output element: vmap over the backward operator."""
    function, inputs = FUNCTIONS[name]
    for index, t in enumerate(inputs):

        def of_one(value, at=index):
            return function(*inputs[:at], value, *inputs[at + 1 :])

        rows, leaf = [], t.clone().requires_grad_()
        for element in of_one(leaf).flatten():
            rows.append(torch.autograd.grad(element, leaf, retain_graph=True)[0])
        expected = torch.stack(rows)
        close(jacrev(of_one)(t).reshape(expected.shape), expected)
        batched = torch.autograd.functional.jacobian(of_one, t, vectorize=True)
        close(batched.reshape(expected.shape), expected)


@every_function
def test_vmap_over_each_input_and_over_all(name):
    function, inputs = FUNCTIONS[name]
    count = 3
    for which in [*({i} for i in range(len(inputs))), set(range(len(inputs)))]:
        dims = tuple((1 if i % 2 else 0) if i in which else None for i in range(len(inputs)))
        stacked = [
            t if d is None else torch.stack([t + 0.1 * k for k in range(count)], d)
            for t, d in zip(inputs, dims, strict=True)
        ]
        slices = [
            [t if d is None else t.select(d, k) for t, d in zip(stacked, dims, strict=True)] for k in range(count)
        ]
        close(vmap(function, dims)(*stacked), torch.stack([function(*s) for s in slices]))
        every = tuple(range(len(inputs)))
        per_sample = vmap(grad(lambda *t: loss(function, t), argnums=every), dims)(*stacked)
        in_a_loop = [ordinary_gradients(function, s) for s in slices]
        for index, column in enumerate(per_sample):
            close(column, torch.stack([gradients[index] for gradients in in_a_loop]))


@every_function
def test_gradient_of_vmap_and_vmap_of_vmap(name):
    function, inputs = FUNCTIONS[name]
    stacked = torch.stack([inputs[0], 0.5 * inputs[0]])

    def total(weight):
        return vmap(lambda x: loss(function, (x, weight, *inputs[2:])))(stacked).sum()

    expected = sum(ordinary_gradients(function, (x, *inputs[1:]))[1] for x in stacked)
    close(grad(total)(inputs[1]), expected)
    leaf = inputs[1].clone().requires_grad_()
    total(leaf).backward()  # a transform inside ordinary autograd
    close(leaf.grad, expected)
    twice = vmap(vmap(lambda x: function(x, *inputs[1:])))(torch.stack([stacked, 2 * stacked]))
    close(twice[1, 1], function(inputs[0], *inputs[1:]))
    close(vjp(lambda x: function(x, *inputs[1:]), inputs[0])[0], function(*inputs))


@every_function
def test_second_derivatives_and_forward_mode_say_so(name):
    """Not zeros: what has no formula is refused, in every spelling."""
    function, inputs = FUNCTIONS[name]

    def of_first(x):
        return loss(function, (x, *inputs[1:]))

    for transform in (lambda: grad(lambda x: grad(of_first)(x).sum())(inputs[0]), lambda: hessian(of_first)(inputs[0])):
        with pytest.raises(RuntimeError, match=r"no (second derivative|forward-mode derivative)"):
            transform()
    for transform in (lambda: jvp(of_first, inputs[:1], inputs[:1]), lambda: jacfwd(of_first)(inputs[0])):
        with pytest.raises(RuntimeError, match="no forward-mode derivative"):
            transform()


@pytest.mark.parametrize("kind", ["none", "v1", "v2"])
def test_per_sample_gradients_of_a_module(kind):
    torch.manual_seed(0)
    module = Mamba(8, d_state=N, bimamba_type=kind)
    parameters = dict(module.named_parameters())
    x = randn(3, 5, 8)

    def of_sample(parameters, sample):
        return functional_call(module, parameters, (sample[None],)).square().sum()

    per_sample = vmap(grad(of_sample), (None, 0))(parameters, x)
    for index, sample in enumerate(x):
        module.zero_grad()
        module(sample[None]).square().sum().backward()
        for name, parameter in module.named_parameters():
            expected = parameter.grad
            # The fused mixer projects in another order: some ulps of the largest entry.
            torch.testing.assert_close(per_sample[name][index], expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_ensembles_of_a_module():
    """Several sets of weights over one input, as torch.func.stack_module_state gives them."""
    torch.manual_seed(0)
    modules = [Mamba(8, d_state=N, bimamba_type="v2") for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(modules)
    x = randn(2, 5, 8)
    with torch.no_grad():
        out = vmap(lambda p, b: functional_call(modules[0], (p, b), (x,)))(parameters, buffers)
        expected = torch.stack([m(x) for m in modules])
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_compiled_transform():
    torch._dynamo.reset()
    function, inputs = FUNCTIONS["convolution"]
    transform = vmap(grad(lambda x: loss(function, (x, *inputs[1:]))))
    stacked = torch.stack([inputs[0], 2 * inputs[0]])
    close(torch.compile(transform, backend="aot_eager")(stacked), transform(stacked))
