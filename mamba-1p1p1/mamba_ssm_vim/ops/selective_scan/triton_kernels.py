"""Triton kernels of the selective scan.

A program owns BLOCK_E channels of one sequence (or of one chunk of it) and walks over tiles of K tokens. Tensors of a
tile are (K, N, BLOCK_E): Triton's default layout spreads channels over the lanes and keeps tokens and states in a
thread's registers, so the scan over tokens and the sums over states cost no communication. Steps are numbered in scan
order; with REVERSE step s is token L-1-s, so no tensor is ever flipped. Tensors that may be absent are None.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from causal_conv1d_vim.runtime.triton_kernels import sigmoid, softplus

LOG2E = tl.constexpr(1.4426950408889634)


class Sizes(NamedTuple):
    """What all kernels of one call are told."""

    seqlen: Any
    dim: Any
    dstate: Any
    groups: Any
    chunk_len: Any
    chunks: Any


class Block(NamedTuple):
    """The channels of a program, all of one group, and the steps [first, last) of its chunk."""

    batch: Any
    index: Any  # of the block in its group
    group: Any
    chunk: Any
    first: Any
    last: Any
    e: Any  # (BLOCK_E,) channels
    e_mask: Any
    n: Any  # (N,) states
    n_mask: Any
    ne: Any  # (N, BLOCK_E) places in a tensor (N, E)
    ne_mask: Any


class Tile(NamedTuple):
    """K steps of a block."""

    t: Any  # (K,) tokens
    inside: Any  # (K, BLOCK_E)
    states: Any  # (K, N), the mask of B and C


@triton.jit
def _combine(a1, b1, a2, b2):
    """Two steps h → a h + b as one."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _combine_exclusive(a1, b1, p1, q1, a2, b2, p2, q2):
    """`_combine` that also carries the map (p, q) up to, but without, the last step."""
    return a1 * a2, a2 * b1 + b2, p2 * a1, p2 * b1 + q2


@triton.jit
def _block(sizes, groups, N: tl.constexpr, BLOCK_E: tl.constexpr):
    per_group = sizes.dim // groups
    blocks = tl.cdiv(per_group, BLOCK_E)
    pid = tl.program_id(0)
    group = (pid // blocks) % groups
    index = pid % blocks
    chunk = tl.program_id(1)
    first = chunk * sizes.chunk_len
    inside = index * BLOCK_E + tl.arange(0, BLOCK_E)
    e = group * per_group + inside
    e_mask = inside < per_group
    n = tl.arange(0, N)
    n_mask = n < sizes.dstate
    ne = n[:, None] * sizes.dim + e[None, :]
    return Block(
        batch=(pid // (groups * blocks)).to(tl.int64), index=index, group=group, chunk=chunk, first=first,
        last=tl.minimum(first + sizes.chunk_len, sizes.seqlen), e=e, e_mask=e_mask, n=n, n_mask=n_mask, ne=ne,
        ne_mask=n_mask[:, None] & e_mask[None, :],
    )  # fmt: skip


@triton.jit
def _tile(block, sizes, s0, REVERSE: tl.constexpr, K: tl.constexpr):
    """The tile from step s0 on."""
    s = s0 + tl.arange(0, K)
    t = (sizes.seqlen - 1 - s if REVERSE else s).to(tl.int64)
    s_mask = s < block.last
    return Tile(t=t, inside=s_mask[:, None] & block.e_mask[None, :], states=s_mask[:, None] & block.n_mask[None, :])


@triton.jit
def _at(x, x_b, x_t, block, tile):
    """Addresses of the tile in x (B, L, E)."""
    return x + block.batch * x_b + tile.t[:, None] * x_t + block.e[None, :]


@triton.jit
def _load(x, x_b, x_t, block, tile):
    """x (B, L, E) → (K, BLOCK_E)."""
    return tl.load(_at(x, x_b, x_t, block, tile), mask=tile.inside, other=0.0).to(tl.float32)


@triton.jit
def _load_states(x, x_b, x_t, x_g, block, tile):
    """B or C (B, L, G, N) → (K, N)."""
    at = x + block.batch * x_b + tile.t[:, None] * x_t + block.group * x_g + block.n[None, :]
    return tl.load(at, mask=tile.states, other=0.0).to(tl.float32)


@triton.jit
def _vector(x, block, BLOCK_E: tl.constexpr):
    """x (E,) or None → (BLOCK_E,)."""
    if x is None:
        return tl.zeros((BLOCK_E,), tl.float32)
    else:
        return tl.load(x + block.e, mask=block.e_mask, other=0.0).to(tl.float32)


@triton.jit
def _state(x, row, sizes, block, N: tl.constexpr, BLOCK_E: tl.constexpr):
    """Row `row` of x (rows, N, E) or None → (N, BLOCK_E)."""
    if x is None:
        return tl.zeros((N, BLOCK_E), tl.float32)
    else:
        return tl.load(x + row * sizes.dstate * sizes.dim + block.ne, mask=block.ne_mask, other=0.0)


@triton.jit
def _step(delta, delta_b, delta_t, block, tile, bias, SOFTPLUS: tl.constexpr):
    """Step sizes (K, BLOCK_E), 0 outside (the state passes through), and d step / d delta."""
    raw = _load(delta, delta_b, delta_t, block, tile) + bias[None, :]
    if SOFTPLUS:
        return tl.where(tile.inside, softplus(raw), 0.0), sigmoid(raw)
    else:
        return tl.where(tile.inside, raw, 0.0), tl.full(raw.shape, 1.0, tl.float32)


@triton.jit
def _log2_decay(A, sizes, block):
    """(N, BLOCK_E) of A · log2(e), so that exp(dt A) is one exp2."""
    at = A + block.e[None, :].to(tl.int64) * sizes.dstate + block.n[:, None]
    return tl.load(at, mask=block.ne_mask, other=0.0) * LOG2E


@triton.jit
def _states(h, decay, added, K: tl.constexpr):
    """The state after each step of a tile (K, N, BLOCK_E), h (N, BLOCK_E) being the one before it."""
    k = tl.arange(0, K)[:, None, None]
    _decay, hs = tl.associative_scan((decay, tl.where(k == 0, added + decay * h[None], added)), 0, _combine)
    return hs


@triton.jit
def _at_step(x, step: tl.constexpr, K: tl.constexpr):
    """x (K, N, BLOCK_E) at one step of the tile."""
    return tl.sum(tl.where(tl.arange(0, K)[:, None, None] == step, x, 0.0), 0)


@triton.jit
def scan_states(
    u, u_b, u_t, delta, delta_b, delta_t, A, B, B_b, B_t, B_g, delta_bias, enter, boundaries, local_state, local_dt,
    seqlen, dim, dstate, groups, chunk_len, chunks,
    SAVE_TILE: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """States only: that on entering every SAVE_TILE tokens → boundaries (B, tiles, N, E), if given; that at the end of
    the chunk → local_state (B, chunks, N, E), and the chunk's summed step → local_dt (B, chunks, E), if given."""
    sizes = Sizes(seqlen=seqlen, dim=dim, dstate=dstate, groups=groups, chunk_len=chunk_len, chunks=chunks)
    block = _block(sizes, sizes.groups, N, BLOCK_E)
    log2_decay = _log2_decay(A, sizes, block)
    bias = _vector(delta_bias, block, BLOCK_E)
    row = block.batch * sizes.chunks + block.chunk
    h = _state(enter, row, sizes, block, N, BLOCK_E)
    total = tl.zeros((BLOCK_E,), tl.float32)
    tiles = tl.cdiv(sizes.seqlen, SAVE_TILE)
    for s0 in range(block.first, block.last, K):
        if boundaries is not None:
            at = boundaries + (block.batch * tiles + s0 // SAVE_TILE) * sizes.dstate * sizes.dim + block.ne
            tl.store(at, h, mask=block.ne_mask & (s0 % SAVE_TILE == 0))
        tile = _tile(block, sizes, s0, REVERSE, K)
        dt, _slope = _step(delta, delta_b, delta_t, block, tile, bias, SOFTPLUS)
        x = _load(u, u_b, u_t, block, tile)
        b = _load_states(B, B_b, B_t, B_g, block, tile)
        hs = _states(h, tl.exp2(dt[:, None, :] * log2_decay[None]), (dt * x)[:, None, :] * b[:, :, None], K)
        h = _at_step(hs, K - 1, K)
        if local_state is not None:
            total += tl.sum(dt, 0)
    if local_state is not None:
        tl.store(local_state + row * sizes.dstate * sizes.dim + block.ne, h, mask=block.ne_mask)
        tl.store(local_dt + row * sizes.dim + block.e, total, mask=block.e_mask)


@triton.jit
def scan_combine(
    A, start, local_state, local_dt, enter, leave, seqlen, dim, dstate, groups, chunk_len, chunks,
    BACKWARD: tl.constexpr, N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Chunk after chunk (from the last to the first if BACKWARD): enter (B, chunks, N, E) is the state on entering a
    chunk, leave (B, N, E) that after all of them; start (B, N, E) is the first state, zero if None."""
    sizes = Sizes(seqlen=seqlen, dim=dim, dstate=dstate, groups=groups, chunk_len=chunk_len, chunks=chunks)
    block = _block(sizes, 1, N, BLOCK_E)
    log2_decay = _log2_decay(A, sizes, block)
    h = _state(start, block.batch, sizes, block, N, BLOCK_E)
    for i in range(0, sizes.chunks):
        row = block.batch * sizes.chunks + (sizes.chunks - 1 - i if BACKWARD else i)
        tl.store(enter + row * sizes.dstate * sizes.dim + block.ne, h, mask=block.ne_mask)
        dt = tl.load(local_dt + row * sizes.dim + block.e, mask=block.e_mask, other=0.0)
        h = tl.exp2(dt[None, :] * log2_decay) * h + _state(local_state, row, sizes, block, N, BLOCK_E)
    tl.store(leave + block.batch * sizes.dstate * sizes.dim + block.ne, h, mask=block.ne_mask)


@triton.jit
def scan_forward(
    u, u_b, u_t, delta, delta_b, delta_t, A, B, B_b, B_t, B_g, C, C_b, C_t, C_g, D, z, z_b, z_t, delta_bias, enter,
    addend, addend_b, addend_t, out, out_b, out_t, last_state,
    seqlen, dim, dstate, groups, chunk_len, chunks, out_scale,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out = addend + out_scale (C h + D u) SiLU(z); enter (B, chunks, N, E), last_state (B, N, E)."""
    sizes = Sizes(seqlen=seqlen, dim=dim, dstate=dstate, groups=groups, chunk_len=chunk_len, chunks=chunks)
    block = _block(sizes, sizes.groups, N, BLOCK_E)
    log2_decay = _log2_decay(A, sizes, block)
    bias = _vector(delta_bias, block, BLOCK_E)
    skip = _vector(D, block, BLOCK_E)
    h = _state(enter, block.batch * sizes.chunks + block.chunk, sizes, block, N, BLOCK_E)
    for s0 in range(block.first, block.last, K):
        tile = _tile(block, sizes, s0, REVERSE, K)
        dt, _slope = _step(delta, delta_b, delta_t, block, tile, bias, SOFTPLUS)
        x = _load(u, u_b, u_t, block, tile)
        b = _load_states(B, B_b, B_t, B_g, block, tile)
        c = _load_states(C, C_b, C_t, C_g, block, tile)
        hs = _states(h, tl.exp2(dt[:, None, :] * log2_decay[None]), (dt * x)[:, None, :] * b[:, :, None], K)
        h = _at_step(hs, K - 1, K)
        y = tl.sum(hs * c[:, :, None], 1) + skip[None, :] * x
        if z is not None:
            gate = _load(z, z_b, z_t, block, tile)
            y = y * gate * sigmoid(gate)
        y = y * out_scale
        if addend is not None:
            y += _load(addend, addend_b, addend_t, block, tile)
        tl.store(_at(out, out_b, out_t, block, tile), y.to(out.dtype.element_ty), mask=tile.inside)
    if block.chunk == sizes.chunks - 1:
        tl.store(last_state + block.batch * sizes.dstate * sizes.dim + block.ne, h, mask=block.ne_mask)


@triton.jit
def scan_grad_states(
    dout, dout_b, dout_t, delta, delta_b, delta_t, A, C, C_b, C_t, C_g, z, z_b, z_t, delta_bias, local_state,
    seqlen, dim, dstate, groups, chunk_len, chunks, out_scale,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradient of the state on entering each chunk if that of the state leaving it is zero → (B, chunks, N, E)."""
    sizes = Sizes(seqlen=seqlen, dim=dim, dstate=dstate, groups=groups, chunk_len=chunk_len, chunks=chunks)
    block = _block(sizes, sizes.groups, N, BLOCK_E)
    log2_decay = _log2_decay(A, sizes, block)
    bias = _vector(delta_bias, block, BLOCK_E)
    k = tl.arange(0, K)[:, None, None]
    g = tl.zeros((N, BLOCK_E), tl.float32)
    tiles = tl.cdiv(block.last - block.first, K)
    for i in range(0, tiles):
        tile = _tile(block, sizes, block.first + (tiles - 1 - i) * K, REVERSE, K)
        dt, _slope = _step(delta, delta_b, delta_t, block, tile, bias, SOFTPLUS)
        c = _load_states(C, C_b, C_t, C_g, block, tile)
        dy = _load(dout, dout_b, dout_t, block, tile) * out_scale
        if z is not None:
            gate = _load(z, z_b, z_t, block, tile)
            dy = dy * gate * sigmoid(gate)
        a = tl.exp2(dt[:, None, :] * log2_decay[None])
        w = dy[:, None, :] * c[:, :, None]
        w = a * tl.where(k == K - 1, w + g[None], w)
        _decay, gs = tl.associative_scan((a, w), 0, _combine, reverse=True)
        g = _at_step(gs, 0, K)
    at = local_state + (block.batch * sizes.chunks + block.chunk) * sizes.dstate * sizes.dim + block.ne
    tl.store(at, g, mask=block.ne_mask)


@triton.jit
def scan_backward(
    dout, dout_b, dout_t, u, u_b, u_t, delta, delta_b, delta_t, A, B, B_b, B_t, B_g, C, C_b, C_t, C_g, D, z, z_b, z_t,
    delta_bias, boundaries, enter, du, ddelta, dz, dz_b, dz_t, dA, dB, dC, dD, dbias, dstart, batches,
    seqlen, dim, dstate, groups, chunk_len, chunks, out_scale, ADD_DZ: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk. States are recomputed tile by tile from boundaries (B, tiles, N, E).

    du, ddelta (B, L, E) contiguous; dB, dC (blocks, B, L, G, N), dA (B·chunks, N, E), dD and dbias (B·chunks, E) are
    partial sums, float32; enter (B, chunks, N, E) is the gradient that comes in from the following chunk, dstart
    (B, N, E) that of the initial state.
    """
    sizes = Sizes(seqlen=seqlen, dim=dim, dstate=dstate, groups=groups, chunk_len=chunk_len, chunks=chunks)
    block = _block(sizes, sizes.groups, N, BLOCK_E)
    log2_decay = _log2_decay(A, sizes, block)
    bias = _vector(delta_bias, block, BLOCK_E)
    skip = _vector(D, block, BLOCK_E)
    k = tl.arange(0, K)[:, None, None]
    row = block.batch * sizes.chunks + block.chunk
    g = _state(enter, row, sizes, block, N, BLOCK_E)
    sum_A = tl.zeros((N, BLOCK_E), tl.float32)
    sum_D = tl.zeros((BLOCK_E,), tl.float32)
    sum_bias = tl.zeros((BLOCK_E,), tl.float32)
    tiles = tl.cdiv(block.last - block.first, K)
    all_tiles = tl.cdiv(sizes.seqlen, K)
    for i in range(0, tiles):
        s0 = block.first + (tiles - 1 - i) * K
        tile = _tile(block, sizes, s0, REVERSE, K)
        h = _state(boundaries, block.batch * all_tiles + s0 // K, sizes, block, N, BLOCK_E)
        dt, slope = _step(delta, delta_b, delta_t, block, tile, bias, SOFTPLUS)
        x = _load(u, u_b, u_t, block, tile)
        b = _load_states(B, B_b, B_t, B_g, block, tile)
        c = _load_states(C, C_b, C_t, C_g, block, tile)
        dy = _load(dout, dout_b, dout_t, block, tile) * out_scale
        a = tl.exp2(dt[:, None, :] * log2_decay[None])
        added = (dt * x)[:, None, :] * b[:, :, None]
        hs = _states(h, a, added, K)
        if z is not None:
            gate = _load(z, z_b, z_t, block, tile)
            sigma = sigmoid(gate)
            y = tl.sum(hs * c[:, :, None], 1) + skip[None, :] * x
            grad_z = dy * y * sigma * (1.0 + gate * (1.0 - sigma))
            if ADD_DZ:
                grad_z += _load(dz, dz_b, dz_t, block, tile)
            tl.store(_at(dz, dz_b, dz_t, block, tile), grad_z.to(dz.dtype.element_ty), mask=tile.inside)
            dy = dy * gate * sigma
        dyc = dy[:, None, :] * c[:, :, None]
        # With v_s the gradient of the state before step s, dh_s = dy_s C_s + v_{s+1} and v_s = a_s dh_s: a scan from
        # the tile's last step to its first, whose exclusive value is v_{s+1}.
        w = a * tl.where(k == K - 1, dyc + g[None], dyc)
        one = tl.full((K, N, BLOCK_E), 1.0, tl.float32)
        after = tl.where(k == K - 1, g[None], tl.zeros((K, N, BLOCK_E), tl.float32))
        _decay, vs, _product, after = tl.associative_scan((a, w, one, after), 0, _combine_exclusive, reverse=True)
        dh = dyc + after
        g = _at_step(vs, 0, K)
        moved = dh * (hs - added)
        dhb = tl.sum(dh * b[:, :, None], 1)
        # log2_decay = A log2(e): scaling the sum over states back costs one product per token instead of one per state.
        grad_dt = tl.sum(moved * log2_decay[None], 1) / LOG2E + dhb * x
        sum_A += tl.sum(moved * dt[:, None, :], 0)
        grad_delta = tl.where(tile.inside, grad_dt * slope, 0.0)
        sum_bias += tl.sum(grad_delta, 0)
        sum_D += tl.sum(dy * x, 0)
        at = (block.batch * sizes.seqlen + tile.t[:, None]) * sizes.dim + block.e[None, :]
        tl.store(ddelta + at, grad_delta.to(ddelta.dtype.element_ty), mask=tile.inside)
        tl.store(du + at, (dhb * dt + dy * skip[None, :]).to(du.dtype.element_ty), mask=tile.inside)
        token = (block.index * batches + block.batch) * sizes.seqlen + tile.t[:, None]
        at_n = (token * sizes.groups + block.group) * sizes.dstate + block.n[None, :]
        tl.store(dB + at_n, tl.sum(dh * (dt * x)[:, None, :], 2), mask=tile.states)
        tl.store(dC + at_n, tl.sum(hs * dy[:, None, :], 2), mask=tile.states)
    tl.store(dA + row * sizes.dstate * sizes.dim + block.ne, sum_A, mask=block.ne_mask)
    tl.store(dD + row * sizes.dim + block.e, sum_D, mask=block.e_mask)
    tl.store(dbias + row * sizes.dim + block.e, sum_bias, mask=block.e_mask)
    if block.chunk == 0:
        tl.store(dstart + block.batch * sizes.dstate * sizes.dim + block.ne, g, mask=block.ne_mask)
