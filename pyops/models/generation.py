"""Text from a decoder: prompts in chunks, then steps; on a GPU steps are captured CUDA graphs that feed themselves."""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from ._architecture import WHO
from ._rows import Rows
from ._sampling import Sampling
from .caches import KVCache, UpfrontCache
from .decoder import Attention, Decoder, FullAttention


@dataclass
class Text:
    """What a text is made with, and where it stands.

    Args:
        decoder, cache, attention, sampling: the parts.
        generator: the random numbers of `sampling`.
        tokens: int64 [B] on the device, the newest token of each sequence, which is not in the cache yet.
        rows: the most rows that any sequence has in the cache, on the host.
        graphs: whether steps are captured.
    """

    decoder: Decoder
    cache: KVCache
    attention: Attention
    sampling: Sampling
    generator: torch.Generator | None
    tokens: Tensor
    rows: int
    graphs: bool = False

    def choose(self, hidden: Tensor) -> Tensor:
        """[B] the tokens after rows hidden [B, H]."""
        return self.sampling(self.decoder.head(hidden), self.generator)


class Decoding(Protocol):
    """The way a step makes tokens: the part that speculative methods replace."""

    def step(self, text: Text) -> Tensor:
        """Emit tokens, int64 [B, n] on the device, -1 where a sequence has fewer (but at least one).

        Leaves the newest in text.tokens, and in text.rows the most rows that any sequence has.
        """

    @property
    def width(self) -> int:
        """Rows that a step may add to a sequence in the cache, for a while or for good."""


@dataclass
class OneToken:
    """A token a sequence and step."""

    width: ClassVar[int] = 1
    _captured: tuple[Text, int, Any] | None = field(default=None, repr=False)

    def step(self, text: Text) -> Tensor:
        """On a GPU the replay of a graph, captured again when the cache's memory moves."""
        text.rows += 1
        if not text.graphs:
            self._advance(text)
            return text.tokens[:, None]
        known = self._captured
        if known is None or known[0] is not text or known[1] != text.cache.version:
            self._captured = (text, text.cache.version, _capture(lambda: self._advance(text), text))
        else:
            known[2].replay()
        return text.tokens[:, None]

    @staticmethod
    def _advance(text: Text) -> None:
        """Every sequence by a token, in place: what the step reads and what it leaves lie in the same memory."""
        rows = Rows.next(text.cache.lengths)
        hidden = text.decoder.hidden(text.tokens, rows, text.cache, text.attention)
        text.tokens.copy_(text.choose(hidden))


def _capture(step: Callable[[], None], text: Text) -> Any:
    """Run `step` once for real, after which the returned graph does it again.

    The first run compiles and loads kernels, which capture does not allow. Capture itself runs nothing.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    if text.generator is not None:
        graph.register_generator_state(text.generator)
    with torch.cuda.graph(graph):
        step()
    return graph


def generate(decoder: Decoder, prompts: Any, max_new_tokens: int, **options: Any) -> Any:
    """See Decoder.generate."""
    as_text = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], str))
    out: list[list[int]] | None = None
    for new in stream(decoder, prompts, max_new_tokens, **options):
        out = new if out is None else [a + b for a, b in zip(out, new, strict=True)]
    if not as_text:
        return out or []
    texts = [_cut(decoder.tokenizer.decode(t, skip_special_tokens=True), options.get("stop", ())) for t in out or []]
    return texts[0] if isinstance(prompts, str) else texts


def stream(
    decoder: Decoder,
    prompts: Any,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eos: int | Sequence[int] | None = None,
    stop: str | Sequence[str] = (),
    cache: KVCache | None = None,
    attention: Attention | None = None,
    decoding: Decoding | None = None,
    chunk: int = 2048,
    graphs: bool | None = None,
    progress: bool = False,
) -> Iterator[list[list[int]]]:
    """See Decoder.stream."""
    ids = token_ids(decoder, prompts)
    sampling = Sampling(temperature, top_k, top_p, seed)
    decoding = OneToken() if decoding is None else decoding
    ends = _ends(decoder, eos, stop)
    _check(decoder, ids, max_new_tokens, chunk, decoding.width)
    if not ids or max_new_tokens == 0:
        return iter([[[] for _ in ids]])
    cache = UpfrontCache() if cache is None else cache
    capturable = decoder.device.type == "cuda" and getattr(cache, "capturable", True)
    text = Text(
        decoder, cache, FullAttention() if attention is None else attention,
        sampling, sampling.generator(decoder.device), torch.zeros(len(ids), dtype=torch.int64, device=decoder.device),
        rows=0, graphs=capturable if graphs is None else graphs and capturable,
    )  # fmt: skip
    return _steps(text, ids, max_new_tokens, decoding, ends, chunk, progress)


def _steps(
    text: Text,
    ids: list[list[int]],
    max_new_tokens: int,
    decoding: Decoding,
    ends: _Ends,
    chunk: int,
    progress: bool,
) -> Iterator[list[list[int]]]:
    """The first tokens from the prompts, then step after step until all sequences have ended.

    On a GPU a step is launched before the tokens of the one before it are looked at: the device never waits.
    """
    longest = max(map(len, ids))
    a = text.decoder.architecture
    lag = _lag(text.decoder)
    most = longest + _most_rows(text.decoder, max_new_tokens, decoding.width)
    text.cache.start(a, len(ids), most, text.decoder.device, text.decoder.dtype)
    answers = [_Answer(max_new_tokens, ends) for _ in ids]
    waiting: collections.deque[_Fetched] = collections.deque()
    with _bar(progress, max_new_tokens) as tick, torch.no_grad():
        _prefill(text, ids, chunk)
        waiting.append(_Fetched(text.tokens[:, None]))
        launched = 1
        while not all(answer.ended for answer in answers):
            while len(waiting) <= lag and launched < max_new_tokens:
                text.cache.reserve(text.rows + decoding.width)
                waiting.append(_Fetched(decoding.step(text)))
                launched += 1
            new = [answer.take(tokens) for answer, tokens in zip(answers, waiting.popleft().lists(), strict=True)]
            if any(new):
                yield new
            tick(min(len(answer.tokens) for answer in answers))


def _lag(decoder: Decoder) -> int:
    """Steps that are under way before the tokens of an earlier one are looked at."""
    return 1 if decoder.device.type == "cuda" else 0


def _most_rows(decoder: Decoder, max_new_tokens: int, width: int) -> int:
    """Rows that may follow a prompt in the cache.

    There are at most max_new_tokens - 1 steps (the prompt gives the first token). A step may begin while one token
    is missing, and others before it is known that none is.
    """
    return max(0, min((max_new_tokens - 1) * width, max_new_tokens - 2 + (1 + _lag(decoder)) * width))


def _prefill(text: Text, ids: list[list[int]], chunk: int) -> None:
    """All prompts into the cache, at most `chunk` tokens in a pass, packed; then the first new token of each."""
    decoder, batch = text.decoder, len(ids)
    done, last = (
        [0] * batch,
        torch.empty(batch, decoder.architecture.hidden, device=decoder.device, dtype=decoder.dtype),
    )
    text.cache.reserve(max(map(len, ids)))  # at once: a cache that grows then knows what is prompt
    while any(d < len(prompt) for d, prompt in zip(done, ids, strict=True)):
        room, counts = chunk, []
        for before, prompt in zip(done, ids, strict=True):
            counts.append(min(room, len(prompt) - before))
            room -= counts[-1]
        rows = Rows.packed(done, counts, decoder.device)
        tokens = torch.tensor([t for d, n, p in zip(done, counts, ids, strict=True) for t in p[d : d + n]])
        done = [d + n for d, n in zip(done, counts, strict=True)]
        whole = [b for b in range(batch) if counts[b] and done[b] == len(ids[b])]  # whose prompts end in this pass
        ends = torch.tensor([sum(counts[: b + 1]) - 1 for b in whole], dtype=torch.int64, device=decoder.device)
        hidden = decoder.hidden(tokens.to(decoder.device), rows, text.cache, text.attention, wanted=ends)
        last[whole] = hidden
    text.rows = max(done)
    text.tokens.copy_(text.choose(last))


class _Fetched:
    """Tokens on their way to the host."""

    def __init__(self, tokens: Tensor) -> None:
        self.done = None
        if tokens.device.type == "cuda":
            host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            tokens = host.copy_(tokens, non_blocking=True)
            self.done = torch.cuda.Event()
            self.done.record()
        else:
            tokens = tokens.clone()
        self.tokens = tokens

    def lists(self) -> list[list[int]]:
        """Those of each sequence; waits until they are here."""
        if self.done is not None:
            self.done.synchronize()
        return [[t for t in row if t >= 0] for row in self.tokens.tolist()]


@dataclass(frozen=True)
class _Ends:
    """What ends a sequence."""

    eos: frozenset[int]
    stop: tuple[str, ...]
    tokenizer: Any


class _Answer:
    """The new tokens of one sequence."""

    def __init__(self, most: int, ends: _Ends) -> None:
        self.tokens: list[int] = []
        self.ended = False
        self._most, self._ends = most, ends

    def take(self, tokens: list[int]) -> list[int]:
        """Those of `tokens` that belong to the sequence; it may end with them."""
        new: list[int] = []
        for token in tokens:
            if self.ended:
                break
            if token in self._ends.eos:
                self.ended = True
                break
            self.tokens.append(token)
            new.append(token)
            self.ended = len(self.tokens) >= self._most or self._stops()
        return new

    def _stops(self) -> bool:
        """Whether the text, of which a stop string may be the end, holds one."""
        if not self._ends.stop:
            return False
        tail = self.tokens[-(max(map(len, self._ends.stop)) + 8) :]
        text = self._ends.tokenizer.decode(tail)
        return any(stop in text for stop in self._ends.stop)


def _ends(decoder: Decoder, eos: int | Sequence[int] | None, stop: str | Sequence[str]) -> _Ends:
    tokens = decoder.architecture.eos if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
    strings = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not s for s in strings):
        raise ValueError(f"{WHO}: stop must hold strings of at least one character, got {list(strings)}")
    if strings and decoder.tokenizer is None:
        raise ValueError(f"{WHO}: stop must be empty for a decoder without a tokenizer, got {list(strings)}")
    return _Ends(frozenset(tokens), strings, decoder.tokenizer)


def _cut(text: str, stop: str | Sequence[str]) -> str:
    """The text before the first stop string."""
    for string in (stop,) if isinstance(stop, str) else stop:
        text = text.partition(string)[0]
    return text


def token_ids(decoder: Decoder, prompts: Any) -> list[list[int]]:
    """Prompts as lists of token ids."""
    if isinstance(prompts, Tensor):
        prompts = prompts.tolist() if prompts.dim() == 2 else [prompts.tolist()]
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if any(isinstance(p, str) for p in prompts):
        if decoder.tokenizer is None:
            raise ValueError(f"{WHO}: prompts must be token ids for a decoder without a tokenizer, got text")
        return [list(decoder.tokenizer(p).input_ids) if isinstance(p, str) else list(p) for p in prompts]
    if any(isinstance(p, int) for p in prompts):
        raise ValueError(f"{WHO}: prompts must be a list of prompts, each a list of token ids, got a list of ids")
    return [list(map(int, p)) for p in prompts]


def _check(decoder: Decoder, ids: list[list[int]], max_new_tokens: int, chunk: int, width: int) -> None:
    a = decoder.architecture
    if max_new_tokens < 0:
        raise ValueError(f"{WHO}: max_new_tokens must be 0 or more, got {max_new_tokens}")
    if chunk < 1:
        raise ValueError(f"{WHO}: chunk must be at least 1, got {chunk}")
    for b, prompt in enumerate(ids):
        if not prompt:
            raise ValueError(f"{WHO}: prompts[{b}] must have at least 1 token, got none")
        if len(prompt) + _most_rows(decoder, max_new_tokens, width) > a.max_positions:
            raise ValueError(
                f"{WHO}: prompts[{b}] must leave room for {max_new_tokens} new tokens in {a.max_positions} positions, "
                f"got {len(prompt)} tokens"
            )
        wrong = [token for token in prompt if not 0 <= token < a.vocab]
        if wrong:
            raise ValueError(f"{WHO}: prompts[{b}] must hold token ids from 0 to {a.vocab - 1}, got {wrong[0]}")


@contextlib.contextmanager
def _bar(progress: bool, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on the terminal; what it yields takes how far we are."""
    if not progress:
        yield lambda done: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task("tokens", total=total)
        yield lambda done: bar.update(task, completed=done)
