"""KVPR: a decode step with its KV cache in host memory, beside the link's floor and transformers' offloaded cache.

GPU: a few layers of OPT-6.7B, -13B, -30B and Llama-2-7B with random weights in fp16, and a vocabulary so small that
the layers are what is measured; milliseconds a layer and step. A case without `l` compares the schedules: all K and V
sent, KVPR's single split, the chunk pipeline. A case with `l`, a share of the rows, is a point of the grid on which
predicted times are held against measured ones. CPU: what the 4-bit stores cost SmolLM2-135M in perplexity on a real
text, token after token through the runtime; no speed is claimed there.

    python -m bench.methods.bench_kvpr --plot docs/kvpr_predicted.png --timeline docs/kvpr_timeline
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fastops.cli import smollm2
from fastops.methods import OffloadedWeights
from fastops.methods._kvpr_column import Batch, prompts_pass, step_pass
from fastops.methods._kvpr_store import release_pinned
from fastops.methods.kvpr import OffloadedCache, Plan
from fastops.models import Decoder, FullAttention, Rows, UpfrontCache
from fastops.models._sampling import Sampling
from fastops.models.caches import KVCache

from .. import records
from ..harness import Case, Outcome, Session, difference, first_line, make_record, pick_device
from ..peers import Absent, library
from ..records import Record
from ..timing import FULL, free_memory
from .bench_nf4 import check
from .page import MethodPage, five_digits

GATED = dict(vocab_size=512, max_position_embeddings=4096)
OPT = dict(vocab_size=512, max_position_embeddings=4096)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "OPT-6.7B": ("OPT", dict(OPT, hidden_size=4096, num_attention_heads=32, ffn_dim=16384, word_embed_proj_dim=4096)),
    "OPT-13B": ("OPT", dict(OPT, hidden_size=5120, num_attention_heads=40, ffn_dim=20480, word_embed_proj_dim=5120)),
    "OPT-30B": ("OPT", dict(OPT, hidden_size=7168, num_attention_heads=56, ffn_dim=28672, word_embed_proj_dim=7168)),
    "Llama-2-7B": ("Llama", dict(GATED, hidden_size=4096, num_attention_heads=32, intermediate_size=11008)),
    "tiny": ("OPT", dict(OPT, hidden_size=64, num_attention_heads=4, ffn_dim=128, word_embed_proj_dim=64)),
}
LAYERS = 4
STEPS, WARM = 6, 2
LOGITS_TOLERANCE = 2e-2  # of a step's logits from those of the resident cache, by norm, in fp16
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the rows, on the grid
SWEEP = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)  # round the split that the scheduler chose
CHUNK = 32 << 20  # bytes of X in a chunk of a given split
BATCHES = 4  # that share a load of a layer's weights in the column schedule
SMOLLM, TEXTS, PROMPT, SCORED = smollm2.NAME, 8, 256, 96

MODELS = ("OPT-6.7B", "OPT-13B", "OPT-30B", "Llama-2-7B")
KINDS: list[tuple[int, dict[str, Any]]] = [
    (32, {}), (64, {}), *((32, {"l": share}) for share in SHARES), (32, {"batches": BATCHES}),
]  # fmt: skip
CASES = [
    *(  # a model's cases stand together: it is made once, and their pinned blocks are of the same sizes
        Case({"model": model, "batch": batch, "context": context, **more}, torch.float16)
        for model in MODELS
        for batch, more in KINDS
        for context in (512, 1024)
    ),
    *(
        Case({"model": SMOLLM, "batch": TEXTS, "context": PROMPT, "compress": compress}, torch.float32, "cpu")
        for compress in ("none", "kv", "x", "all")
    ),
]


def hf_model(name: str, device: torch.device, dtype: torch.dtype, layers: int = LAYERS) -> Any:
    """A transformers model of this shape; weights small and random."""
    transformers: Any = library("transformers")
    kind, sizes = SHAPES[name]
    before = torch.get_default_dtype()
    torch.manual_seed(0)
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            config = getattr(transformers, f"{kind}Config")(**sizes, num_hidden_layers=layers)
            return getattr(transformers, f"{kind}ForCausalLM")(config).eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(before)


class Text:
    """Prompts in a cache, and then token after token.

    Args:
        decoder: the model.
        cache: where K and V go.
        prompt: int64 [B, N].
        steps: how many may follow.
    """

    def __init__(self, decoder: Decoder, cache: KVCache, prompt: Tensor, steps: int) -> None:
        self.decoder, self.cache, self.rows = decoder, cache, prompt.shape[1]
        batch = prompt.shape[0]
        cache.start(decoder.architecture, batch, self.rows + steps, decoder.device, decoder.dtype)
        cache.reserve(self.rows)
        rows = Rows.packed([0] * batch, [self.rows] * batch, decoder.device)
        ends = torch.arange(batch, device=decoder.device) * self.rows + self.rows - 1
        self.hidden = decoder.hidden(prompt.reshape(-1), rows, cache, FullAttention(), wanted=ends)

    def step(self, tokens: Tensor) -> Tensor:
        """Logits [B, V] after tokens [B]."""
        self.rows += 1
        self.cache.reserve(self.rows)
        self.hidden = self.decoder.hidden(tokens, Rows.next(self.cache.lengths), self.cache, FullAttention())
        logits: Tensor = self.decoder.head(self.hidden)
        return logits


def seconds_of(device: torch.device, step: Any, count: int) -> float:
    """The median of `count` steps one after the other, by the device's clock; two are not counted."""
    for _ in range(WARM):
        step()
    if device.type != "cuda":
        moments = [time.perf_counter()]
        for _ in range(count):
            step()
            moments.append(time.perf_counter())
        return statistics.median(b - a for a, b in itertools.pairwise(moments))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    marks[0].record()
    for mark in marks[1:]:
        step()
        mark.record()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1e3


def ours(decoder: Decoder, cache: OffloadedCache, prompt: Tensor, count: int) -> float:
    """Seconds of a layer and step."""
    text = Text(decoder, cache, prompt, count + WARM)
    token = prompt[:, 0]
    took = seconds_of(decoder.device, lambda: text.step(token), count) / decoder.architecture.layers
    if decoder.device.type == "cuda":
        torch.cuda.synchronize(decoder.device)
    return took


def column(
    weights: OffloadedWeights, prompt: Tensor, count: int, split: str, more: int
) -> tuple[list[Batch], Callable[[], Any]]:
    """(`count` batches behind their prompts, what makes a step of all of them)."""
    sampling, ids = Sampling(0.0, None, None, 0), prompt.tolist()
    share = weights.layer_bytes / count
    batches = [
        Batch(ids, OffloadedCache(weights.decoder, split, weights=share), [], None, prompt[:, 0].clone(), 0)
        for _ in range(count)
    ]
    prompts_pass(weights, batches, more, sampling)
    return batches, lambda: step_pass(weights, batches, sampling)


def hf_offloaded(model: Any, prompt: Tensor, count: int) -> float:
    """The same of transformers' DynamicCache(offloading=True)."""
    transformers: Any = library("transformers")
    try:
        cache = transformers.DynamicCache(config=model.config, offloading=True)
        with torch.inference_mode():
            model(prompt, past_key_values=cache, logits_to_keep=1)
            token = prompt[:, :1]
            step = lambda: model(token, past_key_values=cache, logits_to_keep=1)  # noqa: E731
            return seconds_of(prompt.device, step, count) / model.config.num_hidden_layers
    except (RuntimeError, TypeError, AssertionError) as why:
        raise Absent(first_line(why)) from why


@torch.no_grad()
def prove(decoder: Decoder, tolerance: float = LOGITS_TOLERANCE) -> None:
    """A step's logits over host memory are those over a resident cache, whatever is recomputed."""
    prompt = torch.randint(0, decoder.architecture.vocab, (3, 70), device=decoder.device)

    def logits(cache: KVCache) -> Tensor:
        text = Text(decoder, cache, prompt, 2)
        text.step(prompt[:, 1])
        return text.step(prompt[:, 2])

    want = logits(UpfrontCache())
    for split, chunk in ((0, None), (40, None), (70, 4096)):
        got = logits(OffloadedCache(decoder, split, chunk=chunk))
        check(f"the logits at l = {split}", difference(got, want), tolerance)


_held: dict[tuple[str, torch.device, torch.dtype], tuple[Any, Decoder]] = {}


def made(name: str, device: torch.device, dtype: torch.dtype) -> tuple[Any, Decoder]:
    """(transformers' model, ours of the same weights), proven; the ones before make room."""
    key = name, device, dtype
    if key not in _held:
        _held.clear()
        free_memory()
        if device.type == "cuda":
            release_pinned()
        model = hf_model(name, device, dtype)
        decoder = Decoder.from_hf(model)
        prove(decoder)
        _held[key] = model, decoder
    return _held[key]


class KvprMethod(MethodPage):
    """The page: a record for each case."""

    op, cases = "kvpr", CASES

    def sources(self, backend: str) -> tuple[str, ...]:
        """The kernels of recomputation, attention and the store, and the runtime."""
        triton = "triton" if backend == "cuda" else backend  # what has no CUDA kernel
        kernels = {f for op in ("kv_recompute", "decode_attn") for f in records.op_sources(op, triton)}
        kernels |= set(records.op_sources("kv_append", backend))
        return (*sorted(kernels), "pyops/methods/kvpr.py", "pyops/methods/_kvpr_*.py", "pyops/models/decoder.py")

    @torch.no_grad()
    def record(self, case: Case, session: Session, outcome: Outcome) -> Record:
        """Prove and time one case."""
        kinds = {"compress": self._perplexity, "l": self._point, "batches": self._column}
        kind = next((kinds[name] for name in case.sizes if name in kinds), self._compare)
        try:
            return kind(case, session, outcome)
        finally:
            free_memory()

    def _record(
        self, case: Case, session: Session, ms: float, floor_ms: float, figures: dict[str, float], **peers: float
    ) -> Record:
        backend = "cuda" if session.device.type == "cuda" else "cpu"
        named = {name: round(1e3 * theirs, 3) for name, theirs in peers.items()}
        record = make_record(self, case, backend, 1e3 * ms, 1e3 * floor_ms, None, named, False, session.device)
        return {**record, "figures": five_digits(figures)}

    def _compare(self, case: Case, session: Session, outcome: Outcome) -> Record:
        """Every schedule and the peer; `us` is the pipeline's, its floor the link's for what the pipeline sends."""
        model, decoder = made(case.sizes["model"], session.device, case.dtype)
        prompt = _prompt(case, decoder)
        count = STEPS if session.effort == FULL else 2
        ms: dict[str, float] = {}
        plans: dict[str, Plan] = {}
        link = 0.0
        tokens = case.sizes["context"] + WARM + count // 2
        for schedule in ("full", "single", "pipeline"):
            cache = OffloadedCache(decoder, schedule)
            ms[schedule] = 1e3 * ours(decoder, cache, prompt, count)
            plans[schedule], link = cache.plan(tokens), max(cache.profile.by_size.values())
            del cache
        best = ms["pipeline"]
        for share in SWEEP:
            cache = OffloadedCache(decoder, round(share * tokens), chunk=CHUNK)
            best = min(best, 1e3 * ours(decoder, cache, prompt, count))
            del cache
        floors = {name: 1e3 * plan.copied / link for name, plan in plans.items()}
        figures = {f"ms_{name}": value for name, value in ms.items()}
        figures |= {
            "floor_ms_full": floors["full"],
            "speedup_single_split": ms["full"] / ms["single"],
            "speedup_pipeline": ms["full"] / ms["pipeline"],
            "copy_share": floors["pipeline"] / ms["pipeline"],
            "copy_share_full": floors["full"] / ms["full"],
            "predicted_over_measured": 1e3 * plans["pipeline"].seconds / ms["pipeline"],
            "l_single": plans["single"].split,
            "l_pipeline": plans["pipeline"].split,
            "chosen_over_best": ms["pipeline"] / best,
        }
        peers = {}
        try:
            theirs = 1e3 * hf_offloaded(model, prompt, min(count, 3))
            figures |= {"ms_hf_offloaded": theirs, "speedup_vs_hf_offloaded": theirs / ms["pipeline"]}
            peers["hf_offloaded"] = theirs
        except Absent as why:
            outcome.absent["hf_offloaded"] = str(why)
        return self._record(case, session, ms["pipeline"], floors["pipeline"], figures, **peers)

    def _point(self, case: Case, session: Session, outcome: Outcome) -> Record:
        """A split, in chunks, against its prediction."""
        _, decoder = made(case.sizes["model"], session.device, case.dtype)
        prompt, count = _prompt(case, decoder), STEPS if session.effort == FULL else 2
        tokens = case.sizes["context"] + WARM + count // 2
        cache = OffloadedCache(decoder, round(case.sizes["l"] * tokens), chunk=CHUNK)
        ms = 1e3 * ours(decoder, cache, prompt, count)
        plan, link = cache.plan(tokens), max(cache.profile.by_size.values())
        floor = 1e3 * plan.copied / link
        predicted = 1e3 * plan.seconds
        figures = {"ms_per_layer": ms, "ms_predicted": predicted, "predicted_over_measured": predicted / ms}
        return self._record(case, session, ms, floor, {**figures, "copy_share": floor / ms})

    def _column(self, case: Case, session: Session, outcome: Outcome) -> Record:
        """Weights in host memory too, several batches a load of them: the column schedule's split against l = 0."""
        _, decoder = made(case.sizes["model"], session.device, case.dtype)
        weights = OffloadedWeights(decoder)
        prompt, count = _prompt(case, decoder), STEPS if session.effort == FULL else 2
        ms: dict[str, float] = {}
        for split in ("full", "column"):
            batches, step = column(weights, prompt, case.sizes["batches"], split, count + WARM)
            ms[split] = 1e3 * seconds_of(decoder.device, step, count) / decoder.architecture.layers
            cache = batches[-1].cache
            plan, link = cache.plan(case.sizes["context"] + WARM + count // 2), max(cache.profile.by_size.values())
            del batches, step, cache
        floor = 1e3 * case.sizes["batches"] * plan.copied / link
        predicted = 1e3 * case.sizes["batches"] * plan.seconds
        figures = {
            "ms_column_full": ms["full"],
            "ms_column": ms["column"],
            "speedup_column": ms["full"] / ms["column"],
            "copy_share": floor / ms["column"],
            "predicted_over_measured": predicted / ms["column"],
            "l_column": plan.split,
        }
        return self._record(case, session, ms["column"], floor, figures)

    def _perplexity(self, case: Case, session: Session, outcome: Outcome) -> Record:
        """Of tokens that are decoded one after the other over a store that holds all before them."""
        decoder, tokens = smol(session.device, case.dtype)
        compress = None if case.sizes["compress"] == "none" else case.sizes["compress"]
        scored = SCORED if session.effort == FULL else 4
        texts = tokens[: TEXTS * (PROMPT + SCORED + 1)].reshape(TEXTS, -1)[:, : PROMPT + scored + 1]
        split = {"x": PROMPT + SCORED, "all": PROMPT // 2}.get(str(compress), 0)
        start = time.perf_counter()
        value = perplexity(decoder, texts, OffloadedCache(decoder, split, compress=compress))
        us = 1e6 * (time.perf_counter() - start) / scored
        figures = {"perplexity": value, "recomputed_rows": split}
        if compress is None:
            resident = perplexity(decoder, texts, UpfrontCache())
            check("the perplexity", abs(value / resident - 1), 1e-4)
            figures["perplexity_resident"] = resident
        return self._record(case, session, us / 1e3, 0.0, figures)


def _prompt(case: Case, decoder: Decoder) -> Tensor:
    sizes = case.sizes
    return torch.randint(0, decoder.architecture.vocab, (sizes["batch"], sizes["context"]), device=decoder.device)


@functools.cache
def smol(device: torch.device, dtype: torch.dtype) -> tuple[Decoder, Tensor]:
    """SmolLM2 and the tokens of a real text."""
    try:
        model, tokenizer = smollm2.load(smollm2.gguf_file(), device, dtype)
    except smollm2.Missing as missing:
        raise Absent(str(missing)) from missing
    tokens: Tensor = tokenizer(smollm2.real_text(), return_tensors="pt").input_ids[0]
    return Decoder.from_hf(model), tokens.to(device)


@torch.no_grad()
def perplexity(decoder: Decoder, texts: Tensor, cache: KVCache) -> float:
    """Of the tokens after PROMPT of each row of texts [B, N], each from those before it."""
    text = Text(decoder, cache, texts[:, :PROMPT], texts.shape[1] - PROMPT)
    losses = []
    for at in range(PROMPT, texts.shape[1] - 1):
        logits = text.step(texts[:, at])
        losses.append(float(functional.cross_entropy(logits.float(), texts[:, at + 1])))
    return math.exp(statistics.fmean(losses))


def draw_predictions(path: Path, found: Sequence[Record]) -> int:
    """Predicted against measured time of the grid's points; how many there are."""
    points = [r for r in found if "ms_predicted" in r["figures"]]
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5, 4.5), layout="constrained")
    for model in dict.fromkeys(r["case"]["model"] for r in points):
        mine = [r["figures"] for r in points if r["case"]["model"] == model]
        axes.plot([f["ms_per_layer"] for f in mine], [f["ms_predicted"] for f in mine], "o", label=model, markersize=4)
    most = max((r["figures"]["ms_per_layer"] for r in points), default=1.0) * 1.1
    axes.plot([0, most], [0, most], color="grey", linewidth=0.8)
    axes.fill_between([0, most], [0, 0.9 * most], [0, 1.1 * most], color="grey", alpha=0.15, label="within 10 %")
    axes.set(xlabel="measured ms a layer", ylabel="predicted ms a layer", xlim=(0, most), ylim=(0, most))
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return len(points)


@torch.no_grad()
def draw_timeline(stem: Path, name: str, batch: int, context: int, device: torch.device) -> Path:
    """Two steps of the pipeline as stem.json (a Chrome trace) and stem.png."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    decoder = Decoder.from_hf(hf_model(name, device, dtype))
    cache = OffloadedCache(decoder, "pipeline", timeline=True)
    prompt = torch.randint(0, decoder.architecture.vocab, (batch, context), device=device)
    text = Text(decoder, cache, prompt, 5)
    for step in range(5):
        if step == 3 and cache.timeline is not None:
            cache.timeline.clear()
        text.step(prompt[:, 0])
    assert cache.timeline is not None
    cache.timeline.save(stem.with_suffix(".json"))  # before what a bare machine may lack
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 2.2), layout="constrained")
    colors = {"X": "tab:orange", "KV": "tab:blue", "recompute": "tab:green", "layer": "tab:grey", "store": "tab:red"}
    for span in cache.timeline.spans():
        lane = ("copy", "compute", "store").index(span["lane"])
        color = colors.get(span["name"].split()[0], "tab:olive")
        axes.broken_barh([(1e3 * span["start"], 1e3 * span["seconds"])], (-lane - 0.4, 0.8), color=color)
    axes.set_yticks([0, -1, -2], ["copy", "compute", "store"])
    axes.set_xlabel(
        f"ms; {name}, batch {batch}, context {context}: " + ", ".join(f"{k} {v[4:]}" for k, v in colors.items())
    )
    figure.savefig(stem.with_suffix(".png"), dpi=110, metadata={"Software": None})
    pyplot.close(figure)
    return stem.with_suffix(".png")


BENCH = KvprMethod()


def main() -> None:
    """Draw what was measured, and a timeline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", type=Path, help="draw predicted against measured times of the committed results")
    parser.add_argument("--timeline", type=Path, help="run a few steps, write this name with .json and .png")
    parser.add_argument("--model", default="OPT-6.7B", choices=SHAPES)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    given = parser.parse_args()
    device = pick_device()
    if given.plot:
        print(draw_predictions(given.plot, records.load(records.device_name(device), BENCH.results)), "points")
    if given.timeline:
        print(draw_timeline(given.timeline, given.model, given.batch, given.context, device))


if __name__ == "__main__":
    main()
