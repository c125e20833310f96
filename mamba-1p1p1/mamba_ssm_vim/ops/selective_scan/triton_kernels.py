"""Triton kernels of the selective scan.

A program owns BLOCK_E channels of one sequence (or of one chunk of it) and walks over tiles of K tokens. Tensors of a
tile are (K, N, BLOCK_E): Triton's default layout spreads channels over the lanes and keeps tokens and states in a
thread's registers, so the scan over tokens and the sums over states cost no communication. Steps are numbered in scan
order; with REVERSE step s is token L-1-s, so no tensor is ever flipped.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _combine(a1, b1, a2, b2):
    """Two steps h → a h + b as one."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def _combine_exclusive(a1, b1, p1, q1, a2, b2, p2, q2):
    """`_combine` that also carries the map (p, q) up to, but without, the last step."""
    return a1 * a2, a2 * b1 + b2, p2 * a1, p2 * b1 + q2


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _softplus(x):
    """log(1 + exp(x)) to a relative error near float32's rounding: log1p(e) = e log(w) / (w - 1) with w = 1 + e."""
    e = tl.exp(-tl.abs(x))
    w = 1.0 + e
    log1p = tl.where(w == 1.0, e, e * tl.log(w) / tl.where(w == 1.0, 1.0, w - 1.0))
    return tl.maximum(x, 0.0) + log1p


@triton.jit
def _step(delta, off, bias, inside, SOFTPLUS: tl.constexpr):
    """Step sizes (K, BLOCK_E), 0 outside (the state passes through), and d step / d delta."""
    raw = tl.load(delta + off, mask=inside, other=0.0).to(tl.float32) + bias[None, :]
    if SOFTPLUS:
        return tl.where(inside, _softplus(raw), 0.0), _sigmoid(raw)
    else:
        return tl.where(inside, raw, 0.0), tl.full(raw.shape, 1.0, tl.float32)


@triton.jit
def _channels(dim, groups, BLOCK_E: tl.constexpr):
    """(sequence, chunk) index, block, group, channels and their mask; a block lies within one group."""
    per_group = dim // groups
    blocks = tl.cdiv(per_group, BLOCK_E)
    pid = tl.program_id(0)
    row = pid // (groups * blocks)
    group = (pid // blocks) % groups
    block = pid % blocks
    inside = block * BLOCK_E + tl.arange(0, BLOCK_E)
    return row.to(tl.int64), block, group, group * per_group + inside, inside < per_group


@triton.jit
def _poles(A, e, e_mask, n, dstate):
    """(N, BLOCK_E) of A · log2(e), so that exp(dt A) is one exp2."""
    mask = (n < dstate)[:, None] & e_mask[None, :]
    return tl.load(A + e[None, :].to(tl.int64) * dstate + n[:, None], mask=mask, other=0.0) * LOG2E


@triton.jit
def scan_states(
    u, delta, A, B, delta_bias, enter, boundaries, local_state, local_dt,
    u_b, u_t, delta_b, delta_t, B_b, B_t, B_g,
    seqlen, dim, dstate, groups, chunk_len, chunks,
    HAS_BIAS: tl.constexpr, HAS_ENTER: tl.constexpr, SAVE: tl.constexpr, LOCAL: tl.constexpr,
    SAVE_TILE: tl.constexpr, SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr,
    K: tl.constexpr, N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """States only. SAVE: the state on entering every SAVE_TILE tokens → boundaries (B, tiles, N, E). LOCAL: the state
    at the end of the chunk → local_state (B, chunks, N, E), and the chunk's summed step → local_dt (B, chunks, E)."""
    chunk = tl.program_id(1)
    batch, _block, group, e, e_mask = _channels(dim, groups, BLOCK_E)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    n_mask = n < dstate
    ne = n[:, None] * dim + e[None, :]
    ne_mask = n_mask[:, None] & e_mask[None, :]
    poles = _poles(A, e, e_mask, n, dstate)
    bias = tl.zeros((BLOCK_E,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(delta_bias + e, mask=e_mask, other=0.0).to(tl.float32)
    h = tl.zeros((N, BLOCK_E), tl.float32)
    if HAS_ENTER:
        h = tl.load(enter + (batch * chunks + chunk) * dstate * dim + ne, mask=ne_mask, other=0.0)
    total = tl.zeros((BLOCK_E,), tl.float32)
    first = chunk * chunk_len
    last = tl.minimum(first + chunk_len, seqlen)
    tiles = tl.cdiv(seqlen, SAVE_TILE)
    for s0 in range(first, last, K):
        if SAVE:
            at = boundaries + (batch * tiles + s0 // SAVE_TILE) * dstate * dim + ne
            tl.store(at, h, mask=ne_mask & (s0 % SAVE_TILE == 0))
        s = s0 + k
        t = (seqlen - 1 - s if REVERSE else s).to(tl.int64)
        s_mask = s < last
        inside = s_mask[:, None] & e_mask[None, :]
        dt, _slope = _step(delta, batch * delta_b + t[:, None] * delta_t + e[None, :], bias, inside, SOFTPLUS)
        x = tl.load(u + batch * u_b + t[:, None] * u_t + e[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(
            B + batch * B_b + t[:, None] * B_t + group * B_g + n[None, :],
            mask=s_mask[:, None] & n_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        a = tl.exp2(dt[:, None, :] * poles[None])
        w = (dt * x)[:, None, :] * b[:, :, None]
        w = tl.where(k[:, None, None] == 0, w + a * h[None], w)
        _decay, hs = tl.associative_scan((a, w), 0, _combine)
        h = tl.sum(tl.where(k[:, None, None] == K - 1, hs, 0.0), 0)
        if LOCAL:
            total += tl.sum(dt, 0)
    if LOCAL:
        tl.store(local_state + (batch * chunks + chunk) * dstate * dim + ne, h, mask=ne_mask)
        tl.store(local_dt + (batch * chunks + chunk) * dim + e, total, mask=e_mask)


@triton.jit
def scan_combine(
    A, start, local_state, local_dt, enter, leave, dim, dstate, chunks,
    HAS_START: tl.constexpr, BACKWARD: tl.constexpr, N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Chunk after chunk (from the last to the first if BACKWARD): enter (B, chunks, N, E) is the state on entering a
    chunk, leave (B, N, E) that after all of them; start (B, N, E) is the first state."""
    batch, _block, _group, e, e_mask = _channels(dim, 1, BLOCK_E)
    n = tl.arange(0, N)
    ne = n[:, None] * dim + e[None, :]
    ne_mask = (n < dstate)[:, None] & e_mask[None, :]
    poles = _poles(A, e, e_mask, n, dstate)
    h = tl.zeros((N, BLOCK_E), tl.float32)
    if HAS_START:
        h = tl.load(start + batch * dstate * dim + ne, mask=ne_mask, other=0.0)
    for i in range(0, chunks):
        at = batch * chunks + (chunks - 1 - i if BACKWARD else i)
        tl.store(enter + at * dstate * dim + ne, h, mask=ne_mask)
        dt = tl.load(local_dt + at * dim + e, mask=e_mask, other=0.0)
        added = tl.load(local_state + at * dstate * dim + ne, mask=ne_mask, other=0.0)
        h = tl.exp2(dt[None, :] * poles) * h + added
    tl.store(leave + batch * dstate * dim + ne, h, mask=ne_mask)


@triton.jit
def scan_forward(
    u, delta, A, B, C, D, z, delta_bias, enter, addend, out, last_state,
    u_b, u_t, delta_b, delta_t, B_b, B_t, B_g, C_b, C_t, C_g, z_b, z_t, addend_b, addend_t, out_b, out_t,
    seqlen, dim, dstate, groups, chunk_len, chunks, out_scale,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ENTER: tl.constexpr, ADD: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """out = addend + out_scale (C h + D u) SiLU(z); enter (B, chunks, N, E), last_state (B, N, E)."""
    chunk = tl.program_id(1)
    batch, _block, group, e, e_mask = _channels(dim, groups, BLOCK_E)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    n_mask = n < dstate
    ne = n[:, None] * dim + e[None, :]
    ne_mask = n_mask[:, None] & e_mask[None, :]
    poles = _poles(A, e, e_mask, n, dstate)
    bias = tl.zeros((BLOCK_E,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(delta_bias + e, mask=e_mask, other=0.0).to(tl.float32)
    skip = tl.zeros((BLOCK_E,), tl.float32)
    if HAS_D:
        skip = tl.load(D + e, mask=e_mask, other=0.0).to(tl.float32)
    h = tl.zeros((N, BLOCK_E), tl.float32)
    if HAS_ENTER:
        h = tl.load(enter + (batch * chunks + chunk) * dstate * dim + ne, mask=ne_mask, other=0.0)
    first = chunk * chunk_len
    last = tl.minimum(first + chunk_len, seqlen)
    for s0 in range(first, last, K):
        s = s0 + k
        t = (seqlen - 1 - s if REVERSE else s).to(tl.int64)
        s_mask = s < last
        inside = s_mask[:, None] & e_mask[None, :]
        sn_mask = s_mask[:, None] & n_mask[None, :]
        dt, _slope = _step(delta, batch * delta_b + t[:, None] * delta_t + e[None, :], bias, inside, SOFTPLUS)
        x = tl.load(u + batch * u_b + t[:, None] * u_t + e[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(B + batch * B_b + t[:, None] * B_t + group * B_g + n[None, :], mask=sn_mask, other=0.0).to(
            tl.float32
        )
        c = tl.load(C + batch * C_b + t[:, None] * C_t + group * C_g + n[None, :], mask=sn_mask, other=0.0).to(
            tl.float32
        )
        a = tl.exp2(dt[:, None, :] * poles[None])
        w = (dt * x)[:, None, :] * b[:, :, None]
        w = tl.where(k[:, None, None] == 0, w + a * h[None], w)
        _decay, hs = tl.associative_scan((a, w), 0, _combine)
        h = tl.sum(tl.where(k[:, None, None] == K - 1, hs, 0.0), 0)
        y = tl.sum(hs * c[:, :, None], 1) + skip[None, :] * x
        if HAS_Z:
            gate = tl.load(z + batch * z_b + t[:, None] * z_t + e[None, :], mask=inside, other=0.0).to(tl.float32)
            y = y * gate * _sigmoid(gate)
        y = y * out_scale
        if ADD:
            y += tl.load(addend + batch * addend_b + t[:, None] * addend_t + e[None, :], mask=inside, other=0.0).to(
                tl.float32
            )
        tl.store(out + batch * out_b + t[:, None] * out_t + e[None, :], y.to(out.dtype.element_ty), mask=inside)
    if chunk == chunks - 1:
        tl.store(last_state + batch * dstate * dim + ne, h, mask=ne_mask)


@triton.jit
def scan_grad_states(
    dout, delta, A, C, z, delta_bias, local_state,
    dout_b, dout_t, delta_b, delta_t, C_b, C_t, C_g, z_b, z_t,
    seqlen, dim, dstate, groups, chunk_len, chunks, out_scale,
    HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Gradient of the state on entering each chunk if that of the state leaving it is zero → (B, chunks, N, E)."""
    chunk = tl.program_id(1)
    batch, _block, group, e, e_mask = _channels(dim, groups, BLOCK_E)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    n_mask = n < dstate
    poles = _poles(A, e, e_mask, n, dstate)
    bias = tl.zeros((BLOCK_E,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(delta_bias + e, mask=e_mask, other=0.0).to(tl.float32)
    g = tl.zeros((N, BLOCK_E), tl.float32)
    first = chunk * chunk_len
    last = tl.minimum(first + chunk_len, seqlen)
    tiles = tl.cdiv(last - first, K)
    for i in range(0, tiles):
        s = first + (tiles - 1 - i) * K + k
        t = (seqlen - 1 - s if REVERSE else s).to(tl.int64)
        s_mask = s < last
        inside = s_mask[:, None] & e_mask[None, :]
        dt, _slope = _step(delta, batch * delta_b + t[:, None] * delta_t + e[None, :], bias, inside, SOFTPLUS)
        c = tl.load(
            C + batch * C_b + t[:, None] * C_t + group * C_g + n[None, :],
            mask=s_mask[:, None] & n_mask[None, :],
            other=0.0,
        ).to(tl.float32)
        dy = tl.load(dout + batch * dout_b + t[:, None] * dout_t + e[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = dy * out_scale
        if HAS_Z:
            gate = tl.load(z + batch * z_b + t[:, None] * z_t + e[None, :], mask=inside, other=0.0).to(tl.float32)
            dy = dy * gate * _sigmoid(gate)
        a = tl.exp2(dt[:, None, :] * poles[None])
        w = dy[:, None, :] * c[:, :, None]
        w = a * tl.where(k[:, None, None] == K - 1, w + g[None], w)
        _decay, gs = tl.associative_scan((a, w), 0, _combine, reverse=True)
        g = tl.sum(tl.where(k[:, None, None] == 0, gs, 0.0), 0)
    ne = n[:, None] * dim + e[None, :]
    tl.store(local_state + (batch * chunks + chunk) * dstate * dim + ne, g, mask=n_mask[:, None] & e_mask[None, :])


@triton.jit
def scan_backward(
    dout, u, delta, A, B, C, D, z, delta_bias, boundaries, enter,
    du, ddelta, dz, dA, dB, dC, dD, dbias, dstart,
    dout_b, dout_t, u_b, u_t, delta_b, delta_t, B_b, B_t, B_g, C_b, C_t, C_g, z_b, z_t, dz_b, dz_t,
    batches, seqlen, dim, dstate, groups, chunk_len, chunks, out_scale,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, ADD_DZ: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_ENTER: tl.constexpr,
    SOFTPLUS: tl.constexpr, REVERSE: tl.constexpr, K: tl.constexpr, N: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk. States are made again tile by tile from boundaries (B, tiles, N, E).

    du, ddelta (B, L, E) contiguous; dB, dC (blocks, B, L, G, N), dA (B·chunks, N, E), dD and dbias (B·chunks, E) are
    partial sums, float32; enter (B, chunks, N, E) is the gradient that comes in from the following chunk, dstart
    (B, N, E) that of the initial state.
    """
    chunk = tl.program_id(1)
    batch, block, group, e, e_mask = _channels(dim, groups, BLOCK_E)
    n = tl.arange(0, N)
    k = tl.arange(0, K)
    n_mask = n < dstate
    ne = n[:, None] * dim + e[None, :]
    ne_mask = n_mask[:, None] & e_mask[None, :]
    poles = _poles(A, e, e_mask, n, dstate)
    bias = tl.zeros((BLOCK_E,), tl.float32)
    if HAS_BIAS:
        bias = tl.load(delta_bias + e, mask=e_mask, other=0.0).to(tl.float32)
    skip = tl.zeros((BLOCK_E,), tl.float32)
    if HAS_D:
        skip = tl.load(D + e, mask=e_mask, other=0.0).to(tl.float32)
    g = tl.zeros((N, BLOCK_E), tl.float32)
    if HAS_ENTER:
        g = tl.load(enter + (batch * chunks + chunk) * dstate * dim + ne, mask=ne_mask, other=0.0)
    sum_A = tl.zeros((N, BLOCK_E), tl.float32)
    sum_D = tl.zeros((BLOCK_E,), tl.float32)
    sum_bias = tl.zeros((BLOCK_E,), tl.float32)
    first = chunk * chunk_len
    last = tl.minimum(first + chunk_len, seqlen)
    tiles = tl.cdiv(last - first, K)
    all_tiles = tl.cdiv(seqlen, K)
    for i in range(0, tiles):
        s0 = first + (tiles - 1 - i) * K
        s = s0 + k
        t = (seqlen - 1 - s if REVERSE else s).to(tl.int64)
        s_mask = s < last
        inside = s_mask[:, None] & e_mask[None, :]
        sn_mask = s_mask[:, None] & n_mask[None, :]
        h = tl.load(boundaries + (batch * all_tiles + s0 // K) * dstate * dim + ne, mask=ne_mask, other=0.0)
        dt, slope = _step(delta, batch * delta_b + t[:, None] * delta_t + e[None, :], bias, inside, SOFTPLUS)
        x = tl.load(u + batch * u_b + t[:, None] * u_t + e[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(B + batch * B_b + t[:, None] * B_t + group * B_g + n[None, :], mask=sn_mask, other=0.0).to(
            tl.float32
        )
        c = tl.load(C + batch * C_b + t[:, None] * C_t + group * C_g + n[None, :], mask=sn_mask, other=0.0).to(
            tl.float32
        )
        dy = tl.load(dout + batch * dout_b + t[:, None] * dout_t + e[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = dy * out_scale
        a = tl.exp2(dt[:, None, :] * poles[None])
        added = (dt * x)[:, None, :] * b[:, :, None]
        w = tl.where(k[:, None, None] == 0, added + a * h[None], added)
        _decay, hs = tl.associative_scan((a, w), 0, _combine)
        if HAS_Z:
            gate = tl.load(z + batch * z_b + t[:, None] * z_t + e[None, :], mask=inside, other=0.0).to(tl.float32)
            sigma = _sigmoid(gate)
            y = tl.sum(hs * c[:, :, None], 1) + skip[None, :] * x
            grad_z = dy * y * sigma * (1.0 + gate * (1.0 - sigma))
            at_z = dz + batch * dz_b + t[:, None] * dz_t + e[None, :]
            if ADD_DZ:
                grad_z += tl.load(at_z, mask=inside, other=0.0).to(tl.float32)
            tl.store(at_z, grad_z.to(dz.dtype.element_ty), mask=inside)
            dy = dy * gate * sigma
        dyc = dy[:, None, :] * c[:, :, None]
        # With v_s the gradient of the state before step s, dh_s = dy_s C_s + v_{s+1} and v_s = a_s dh_s: a scan from
        # the tile's last step to its first, whose exclusive value is v_{s+1}.
        w = a * tl.where(k[:, None, None] == K - 1, dyc + g[None], dyc)
        one = tl.full((K, N, BLOCK_E), 1.0, tl.float32)
        after = tl.where(k[:, None, None] == K - 1, g[None], tl.zeros((K, N, BLOCK_E), tl.float32))
        _decay, vs, _product, after = tl.associative_scan((a, w, one, after), 0, _combine_exclusive, reverse=True)
        dh = dyc + after
        g = tl.sum(tl.where(k[:, None, None] == 0, vs, 0.0), 0)
        moved = dh * (hs - added)
        dhb = tl.sum(dh * b[:, :, None], 1)
        # poles = A log2(e): scaling the sum over states back costs one product per token instead of one per state.
        grad_dt = tl.sum(moved * poles[None], 1) / LOG2E + dhb * x
        sum_A += tl.sum(moved * dt[:, None, :], 0)
        grad_delta = tl.where(inside, grad_dt * slope, 0.0)
        sum_bias += tl.sum(grad_delta, 0)
        sum_D += tl.sum(dy * x, 0)
        at = (batch * seqlen + t[:, None]) * dim + e[None, :]
        tl.store(ddelta + at, grad_delta.to(ddelta.dtype.element_ty), mask=inside)
        tl.store(du + at, (dhb * dt + dy * skip[None, :]).to(du.dtype.element_ty), mask=inside)
        at_n = (((block * batches + batch) * seqlen + t[:, None]) * groups + group) * dstate + n[None, :]
        tl.store(dB + at_n, tl.sum(dh * (dt * x)[:, None, :], 2), mask=sn_mask)
        tl.store(dC + at_n, tl.sum(hs * dy[:, None, :], 2), mask=sn_mask)
    row = batch * chunks + chunk
    tl.store(dA + row * dstate * dim + ne, sum_A, mask=ne_mask)
    tl.store(dD + row * dim + e, sum_D, mask=e_mask)
    tl.store(dbias + row * dim + e, sum_bias, mask=e_mask)
    if chunk == 0:
        tl.store(dstart + batch * dstate * dim + ne, g, mask=ne_mask)
