"""Choosing the next token from scores."""

import torch


def modify_logits_for_min_p_filtering(logits: torch.Tensor, min_p: float) -> None:
    """Set scores (..., V) to -inf, in place, where the probability is below `min_p` times that of the likeliest token.

    Nothing is done unless 0 < min_p < 1.
    """
    if 0.0 < min_p < 1.0:
        probabilities = torch.softmax(logits.float(), dim=-1)
        logits.masked_fill_(probabilities < min_p * probabilities.amax(-1, keepdim=True), -torch.inf)


def modify_logits_for_top_k_filtering(logits: torch.Tensor, top_k: int) -> None:
    """Set scores (..., V) to -inf, in place, where they are below the `top_k`-th largest."""
    smallest = torch.topk(logits, min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    logits.masked_fill_(logits < smallest, -torch.inf)


def modify_logits_for_top_p_filtering(logits: torch.Tensor, top_p: float) -> None:
    """Set scores (..., V) to -inf, in place, outside the smallest set of likeliest tokens that has probability `top_p`.

    Nothing is done unless 0 < top_p < 1.
    """
    if top_p <= 0.0 or top_p >= 1.0:
        return
    ordered, indices = torch.sort(logits, dim=-1, descending=True)
    probabilities = torch.softmax(ordered.float(), dim=-1)
    # A token is needed if those before it have not reached top_p.
    dropped = probabilities.cumsum(-1) - probabilities >= top_p
    dropped[..., 0] = False
    logits.masked_fill_(torch.zeros_like(dropped).scatter(-1, indices, dropped), -torch.inf)


def modify_logit_for_repetition_penalty(
    logits: torch.Tensor, prev_output_tokens: torch.Tensor, repetition_penalty: float = 1.0
) -> torch.Tensor:
    """Make tokens that have occurred less likely, in place: divide their positive scores, multiply the negative ones.

    Args:
        logits: (B, V).
        prev_output_tokens: (B, L) token numbers.
        repetition_penalty: above 1 against repetition; 1 changes nothing (arXiv 1909.05858).
    """
    if repetition_penalty == 1.0:
        return logits
    score = torch.gather(logits, 1, prev_output_tokens)
    score = torch.where(score < 0, score * repetition_penalty, score / repetition_penalty)
    return logits.scatter_(1, prev_output_tokens, score)


def check_sampling(top_k: int, top_p: float, min_p: float, temperature: float, repetition_penalty: float = 1.0) -> None:
    """Raise ValueError for settings that mean nothing."""
    if not isinstance(top_k, int) or top_k < 0:
        raise ValueError(f"top_k is {top_k}, expected 0 (all tokens), 1 (the likeliest) or more")
    for name, value in (("top_p", top_p), ("min_p", min_p)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name} is {value}, expected a probability from 0 (off) to 1")
    for name, value in (("temperature", temperature), ("repetition_penalty", repetition_penalty)):
        if not value > 0.0:
            raise ValueError(f"{name} is {value}, expected more than 0")


def sample(
    logits: torch.Tensor, top_k: int = 1, top_p: float = 0.0, min_p: float = 0.0, temperature: float = 1.0
) -> torch.Tensor:
    """Draw token numbers (B,) from scores (B, V); the scores are left as they are.

    Args:
        logits: (B, V).
        top_k: draw from this many likeliest tokens; 1 takes the likeliest, 0 draws from all.
        top_p: draw from the smallest set of likeliest tokens with this probability; 0 is off.
        min_p: draw from tokens at least this many times as likely as the likeliest, before the temperature; 0 is off.
        temperature: divides the scores that are left.

    Raises:
        ValueError: settings that mean nothing.
    """
    check_sampling(top_k, top_p, min_p, temperature)
    if top_k == 1:
        return logits.argmax(dim=-1)
    indices = None
    if top_k > 0:
        logits, indices = torch.topk(logits, min(top_k, logits.shape[-1]), dim=-1)
    logits = logits.clone()
    modify_logits_for_min_p_filtering(logits, min_p)
    logits /= temperature
    modify_logits_for_top_p_filtering(logits, top_p)
    drawn = torch.multinomial(torch.softmax(logits.float(), dim=-1), num_samples=1)
    return (drawn if indices is None else indices.gather(-1, drawn)).squeeze(-1)
