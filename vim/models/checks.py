"""Checks of the arguments of `VisionMamba`; each error is one sentence."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.models._features import feature_take_indices

from vim.models.tokens import GLOBAL_POOLS

WEIGHT_INITS = ("vim", "videomamba")

# Least and most of each size. Beyond these no model has been trained, and a file that asks for more would keep a
# process busy, or its memory full, before an allocation fails.
_SIZES = {
    "depth": (1, 512), "embed_dim": (1, 2**16), "d_state": (1, 1024), "in_chans": (1, 4096),
    "num_classes": (0, 10**7), "num_registers": (0, 4096), "register_reduce": (1, 4096), "num_frames": (0, 4096),
    "tubelet_size": (1, 4096), "mlp_dim": (0, 2**18),
}  # fmt: skip


def check_arguments(**given: Any) -> None:
    """Raise for values out of range and options that exclude each other.

    Args:
        given: arguments of `VisionMamba` by name; `in_chans` stands for `channels`.

    Raises:
        ValueError: with the reason.
    """
    for name, (least, most) in _SIZES.items():
        value = given[name]
        _check_size(name, value, least, most)
    for name in ("drop_rate", "drop_path_rate", "head_drop_rate"):
        if not _is_number(given[name]) or not 0.0 <= given[name] < 1.0:
            raise ValueError(f"{name} is {given[name]!r}, expected a probability below 1")
    _check_numbers(given)
    _check_mixer(given["ssm_cfg"])
    pools = [published for published in GLOBAL_POOLS.values() if published]
    if given["final_pool_type"] not in pools:
        raise ValueError(f"final_pool_type is {given['final_pool_type']!r}, expected one of {', '.join(pools)}")
    if given["weight_init"] not in WEIGHT_INITS:
        raise ValueError(f"weight_init is {given['weight_init']!r}, expected one of {', '.join(WEIGHT_INITS)}")
    _check_rotary(given)
    _check_pairs(given)
    _check_registers(given)
    _check_pooled_scan(given)
    _check_clips(given)
    _check_merging(given)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_size(name: str, value: Any, least: int, most: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, expected a whole number of at least {least} and at most {most:,}")


def _check_numbers(given: dict[str, Any]) -> None:
    epsilon = given["norm_epsilon"]
    if not _is_number(epsilon) or not 0.0 <= epsilon < 1.0:
        raise ValueError(f"norm_epsilon is {epsilon!r}, expected a number of at least 0 and below 1")
    for name in ("init_layer_scale", "scan_pool_scale"):
        value = given[name]
        if not (value is None and name == "init_layer_scale") and not (_is_number(value) and math.isfinite(value)):
            raise ValueError(f"{name} is {value!r}, expected a finite number")
    dtype = given["dtype"]
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise ValueError(f"dtype is {dtype!r}, expected a floating point type of torch, such as torch.bfloat16")


def _check_mixer(ssm_cfg: Any) -> None:
    if ssm_cfg is None:
        return
    if not isinstance(ssm_cfg, dict):
        raise ValueError(f"ssm_cfg is {ssm_cfg!r}, expected a mapping of arguments of Mamba")
    expand = ssm_cfg.get("expand", 1)
    if not _is_number(expand) or not 0 < expand <= 64:
        raise ValueError(f"expand of ssm_cfg is {expand!r}, expected a number above 0 and at most 64")
    for name, most in (("d_state", 1024), ("d_conv", 64), ("dt_rank", 2**16)):
        if name in ssm_cfg and (name, ssm_cfg[name]) != ("dt_rank", "auto"):
            _check_size(f"{name} of ssm_cfg", ssm_cfg[name], 1, most)


def _check_rotary(given: dict[str, Any]) -> None:
    if given["if_rope_residual"] and not given["if_rope"]:
        raise ValueError("if_rope_residual needs if_rope=True: there is no rotary table to turn the residual with")
    _check_size("pt_hw_seq_len", given["pt_hw_seq_len"], 1, 2**16)
    if given["if_rope"] and given["embed_dim"] % 4:
        raise ValueError(f"if_rope needs embed_dim to be a multiple of 4, got {given['embed_dim']}")


def _check_pairs(given: dict[str, Any]) -> None:
    if not given["if_bidirectional"]:
        return
    if given["depth"] % 2:
        raise ValueError(f"if_bidirectional pairs the blocks, so depth must be even, got {given['depth']}")
    if given["bimamba_type"] not in ("none", None):
        raise ValueError(
            f"if_bidirectional already runs every second block backwards: use bimamba_type='none', "
            f"got {given['bimamba_type']!r}"
        )
    if given["mlp_dim"]:
        raise ValueError("if_bidirectional adds the outputs of two mixers, which mlp_dim would put an MLP between")


def _check_registers(given: dict[str, Any]) -> None:
    registers, reduce = given["num_registers"], given["register_reduce"]
    if not registers:
        if reduce != 1:
            raise ValueError("register_reduce is about registers: give num_registers too")
        return
    if given["if_cls_token"]:
        raise ValueError("registers take the class token's place: use if_cls_token=False with num_registers")
    if registers % reduce or given["embed_dim"] % reduce:
        raise ValueError(
            f"register_reduce is {reduce}: it must divide num_registers ({registers}) and embed_dim "
            f"({given['embed_dim']})"
        )


def _check_pooled_scan(given: dict[str, Any]) -> None:
    if given["scan_pool"] == "none":
        return
    if given["if_cls_token"] or given["num_registers"]:
        raise ValueError(
            "scan_pool pools whole rows of patches: class tokens and registers would fall into one of them, so use "
            "if_cls_token=False and num_registers=0"
        )


def _check_clips(given: dict[str, Any]) -> None:
    frames, tubelet = given["num_frames"], given["tubelet_size"]
    if not frames:
        if tubelet != 1:
            raise ValueError("tubelet_size is about clips: give num_frames too")
        return
    if frames < tubelet:
        raise ValueError(f"a clip of num_frames={frames} is shorter than tubelet_size={tubelet}")
    for name, value, reason in (
        ("num_registers", given["num_registers"], "are spread over the patches of one image"),
        ("scan_pool", given["scan_pool"] != "none", "follows the grid of one image"),
        ("bimamba_type='v3'", given["bimamba_type"] == "v3", "follows the grid of one image"),
        ("if_rope", given["if_rope"], "follows the grid of one image"),
        ("pad_patches", given["pad_patches"], "is written for images"),
        ("column_major", given["column_major"], "is written for images"),
    ):
        if value:
            raise ValueError(f"num_frames cannot be combined with {name}, which {reason}")


def _check_merging(given: dict[str, Any]) -> None:
    ratio, blocks, depth = given["merge_ratio"], given["merge_blocks"], given["depth"]
    if not _is_number(ratio) or not 0.0 <= ratio <= 0.5:
        raise ValueError(f"merge_ratio is {ratio!r}, expected a share from 0 to 0.5")
    if blocks is not None and (
        not isinstance(blocks, list | tuple)
        or not blocks
        or any(not isinstance(i, int) or not 0 <= i < depth for i in blocks)
    ):
        raise ValueError(f"merge_blocks is {blocks!r}, expected blocks from 0 to {depth - 1}")
    if ratio == 0:
        return
    if not given["if_cls_token"] and not given["num_registers"]:
        raise ValueError("merge_ratio needs a class token or registers to read out: merged patches stand for several")
    for name, value, reason in (
        ("scan_pool", given["scan_pool"] != "none", "pools the grid of patches"),
        ("bimamba_type='v3'", given["bimamba_type"] == "v3", "follows the grid of patches"),
        ("if_rope", given["if_rope"], "turns the patches of a grid"),
        ("if_bidirectional", given["if_bidirectional"], "adds the outputs of blocks of one length"),
    ):
        if value:
            raise ValueError(f"merge_ratio cannot be combined with {name}, which {reason}")


def checked_indices(depth: int, pairs: bool, indices: int | list[int] | None) -> tuple[list[int], int]:
    """The blocks that `indices` names, and the last of them (the last of all for pairs counted from the end).

    Args:
        depth: number of blocks.
        pairs: blocks work in pairs, so only every second one has features.
        indices: how many of the last ones, which ones, or None for all.

    Raises:
        ValueError: blocks out of range, or the first of a pair.
    """
    last_ones = indices is None or isinstance(indices, int)
    if pairs and last_ones:
        odd = list(range(1, depth, 2))
        if indices is not None and not 0 < indices <= len(odd):
            raise ValueError(f"indices is {indices!r}, but the model has {len(odd)} pairs of blocks")
        return (odd if indices is None else odd[-indices:]), depth - 1
    try:
        if isinstance(indices, int) and indices < 1:
            raise AssertionError
        take, last = feature_take_indices(depth, indices if last_ones else list(indices))
    except (AssertionError, TypeError) as error:
        raise ValueError(
            f"indices is {indices!r}: expected how many of the last blocks (1 to {depth}), a list of blocks from "
            f"{-depth} to {depth - 1}, or None"
        ) from error
    if pairs and any(i % 2 == 0 for i in take):
        raise ValueError(f"blocks work in pairs (if_bidirectional), so indices must be odd, got {take}")
    return take, last


@contextmanager
def ready_for_export(model: torch.nn.Module) -> Iterator[None]:
    """Inside, a float32 model is in evaluation mode and records no gradients.

    Raises:
        ValueError: the model is not float32 throughout.
    """
    kinds = {p.dtype for p in model.parameters()}
    if kinds != {torch.float32}:
        raise ValueError(
            f"the model holds {', '.join(sorted(map(str, kinds)))}: convert it with .float() for the export"
        )
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
