"""What reaches a registered operator or a public function fits, or is refused in a sentence; odd tensors are right."""

import functools
import itertools

import pytest
import torch
from causal_conv1d_vim import causal_conv1d, causal_conv1d_fn, causal_conv1d_update
from causal_conv1d_vim.runtime.backend import use_backend
from mamba_ssm_vim import add_norm, selective_scan
from mamba_ssm_vim.ops.triton.layer_norm import layer_norm_fn, layer_norm_ref
from mamba_ssm_vim.ops.triton.selective_state_update import selective_state_update, selective_state_update_ref

OPS = torch.ops.vision_mamba
BATCH, SEQLEN, DIM, N, W = 2, 6, 4, 3, 3


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scan_arguments():
    u, delta, z = (randn(BATCH, SEQLEN, DIM, seed=s) for s in range(3))
    B, C = randn(BATCH, SEQLEN, 2, N, seed=4), randn(BATCH, SEQLEN, 2, N, seed=5)
    return {
        "u": u, "delta": delta, "A": -randn(DIM, N, seed=6).abs(), "B": B, "C": C, "D": randn(DIM, seed=7), "z": z,
        "delta_bias": randn(DIM, seed=8), "initial_state": randn(BATCH, DIM, N, seed=9),
        "delta_softplus": True, "reverse": False,
    }  # fmt: skip


def convolution_arguments():
    return {
        "x": randn(BATCH, SEQLEN, DIM), "weight": randn(DIM, W), "bias": randn(DIM),
        "initial_state": randn(BATCH, W - 1, DIM), "silu": True, "reverse": True,
    }  # fmt: skip


def norm_arguments():
    return {
        "x": randn(BATCH, SEQLEN, DIM), "residual": randn(BATCH, SEQLEN, DIM, seed=1), "weight": randn(DIM),
        "bias": randn(DIM, seed=1), "eps": 1e-5, "rms": False, "residual_dtype": torch.float32,
    }  # fmt: skip


def norm_backward_arguments():
    _, total, mean, rstd = OPS.add_norm(*norm_arguments().values())
    return {
        "dy": randn(BATCH, SEQLEN, DIM, seed=2), "dresidual_out": randn(BATCH, SEQLEN, DIM, seed=3),
        "residual_out": total, "weight": randn(DIM), "bias": randn(DIM, seed=1), "mean": mean, "rstd": rstd,
        "rms": False, "x_dtype": torch.float32,
    }  # fmt: skip


OPERATORS = {
    "selective_scan": scan_arguments(),
    "selective_scan_backward": {
        "dout": randn(BATCH, SEQLEN, DIM), "dlast_state": randn(BATCH, DIM, N), **scan_arguments(),
    },
    "causal_conv1d": convolution_arguments(),
    "causal_conv1d_backward": {"dout": randn(BATCH, SEQLEN, DIM), **convolution_arguments()},
    "add_norm": norm_arguments(),
    "add_norm_backward": norm_backward_arguments(),
}  # fmt: skip
PUBLIC = {
    "selective_scan": lambda **a: selective_scan(**a, return_last_state=True),
    "causal_conv1d": lambda silu, **a: (causal_conv1d(**a, activation="silu" if silu else None),),
    "add_norm": add_norm,
}
CALLS = {
    **{f"registered {name}": (lambda op: lambda **a: op(*a.values()))(getattr(OPS, name)) for name in OPERATORS},
    **{f"public {name}": function for name, function in PUBLIC.items()},
}
SLOTS = [
    (call, argument)
    for call in CALLS
    for argument, value in OPERATORS[call.split()[1]].items()
    if isinstance(value, torch.Tensor)
]
every_slot = pytest.mark.parametrize(("call", "argument"), SLOTS)


def arguments_of(call):
    return dict(OPERATORS[call.split()[1]])


def tensors(results):
    return [results] if isinstance(results, torch.Tensor) else list(results)


def outcome(call, arguments):
    """(results, None), or (None, the sentence that refuses)."""
    try:
        return tensors(CALLS[call](**arguments)), None
    except (ValueError, RuntimeError) as error:
        return None, str(error)


def same_or_refused(call, arguments):
    """A sentence, or what the reference makes of the same arguments."""
    results, sentence = outcome(call, arguments)
    if results is None:
        assert len(sentence.split()) > 4
        return
    with use_backend("reference"):
        expected = CALLS[call](**arguments)
    for a, e in zip(results, tensors(expected), strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4, equal_nan=True)


def resized(t):
    """The tensor with each of its sizes one larger, 1 and 0, and with a dimension more or less."""
    yield t.unsqueeze(0)
    yield t.unsqueeze(-1)
    yield t.select(0, 0)
    for dim, size in enumerate(t.shape):
        yield torch.cat([t, t.narrow(dim, 0, 1)], dim)
        if size > 1:
            yield t.narrow(dim, 0, 1)
        yield t.narrow(dim, 0, 0)


def test_every_operator_is_called():
    registered = torch._C._dispatch_get_all_op_names()
    names = {name.split("::")[1].split(".")[0] for name in registered if name.startswith("vision_mamba::")}
    # The mixer's operators take what `mixer` has checked; their own tests are in ops/mixer.
    assert names - {"mixer", "mixer_saving", "mixer_backward"} == set(OPERATORS)


@every_slot
def test_a_misfitting_shape_is_refused(call, argument):
    arguments = arguments_of(call)
    for misfit in resized(arguments[argument]):
        same_or_refused(call, {**arguments, argument: misfit})


@pytest.mark.parametrize("dtype", [
    torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.complex32,
])  # fmt: skip
@every_slot
def test_a_type_that_is_no_real_number_is_refused(call, argument, dtype):
    arguments = arguments_of(call)
    arguments[argument] = arguments[argument].to(dtype)
    if argument == "A" and dtype == torch.complex64:  # the one that may be
        return same_or_refused(call, arguments)
    with pytest.raises((ValueError, RuntimeError), match=str(dtype)):
        CALLS[call](**arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@every_slot
def test_one_tensor_of_another_type(call, argument, dtype):
    """Mixes compute with the numbers that are there, or are refused (float64 beside float32 activations)."""
    arguments = arguments_of(call)
    narrow = arguments[argument].to(dtype)
    results, sentence = outcome(call, {**arguments, argument: narrow})
    if results is None:
        assert dtype == torch.float64
        assert "must both be float64 or neither" in sentence
        return
    wide = tensors(CALLS[call](**{**arguments, argument: narrow.float()}))
    for a, e in zip(results, wide, strict=True):
        # Results have the type of the tensor they belong to: one rounding to it.
        rtol = 2 * max(torch.finfo(a.dtype).eps, 1e-5)
        torch.testing.assert_close(a.double(), e.double(), rtol=rtol, atol=rtol)


@every_slot
def test_none_and_no_tensor(call, argument):
    arguments = arguments_of(call)
    same_or_refused(call, {**arguments, argument: None})
    for value in (1.0, arguments[argument].numpy(), arguments[argument].tolist()):
        with pytest.raises(RuntimeError, match="Tensor"):
            CALLS[call](**{**arguments, argument: value})


@every_slot
def test_other_layouts_and_devices_are_refused(call, argument):
    arguments = arguments_of(call)
    t = arguments[argument]
    odd = [t.to("meta"), t.to_sparse()]
    if t.dim() == 3:
        odd.append(t.to_mkldnn())
    for value in odd:
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)) as raised:
            CALLS[call](**{**arguments, argument: value})
        assert len(str(raised.value).split()) > 4


def odd_views(t):
    """The same numbers in other memory: negative and conjugate views, overlapping and strided memory."""
    yield "negative", torch._neg_view(-t)
    yield "imaginary part of a conjugate", torch.complex(t, -t).conj().imag
    yield "every second number", torch.stack([t, t + 1], -1)[..., 0]
    yield "transposed", t.transpose(0, -1).contiguous().transpose(0, -1)
    yield "backwards", t.flip(0).flip(0)
    yield "offset", torch.cat([t.flatten(), t.flatten()])[t.numel() :].view(t.shape)


@every_slot
def test_odd_views(call, argument):
    arguments = arguments_of(call)
    expected = tensors(CALLS[call](**arguments))
    for what, view in odd_views(arguments[argument]):
        assert torch.equal(view, arguments[argument]), what
        for a, e in zip(tensors(CALLS[call](**{**arguments, argument: view})), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6, msg=what)


@every_slot
def test_zero_and_expanded_tensors(call, argument):
    """Tensors without memory of their own: zeros that are not stored, one row or number for all."""
    arguments = arguments_of(call)
    t = arguments[argument]
    rows, number = t[:1].expand(t.shape), t.flatten()[0].expand(t.shape)
    window = t.flatten().as_strided(t.shape, [1] * t.dim())
    for view in (torch._efficientzerotensor(t.shape), rows, number, window):
        stored = torch.zeros(t.shape) if view._is_zerotensor() else view.clone(memory_format=torch.contiguous_format)
        expected = tensors(CALLS[call](**{**arguments, argument: stored}))
        for a, e in zip(tensors(CALLS[call](**{**arguments, argument: view})), expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("call", [call for call in CALLS if not call.endswith("backward")])
def test_any_mix_of_inputs_may_require_gradients(call):
    arguments = arguments_of(call)
    names = [name for name, t in arguments.items() if isinstance(t, torch.Tensor)]

    def gradients(which):
        leaves = {name: arguments[name].clone().requires_grad_() for name in which}
        results = tensors(CALLS[call](**{**arguments, **leaves}))
        loss = sum((r * (k + 1)).square().sum() for k, r in enumerate(results) if r.requires_grad)
        return dict(zip(which, torch.autograd.grad(loss, list(leaves.values())), strict=True))

    everything = gradients(names)
    for which in [*itertools.combinations(names, 1), *itertools.combinations(names, 2)]:
        for name, g in gradients(which).items():
            assert torch.equal(g, everything[name])
    tensor = names[0]
    with torch.inference_mode():
        CALLS[call](**arguments)
    base = arguments[tensor].clone().requires_grad_()
    view = torch.complex(base, -base).conj().imag  # a negative view in a graph
    results = tensors(CALLS[call](**{**arguments, tensor: view}))
    loss = sum((r * (k + 1)).square().sum() for k, r in enumerate(results) if r.requires_grad)
    assert torch.equal(torch.autograd.grad(loss, base)[0], everything[tensor])


@pytest.mark.parametrize("call", CALLS)
def test_shapes_without_values(call):
    """All on the meta device: the shapes and types that the values would have."""
    arguments = arguments_of(call)
    meta = {name: t.to("meta") if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
    for a, e in zip(tensors(CALLS[call](**meta)), tensors(CALLS[call](**arguments)), strict=True):
        assert (a.shape, a.dtype, a.device.type) == (e.shape, e.dtype, "meta")


@pytest.mark.parametrize("sizes", [(0, SEQLEN), (BATCH, 0), (0, 0)])
@pytest.mark.parametrize("call", CALLS)
def test_no_rows_and_no_tokens(call, sizes):
    """Empty batches and sequences have results: empty ones, states passed through, gradients of zero."""
    arguments = arguments_of(call)
    for name, t in arguments.items():
        if isinstance(t, torch.Tensor) and t.dim() > 1 and len(t) == BATCH:
            arguments[name] = t[: sizes[0], : sizes[1] if t.shape[1] == SEQLEN else None]
    with use_backend("cpu"):
        results = tensors(CALLS[call](**arguments))
    with use_backend("reference"):
        expected = tensors(CALLS[call](**arguments))
    for a, e in zip(results, expected, strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a, e)


def steps():
    """Arguments of the published functions of one step, by name; every tensor may be replaced by a misfit."""
    state, x, B = torch.zeros(BATCH, DIM, N), randn(BATCH, DIM), randn(BATCH, N)
    scan = {"state": state, "x": x, "dt": x, "A": -randn(DIM, N).abs(), "B": B, "C": B, "D": randn(DIM), "z": x,
            "dt_bias": randn(DIM), "state_batch_indices": torch.arange(BATCH)}  # fmt: skip
    convolution = {"x": x, "conv_state": torch.zeros(BATCH, DIM, W), "weight": randn(DIM, W), "bias": randn(DIM),
                   "cache_seqlens": torch.zeros(BATCH, dtype=torch.int32)}  # fmt: skip
    xs = x.unsqueeze(-1).expand(BATCH, DIM, SEQLEN).contiguous()
    sequence = {"x": xs, "weight": randn(DIM, W), "bias": randn(DIM), "initial_states": randn(BATCH, DIM, W - 1),
                "final_states_out": torch.zeros(BATCH, DIM, W - 1)}  # fmt: skip
    packed = {**sequence, "seq_idx": torch.zeros(BATCH, SEQLEN, dtype=torch.int32)}
    norm = {"x": x, "weight": randn(DIM), "bias": randn(DIM), "residual": x}
    finals = functools.partial(causal_conv1d_fn, return_final_states=True)
    return {
        "selective_state_update": (selective_state_update, scan),
        "selective_state_update_ref": (selective_state_update_ref, {k: v for k, v in scan.items() if "ind" not in k}),
        "causal_conv1d_update": (causal_conv1d_update, convolution),
        "causal_conv1d_fn": (finals, sequence),
        "causal_conv1d_fn, packed": (finals, packed),
        "layer_norm_fn": (layer_norm_fn, norm),
        "layer_norm_ref": (layer_norm_ref, norm),
    }


@pytest.mark.parametrize("name", steps())
def test_published_functions_refuse_misfits(name):
    function, arguments = steps()[name]
    function(**arguments)
    for argument, t in arguments.items():
        other = torch.float32 if argument in INDICES else torch.int64
        misfits = [t.to(other), t.to(torch.complex64), t.to("meta")]
        if (name, argument) != ("selective_state_update", "state"):  # which may have more rows than the batch
            misfits.append(torch.cat([t, t[:1]]))
        if (name, argument) != ("causal_conv1d_update", "x"):  # which may be several tokens
            misfits.append(t[..., None])
        for misfit in misfits:
            fresh = {k: v.clone() for k, v in arguments.items()}
            with pytest.raises((ValueError, RuntimeError), match=r"\w+ .+ .+"):
                function(**{**fresh, argument: misfit})
            # Nothing half-written is left behind in the states.
            assert all(torch.equal(v, arguments[k]) for k, v in fresh.items())


INDICES = ("state_batch_indices", "cache_seqlens", "seq_idx")


def test_overlapping_states_are_refused():
    """A state that is written in place may not share its memory between rows."""
    for name, argument in (("selective_state_update", "state"), ("causal_conv1d_update", "conv_state")):
        function, arguments = steps()[name]
        arguments.pop("state_batch_indices", None), arguments.pop("cache_seqlens", None)
        arguments[argument] = arguments[argument][:1].expand(BATCH, -1, -1)
        with pytest.raises(RuntimeError, match="single memory location"):
            function(**arguments)
