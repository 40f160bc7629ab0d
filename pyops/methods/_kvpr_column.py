"""KVPR's column schedule: layer after layer, and within a layer batch after batch, so that they share its weights.

Weights and caches are in host memory; a layer's weights are sent once a step for all batches. For throughput: a step of
all batches takes as long as the slower of the link and the GPU. Source: arXiv:2411.17089, section 3; FlexGen's block
schedule, arXiv:2303.06865.
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..models import FullAttention, Rows
from ..models._sampling import Sampling
from ..models.generation import _Answer, _bar, _check, _ends, _Fetched, _lag, _most_rows, token_ids
from ._kvpr_weights import OffloadedWeights
from .kvpr import OffloadedCache


@dataclass
class Batch:
    """A batch of texts, its cache, and its newest tokens."""

    ids: list[list[int]]
    cache: OffloadedCache
    answers: list[_Answer]
    generator: torch.Generator | None
    tokens: Tensor
    rows: int


def generate_column(
    weights: OffloadedWeights,
    batches: Sequence[Any],
    max_new_tokens: int,
    *,
    split: int | str = "column",
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | Sequence[int] | None = None,
    progress: bool = False,
    **options: Any,
) -> list[list[list[int]]]:
    """Continue the prompts of several batches by up to max_new_tokens tokens.

    Args:
        weights: the decoder.
        batches: of prompts, each as Decoder.generate takes them; prompts of a batch go through in one pass.
        max_new_tokens: at most this many a sequence.
        split: OffloadedCache's; "column" is what the column schedule's model says.
        temperature, top_k, top_p, seed, eos, progress: as Decoder.generate's.
        **options: OffloadedCache's: chunk, compress, pin, segment, host_limit, profile, timeline.

    Returns:
        The new tokens of each prompt of each batch.

    Raises:
        ValueError: naming the argument, what it must be and what it is.
        HostMemoryError: the caches do not fit into host memory.
    """
    decoder = weights.decoder
    sampling = Sampling(temperature, top_k, top_p, seed)
    ends = _ends(decoder, eos, ())
    prompts = [token_ids(decoder, batch) for batch in batches]
    for ids in prompts:
        _check(decoder, ids, max_new_tokens, 1, 1)
    if max_new_tokens == 0 or not any(prompts):
        return [[[] for _ in ids] for ids in prompts]
    share = weights.layer_bytes / len(prompts)
    made = []
    for ids in prompts:
        cache = OffloadedCache(decoder, split, weights=share, **options)
        answers = [_Answer(max_new_tokens, ends) for _ in ids]
        tokens = torch.zeros(len(ids), dtype=torch.int64, device=decoder.device)
        made.append(Batch(ids, cache, answers, sampling.generator(decoder.device), tokens, 0))
    _run(weights, [batch for batch in made if batch.ids], max_new_tokens, sampling, progress)
    return [[answer.tokens for answer in batch.answers] for batch in made]


@torch.no_grad()
def _run(weights: OffloadedWeights, batches: list[Batch], new: int, sampling: Sampling, progress: bool) -> None:
    """The prompts, then step after step until all sequences have ended; the device is a step ahead of the host."""
    waiting = collections.deque([prompts_pass(weights, batches, _most_rows(weights.decoder, new, 1), sampling)])
    launched = 1
    with _bar(progress, new) as tick:
        while not all(answer.ended for batch in batches for answer in batch.answers):
            while len(waiting) <= _lag(weights.decoder) and launched < new:
                waiting.append(step_pass(weights, batches, sampling))
                launched += 1
            for batch, fetched in zip(batches, waiting.popleft(), strict=True):
                for answer, tokens in zip(batch.answers, fetched.lists(), strict=True):
                    answer.take(tokens)
            tick(min(len(answer.tokens) for batch in batches for answer in batch.answers))


def prompts_pass(weights: OffloadedWeights, batches: list[Batch], more: int, sampling: Sampling) -> list[_Fetched]:
    """All prompts of all batches, whose caches then have room for `more` rows."""
    decoder, packed = weights.decoder, []
    for batch in batches:
        counts = [len(prompt) for prompt in batch.ids]
        batch.rows = max(counts)
        batch.cache.start(decoder.architecture, len(counts), batch.rows + more, decoder.device, decoder.dtype)
        batch.cache.reserve(batch.rows)
        packed.append(Rows.packed([0] * len(counts), counts, decoder.device))
    tokens = [torch.tensor([t for p in batch.ids for t in p], device=decoder.device) for batch in batches]
    return _pass(weights, batches, tokens, packed, sampling)


def step_pass(weights: OffloadedWeights, batches: list[Batch], sampling: Sampling) -> list[_Fetched]:
    """A token for every sequence of every batch."""
    for batch in batches:
        batch.rows += 1
        batch.cache.reserve(batch.rows)
    rows = [Rows.next(batch.cache.lengths) for batch in batches]
    return _pass(weights, batches, [batch.tokens for batch in batches], rows, sampling)


def _pass(
    weights: OffloadedWeights, batches: list[Batch], tokens: list[Tensor], rows: list[Rows], sampling: Sampling
) -> list[_Fetched]:
    """New rows of every batch through all layers; the tokens that follow, on their way to the host."""
    decoder, attention = weights.decoder, FullAttention()
    states: list[tuple[Tensor, Tensor | None]] = [
        (decoder.embed(t, r.positions), None) for t, r in zip(tokens, rows, strict=True)
    ]
    angles = [decoder.angles(r.positions) for r in rows]
    for layer in range(decoder.architecture.layers):
        weights.visit(layer)
        for i, batch in enumerate(batches):
            states[i] = decoder.layer(layer, *states[i], angles[i], rows[i], batch.cache, attention)
    fetched = []
    for batch, (x, delta), new in zip(batches, states, rows, strict=True):
        batch.cache.advance(new.after)
        if new.starts is not None:
            last = new.starts[1:].long() - 1
            x, delta = x[last], None if delta is None else delta[last]
        batch.tokens.copy_(sampling(decoder.head(decoder.normed(x, delta)), batch.generator))
        fetched.append(_Fetched(batch.tokens[:, None]))
    return fetched
