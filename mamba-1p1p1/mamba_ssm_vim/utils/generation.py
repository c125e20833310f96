"""Generating text token by token, under the published names."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mamba_ssm_vim.utils.decoding_graph import DecodingCGCache, can_capture, capture_graph, update_graph_cache
from mamba_ssm_vim.utils.inference import InferenceParams
from mamba_ssm_vim.utils.sampling import (
    check_sampling,
    modify_logit_for_repetition_penalty,
    modify_logits_for_min_p_filtering,
    modify_logits_for_top_k_filtering,
    modify_logits_for_top_p_filtering,
    sample,
)

__all__ = [
    "DecodingCGCache",
    "GenerationMixin",
    "GenerationOutput",
    "InferenceParams",
    "capture_graph",
    "decode",
    "modify_logit_for_repetition_penalty",
    "modify_logits_for_min_p_filtering",
    "modify_logits_for_top_k_filtering",
    "modify_logits_for_top_p_filtering",
    "sample",
    "update_graph_cache",
]

_logger = logging.getLogger("vision_mamba")


class Streamer(Protocol):
    """What takes tokens as they come, such as transformers' `TextStreamer`."""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt (B, L), then each new token (B,), on the CPU."""

    def end(self) -> None:
        """No more tokens follow."""


@dataclass
class GenerationOutput:
    """What `decode` gives; also by index and by name, as in transformers.

    Attributes:
        sequences: (B, L) token numbers, prompt included.
        scores: per new token the scores (B, V) before any filter, or None.
    """

    sequences: torch.Tensor
    scores: tuple[torch.Tensor, ...] | None = None

    def __getitem__(self, key: int | str) -> Any:
        if isinstance(key, str):
            return getattr(self, key)
        return tuple(v for v in (self.sequences, self.scores) if v is not None)[key]


@torch.inference_mode()
def decode(
    input_ids: torch.Tensor,
    model: torch.nn.Module,
    max_length: int,
    top_k: int = 1,
    top_p: float = 0.0,
    min_p: float = 0.0,
    temperature: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | None = None,
    teacher_outputs: torch.Tensor | None = None,
    vocab_size: int | None = None,
    cg: bool = False,
    enable_timing: bool = False,
    output_scores: bool = True,
    streamer: Streamer | None = None,
) -> GenerationOutput:
    """Continue prompts, greedily or by drawing.

    Args:
        input_ids: (B, L) prompts of one length.
        model: called with `input_ids`, `inference_params` and `num_last_tokens`, gives an object with `logits`.
        max_length: tokens in the result, prompt included.
        top_k, top_p, min_p, temperature: see `sample`.
        repetition_penalty: see `modify_logit_for_repetition_penalty`; prompts count.
        eos_token_id: a sequence ends with this token and is filled up with it; stop when all have ended.
        teacher_outputs: (B, T) or None: tokens that are taken instead of drawn ones, at their positions in the result.
        vocab_size: draw from the first tokens only, without the padding of the vocabulary.
        cg: replay a CUDA graph at each step; on a CPU, which has none, it changes nothing.
        enable_timing: print the time taken.
        output_scores: keep the scores of every step.
        streamer: gets the prompt and each new token.

    Raises:
        ValueError: settings that mean nothing, an empty prompt, or one that leaves nothing to generate.
    """
    check_sampling(top_k, top_p, min_p, temperature, repetition_penalty)
    _check_tokens(input_ids, model, eos_token_id, vocab_size)
    _check_lengths(input_ids, max_length, teacher_outputs)
    batch_size, prompt_len = input_ids.shape
    params, graphs = _start(model, input_ids, max_length, cg)
    if streamer is not None:
        streamer.put(input_ids.cpu())
    started = _now(input_ids) if enable_timing else 0.0
    sequences = input_ids.new_empty(batch_size, max_length)
    sequences[:, :prompt_len] = input_ids
    ended = torch.zeros(batch_size, dtype=torch.bool, device=input_ids.device)
    scores, length = [], prompt_len
    logits = model(input_ids, inference_params=params, num_last_tokens=1).logits[:, -1]
    step = _step(model, params, graphs)
    while True:
        logits = logits[..., :vocab_size]
        if output_scores:
            scores.append(logits)
        if teacher_outputs is not None and length < teacher_outputs.shape[1]:
            token = teacher_outputs[:, length]
        else:
            if repetition_penalty != 1.0:
                logits = modify_logit_for_repetition_penalty(logits.clone(), sequences[:, :length], repetition_penalty)
            token = sample(logits, top_k, top_p, min_p, temperature)
        if eos_token_id is not None:
            token = token.masked_fill(ended, eos_token_id)
            ended |= token == eos_token_id
        sequences[:, length] = token
        length += 1
        if streamer is not None:
            streamer.put(token.cpu())
        if length == max_length or (eos_token_id is not None and bool(ended.all())):
            break
        logits = step(token.unsqueeze(1), length - 1)
    if streamer is not None:
        streamer.end()
    if enable_timing:
        print(f"Prompt processing + decoding time: {(_now(input_ids) - started) * 1000:.0f}ms")
    return GenerationOutput(sequences[:, :length], tuple(scores) if output_scores else None)


def _check_tokens(
    input_ids: torch.Tensor, model: torch.nn.Module, eos_token_id: int | None, vocab_size: int | None
) -> None:
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        what = str(input_ids.dtype) if isinstance(input_ids, torch.Tensor) else type(input_ids).__name__
        raise ValueError(f"input_ids is of {what}, expected a tensor of int64 token numbers")
    if input_ids.dim() != 2 or 0 in input_ids.shape:
        raise ValueError(f"input_ids must be (batch, seqlen) with at least one token, got {tuple(input_ids.shape)}")
    known = getattr(getattr(model, "config", None), "padded_vocab_size", None)
    # A GPU would report this in a way that ends the use of the device.
    if known is not None and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < known:
        raise ValueError(
            f"input_ids holds numbers outside the vocabulary, 0 to {known - 1}: is it another tokenizer's?"
        )
    if eos_token_id is not None and not isinstance(eos_token_id, int):
        raise ValueError(f"eos_token_id is {eos_token_id!r}, expected one token number or None")
    if vocab_size is not None and not (isinstance(vocab_size, int) and vocab_size > 0):
        raise ValueError(f"vocab_size is {vocab_size!r}, expected a whole number of at least 1, or None")


def _check_lengths(input_ids: torch.Tensor, max_length: int, teacher_outputs: torch.Tensor | None) -> None:
    if not isinstance(max_length, int):
        raise ValueError(f"max_length is {max_length!r}, expected a whole number")
    if max_length <= input_ids.shape[1]:
        raise ValueError(
            f"max_length is {max_length}, expected more than the {input_ids.shape[1]} tokens of the prompt, which count"
        )
    if teacher_outputs is not None and (teacher_outputs.dim() != 2 or len(teacher_outputs) != len(input_ids)):
        raise ValueError(
            f"teacher_outputs must be ({len(input_ids)}, seqlen) like the prompts, got {tuple(teacher_outputs.shape)}"
        )


def _now(tensor: torch.Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()


def _start(
    model: torch.nn.Module, input_ids: torch.Tensor, max_length: int, cg: bool
) -> tuple[InferenceParams, DecodingCGCache | None]:
    """An inference cache for these prompts, and the graphs that work on it, if they are wanted and possible."""
    batch_size = input_ids.shape[0]
    if cg and can_capture(input_ids):
        cache = update_graph_cache(model, getattr(model, "_decoding_cache", None), batch_size, 1, max_length)
        model._decoding_cache = cache
        cache.inference_params.reset(max_length, batch_size)
        return cache.inference_params, cache
    if cg:
        _logger.info("cg=True changes nothing on a %s: CUDA graphs need a GPU", input_ids.device.type)
    return InferenceParams(max_seqlen=max_length, max_batch_size=batch_size), None


def _step(
    model: torch.nn.Module, params: InferenceParams, graphs: DecodingCGCache | None
) -> Callable[[torch.Tensor, int], torch.Tensor]:
    """`step(token (B, 1), offset)` → scores (B, V), by the fastest way that there is."""
    if graphs is not None:
        return lambda token, offset: graphs.run(token, None, offset)[:, -1]
    decoder = model.decoder(params) if hasattr(model, "decoder") else None
    if decoder is not None:
        return lambda token, offset: decoder(token)[:, -1]

    def step(token: torch.Tensor, offset: int) -> torch.Tensor:
        params.seqlen_offset = offset
        return model(token, inference_params=params, num_last_tokens=1).logits[:, -1]

    return step


class GenerationMixin:
    """Gives a language model `generate`."""

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None, **kwargs):
        """Zero states by layer; the model defines it."""
        raise NotImplementedError

    def generate(
        self,
        input_ids: torch.Tensor,
        max_length: int,
        top_k: int = 1,
        top_p: float = 0.0,
        min_p: float = 0.0,
        temperature: float = 1.0,
        return_dict_in_generate: bool = False,
        output_scores: bool = False,
        **kwargs,
    ) -> torch.Tensor | GenerationOutput:
        """Continue prompts (B, L) to (B, max_length) token numbers.

        Args:
            input_ids, max_length, top_k, top_p, min_p, temperature: see `decode`.
            return_dict_in_generate: give an object with `sequences` and `scores` instead of the sequences.
            output_scores: keep the scores of every step in it.
            kwargs: further arguments of `decode`.
        """
        output = decode(
            input_ids, self, max_length, top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature,
            output_scores=output_scores, **kwargs,
        )  # fmt: skip
        return output if return_dict_in_generate else output.sequences
