"""BMC: what a decode step takes by the rows that the cache grows by, beside the model of it and transformers' caches.

Every run continues the same prompts from the same keys and values, which are made once, so that only steps are timed:
the mean of all of them, growth included. `padded` is the published setting, one attention kernel throughout; the peers
are timed once a shape and stand beside every setting. GPU: a Llama with random weights and prompts; CPU: SmolLM2-135M
on real text.
"""

from __future__ import annotations

import functools
import statistics
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastops.cli import smollm2
from fastops.cli._measure import Clock
from fastops.methods import bmc
from fastops.methods._bmc_profile import Shape as CacheShape
from fastops.models import Decoder, Rows, UpfrontCache
from fastops.models._sampling import Sampling
from fastops.models.generation import OneToken, Text
from fastops.ops.kv_append import kv_append
from fastops.reference._truth import Cost

from .. import records
from ..harness import Case, Outcome, Session, first_line, make_record
from ..peers import Absent
from ..records import Record
from ..timing import FULL, Runner, free_memory
from .bench_decoder import models
from .bench_nf4 import LLAMA, SMOLLM

SWEEP = (1, 8, 16, 32, 64, 128, 256)
AUTO, ALL = "auto", "all"  # r from the model; every row at once
SAME_TOKENS = 16  # that every run must agree in: sums of fp32 in another order decide later ones
SHORT = 128  # new tokens up to which a run is done three times, and the fastest counts


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
SETTINGS = {  # name: how GrowingCache is made, the r's that are swept
    "padded": (dict(setting="padded"), SWEEP),
    "length_aware": (dict(setting="length_aware"), (1, 16, 64, 256)),
    "virtual": (dict(setting="length_aware", growth="virtual"), (64,)),
}


def _cases(kind: str, shape: Shape) -> list[Case]:
    """The sweep first: the record of r = auto compares with it."""
    dtype = torch.float32 if kind == "cpu" else torch.bfloat16
    return [
        Case({**shape._asdict(), "setting": setting, "r": r}, dtype, kind)
        for setting, (_, sweep) in SETTINGS.items()
        for r in (*(r for r in sweep if r < shape.new), ALL, AUTO)
    ]


CASES = [case for kind, shapes in SHAPES.items() for shape in shapes for case in _cases(kind, shape)]


class Prompts(NamedTuple):
    """A decoder at the end of its prompts: keys and values of each layer, and the first new tokens."""

    decoder: Decoder
    layers: list[tuple[Tensor, Tensor]]
    tokens: Tensor


class Run(NamedTuple):
    """Milliseconds a step, the tokens, and the cache after the last."""

    ms: float
    tokens: Tensor
    cache: Any


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


def run(shape: Shape, made: Prompts, new: int, parts: dict[str, Any]) -> Run:
    """new - 1 steps from the end of the prompts, as generate() makes them."""
    decoder, cache = made.decoder, parts["cache"]
    device = decoder.device
    cache.start(decoder.architecture, shape.batch, shape.context + new, device, decoder.dtype)
    cache.reserve(shape.context)
    for i, (k, v) in enumerate(made.layers):
        kv_append(*cache.layer(i)[:2], k, v, cache.lengths)
    cache.advance(Rows.packed([0] * shape.batch, [shape.context] * shape.batch, device).after)
    sampling = Sampling(0.0, None, None, 0)
    graphs = device.type == "cuda"
    text = Text(
        decoder, cache, parts["attention"], sampling, None, made.tokens.clone(), rows=shape.context, graphs=graphs
    )
    decoding, tokens = OneToken(), [made.tokens]
    with torch.no_grad():
        for step in range(new):
            if step == 1:  # the first one loads kernels and, on a GPU, captures
                start = _now(device)
            cache.reserve(text.rows + 1)
            tokens.append(decoding.step(text)[:, 0].clone())
        ms = 1e3 * (_now(device) - start) / max(1, new - 1)
    return Run(ms, torch.stack(tokens, dim=1), cache)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@functools.lru_cache(maxsize=2)
def peers(shape: Shape, device: torch.device, dtype: torch.dtype, new: int) -> tuple[dict[str, float], dict[str, str]]:
    """({peer: ms a step}, {peer: why it is absent}) of transformers' caches on the same prompts, by their mean too."""
    model, prompt = models(shape.model, device, dtype)[0], prompt_of(shape, device)
    times, absent = {}, {}
    for name, kind in (("hf_dynamic", "dynamic"), ("hf_static", "static")):
        clock = Clock(lambda: None)
        try:
            with torch.inference_mode():
                model.generate(
                    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new + 1, do_sample=False,
                    streamer=clock, cache_implementation=kind,
                )  # fmt: skip
        except Exception as why:  # whatever ails a peer, we go on without it
            absent[name] = first_line(why)
            continue
        steps = clock.steps()
        times[name] = 1e3 * statistics.fmean(steps[len(steps) // 8 :])  # without those that compile
        free_memory()
    return times, absent


def step_cost(made: Prompts, shape: Shape, dtype: torch.dtype) -> Cost:
    """All weights once, and the keys and values of the rows that are there in the middle of the text."""
    a = made.decoder.architecture
    rows = shape.batch * (shape.context + shape.new // 2)
    cached = 2 * rows * a.kv_heads * a.head_dim * a.layers * dtype.itemsize
    return Cost(made.decoder.step_bytes + cached, 4 * rows * a.heads * a.head_dim * a.layers)


class BmcMethod:
    """The page: a record for each r, setting and shape."""

    op, results = "bmc", "methods/bmc"

    def __init__(self) -> None:
        self._runs: dict[tuple[Any, ...], Run] = {}

    def sources(self, backend: str) -> tuple[str, ...]:
        """The cache, and the kernels of attention."""
        attention = "triton" if backend == "cuda" else backend
        kernels = {f for op in ("kv_append", "decode_attn") for f in records.op_sources(op, attention)}
        return (*sorted(kernels), "pyops/methods/bmc.py", "pyops/methods/_bmc_*.py", "pyops/models/generation.py")

    def cases_on(self, device: torch.device) -> list[Case]:
        """A large model on a GPU, a small one on a CPU."""
        return [case for case in CASES if case.device == device.type]

    def bytes_of(self, record: Record) -> int | None:
        """Known only beside the model."""
        return None

    def runner(self, case: Case, session: Session) -> Runner:
        """One whole measurement."""
        return functools.partial(self.measure, case, session)

    def measure(self, case: Case, session: Session) -> Outcome:
        """Time one r; the record of r = auto compares it with the others and with the peers."""
        outcome = Outcome(case)
        try:
            outcome.records.append(self._measured(case, session, outcome))
        except Absent as why:
            outcome.absent[case.sizes["model"]] = str(why)
        except Exception as why:  # the next case may still run
            outcome.failures.append(f"{type(why).__name__}: {first_line(why)}")
        return outcome

    def _measured(self, case: Case, session: Session, outcome: Outcome) -> Record:
        sizes, device = case.sizes, session.device
        shape = Shape(sizes["model"], sizes["batch"], sizes["context"], sizes["new"])
        new = shape.new if session.effort == FULL else 4
        made = prompts(shape, device, case.dtype)
        mine = self._run(shape, sizes["setting"], sizes["r"], made, new)
        costs = bmc.costs_of(_cache_shape(made, shape), shape.context)
        figures = {"ms_per_token": mine.ms}
        if sizes["setting"] == "padded":
            r = bmc.best_r(costs, shape.context, new) if sizes["r"] == AUTO else _rows(sizes["r"], shape)
            figures["overhead_ms"] = 1e3 * bmc.overhead(costs, min(r, new + 1), shape.context, new) / new
        times: dict[str, float] = {}
        if sizes["r"] == AUTO:
            times, absent = peers(shape, device, case.dtype, new)
            outcome.absent.update(absent)
            r_model = r if sizes["setting"] == "padded" else mine.cache.spare
            figures |= self._compared(shape, sizes["setting"], mine, r_model, made, new)
            figures |= {f"speedup_vs_{name.removeprefix('hf_')}": ms / mine.ms for name, ms in times.items()}
            figures |= {f"ms_per_token_{name}": ms for name, ms in times.items()}
        memory = mine.cache.memory
        figures |= {"growths": mine.cache.growths, "cache_mb": memory.capacity / 1e6, "copied_mb": memory.copied / 1e6}
        floor = session.peaks.floor_us(step_cost(made, shape, case.dtype), case.dtype)
        backend, graphed = ("triton", True) if device.type == "cuda" else ("cpu", False)
        us = {name: round(1e3 * ms, 3) for name, ms in times.items()}
        record = make_record(self, case, backend, 1e3 * mine.ms, floor, None, us, graphed, device)
        return {**record, "figures": {name: float(f"{value:.5g}") for name, value in figures.items()}}

    def _run(self, shape: Shape, setting: str, r: int | str, made: Prompts, new: int) -> Run:
        """Of this session, once; its tokens must be those of all others."""
        key = (shape, setting, r, new)
        if key not in self._runs:
            rows = _rows(r, shape) if r != AUTO else r
            turns = []
            for _ in range(3 if new <= SHORT else 1):
                turns.append(run(shape, made, new, bmc.parts(r=rows, **SETTINGS[setting][0])))
            self._runs[key] = min(turns, key=lambda turn: turn.ms)
            first = next(run for other, run in self._runs.items() if (other[0], other[3]) == (shape, new))
            if not torch.equal(first.tokens[:, :SAME_TOKENS], self._runs[key].tokens[:, :SAME_TOKENS]):
                raise RuntimeError(f"r = {r}, {setting}: other tokens than with another r")
            self._runs[key].cache.k, self._runs[key].cache.v = [], []  # its memory is of use to the next
            free_memory()
        return self._runs[key]

    def _compared(
        self, shape: Shape, setting: str, mine: Run, r_model: int, made: Prompts, new: int
    ) -> dict[str, float]:
        """r = auto beside the sweep."""
        sweep = {
            r: self._run(shape, setting, r, made, new).ms for r in (*SETTINGS[setting][1], ALL) if r == ALL or r < new
        }
        best = min(sweep, key=lambda r: sweep[r])
        figures = {
            "r_model": r_model,
            "r_best": _rows(best, shape) if sweep[best] < mine.ms else r_model,
            "throughput_vs_best": min(min(sweep.values()), mine.ms) / mine.ms,
            "speedup_vs_full": sweep[ALL] / mine.ms,
        }
        if 1 in sweep:
            figures["speedup_vs_r1"] = sweep[1] / mine.ms
        return figures


def _rows(r: int | str, shape: Shape) -> int:
    return shape.new + 1 if r == ALL else int(r)


def _cache_shape(made: Prompts, shape: Shape) -> CacheShape:
    a, d = made.decoder.architecture, made.decoder
    return CacheShape(shape.batch, a.layers, a.heads, a.kv_heads, a.head_dim, d.device, d.dtype)


BENCH = BmcMethod()
