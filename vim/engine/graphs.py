"""Forward and backward of a training step as one CUDA graph, which the host launches in one call."""

import logging
from collections.abc import Callable

import torch
from torch import nn

from vim.engine.distributed import DistributedContext
from vim.flags import Flags

_logger = logging.getLogger("vision_mamba")

_EAGER_CALLS = 3  # in which the libraries choose their kernels and make their workspaces


def why_not(args: Flags, context: DistributedContext) -> str | None:
    """None if the run's steps can be replayed from a graph, else the reason."""
    reasons = {
        "there is no GPU": context.device.type != "cuda",
        "several processes exchange gradients": context.world_size > 1,
        "--compile makes graphs of its own": args.compile,
        "--grad-checkpointing keeps random states on the host": args.grad_checkpointing,
        "--pretrain draws its masks on the host": args.pretrain != "none",
        "--if_random_cls_token_position draws on the host": args.if_random_cls_token_position,
        "--if_random_token_rank draws on the host": args.if_random_token_rank,
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _capture(run: Callable[[], None]) -> Callable[[], None]:
    """Capture what a function launches; returns what replays it."""
    graph = torch.cuda.CUDAGraph()
    # Threads that pin memory or read files go on meanwhile.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        run()
    return graph.replay


class GraphedBackward:
    """A function that adds the gradients of a batch, replayed from a CUDA graph for batches of one shape.

    The first calls are eager, then one is captured. Replays read the device's random state as it is by then, so that a
    call gives the same bits as the eager one. Batches of another shape or share are done eagerly, and so are all where
    the capture fails.

    Args:
        backward: (images, targets, parts) → detached loss; adds to the `grad` of the parameters. It must not wait for
            the device, and all that it reads besides its arguments must stay in its place.
        parameters: leaves that get gradients.
        parts: the share that is captured: over how many batches the loss is averaged.
        capture: runs a function on a stream that is being captured; returns what replays it.
    """

    def __init__(
        self,
        backward: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor],
        parameters: list[nn.Parameter],
        *,
        parts: int = 1,
        capture: Callable[[Callable[[], None]], Callable[[], None]] = _capture,
    ) -> None:
        self._backward, self._parameters, self._parts, self._capture = backward, parameters, parts, capture
        self._eager_calls, self._replay = _EAGER_CALLS, None

    def __call__(self, images: torch.Tensor, targets: torch.Tensor, parts: int) -> torch.Tensor:
        """The loss of a batch, whose gradients are added; it holds until the next call.

        Args:
            images: (B, C, H, W).
            targets: (B,) or (B, K).
            parts: over how many batches the loss is averaged.
        """
        if self._replay is None and parts == self._parts:
            if self._eager_calls == 0:
                self._record(images, targets)
            self._eager_calls -= 1  # below zero after the one attempt
        if self._replay is None or parts != self._parts or not self._fits(images, targets):
            return self._backward(images, targets, parts)
        self._images.copy_(images)
        self._targets.copy_(targets)
        self._replay()
        # Each replay overwrites the graph's gradients, so that those of several batches are summed elsewhere.
        for p, grad in self._grads:
            if p.grad is None:
                p.grad = grad if self._parts == 1 else torch.zeros_like(grad)
        if self._parts > 1:
            torch._foreach_add_([p.grad for p, _ in self._grads], [grad for _, grad in self._grads])
        return self._loss

    def _fits(self, images: torch.Tensor, targets: torch.Tensor) -> bool:
        pairs = ((images, self._images), (targets, self._targets))
        return all(t.shape == own.shape and t.dtype == own.dtype for t, own in pairs)

    def _record(self, images: torch.Tensor, targets: torch.Tensor) -> None:
        self._images, self._targets = images.clone(), targets.clone()
        before = [p.grad for p in self._parameters]
        for p in self._parameters:
            p.grad = None  # the first gradient is kept where it is computed, and not added

        def run() -> None:
            self._loss = self._backward(self._images, self._targets, self._parts)

        try:
            self._replay = self._capture(run)
            self._grads = [(p, p.grad) for p in self._parameters if p.grad is not None]
        except RuntimeError as error:
            _logger.warning("steps are not replayed from a CUDA graph: %s", str(error).splitlines()[0])
        for p, grad in zip(self._parameters, before, strict=True):
            p.grad = grad
