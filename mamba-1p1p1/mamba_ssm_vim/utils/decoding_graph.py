"""One step of decoding as a CUDA graph: the kernels of all layers are launched at once."""

import gc
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from mamba_ssm_vim.utils.inference import InferenceParams


@dataclass
class DecodingCGCache:
    """Graphs of a model's decoding step and the memory that they work on, kept between calls of `decode`.

    Attributes:
        max_batch_size, max_seqlen: limits that the cache was made for.
        device, dtype: of the model.
        callables: by batch size and number of tokens, the replay of a graph and the states that it works on.
        mempool: memory shared by the graphs.
        inference_params: the states of the batch size that was asked for last.
        run: `run(input_ids, position_ids, seqlen)` gives the scores (B, L, V).
    """

    max_batch_size: int = 0
    max_seqlen: int = 0
    device: torch.device | None = None
    dtype: torch.dtype | None = None
    callables: dict = field(default_factory=dict)
    mempool: Any = None
    inference_params: InferenceParams | None = None
    run: Callable | None = None


def can_capture(tensor: torch.Tensor) -> bool:
    """Whether a graph can work on tensors like this one."""
    return tensor.is_cuda


@torch.inference_mode()
def update_graph_cache(
    model: torch.nn.Module,
    cache: DecodingCGCache | None,
    batch_size: int,
    seqlen_og: int,
    max_seqlen: int,
    decoding_seqlens: tuple[int, ...] = (1,),
    dtype: torch.dtype | None = None,
    n_warmups: int = 2,
) -> DecodingCGCache:
    """A cache with graphs for this batch size: the given one if it serves, else with what it lacks.

    Args:
        model: on a CUDA device, with `allocate_inference_cache`.
        cache: from an earlier call, or None.
        batch_size: B.
        seqlen_og: length of the prompt; accepted for the published signature.
        max_seqlen: most tokens that will be seen.
        decoding_seqlens: numbers of tokens per step to make graphs for.
        dtype: of the states; None: the convolution's as its weight, the scan's float32.
        n_warmups: eager runs before a graph is captured.
    """
    cache = DecodingCGCache() if cache is None else cache
    parameter = next(model.parameters())
    fits = (parameter.device, parameter.dtype) == (cache.device, cache.dtype)
    if not fits or batch_size > cache.max_batch_size or max_seqlen > cache.max_seqlen:
        cache.callables, cache.mempool, cache.inference_params = {}, None, None
        gc.collect()
        cache.device, cache.dtype = parameter.device, parameter.dtype
        cache.max_batch_size, cache.max_seqlen = batch_size, max_seqlen
        cache.inference_params = InferenceParams(max_seqlen=max_seqlen, max_batch_size=batch_size)
        cache.mempool = torch.cuda.graphs.graph_pool_handle()
    for seqlen in decoding_seqlens:
        if (batch_size, seqlen) not in cache.callables:
            # Graphs of another batch size have states of their own.
            states = model.allocate_inference_cache(batch_size, max_seqlen, dtype)
            params = InferenceParams(cache.max_seqlen, batch_size, seqlen_offset=1, key_value_memory_dict=states)
            cache.callables[batch_size, seqlen] = (
                capture_graph(model, params, batch_size, cache.max_seqlen, seqlen, cache.mempool, n_warmups), params
            )  # fmt: skip
    cache.inference_params = cache.callables[batch_size, decoding_seqlens[0]][1]

    def run(input_ids: torch.Tensor, position_ids: torch.Tensor | None, seqlen: int) -> torch.Tensor:
        replay, params = cache.callables[tuple(input_ids.shape)]
        params.seqlen_offset = seqlen
        return replay(input_ids, position_ids, seqlen)

    cache.run = run
    cache.inference_params.seqlen_offset = 0
    return cache


def capture_graph(
    model: torch.nn.Module,
    inference_params: InferenceParams,
    batch_size: int,
    max_seqlen: int,
    decoding_seqlen: int = 1,
    mempool: Any = None,
    n_warmups: int = 2,
) -> Callable[[torch.Tensor, torch.Tensor | None, int], torch.Tensor]:
    """Record the model's step for tokens (B, decoding_seqlen); the result replays it and gives a copy of the scores.

    Args:
        model: on a CUDA device.
        inference_params: the states that the graph will work on.
        batch_size: B.
        max_seqlen: most tokens that will be seen; accepted for the published signature.
        decoding_seqlen: L.
        mempool: memory shared with other graphs, or None.
        n_warmups: eager runs before the capture, in which kernels are compiled.
    """
    device = next(iter(model.parameters())).device
    input_ids = torch.zeros(batch_size, decoding_seqlen, dtype=torch.long, device=device)
    offset = inference_params.seqlen_offset
    inference_params.seqlen_offset = max(1, offset)  # 0 would start the states over within the graph

    def step() -> torch.Tensor:
        return model(input_ids, inference_params=inference_params, num_last_tokens=decoding_seqlen).logits

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(n_warmups):
            step()
        stream.synchronize()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=mempool):
        logits = step()
    inference_params.seqlen_offset = offset

    def replay(new_input_ids: torch.Tensor, position_ids: torch.Tensor | None, seqlen: int) -> torch.Tensor:
        input_ids.copy_(new_input_ids)
        graph.replay()
        return logits.clone()

    return replay
