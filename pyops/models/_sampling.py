"""The choice of the next token from logits, on their device, without reading anything back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ._architecture import WHO


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: greedily at temperature 0.

    Args:
        temperature: logits are divided by it.
        top_k: only the k likeliest tokens; all when None.
        top_p: only the likeliest tokens whose probabilities reach p together; all when None.
        seed: of the random numbers; equal seeds give equal texts.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"{WHO}: temperature must be 0 or more, got {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"{WHO}: top_k must be at least 1, got {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"{WHO}: top_p must be greater than 0 and at most 1, got {self.top_p}")

    def generator(self, device: torch.device) -> torch.Generator | None:
        """The random numbers of one text; none where none are drawn."""
        return None if self.temperature == 0 else torch.Generator(device).manual_seed(self.seed)

    def __call__(self, logits: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """[B] int64 of logits [B, V]."""
        if self.temperature == 0:
            return logits.argmax(-1)
        scores = self.filtered(logits)
        # Adding Gumbel noise and taking the largest draws from softmax(scores).
        uniform = torch.rand(scores.shape, generator=generator, device=scores.device)
        tiny = torch.finfo(torch.float32).tiny
        noise = -(-uniform.clamp(min=tiny).log()).clamp(min=tiny).log()
        return (scores + noise).argmax(-1)

    def filtered(self, logits: Tensor) -> Tensor:
        """[B, V] fp32: logits over the temperature, -inf for tokens that are out."""
        scores = logits.float() / self.temperature
        if self.top_k is not None and self.top_k < scores.shape[-1]:
            least = scores.topk(self.top_k, dim=-1).values[..., -1:]
            scores = scores.masked_fill(scores < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = scores.sort(dim=-1, descending=True)
            p = ordered.softmax(-1)
            out = p.cumsum(-1) - p >= self.top_p  # the likeliest always stays
            scores = scores.masked_fill(out.scatter(-1, order, out), -torch.inf)
        return scores
