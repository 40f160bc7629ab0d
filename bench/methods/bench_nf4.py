"""The NF4 method on whole models: on a GPU a Llama with random weights, on a CPU a real small model.

GPU: milliseconds a token of transformers' generate(), and of one step's linear layers alone in a CUDA graph, each with
its own weights: of bitsandbytes' layers, of the same ones after accelerate_bitsandbytes, and of the dense ones.
CPU: milliseconds a token of SmolLM2-135M, and its perplexity, which must be that of the dequantised dense weights.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fastops import _registry
from fastops.cli import smollm2
from fastops.cli._measure import generate, megabytes, perplexity
from fastops.cli.demo import SKIP, bitsandbytes_model, tensors_of
from fastops.methods import Nf4Linear, accelerate_bitsandbytes, quantize_model, restore_bitsandbytes
from fastops.reference._truth import Cost

from .. import records
from ..bench_nf4_gemv import LINEAR
from ..harness import Case, Outcome, Session, difference, make_record
from ..peers import Absent, library
from ..records import Record
from ..timing import FULL, Runner, cuda_graph_us
from .page import MethodPage, five_digits

OURS, BLOCKSIZE = "fastops", 64
LLAMA, SMOLLM = "Llama-3-8B", smollm2.NAME
SHAPES = {
    LLAMA: {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    },
}  # fmt: skip
NEW_TOKENS, QUICK_TOKENS = 24, 4
TEXT_TOKENS = 1024
# The largest relative distance from bitsandbytes' output: of any layer, and of the logits, where 32 layers add up.
LAYER_TOLERANCE, LOGITS_TOLERANCE = 1e-2, 1e-1
# Of the perplexity from that of the dequantised weights; in bf16 those are rounded, ours are not.
PERPLEXITY_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 1e-2}

CASES = [
    *(Case({"model": LLAMA, "batch": batch, "context": 128}, torch.bfloat16) for batch in (1, 8, 32)),
    *(Case({"model": LLAMA, "part": "linears", "batch": batch}, torch.bfloat16) for batch in (1, 8, 32)),
    *(Case({"model": SMOLLM, "batch": 1, "context": 64}, dtype, "cpu") for dtype in (torch.float32, torch.bfloat16)),
]


Variant: TypeAlias = "Callable[[], contextlib.AbstractContextManager[Any]]"  # a model, within a block


class Wrong(Exception):
    """What a method computes is not what it must."""


class Llama(NamedTuple):
    """The same model twice; what is not a linear layer is shared."""

    dense: Any
    four_bit: Any  # bitsandbytes' layers


class Timed(NamedTuple):
    """What was measured of a case: µs a step of each variant, its least cost, and other figures."""

    us: dict[str, float]
    cost: Cost
    figures: dict[str, float]


@functools.cache
def llama(name: str, device: torch.device) -> Llama:
    """Made on the device, its layers quantised one by one; it stays there, 22 GB, for the cases to come."""
    transformers = library("transformers")
    library("bitsandbytes")
    config = transformers.LlamaConfig(**SHAPES[name], bos_token_id=None, eos_token_id=None, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device(device):
        dense = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    shared = {id(t): t for t in (*dense.parameters(), *dense.buffers())}
    return Llama(dense, bitsandbytes_model(copy.deepcopy(dense, shared), torch.bfloat16, False))


@contextlib.contextmanager
def accelerated(model: Any) -> Iterator[Any]:
    """bitsandbytes' layers on our operators within the block."""
    try:
        yield accelerate_bitsandbytes(model)
    finally:
        restore_bitsandbytes(model)


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers that the method takes."""
    return {n: m for n, m in model.named_modules() if type(m) is nn.Linear and not set(n.split(".")) & set(SKIP)}


def linears_cost(model: nn.Module, rows: int, dtype: torch.dtype) -> Cost:
    """Of those layers in 4 bits."""
    sizes = [{"M": rows, "N": m.out_features, "K": m.in_features} for m in linears(model).values()]
    costs = [LINEAR.cost(Case({**each, "blocksize": BLOCKSIZE}, dtype)) for each in sizes]
    return Cost(sum(c.bytes for c in costs), sum(c.flops for c in costs))


def step_cost(model: Any, batch: int, context: int, dtype: torch.dtype) -> Cost:
    """Of a decoding step: the layers in 4 bits, the head as it is, and the keys and values of the context read once."""
    config, some = model.config, linears_cost(model, batch, dtype)
    head = config.vocab_size * config.hidden_size
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    cache = 2 * config.num_hidden_layers * batch * context * width
    return Cost(some.bytes + (head + cache) * dtype.itemsize, some.flops + 2 * batch * head)


def weights_mb(model: nn.Module) -> float:
    """Everything that the model holds."""
    return megabytes(t for module in model.modules() for t in tensors_of(module))


def check(what: str, distance: float, limit: float) -> None:
    """Raise where a distance is beyond its limit, or NaN."""
    if not distance <= limit:
        raise Wrong(f"{what} differs by {distance:.2g}, at most {limit:g} allowed")


def step_us(variants: dict[str, Variant], prompt: Tensor, session: Session) -> dict[str, float]:
    """The median step of generate() with each; on a CPU, that others may share, the lower quartile.

    Each generates once before: a cache that grows by concatenation asks the driver for memory at almost every step of
    the first text of its size, which takes longer than the step, and whoever came first would pay for all.
    """
    count = NEW_TOKENS if session.effort == FULL else QUICK_TOKENS
    steps: dict[str, list[float]] = {name: [] for name in variants}
    for variant in variants.values():
        with variant() as model:
            generate(model, prompt, count, lambda: None)
    for name in [*variants, *reversed(variants)]:  # there and back: a machine that slows down slows all alike
        with variants[name]() as model:
            steps[name] += generate(model, prompt, count, lambda: None)[1]
    which = 1 if prompt.device.type == "cuda" else 0
    return {name: statistics.quantiles(each, n=4)[which] * 1e6 for name, each in steps.items()}


def whole_model(case: Case, session: Session) -> Timed:
    """generate() of a Llama, eager."""
    models, batch, context = llama(case.sizes["model"], session.device), case.sizes["batch"], case.sizes["context"]
    variants: dict[str, Variant] = {
        OURS: lambda: accelerated(models.four_bit),
        "bitsandbytes": lambda: contextlib.nullcontext(models.four_bit),
        "dense": lambda: contextlib.nullcontext(models.dense),
    }
    prompt = torch.randint(0, models.dense.config.vocab_size, (batch, context), device=session.device)
    logits = {}
    for name in (OURS, "bitsandbytes"):
        with torch.inference_mode(), variants[name]() as model:
            logits[name] = model(prompt, logits_to_keep=1).logits
    distance = difference(logits["bitsandbytes"], logits[OURS])
    check("the logits", distance, LOGITS_TOLERANCE)
    sizes = {"memory_mb": weights_mb(models.four_bit), "memory_mb_dense": weights_mb(models.dense)}
    cost = step_cost(models.dense, batch, context, case.dtype)
    return Timed(step_us(variants, prompt, session), cost, {"logits_distance": distance, **sizes})


def linears_alone(case: Case, session: Session) -> Timed:
    """The linear layers of a step, one after the other in a CUDA graph; together they are far larger than L2."""
    models, batch = llama(case.sizes["model"], session.device), case.sizes["batch"]
    widths = {name: layer.in_features for name, layer in linears(models.dense).items()}
    x = {k: torch.randn(batch, 1, k, device=session.device, dtype=case.dtype) for k in sorted(set(widths.values()))}

    def step(model: nn.Module) -> Runner:
        layers = [(model.get_submodule(name), x[k]) for name, k in widths.items()]
        return lambda: [layer(given) for layer, given in layers]

    dense, four_bit = step(models.dense), step(models.four_bit)
    with torch.inference_mode():
        us = {
            "bitsandbytes": cuda_graph_us([four_bit], session.effort),
            "dense": cuda_graph_us([dense], session.effort),
        }
        theirs = four_bit()
        with accelerated(models.four_bit):
            distance = difference(theirs, four_bit())
            check("a layer's output", distance, LAYER_TOLERANCE)
            us[OURS] = cuda_graph_us([four_bit], session.effort)
    return Timed(us, linears_cost(models.dense, batch, case.dtype), {"layer_distance": distance})


def small_model(case: Case, session: Session) -> Timed:
    """SmolLM2 as the demo runs it."""
    try:
        dense, tokenizer = smollm2.load(smollm2.gguf_file(), session.device, case.dtype)
    except smollm2.Missing as missing:
        raise Absent(str(missing)) from missing
    dense.generation_config.eos_token_id = None
    text = tokenizer(smollm2.real_text(), return_tensors="pt").input_ids[0, :TEXT_TOKENS].to(session.device)
    ours = quantize_model(copy.deepcopy(dense), skip=SKIP, blocksize=BLOCKSIZE)
    expanded = copy.deepcopy(dense)
    for name, layer in linears(expanded).items():
        layer.weight = nn.Parameter(quantised(ours, name).dequantize(case.dtype), requires_grad=False)
    models = {OURS: ours, "dense": dense}
    with contextlib.suppress(Absent):
        library("bitsandbytes")
        models["bitsandbytes"] = bitsandbytes_model(copy.deepcopy(dense), case.dtype, False)
    found = {"perplexity": perplexity(ours, text), "perplexity_dequantised": perplexity(expanded, text)}
    distance = abs(found["perplexity"] / found["perplexity_dequantised"] - 1)
    check("the perplexity", distance, PERPLEXITY_TOLERANCE[case.dtype])
    sizes = {"memory_mb": weights_mb(ours), "memory_mb_dense": weights_mb(dense)}
    variants: dict[str, Variant] = {n: functools.partial(contextlib.nullcontext, m) for n, m in models.items()}
    us = step_us(variants, text[None, : case.sizes["context"]], session)
    cost = step_cost(dense, case.sizes["batch"], case.sizes["context"], case.dtype)
    return Timed(us, cost, {**found, "perplexity_dense": perplexity(dense, text), **sizes})


def quantised(model: nn.Module, name: str) -> Nf4Linear:
    """The layer of this name, which is one of ours."""
    layer = model.get_submodule(name)
    assert isinstance(layer, Nf4Linear)
    return layer


class Nf4Method(MethodPage):
    """The page: a record for each case."""

    op, cases = "nf4", CASES

    def sources(self, backend: str) -> tuple[str, ...]:
        """The kernels of the products, the layers, and the Python before the kernels, which eager steps wait for."""
        layers = [f"pyops/methods/{name}.py" for name in ("nf4", "_nf4_linear", "_accelerate")]
        return (*records.op_sources("nf4_gemv", backend), *layers, "pyops/ops/nf4_gemv.py")

    def record(self, case: Case, session: Session, outcome: Outcome) -> Record:
        """Prove and time one case."""
        kind = small_model if case.sizes["model"] == SMOLLM else linears_alone if "part" in case.sizes else whole_model
        return self._record(case, kind(case, session), session)

    def _record(self, case: Case, timed: Timed, session: Session) -> Record:
        us = dict(timed.us)
        ours = us.pop(OURS)
        figures = {"ms_per_token": ours / 1e3}
        for name, theirs in us.items():
            figures |= {f"ms_per_token_{name}": theirs / 1e3, f"speedup_vs_{name}": theirs / ours}
        figures |= timed.figures
        dense = "cublas" if session.device.type == "cuda" else "torch"  # as the operators' records call it
        record = make_record(
            self,
            case,
            _registry.find("nf4_linear").process_default(session.device)[0],
            ours,
            session.peaks.floor_us(timed.cost, case.dtype),
            None,
            {dense if name == "dense" else name: round(theirs, 3) for name, theirs in us.items()},
            "part" in case.sizes,
            session.device,
        )
        return {**record, "figures": five_digits(figures)}


BENCH = Nf4Method()
