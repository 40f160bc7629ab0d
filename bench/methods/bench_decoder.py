"""The decoder: milliseconds a token and of a prompt, beside transformers and the bytes that a step must read.

GPU: a Llama with random weights, dense (bf16) and in NF4. CPU: SmolLM2-135M, fp32 and NF4. Peers generate the same
number of tokens from the same prompts with a cache that grows (hf_dynamic), with one that is static and compiled
(hf_static; at batch 1, where compiling pays for itself soonest), and with bitsandbytes' layers.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastops.cli import smollm2
from fastops.cli._measure import generate
from fastops.cli.demo import bitsandbytes_model
from fastops.models import Decoder
from fastops.models._linear import Dense, Nf4
from fastops.reference._truth import Cost

from .. import records
from ..harness import Case, Outcome, Session, difference, first_line, make_record
from ..peers import Absent, library
from ..records import Record
from ..timing import FULL, free_memory
from .bench_nf4 import LLAMA, SMOLLM, check, llama
from .page import MethodPage, five_digits

OURS = "fastops"
LOGITS_TOLERANCE = 1e-1  # of the last token's logits from transformers', by norm: 32 layers of bf16 add up
WEIGHTS = {"bf16": "dense", "fp32": "dense", "nf4": "nf4"}


def _case(model: str, batch: int, context: int, new: int, weights: str, dtype: torch.dtype, device: str) -> Case:
    sizes = {"model": model, "batch": batch, "context": context, "new": new, "weights": weights}
    return Case(sizes, dtype, device)


CASES = [
    *(_case(LLAMA, b, 128, 64, w, torch.bfloat16, "cuda") for w in ("bf16", "nf4") for b in (1, 8, 32)),
    _case(LLAMA, 4, 2048, 1, "bf16", torch.bfloat16, "cuda"),
    *(
        _case(SMOLLM, b, context, new, w, torch.float32, "cpu")
        for b, context, new in ((1, 64, 128), (8, 64, 256), (8, 1024, 64))
        for w in ("fp32", "nf4")
    ),
    _case(SMOLLM, 4, 2048, 1, "fp32", torch.float32, "cpu"),
]


def steps_of(decoder: Decoder, prompt: Tensor, new: int, **options: Any) -> list[float]:
    """Seconds between tokens; of the first alone where there is no other."""
    start = time.perf_counter()
    times = [time.perf_counter() for _ in decoder.stream(prompt, new, eos=(), **options)]
    return [times[0] - start] if new == 1 else [b - a for a, b in itertools.pairwise(times)]


def hf_steps(model: Any, prompt: Tensor, new: int, **options: Any) -> list[float]:
    """The same of transformers' generate()."""
    if new > 1 and not options:
        return generate(model, prompt, new, lambda: None)[1]
    start = time.perf_counter()
    model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, do_sample=False, **options)
    if prompt.device.type == "cuda":
        torch.cuda.synchronize()
    return [(time.perf_counter() - start) / new]


def step_cost(decoder: Decoder, case: Case) -> Cost:
    """A step reads all weights, and on average the cache of half of the new tokens; a prompt's pass is flops."""
    a, sizes = decoder.architecture, case.sizes
    batch, context, new = sizes["batch"], sizes["context"], sizes["new"]
    width = 2 * a.kv_heads * a.head_dim * a.layers * case.dtype.itemsize
    rows = batch * (context if new == 1 else 1)
    weights = sum(m.weights for m in decoder.modules() if isinstance(m, (Dense, Nf4)))
    cached = batch * width * (context if new == 1 else context + new // 2)
    attended = context // 2 if new == 1 else context
    flops = 2 * rows * weights + 4 * rows * attended * a.heads * a.head_dim * a.layers
    return Cost(decoder.step_bytes + cached, flops)


class DecoderMethod(MethodPage):
    """The page: a record for each case."""

    op, cases = "decoder", CASES

    def __init__(self) -> None:
        self._made: tuple[str, Decoder] | None = None

    def sources(self, backend: str) -> tuple[str, ...]:
        """The kernels of the products and of attention, and the decoder."""
        kernels = {f for op in ("nf4_gemv", "kv_append") for f in records.op_sources(op, backend)}
        attention = "triton" if backend == "cuda" else backend
        kernels |= {f for op in ("decode_attn", "prefill_attn") for f in records.op_sources(op, attention)}
        return (*sorted(kernels), "pyops/models/*.py")

    def record(self, case: Case, session: Session, outcome: Outcome) -> Record:
        """Prove the last token's logits, then time ours and theirs in turns."""
        sizes, device = case.sizes, session.device
        dense, four_bit = models(sizes["model"], device, case.dtype)
        decoder = self._decoder(sizes["model"] + sizes["weights"], dense, WEIGHTS[sizes["weights"]])
        new = sizes["new"] if session.effort == FULL else min(sizes["new"], 4)
        prompt = torch.randint(0, dense.config.vocab_size, (sizes["batch"], sizes["context"]), device=device)
        distance = self._distance(decoder, dense if WEIGHTS[sizes["weights"]] == "dense" else four_bit, prompt[:1, :64])

        runs: dict[str, Callable[[], list[float]]] = {OURS: functools.partial(steps_of, decoder, prompt, new)}
        runs["hf_dynamic"] = functools.partial(hf_steps, dense, prompt, new)
        if four_bit is not None and new > 1 and (device.type == "cuda" or sizes["weights"] == "nf4"):
            runs["bitsandbytes"] = functools.partial(hf_steps, four_bit, prompt, new)
        if new > 1 and (sizes["weights"] == "fp32" or (sizes["batch"] == 1 and sizes["weights"] == "bf16")):
            runs["hf_static"] = functools.partial(hf_steps, dense, prompt, new, cache_implementation="static")
        us = timed(runs, device, outcome)
        ours = us.pop(OURS)
        floor = session.peaks.floor_us(step_cost(decoder, case), case.dtype)
        figures = {"ms_per_token": ours / 1e3, "floor_ms": floor / 1e3, "floor_share": floor / ours}
        figures |= {f"ms_per_token_{name}": theirs / 1e3 for name, theirs in us.items()}
        figures |= {f"speedup_vs_{name}": theirs / ours for name, theirs in us.items()}
        figures["logits_distance"] = distance
        backend = "cuda" if device.type == "cuda" else "cpu"
        peers = {name: round(theirs, 3) for name, theirs in us.items()}
        graphed = device.type == "cuda"
        record = make_record(self, case, backend, ours, floor, None, peers, graphed, device)
        return {**record, "figures": five_digits(figures)}

    def _decoder(self, key: str, dense: Any, kind: str) -> Decoder:
        """The decoder of these weights, made once for all cases that want it; the one before makes room."""
        if self._made is None or self._made[0] != key:
            self._made = None
            free_memory()
            self._made = key, Decoder.from_hf(dense, weights=kind)
        return self._made[1]

    @staticmethod
    def _distance(decoder: Decoder, theirs: Any, prompt: Tensor) -> float:
        """Of the last logits from those of the model with the same weights."""
        if theirs is None:
            return 0.0
        with torch.inference_mode():
            want, got = theirs(prompt).logits[:, -1], decoder(prompt)[:, -1]
        distance = difference(want, got)
        check("the logits", distance, LOGITS_TOLERANCE)
        return distance


def timed(runs: dict[str, Callable[[], list[float]]], device: torch.device, outcome: Outcome) -> dict[str, float]:
    """µs a step of each: the median of two turns, there and back, after one that is not counted.

    On a CPU, where a turn takes minutes and others may share the cores, the lower quartile, and no turn is left out.
    """
    steps: dict[str, list[float]] = {name: [] for name in runs}
    turns = [(False, [*runs]), (True, [*runs]), (True, [*reversed(runs)])]
    for counted, names in turns if device.type == "cuda" else turns[1:]:
        for name in names:
            if name in outcome.absent:
                continue
            try:
                took = runs[name]()
            except Exception as why:
                if name == OURS:
                    raise
                outcome.absent[name] = first_line(why)
                continue
            steps[name] += took if counted else []
    quartile = 1 if device.type == "cuda" else 0
    return {
        name: 1e6 * (statistics.quantiles(each, n=4)[quartile] if len(each) > 3 else min(each))
        for name, each in steps.items()
        if each
    }


@functools.cache
def models(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """(dense, with bitsandbytes' layers or None) from transformers; neither stops early."""
    if name == LLAMA:
        return llama(name, device)
    library("transformers")
    try:
        dense, _ = smollm2.load(smollm2.gguf_file(), device, dtype)
    except smollm2.Missing as missing:
        raise Absent(str(missing)) from missing
    dense.generation_config.eos_token_id = None
    four_bit = None
    with contextlib.suppress(Absent):
        library("bitsandbytes")
        four_bit = bitsandbytes_model(copy.deepcopy(dense), dtype, False)
    return dense, four_bit


BENCH = DecoderMethod()
