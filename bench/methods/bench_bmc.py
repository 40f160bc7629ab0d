"""BMC: what a decode step takes by the rows that the cache grows by, beside the model of it and transformers' caches.

Every run continues the same prompts from the same keys and values, which are made once, so that only steps are timed:
the mean of all of them, growth included. `padded` is the published setting, one attention kernel throughout. All
settings, r's and peers of a shape are one race. GPU: a Llama with random weights and prompts; CPU: SmolLM2-135M
on real text.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastops.cli import smollm2
from fastops.methods import bmc
from fastops.methods._bmc_profile import Shape as CacheShape
from fastops.models import Decoder, Rows, UpfrontCache
from fastops.models._sampling import Sampling
from fastops.models.generation import OneToken, Text
from fastops.ops.kv_append import kv_append
from fastops.reference._truth import Cost

from .. import records
from ..harness import Case, Outcome, Session, make_record
from ..peers import library
from ..records import Record
from ..timing import FULL, free_memory
from .bench_decoder import models
from .bench_nf4 import LLAMA, SMOLLM
from .page import MethodPage, five_digits

AUTO, ALL = "auto", "all"  # r from the model; every row at once
TURN = 8  # steps of a run before the next one's
SAME_TOKENS = 16  # that every run must agree in: sums in another order decide later ones
SOME_TOKENS = 0.5  # of these in 16 bits, where random weights make logits that are nearly equal


class Shape(NamedTuple):
    """What is generated."""

    model: str
    batch: int
    context: int
    new: int


SHAPES = {
    "cpu": (Shape(SMOLLM, 8, 1024, 64), Shape(SMOLLM, 8, 64, 1024)),
    "cuda": (Shape(LLAMA, 1, 8000, 192), Shape(LLAMA, 8, 8000, 192)),
}
SETTINGS: dict[str, tuple[dict[str, Any], tuple[int | str, ...]]] = {  # how a cache is made, its r's
    "padded": (dict(setting="padded"), (1, 16, 32, 64, 128, 256, ALL, AUTO)),
    "length_aware": (dict(setting="length_aware"), (1, 64, ALL, AUTO)),
    "virtual": (dict(setting="length_aware", growth="virtual"), (AUTO,)),
}
PEERS = {"hf_dynamic": "dynamic", "hf_static": "static"}


def sweep(setting: str, new: int) -> list[int | str]:
    """The r's of a setting that a text of `new` tokens can tell apart."""
    return [r for r in SETTINGS[setting][1] if isinstance(r, str) or r < new]


def _cases(kind: str, shape: Shape) -> list[Case]:
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    return [
        Case({**shape._asdict(), "setting": setting, "r": r}, dtype, kind)
        for setting in SETTINGS
        for r in sweep(setting, shape.new)
    ]


CASES = [case for kind, shapes in SHAPES.items() for shape in shapes for case in _cases(kind, shape)]


class Prompts(NamedTuple):
    """A decoder at the end of its prompts: keys and values of each layer, and the first new tokens."""

    decoder: Decoder
    layers: list[tuple[Tensor, Tensor]]
    tokens: Tensor


def prompt_of(shape: Shape, device: torch.device) -> Tensor:
    """[batch, context] tokens: of a real text where the model is real."""
    if shape.model == LLAMA:
        generator = torch.Generator().manual_seed(0)
        return torch.randint(128_000, (shape.batch, shape.context), generator=generator).to(device)
    _, tokenizer = smollm2.load(smollm2.gguf_file(), device, torch.float32)
    ids = tokenizer(smollm2.real_text(), return_tensors="pt").input_ids[0]
    starts = [i * (len(ids) - shape.context) // shape.batch for i in range(shape.batch)]
    return torch.stack([ids[s : s + shape.context] for s in starts]).to(device)


@functools.lru_cache(maxsize=1)
def prompts(shape: Shape, device: torch.device, dtype: torch.dtype) -> Prompts:
    """The prompts' pass, once for all runs of a shape."""
    decoder = Decoder.from_hf(models(shape.model, device, dtype)[0])
    parts: dict[str, Any] = {"cache": UpfrontCache(capacity=shape.context + 1), "attention": bmc.parts()["attention"]}
    first = decoder.generate(prompt_of(shape, device), 1, eos=(), **parts)
    layers = [tuple(x[:, :, : shape.context] for x in parts["cache"].layer(i)[:2]) for i in range(len(decoder.blocks))]
    return Prompts(decoder, layers, torch.tensor(first, device=device)[:, 0])


class Ours:
    """A text that goes on from the prompts, over one of our caches."""

    def __init__(self, shape: Shape, made: Prompts, new: int, parts: dict[str, Any]) -> None:
        decoder, self.cache = made.decoder, parts["cache"]
        device = decoder.device
        self.cache.start(decoder.architecture, shape.batch, shape.context + new, device, decoder.dtype)
        self.cache.reserve(shape.context)
        for i, (k, v) in enumerate(made.layers):
            kv_append(*self.cache.layer(i)[:2], k, v, self.cache.lengths)
        self.cache.advance(Rows.packed([0] * shape.batch, [shape.context] * shape.batch, device).after)
        self._text = Text(
            decoder, self.cache, parts["attention"], Sampling(0.0, None, None, 0), None, made.tokens.clone(),
            rows=shape.context, graphs=device.type == "cuda",
        )  # fmt: skip
        self._decoding = OneToken()

    def step(self) -> Tensor:
        """The next token of each sequence, as generate() makes it."""
        self.cache.reserve(self._text.rows + 1)
        return self._decoding.step(self._text)[:, 0].clone()

    def follow(self, tokens: Tensor) -> None:
        """Go on from these tokens."""
        self._text.tokens.copy_(tokens)


class Theirs:
    """The same over one of transformers' caches; on a GPU the static one is compiled."""

    def __init__(self, shape: Shape, made: Prompts, new: int, model: Any, kind: str) -> None:
        transformers: Any = library("transformers")
        if kind == "static":
            self._cache = transformers.StaticCache(config=model.config, max_cache_len=shape.context + new)
        else:
            self._cache = transformers.DynamicCache(config=model.config)
        for i, (k, v) in enumerate(made.layers):
            self._cache.update(k, v, i)
        self._tokens = made.tokens
        compiled = kind == "static" and made.tokens.device.type == "cuda"
        self._forward = torch.compile(model.forward, mode="reduce-overhead") if compiled else model.forward
        if compiled:
            for _ in range(3):  # compiles, warms up and records
                self.step()
            for layer in self._cache.layers:  # and back to the end of the prompts
                layer.cumulative_length.fill_(shape.context)
            self._tokens = made.tokens

    def step(self) -> Tensor:
        """The next token of each sequence."""
        logits = self._forward(self._tokens[:, None], past_key_values=self._cache).logits
        self._tokens = logits[:, -1].argmax(-1).clone()
        return self._tokens

    def follow(self, tokens: Tensor) -> None:
        """Go on from these tokens."""
        self._tokens = tokens.clone()


class Times(NamedTuple):
    """Of a run: milliseconds a step, the first tokens, and of our cache after the last what it says of itself."""

    ms: float
    tokens: Tensor
    growths: int = 0
    spare: int = 0
    memory: bmc.Memory | None = None


@torch.no_grad()
def race(runs: dict[str, Callable[[], Ours | Theirs]], new: int, device: torch.device, exact: bool) -> dict[str, Times]:
    """`new` steps of every run, the mean without the first, which loads and captures.

    On a CPU, whose cores others share, the runs take turns of TURN steps, so that what disturbs one disturbs all, and
    what the caches hold is a run's own but for the first of these. On a GPU, whose memory holds one cache of the size,
    they come one after the other; there, in 16 bits, all follow the first run's tokens as long as tokens are compared,
    since one that differs would make all later ones differ.
    """
    done: dict[str, Times] = {}
    lead: list[Tensor] = []
    for group in [[*runs]] if device.type == "cpu" else [[name] for name in runs]:
        texts = {name: runs[name]() for name in group}
        spent, tokens = dict.fromkeys(group, 0.0), {name: list[Tensor]() for name in group}
        for turn in range(0, new, TURN):
            for name, text in texts.items():
                for step in range(turn, min(turn + TURN, new)):
                    start = _now(device)
                    token = text.step()
                    spent[name] += (_now(device) - start) if step else 0.0
                    if step < SAME_TOKENS:
                        tokens[name].append(token)
                        lead += [token] if len(lead) == step else []
                        if not exact:
                            text.follow(lead[step])
        for name, text in texts.items():
            ms = 1e3 * spent[name] / max(1, new - 1)
            done[name] = Times(ms, torch.stack(tokens[name], dim=1))
            if isinstance(text, Ours):
                cache = text.cache
                done[name] = done[name]._replace(growths=cache.growths, spare=cache.spare, memory=cache.memory)
                del cache
        del texts, text
        free_memory()
    first = next(iter(done.values())).tokens
    for name, run in done.items():
        equal = float((run.tokens == first).float().mean())
        if equal < (1.0 if exact else SOME_TOKENS):
            raise RuntimeError(f"{name}: only {equal:.0%} of the first tokens are those of {next(iter(done))}")
    return done


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def raced(shape: Shape, device: torch.device, dtype: torch.dtype, new: int) -> dict[str, Times]:
    """Every setting, every r and every peer of a shape, in one run: "padded 64", "hf_static", …"""
    done = _raced(shape, device, dtype, new)
    if isinstance(done, Exception):
        raise done
    return done


@functools.lru_cache(maxsize=1)
def _raced(shape: Shape, device: torch.device, dtype: torch.dtype, new: int) -> dict[str, Times] | Exception:
    """raced(), or why it failed, so that a shape's cases do not all run what takes minutes to fail."""
    try:
        return _race_all(shape, device, dtype, new)
    except Exception as why:
        return why.with_traceback(None)  # whose frames hold gigabytes


def _race_all(shape: Shape, device: torch.device, dtype: torch.dtype, new: int) -> dict[str, Times]:
    made = prompts(shape, device, dtype)
    model = models(shape.model, device, dtype)[0]
    runs: dict[str, Callable[[], Ours | Theirs]] = {}
    for setting in SETTINGS:
        for r in sweep(setting, shape.new):
            rows = shape.new + 1 if r == ALL else r
            runs[f"{setting} {r}"] = functools.partial(_ours, shape, made, new, rows, SETTINGS[setting][0])
    for name, kind in PEERS.items():
        runs[name] = functools.partial(Theirs, shape, made, new, model, kind)
    return race(runs, new, device, exact=dtype == torch.float32)


def _ours(shape: Shape, made: Prompts, new: int, r: int | str, how: dict[str, Any]) -> Ours:
    return Ours(shape, made, new, bmc.parts(r=r, **how))


def step_cost(made: Prompts, shape: Shape, dtype: torch.dtype) -> Cost:
    """All weights once, and the keys and values of the rows that are there in the middle of the text."""
    a = made.decoder.architecture
    rows = shape.batch * (shape.context + shape.new // 2)
    cached = 2 * rows * a.kv_heads * a.head_dim * a.layers * dtype.itemsize
    return Cost(made.decoder.step_bytes + cached, 4 * rows * a.heads * a.head_dim * a.layers)


class BmcMethod(MethodPage):
    """The page: a record for each r, setting and shape."""

    op, cases = "bmc", CASES

    def sources(self, backend: str) -> tuple[str, ...]:
        """The cache, and the kernels of attention."""
        attention = "triton" if backend == "cuda" else backend
        kernels = {f for op in ("kv_append", "decode_attn") for f in records.op_sources(op, attention)}
        return (*sorted(kernels), "pyops/methods/bmc.py", "pyops/methods/_bmc_*.py", "pyops/models/generation.py")

    def record(self, case: Case, session: Session, outcome: Outcome) -> Record:
        """Time one r; the record of r = auto compares it with the others and with the peers."""
        sizes, device = case.sizes, session.device
        shape = Shape(sizes["model"], sizes["batch"], sizes["context"], sizes["new"])
        new = shape.new if session.effort == FULL else 4
        runs = raced(shape, device, case.dtype, new)
        made, setting = prompts(shape, device, case.dtype), sizes["setting"]
        mine = runs[f"{setting} {sizes['r']}"]
        figures, times = {"ms_per_token": mine.ms}, dict[str, float]()
        r_model = mine.spare
        if setting == "padded":
            costs = bmc.costs_of(_cache_shape(made, shape), shape.context + shape.new)
            r_model = bmc.best_r(costs, shape.context, shape.new)
            r = r_model if sizes["r"] == AUTO else shape.new if sizes["r"] == ALL else sizes["r"]
            figures["overhead_ms"] = 1e3 * bmc.overhead(costs, r, shape.context, shape.new) / shape.new
        if sizes["r"] == AUTO:
            times = {name: runs[name].ms for name in PEERS}
            figures |= {f"speedup_vs_{name.removeprefix('hf_')}": ms / mine.ms for name, ms in times.items()}
            figures |= {f"ms_per_token_{name}": ms for name, ms in times.items()}
            figures |= compared(runs, setting, shape, r_model)
        memory = mine.memory
        assert memory is not None
        figures |= {"growths": mine.growths, "cache_mb": memory.capacity / 1e6, "copied_mb": memory.copied / 1e6}
        floor = session.peaks.floor_us(step_cost(made, shape, case.dtype), case.dtype)
        backend, graphed = ("triton", True) if device.type == "cuda" else ("cpu", False)
        us = {name: round(1e3 * ms, 3) for name, ms in times.items()}
        record = make_record(self, case, backend, 1e3 * mine.ms, floor, None, us, graphed, device)
        return {**record, "figures": five_digits(figures)}


def compared(runs: dict[str, Times], setting: str, shape: Shape, r_model: int) -> dict[str, float]:
    """r = auto beside the sweep of its setting."""
    ms = {r: runs[f"{setting} {r}"].ms for r in sweep(setting, shape.new)}
    auto = ms.pop(AUTO)
    if not ms:
        return {"r_model": r_model}
    best = min(ms, key=lambda r: ms[r])
    r_best = r_model if auto < ms[best] else shape.new if best == ALL else int(best)
    figures = {"r_model": r_model, "r_best": r_best, "throughput_vs_best": min(auto, ms[best]) / auto}
    figures |= {"speedup_vs_full": ms[ALL] / auto, "speedup_vs_r1": ms[1] / auto}
    return figures


def _cache_shape(made: Prompts, shape: Shape) -> CacheShape:
    a, d = made.decoder.architecture, made.decoder
    return CacheShape(shape.batch, a.layers, a.heads, a.kv_heads, a.head_dim, d.device, d.dtype)


BENCH = BmcMethod()
