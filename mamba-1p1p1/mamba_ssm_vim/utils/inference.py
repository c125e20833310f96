"""The inference cache of a model, under its published name."""

import dataclasses

import torch


@dataclasses.dataclass
class InferenceParams:
    """Inference cache of a model.

    Attributes:
        max_seqlen: most tokens that will be seen.
        max_batch_size: most sequences at a time.
        seqlen_offset: tokens seen so far; modules run on whole sequences while it is 0, and token by token after.
        batch_size_offset: first batch entry of the cache that is in use.
        key_value_memory_dict: state of each layer by its `layer_idx`.
        lengths_per_sample: (batch,) lengths of sequences that differ, or None.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = dataclasses.field(default_factory=dict)
    lengths_per_sample: torch.Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Start over with new limits; the layers zero their own states."""
        self.max_seqlen, self.max_batch_size, self.seqlen_offset = max_seqlen, max_batch_size, 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
