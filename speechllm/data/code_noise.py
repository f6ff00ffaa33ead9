"""Augmentation of codes: what the LM hears now and then differs from what was said."""

import math
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

from speechllm.vocabulary import Vocabulary


@dataclass(frozen=True)
class CodeNoise:
    """Some frames replaced, others hidden.

    replaced: share of frames whose codes are random ones. masked: share of frames that are hidden, in spans of up to
    ``MAX_SPAN`` (time masking, Park et al. 2019).
    """

    replaced: float = 0.0
    masked: float = 0.0

    MAX_SPAN = 10  # frames

    def __call__(self, codes: Tensor, card: int, rng: Random) -> Tensor:
        """Codes ``[n_q, frames]``, another tensor of the same shape."""
        frames = codes.shape[1]
        generator = torch.Generator().manual_seed(rng.getrandbits(62))
        hit = torch.rand(frames, generator=generator) < self.replaced
        codes = torch.where(hit, torch.randint(card, codes.shape, generator=generator), codes)
        # spans of 1 … MAX_SPAN frames that begin anywhere, even before the clip, so that its ends are hidden as often
        # as its middle; so many that they leave 1 - masked of the frames, though some overlap
        chance = -math.log1p(-self.masked) * 2 / (self.MAX_SPAN + 1)
        for _ in range(sum(rng.random() < chance for _ in range(frames + self.MAX_SPAN - 1))):
            start = rng.randrange(1 - self.MAX_SPAN, frames)
            end = start + rng.randint(1, self.MAX_SPAN)
            codes[:, max(0, start) : max(0, end)] = Vocabulary.MASKED
        return codes
