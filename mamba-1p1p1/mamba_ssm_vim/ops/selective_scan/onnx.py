"""The selective scan for ONNX's exporters: a loop over tokens that stays a loop.

Legend: B batch, L tokens, E channels, N states, G groups, K = E / G channels of a group. The state is (B, G, N, K),
channels innermost: ONNX Runtime's loops are then two to four times as fast as with states innermost.
"""

import functools

import torch
import torch.nn.functional as F
from causal_conv1d_vim.runtime.onnx import Graph


def _step(state, dt, dtu, b, c, A):
    state = torch.exp(dt * A) * state + dtu * b
    return [state, c @ state]


def decomposition(
    u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse
) -> tuple[torch.Tensor, torch.Tensor]:
    """The operator in torch's own, for `torch.onnx.export(dynamo=True)`, which makes an ONNX Scan of the loop."""
    # The loop's own derivative is of no use in ONNX, and does not trace with a free batch.
    u, delta, A, B, C, D, z, delta_bias, initial_state = (
        None if t is None else t.detach() for t in (u, delta, A, B, C, D, z, delta_bias, initial_state)
    )
    packed = functools.partial(torch.clone, memory_format=torch.contiguous_format)  # the loop compares strides
    batch, seqlen, dim = u.shape
    if B.dim() == 2 or C.dim() == 2 or B.shape[2] != C.shape[2]:  # every channel is a group of its own
        B, C = (
            (t.unsqueeze(0).expand(seqlen, -1, -1).unsqueeze(0).expand(batch, -1, -1, -1) if t.dim() == 2
             else t.repeat_interleave(dim // t.shape[2], dim=2))
            for t in (B, C)
        )  # fmt: skip
    groups, states = B.shape[2:]
    shape = (groups, 1, dim // groups)
    dt = delta.float() if delta_bias is None else delta.float() + delta_bias.float()
    dt = F.softplus(dt) if delta_softplus else dt
    x = u.float()
    xs = [dt.unflatten(-1, shape), (dt * x).unflatten(-1, shape), B.float().unsqueeze(-1), C.float().unsqueeze(-2)]
    xs = [(t.flip(1) if reverse else t).transpose(0, 1).contiguous() for t in xs]
    if initial_state is None:
        state = x.new_zeros(batch, groups, states, dim // groups)
    else:
        state = packed(initial_state.float().unflatten(1, (groups, -1)).transpose(2, 3))
    A = packed(A.float().unflatten(0, (groups, -1)).transpose(1, 2))
    last, y = torch.ops.higher_order.scan(_step, [state], xs, [A])
    y = y.flatten(-3).transpose(0, 1)
    y = y.flip(1) if reverse else y
    if D is not None:
        y = y + x * D.float()
    if z is not None:
        y = y * F.silu(z.float())
    return y.to(u.dtype), last.transpose(2, 3).flatten(1, 2)


def symbolic(context, u, delta, A, B, C, D, z, delta_bias, initial_state, delta_softplus, reverse):
    """The operator in ONNX's, for `torch.onnx.export(dynamo=False)`."""
    g = Graph(context)
    dim, states = g.sizes(A)
    # A number of groups that the exporter has lost track of is taken for one: any other then fails when it is run.
    own = [dim if len(g.sizes(t)) == 2 else g.sizes(t)[2] or 1 for t in (B, C)]
    groups = own[0] if own[0] == own[1] else dim

    def in_order(t):
        """(B, L, ...) → (L, B, ...), in the order of the scan."""
        count = len(g.sizes(t))
        t = g.transpose(g.float32(t), 1, 0, *range(2, count))
        return g.flip(t, 0) if reverse else t

    x, dt = g.float32(u), g.float32(delta)
    if g.given(delta_bias):
        dt = g.op("Add", dt, g.float32(delta_bias))
    dt = in_order(g.op("Softplus", dt) if delta_softplus else dt)
    dtu = g.op("Mul", dt, in_order(u))
    dt, dtu = (g.reshape(t, 0, 0, groups, 1, -1) for t in (dt, dtu))
    rows = g.op("Slice", g.op("Shape", dt), g.ints(0), g.ints(2))

    def projection(t, count, *shape):
        """B or C as (L, B, G, *shape)."""
        if len(g.sizes(t)) == 2:
            size = g.op("Concat", rows, g.ints(1, 1, 1), axis_i=0)
            return g.op("Expand", g.reshape(g.float32(t), 1, 1, dim, *shape), size)
        t = in_order(t)
        if count != groups:
            t = g.op("Expand", g.reshape(t, 0, 0, count, 1, -1), g.ints(1, 1, 1, groups // count, 1))
        return g.reshape(t, 0, 0, groups, *shape)

    A = g.transpose(g.reshape(g.float32(A), groups, dim // groups, states), 0, 2, 1)
    if g.given(initial_state):
        state = g.transpose(g.reshape(g.float32(initial_state), 0, groups, -1, states), 0, 1, 3, 2)
    else:
        batch = g.op("Slice", rows, g.ints(1), g.ints(2))
        size = g.op("Concat", batch, g.ints(groups, states, dim // groups), axis_i=0)
        state = g.op("Expand", g.number(0.0), size)

    def step(body, state, dt_t, dtu_t, b_t, c_t):
        decay = body.op("Exp", body.op("Mul", dt_t, A))
        state = body.op("Add", body.op("Mul", decay, state), body.op("Mul", dtu_t, b_t))
        return state, body.op("MatMul", c_t, state)

    b, c = projection(B, own[0], -1, 1), projection(C, own[1], 1, -1)
    last, y = g.loop((dt, dtu, b, c), state, step)
    y = g.reshape(y, 0, 0, -1)
    y = g.transpose(g.flip(y, 0) if reverse else y, 1, 0, 2)
    if g.given(D):
        y = g.op("Add", y, g.op("Mul", x, g.float32(D)))
    if g.given(z):
        y = g.op("Mul", y, g.silu(g.float32(z)))
    return g.like(y, u), g.reshape(g.transpose(last, 0, 1, 3, 2), 0, -1, states)
