"""What the demo measures of a causal language model, transformers' or our Decoder: memory, speed, perplexity."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..models import Decoder

WINDOW = 1024  # tokens a perplexity window: each is predicted from those before it in its window


def megabytes(tensors: Iterable[Tensor]) -> float:
    """Size of the tensors in MB (10^6 bytes), storage that two of them share counted once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values()) / 1e6


def perplexity(
    model: nn.Module, tokens: Tensor, advance: Callable[[], None] = lambda: None, window: int = WINDOW
) -> float:
    """exp of the mean negative log-likelihood of tokens [n], in windows; `advance` is called after each of them."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for piece in torch.split(tokens, window):
            if len(piece) < 2:
                continue
            total += float(_loss(model, piece)) * (len(piece) - 1)
            count += len(piece) - 1
            advance()
    return math.exp(total / count)


def _loss(model: nn.Module, tokens: Tensor) -> Tensor:
    """The mean negative log-likelihood of tokens [n] but the first."""
    if isinstance(model, Decoder):
        return functional.cross_entropy(model(tokens[None])[0, :-1].float(), tokens[1:])
    loss: Tensor = model(input_ids=tokens[None], labels=tokens[None]).loss
    return loss


class Clock:
    """A transformers streamer that notes when each token came; the first call brings the prompt."""

    def __init__(self, advance: Callable[[], None]) -> None:
        self.times: list[float] = []
        self._advance = advance
        self._prompt_seen = False

    def put(self, _: Tensor) -> None:
        """Called by generate() with the prompt, then with each token (on the host, so the device is done with it)."""
        if self._prompt_seen:
            self.times.append(time.perf_counter())
            self._advance()
        self._prompt_seen = True

    def end(self) -> None:
        """Called by generate() at the end."""

    def steps(self) -> list[float]:
        """Seconds from each token to the next; the first token, which takes the prompt's pass, starts the clock."""
        return [after - before for before, after in itertools.pairwise(self.times)]


def tokens_per_second(steps: list[float]) -> float:
    """By the lower quartile of the step times, since other programs may share the cores."""
    return 1 / sorted(steps)[len(steps) // 4]


def generate(model: Any, prompt: Tensor, new_tokens: int, advance: Callable[[], None]) -> tuple[Tensor, list[float]]:
    """(the new tokens, step times) of greedy generation; model.generation_config must not stop it early."""
    if isinstance(model, Decoder):
        return _stream(model, prompt, new_tokens, advance)
    options = {"do_sample": False, "attention_mask": torch.ones_like(prompt)}
    with torch.inference_mode():
        model.generate(prompt, max_new_tokens=2, **options)  # first calls compile and choose kernels
        clock = Clock(advance)
        out = model.generate(prompt, max_new_tokens=new_tokens, streamer=clock, **options)
    return out[0, prompt.shape[1] :], clock.steps()


def _stream(model: Decoder, prompt: Tensor, new_tokens: int, advance: Callable[[], None]) -> tuple[Tensor, list[float]]:
    tokens: list[int] = []
    times: list[float] = []
    list(model.stream(prompt, 2, eos=()))
    for step in model.stream(prompt, new_tokens, eos=()):
        tokens += step[0]
        times.append(time.perf_counter())
        advance()
    return torch.tensor(tokens), [after - before for before, after in itertools.pairwise(times)]
