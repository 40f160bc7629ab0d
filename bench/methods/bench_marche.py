"""MARché on MAR: speed with random weights of the official sizes, quality on a small model trained on digits.

Speed: all steps of a generation, the transformer's part alone and the whole with the diffusion head, by MARché, by our
MAR without caching, and by MAR as it is usually written (raster order, boolean masks), eager and compiled; on a GPU,
what surrounds attention is compiled in ours too, and MARché's cached layers are CUDA graphs.
Quality: accuracy of a classifier on the samples and their Fréchet distance to the real images, of MAR and of MARché.
"""

from __future__ import annotations

import copy
import functools
import math
import statistics
import time
from typing import NamedTuple

import torch
from torch import Tensor

from fastops import _registry
from fastops.methods import Marche, MarcheConfig
from fastops.methods.marche import rows_computed
from fastops.models import MAR_BASE, MAR_HUGE, MAR_LARGE, Mar, MarConfig
from fastops.models.mar import Predict, random_places, tokens_a_step
from fastops.reference._truth import Cost

from .. import records
from ..harness import Case, Outcome, Session, difference, make_record
from ..records import Record
from ..timing import Runner
from . import digits
from .page import MethodPage, five_digits

OURS, UNCACHED = "fastops", "mar"
MODELS = {"MAR-B": MAR_BASE, "MAR-L": MAR_LARGE, "MAR-H": MAR_HUGE}
CFG, HEAD_STEPS = 2.9, 100
ROUNDINGS = 3  # how far apart two ways to the same conditions may be, in units of rounding()


def speed(model: str, batch: int, steps: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Case:
    return Case({"model": model, "batch": batch, "steps": steps}, dtype, device)


def quality(model: str, refresh: int, active: int, device: str = "cuda") -> Case:
    return Case({"model": model, "refresh": refresh, "active": active}, torch.float32, device)


CASES = [
    *(speed(model, batch, 64) for model in MODELS for batch in (32, 128)),
    quality("digits", 1, 64),  # which is MAR, whatever is active
    *(quality("digits", refresh, active) for active in (64, 32, 128) for refresh in (3, 2, 5)),
    speed("MAR-B", 1, 16, torch.float32, "cpu"),
    *(quality("digits-small", refresh, 16, "cpu") for refresh in (1, 3)),
]


class Wrong(Exception):
    """What a method computes is not what it must."""


class Timed(NamedTuple):
    """µs of the transformer's part of a generation by each variant, its least cost, and other figures."""

    us: dict[str, float]
    cost: Cost
    figures: dict[str, float]


def same_parameters(mar: Mar) -> Mar:
    """A copy that shares its parameters with `mar`."""
    return copy.deepcopy(mar, {id(p): p for p in mar.parameters()})


class UsualMar:
    """MAR as it is usually written: every sample in raster order, rows picked by boolean masks.

    Compiled, each block is one graph, compiled once for all of them: all blocks in one take minutes and run no faster.
    """

    def __init__(self, mar: Mar, compiled: bool) -> None:
        self.mar = same_parameters(mar)
        for block in (*self.mar.encoder_blocks, *self.mar.decoder_blocks) if compiled else ():
            block.compile(dynamic=True)

    def predict(self, tokens: Tensor, condition: Tensor, places: Tensor, count: int) -> Tensor:
        """As Mar.predict."""
        mar, buffer, (batch, n, dim) = self.mar, self.mar.config.buffer, tokens.shape
        total, width = mar.config.tokens, mar.config.width
        image = tokens.new_zeros(batch, total, dim).scatter_(1, places[:, :n, None].expand(-1, -1, dim), tokens)
        hidden = torch.ones(batch, buffer + total, dtype=torch.bool, device=tokens.device)
        hidden[:, :buffer] = False
        hidden.scatter_(1, places[:, :n] + buffer, False)
        x = torch.cat([condition[:, None].expand(-1, buffer, -1), mar.z_proj(image.to(condition.dtype))], dim=1)
        x = mar.z_proj_ln(x + mar.encoder_pos_embed_learned)
        x = mar.decoder_embed(mar.encode(x[~hidden].reshape(batch, -1, width)))
        whole = mar.mask_token.repeat(batch, buffer + total, 1)
        whole[~hidden] = x.flatten(0, 1)
        x = mar.decode(whole + mar.decoder_pos_embed_learned)[:, buffer:] + mar.diffusion_pos_embed_learned
        return x.gather(1, places[:, n : n + count, None].expand(-1, -1, width))


@functools.cache
def random_model(name: str, dtype: torch.dtype, device: torch.device) -> Mar:
    """Random weights, made on the device."""
    torch.manual_seed(0)
    with torch.device(device):
        return Mar(MODELS[name]).to(dtype).eval().requires_grad_(False)


def rounding(config: MarConfig, dtype: torch.dtype) -> float:
    """What two evaluations differ by at best: a residual stream's sums, two a layer, round in either of them."""
    sums = 2 * 2 * 2 * config.depth
    return math.sqrt(sums / 3) * torch.finfo(dtype).eps / 2


def waited_us(run: Runner, device: torch.device, count: int) -> float:
    """The median time until a whole generation is done, after one that warms up."""
    spans = []
    for _ in range(count + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        spans.append((time.perf_counter() - start) * 1e6)
    return statistics.median(spans[1:])


def transformer_cost(config: MarConfig, steps: int, rows: int, itemsize: int) -> Cost:
    """Of MARché's transformer part for `rows` samples: weights read once a step, 24 width^2 flops a row and layer."""
    weights = 2 * config.depth * 12 * config.width**2 * itemsize * steps
    computed = rows_computed(config, steps)[1] * rows
    return Cost(weights, computed * 24 * config.width**2)


def timed(case: Case, session: Session) -> Timed:
    """Speed with random weights and guidance."""
    device, steps, batch = session.device, case.sizes["steps"], case.sizes["batch"]
    mar = random_model(case.sizes["model"], case.dtype, device)
    generator = torch.Generator(device).manual_seed(0)
    labels = torch.randint(mar.config.classes, (batch,), generator=generator, device=device)
    condition = mar.conditions(labels, True)
    places = random_places(batch, mar.config.tokens, generator).repeat(2, 1)
    tokens = torch.randn(batch, mar.config.tokens, mar.config.token_dim, generator=generator, device=device)
    tokens = tokens.repeat(2, 1, 1)

    def part(predict: Predict) -> Runner:
        def run() -> None:
            n = 0
            for count in tokens_a_step(mar.config.tokens, steps):
                predict(tokens[:, :n], condition, places, count)
                n += count

        return run

    ours = same_parameters(mar)
    variants: dict[str, Predict] = {"torch": UsualMar(mar, False).predict}
    if device.type == "cuda":
        ours.compile_glue(graphs=True)
        variants["torch_compile"] = UsualMar(mar, True).predict
    cached = Marche(ours, MarcheConfig(graphs=device.type == "cuda"), guided=True)
    variants |= {OURS: cached.predict, UNCACHED: ours.predict}
    n = mar.config.tokens // 3
    with torch.inference_mode():
        want = mar.predict(tokens[:, :n], condition, places, 4)
        allowed = ROUNDINGS * rounding(mar.config, case.dtype)
        for name in variants.keys() - {OURS}:
            check(name, difference(variants[name](tokens[:, :n], condition, places, 4), want), allowed)
        always = Marche(ours, MarcheConfig(refresh=1), guided=True)
        always.predict(tokens[:, :0], condition, places, n)
        check("refreshed", difference(always.predict(tokens[:, :n], condition, places, 4), want), allowed)
        us = {name: waited_us(part(predict), device, 1) for name, predict in variants.items()}
        options = dict(steps=steps, cfg=CFG, head_steps=HEAD_STEPS, generator=generator)
        whole = {
            name: waited_us(lambda p=variants[name]: ours.generate(labels, predict=p, **options), device, 1)
            for name in (OURS, UNCACHED)
        }
    figures = {f"images_per_s_{name}": batch / each * 1e6 for name, each in whole.items()}
    figures |= {f"images_per_s_transformer_{name}": batch / each * 1e6 for name, each in us.items()}
    all_rows, some_rows = rows_computed(mar.config, steps)
    figures |= {
        "speedup_transformer": us[UNCACHED] / us[OURS],
        "speedup_whole": whole[UNCACHED] / whole[OURS],
        "rows_bound": all_rows / some_rows,
    }
    return Timed(us, transformer_cost(mar.config, steps, 2 * batch, case.dtype.itemsize), figures)


def check(what: str, distance: float, allowed: float) -> None:
    """Raise where a distance is beyond what is allowed, or NaN."""
    if not distance <= allowed:
        raise Wrong(f"{what} differs by {distance:.2g}, at most {allowed:.2g} allowed")


@functools.cache
def plain_quality(name: str, device: torch.device) -> tuple[float, float, float]:
    """(accuracy, Fréchet distance, µs) of MAR itself."""
    start = time.perf_counter()
    judged = digits.judge(*digits.samples(digits.SETTINGS[name], device, None))
    return *judged, (time.perf_counter() - start) * 1e6


def judged(case: Case, session: Session) -> Timed:
    """Quality of the trained model's samples; trains it first, where .models/ does not hold it."""
    name, refresh, active = (case.sizes[key] for key in ("model", "refresh", "active"))
    setting = digits.SETTINGS[name]
    digits.trained(setting, session.device)
    config = MarcheConfig(active=active, encoder_active=active, refresh=refresh)
    accuracy_mar, frechet_mar, us_mar = plain_quality(name, session.device)
    start = time.perf_counter()
    accuracy, frechet = digits.judge(*digits.samples(setting, session.device, config))
    us = (time.perf_counter() - start) * 1e6
    rows = rows_computed(setting.model, setting.generation_steps, config)
    figures = {
        "accuracy_mar": accuracy_mar, "accuracy": accuracy, "frechet_mar": frechet_mar, "frechet": frechet,
        "rows_bound": rows[0] / rows[1],
    }  # fmt: skip
    weights = sum(p.numel() for p in digits.trained(setting, session.device).parameters())
    samples = 20 * setting.a_class  # with guidance
    cost = Cost(4 * weights * setting.generation_steps, rows[1] * samples * 24 * setting.model.width**2)
    return Timed({OURS: us, UNCACHED: us_mar}, cost, figures)


class MarcheMethod(MethodPage):
    """The page: a record for each case."""

    op, cases = "marche", CASES

    def sources(self, backend: str) -> tuple[str, ...]:
        """The operators' kernels, the method and the model."""
        kernels = [f for op in ("split_attn", "attn_received", "kv_append") for f in self._kernels(op, backend)]
        python = ("pyops/methods/marche.py", "pyops/models/mar.py", "pyops/models/_diffusion.py")
        return (*kernels, *python, "bench/methods/digits.py")

    @staticmethod
    def _kernels(op: str, backend: str) -> tuple[str, ...]:
        """What runs where split_attn runs on `backend`; on a CPU, attn_received is the reference."""
        chosen = _registry.find(op)
        return records.op_sources(op, backend if backend == "triton" or chosen._has(backend) else "reference")

    def record(self, case: Case, session: Session, outcome: Outcome) -> Record:
        """Prove and time one case, or judge its images."""
        found = (judged if "refresh" in case.sizes else timed)(case, session)
        us = dict(found.us)
        ours = us.pop(OURS)
        record = make_record(
            self,
            case,
            _registry.find("split_attn").process_default(session.device)[0],
            ours,
            session.peaks.floor_us(found.cost, case.dtype),
            None,
            {name: round(theirs, 3) for name, theirs in us.items()},
            False,
            session.device,
        )
        return {**record, "figures": five_digits(found.figures)}


BENCH = MarcheMethod()
