"""mf_sgd in Triton: one pass of SGD over pairs and their sampled negatives, in place.

Two numbers at 6040 x 3706 tables, F = 64, 10^6 pairs, 4 negatives: 3.1 GB through L2 (the tables, 2.5 MB, stay there),
0.6 ms at some 5 TB/s. Lock-free, a program takes PAIRS pairs with their negatives at a time, one launch does it all.
In blocks, torch's stable sort puts the occurrences of a row side by side, for many blocks at a time; a block is then
four launches (gradients, the steps of items and of users, the global bias), which bound it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import _aot, _tuned

BLOCK = 2048  # as the reference has them
CAP = tl.constexpr(16)
GROUP_EXAMPLES = 1 << 20  # that are sorted together
NOWHERE = tl.constexpr(0xFFFFFFFF)  # the row of a pair whose ids are out of range
MAX_EACH = 8  # floats of a tile of rows that a thread holds; three such tiles are alive at once

DEFAULT = {"PAIRS": 16, "num_warps": 4}
SPACE = [{"PAIRS": pairs, "num_warps": warps} for pairs, warps in ((4, 4), (8, 4), (16, 4))]


@triton.jit
def _item_of(pair, own, j, seed, items):
    """Example j of the pairs at these places of the stream: their own item, or a sampled one. int64."""
    zero = (pair & 0).to(tl.uint32)
    index = ((j + 3) // 4 - 1) * (j > 0)  # (j - 1) // 4 without a negative quotient
    a, b, c, d = tl.philox(seed, pair.to(tl.uint32), (pair >> 32).to(tl.uint32), zero + index.to(tl.uint32), zero)
    word = (j + 3) % 4
    bits = tl.where(word == 0, a, tl.where(word == 1, b, tl.where(word == 2, c, d))).to(tl.uint64)
    sampled = ((bits * items.to(tl.uint64)) >> 32).to(tl.int64)
    return tl.where(j == 0, own, sampled)


@triton.jit
def _loss_of(z, positive):
    """(d loss / d z, loss) of examples."""
    e = tl.exp(-tl.abs(z))
    high = 1.0 / (1.0 + e)
    probability = tl.where(z < 0, e * high, high)
    # log(1 + e), whose argument loses the digits of a small e: what was lost is put back
    one = 1.0 + e
    log1p = tl.log(one) + (e - (one - 1.0)) / one
    loss = tl.maximum(z, 0.0) + log1p
    return tl.where(positive, probability - 1.0, probability), tl.where(positive, loss - z, loss)


@triton.jit
def _pairs_of(pairs_ptr, place, n, users, items):
    """(user, item, whether both exist) of pairs at these places of the call."""
    here = place < n
    user = tl.load(pairs_ptr + 2 * place, mask=here, other=-1)
    item = tl.load(pairs_ptr + 2 * place + 1, mask=here, other=-1)
    good = (user >= 0) & (user < users) & (item >= 0) & (item < items)
    return tl.where(good, user, 0), tl.where(good, item, 0), good


@triton.jit(do_not_specialize=["first", "size", "n", "users", "items", "examples", "seed", "offset"])
def _keys_kernel(
    pairs_ptr, item_keys_ptr, user_keys_ptr, first, size, n, users, items, examples, seed, offset, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """(block << 32 | row) of each example and pair of a group."""
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    here = i < size
    user, own, good = _pairs_of(pairs_ptr, first + i, n, users, items)
    start = tl.full((), 0, tl.int64) + offset + first  # 64 bits: a stream may cross 2^31
    stream = start + i
    block = (stream // BLOCK - start // BLOCK) << 32
    for j in range(examples):
        item = tl.where(good, _item_of(stream, own, j, seed, items), NOWHERE)
        tl.store(item_keys_ptr + i * examples + j, block | item, mask=here)
    tl.store(user_keys_ptr + i, block | tl.where(good, user, NOWHERE), mask=here)


@triton.jit(do_not_specialize=["first", "size", "n", "users", "items", "examples", "seed", "offset"])
def _gradients_kernel(
    user_ptr, item_ptr, user_bias_ptr, item_bias_ptr, global_bias_ptr, pairs_ptr, gradient_ptr, user_gradient_ptr,
    user_row_ptr, loss_ptr, sum_ptr, first, size, n, users, items, examples, seed, offset, F: tl.constexpr,
    WIDTH: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """Of one block; everything is written beside the tables."""
    i = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    here = i < size
    user, own, good = _pairs_of(pairs_ptr, first + i, n, users, items)
    good &= here
    f = tl.arange(0, WIDTH)
    inside = good[:, None] & (f < F)[None, :]
    p = tl.load(user_ptr + user[:, None] * F + f[None, :], mask=inside, other=0.0)  # [PAIRS, WIDTH]
    bias = tl.load(user_bias_ptr + user, mask=good, other=0.0) + tl.load(global_bias_ptr)
    total = tl.zeros((PAIRS, WIDTH), tl.float32)
    loss = tl.zeros((PAIRS,), tl.float32)
    sum_ = tl.zeros((PAIRS,), tl.float32)
    for j in range(examples):
        item = _item_of(offset + (first + i), own, j, seed, items)
        q = tl.load(item_ptr + item[:, None] * F + f[None, :], mask=inside, other=0.0)
        z = tl.sum(p * q, axis=1) + (bias + tl.load(item_bias_ptr + item, mask=good, other=0.0))
        g, each = _loss_of(z, j == 0)
        total += g[:, None] * q
        loss += each
        sum_ += g
        tl.store(gradient_ptr + i * examples + j, g, mask=good)
    tl.store(user_gradient_ptr + i[:, None] * F + f[None, :], total, mask=inside)
    tl.store(user_row_ptr + i[:, None] * F + f[None, :], p, mask=inside)
    tl.store(loss_ptr + i, tl.where(good, loss, 0.0), mask=here)
    tl.store(sum_ptr + i, tl.where(good, sum_, 0.0), mask=here)


@triton.jit
def _step_of(lr, count):
    """A row that occurs `count` times in a block moves by this times the sum of its gradients."""
    return tl.where(count > CAP, lr * (CAP / tl.maximum(count, 1).to(tl.float32)), lr)


@triton.jit
def _steps_kernel(
    table_ptr, bias_ptr, keys_ptr, order_ptr, count_ptr, weight_ptr, values_ptr, bias_gradient_ptr, before, lr, reg,
    examples, F: tl.constexpr, WIDTH: tl.constexpr, OF_ITEM: tl.constexpr,
):  # fmt: skip
    """A program for each sorted occurrence; those that begin a run take its row's step."""
    at = tl.program_id(0)
    count = tl.load(count_ptr + at)
    if count == 0:
        return
    row = tl.load(keys_ptr + at) & 0xFFFFFFFF
    f = tl.arange(0, WIDTH)
    inside = f < F
    total = tl.zeros((WIDTH,), tl.float32)
    bias_total = 0.0
    for t in range(count):
        place = tl.load(order_ptr + at + t) - before
        if OF_ITEM:
            weight = tl.load(weight_ptr + place)
            values = tl.load(values_ptr + place // examples * F + f, mask=inside, other=0.0)
            total += weight * values
            bias_total += weight
        else:
            total += tl.load(values_ptr + place * F + f, mask=inside, other=0.0)
            bias_total += tl.load(bias_gradient_ptr + place)
    every = count if OF_ITEM else count * examples
    step = _step_of(lr, every)
    decay = every.to(tl.float32) * reg
    w = tl.load(table_ptr + row * F + f, mask=inside, other=0.0)
    tl.store(table_ptr + row * F + f, w - step * (total + decay * w), mask=inside)
    bias = tl.load(bias_ptr + row)
    tl.store(bias_ptr + row, bias - step * (bias_total + decay * bias))


@triton.jit
def _bias_kernel(global_bias_ptr, keys_ptr, sum_ptr, loss_ptr, total_ptr, size, lr, examples, BLOCK: tl.constexpr):
    """The global bias's step of a block, and its loss; one program."""
    i = tl.arange(0, BLOCK)
    here = i < size
    row = tl.load(keys_ptr + i, mask=here, other=-1) & 0xFFFFFFFF
    good = tl.sum((here & (row != NOWHERE)).to(tl.int32), axis=0)
    sum_ = tl.sum(tl.load(sum_ptr + i, mask=here, other=0.0).to(tl.float64), axis=0)
    loss = tl.sum(tl.load(loss_ptr + i, mask=here, other=0.0).to(tl.float64), axis=0)
    before = tl.load(global_bias_ptr)
    tl.store(global_bias_ptr, before - _step_of(lr, good * examples) * sum_.to(tl.float32))
    tl.store(total_ptr, tl.load(total_ptr) + loss)


@triton.jit(do_not_specialize=["n", "users", "items", "examples", "seed", "offset"])
def _hogwild_kernel(
    user_ptr, item_ptr, user_bias_ptr, item_bias_ptr, global_bias_ptr, pairs_ptr, loss_ptr, n, users, items, examples,
    lr, reg, bias_step, seed, offset, F: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """PAIRS pairs with their negatives at a time; of several changes of a row at once, one stays, or parts of each."""
    program = tl.program_id(0).to(tl.int64)
    f = tl.arange(0, WIDTH)
    decay = examples.to(tl.float32) * reg
    all_losses = tl.zeros((PAIRS,), tl.float64)
    for start in range(program * PAIRS, n, tl.num_programs(0).to(tl.int64) * PAIRS):
        i = start + tl.arange(0, PAIRS)
        user, own, good = _pairs_of(pairs_ptr, i, n, users, items)
        inside = good[:, None] & (f < F)[None, :]
        p = tl.load(user_ptr + user[:, None] * F + f[None, :], mask=inside, other=0.0, cache_modifier=".cg")
        user_bias = tl.load(user_bias_ptr + user, mask=good, other=0.0, cache_modifier=".cg")
        bias = user_bias + tl.load(global_bias_ptr, cache_modifier=".cg")
        total = tl.zeros((PAIRS, WIDTH), tl.float32)
        loss = tl.zeros((PAIRS,), tl.float32)
        sum_ = tl.zeros((PAIRS,), tl.float32)
        for j in range(examples):
            item = _item_of(offset + i, own, j, seed, items)
            q_ptr = item_ptr + item[:, None] * F + f[None, :]
            q = tl.load(q_ptr, mask=inside, other=0.0, cache_modifier=".cg")
            item_bias = tl.load(item_bias_ptr + item, mask=good, other=0.0, cache_modifier=".cg")
            g, each = _loss_of(tl.sum(p * q, axis=1) + (bias + item_bias), j == 0)
            total += g[:, None] * q
            loss += tl.where(good, each, 0.0)
            sum_ += tl.where(good, g, 0.0)
            tl.store(q_ptr, q - lr * (g[:, None] * p + reg * q), mask=inside)
            tl.store(item_bias_ptr + item, item_bias - lr * (g + reg * item_bias), mask=good)
        tl.store(user_ptr + user[:, None] * F + f[None, :], p - lr * (total + decay * p), mask=inside)
        tl.store(user_bias_ptr + user, user_bias - lr * (sum_ + decay * user_bias), mask=good)
        tl.atomic_add(global_bias_ptr, -bias_step * tl.sum(sum_, axis=0), sem="relaxed")
        all_losses += loss
    tl.store(loss_ptr + program, tl.sum(all_losses, axis=0))


def config_for(device: torch.device, factors: int) -> dict[str, Any]:
    """The tuned configuration of the lock-free kernel for rows of so many factors."""
    key = (("factors", triton.next_power_of_2(factors)),)
    return _tuned.lookup("mf_sgd", device, key, 0, tuple(DEFAULT.items()))


def _fit(config: dict[str, Any], width: int) -> dict[str, Any]:
    """Fewer pairs where their rows would not fit a program's registers."""
    most = MAX_EACH * 32 * config["num_warps"] // width
    return {**config, "PAIRS": max(1, min(config["PAIRS"], most))}


def _most_at_once(users: int, items: int, examples: int) -> int:
    """Pairs that may be under way at once: a row in many of them keeps one of their changes, from an old value."""
    return max(1, min(2 * users, 4 * items // examples))


@functools.cache
def _processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; in the interpreter, which runs one program after the other, any number will do."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def _runs(keys: Tensor) -> Tensor:
    """int32: at the first of each run of equal sorted keys its length, 0 elsewhere and where the row is nowhere."""
    n = keys.numel()
    place = torch.arange(n, device=keys.device)
    changes = torch.ones(n + 1, dtype=torch.bool, device=keys.device)
    torch.ne(keys[1:], keys[:-1], out=changes[1:n])
    ends = torch.where(changes[1:], place + 1, n).flip(0).cummin(0).values.flip(0)
    starts = changes[:n] & ((keys & NOWHERE.value) != NOWHERE.value)
    return torch.where(starts, ends - place, 0).to(torch.int32)


def _ordered(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(sorted keys, where each stood, lengths of runs)."""
    ordered, order = torch.sort(keys, stable=True)
    return ordered, order, _runs(ordered)


def _in_blocks(
    tables: tuple[Tensor, ...], pairs: Tensor, negatives: int, lr: float, reg: float, seed: int, offset: int,
    config: dict[str, Any],
) -> Tensor:  # fmt: skip
    """Block after block; returns the summed loss."""
    user, item, user_bias, item_bias, global_bias = tables
    (users, factors), items, n, examples = user.shape, item.shape[0], pairs.shape[0], 1 + negatives
    block, width = min(n, BLOCK), triton.next_power_of_2(factors)
    gradient = user.new_empty(block * examples)
    user_gradient, user_row = (user.new_empty(block * factors) for _ in range(2))
    loss, sums = (user.new_empty(block) for _ in range(2))
    total = user.new_zeros(1, dtype=torch.float64)
    stream = {"n": n, "users": users, "items": items, "examples": examples, "seed": seed, "offset": offset}
    shape = {"F": factors, "WIDTH": width}
    per_group = max(1, GROUP_EXAMPLES // (BLOCK * examples)) * BLOCK
    group = 0
    while group < n:
        size = min(n - group, per_group - (offset + group) % BLOCK)
        item_keys, user_keys = pairs.new_empty(size * examples), pairs.new_empty(size)
        _keys_kernel[(triton.cdiv(size, 128),)](
            pairs, item_keys, user_keys, group, size, **stream, BLOCK=BLOCK, TILE=128, num_warps=4
        )
        of_items, of_users = _ordered(item_keys), _ordered(user_keys)
        first = group
        while first < group + size:
            here = min(group + size - first, BLOCK - (offset + first) % BLOCK)
            before = first - group
            _gradients_kernel[(triton.cdiv(here, config["PAIRS"]),)](
                *tables, pairs, gradient, user_gradient, user_row, loss, sums, first, here, **stream, **shape, **config
            )
            some = [t[before * examples : (before + here) * examples] for t in of_items]
            _steps_kernel[(here * examples,)](
                item, item_bias, *some, gradient, user_row, None, before * examples, lr, reg, examples, **shape,
                OF_ITEM=True, num_warps=1,
            )  # fmt: skip
            some = [t[before : before + here] for t in of_users]
            _steps_kernel[(here,)](
                user, user_bias, *some, None, user_gradient, sums, before, lr, reg, examples, **shape, OF_ITEM=False,
                num_warps=1,
            )  # fmt: skip
            _bias_kernel[(1,)](global_bias, some[0], sums, loss, total, here, lr, examples, BLOCK=BLOCK, num_warps=4)
            first += here
        group += size
    return total.reshape(())


def launch(
    user: Tensor,
    item: Tensor,
    user_bias: Tensor,
    item_bias: Tensor,
    global_bias: Tensor,
    pairs: Tensor,
    *,
    negatives: int,
    lr: float,
    reg: float,
    seed: int,
    offset: int = 0,
    deterministic: bool = True,
    config: dict[str, Any] | None = None,
) -> Tensor:
    """Run the kernels; arguments as the op has them, already checked."""
    n, factors, examples = pairs.shape[0], user.shape[1], 1 + negatives
    if n == 0:
        return user.new_zeros(())
    tables = (user, item, user_bias, item_bias, global_bias)
    width = triton.next_power_of_2(factors)
    config = _fit(config or config_for(user.device, factors), width)
    pairs = pairs.contiguous()
    with torch.cuda.device_of(user):
        if deterministic:
            loss = _in_blocks(tables, pairs, negatives, lr, reg, seed, offset, config)
        else:
            most = _most_at_once(user.shape[0], item.shape[0], examples)
            config = {**config, "PAIRS": min(config["PAIRS"], 1 << (most.bit_length() - 1))}
            programs = min(triton.cdiv(n, config["PAIRS"]), most // config["PAIRS"], _processors(user.device) * 8)
            # All programs take their gradients of the global bias at about the same value, and no step of it is lost.
            together = min(n, programs * config["PAIRS"]) * examples
            bias_step = lr * min(1.0, CAP.value / together)
            losses = user.new_empty(programs, dtype=torch.float64)
            _hogwild_kernel[(programs,)](
                *tables, pairs, losses, n, user.shape[0], item.shape[0], examples, lr, reg, bias_step, seed, offset,
                F=factors, WIDTH=width, **config,
            )  # fmt: skip
            loss = losses.sum()
    return (loss / (n * examples)).to(torch.float32)


_TABLES = {f"{name}_ptr": "*fp32" for name in ("user", "item", "user_bias", "item_bias", "global_bias")}
_STREAM = {"pairs_ptr": "*i64"} | {n: "i64" for n in ("first", "size", "n", "users", "items", "seed", "offset")}
_RATES = {"lr": "fp32", "reg": "fp32", "bias_step": "fp32", "examples": "i32"}
_BLOCK_SCRATCH = {f"{n}_ptr": "*fp32" for n in ("gradient", "user_gradient", "user_row", "loss", "sum")}


def _specialization(name: str, kernel: Any, constants: dict[str, Any], config: dict[str, Any]) -> _aot.Specialization:
    """The types of whatever arguments the kernel has."""
    known = _TABLES | _STREAM | _RATES | _BLOCK_SCRATCH
    known["loss_ptr"] = "*fp64" if kernel is _hogwild_kernel else "*fp32"
    known |= {"item_keys_ptr": "*i64", "user_keys_ptr": "*i64", "keys_ptr": "*i64", "order_ptr": "*i64"}
    known |= {"count_ptr": "*i32", "table_ptr": "*fp32", "bias_ptr": "*fp32", "weight_ptr": "*fp32", "before": "i64"}
    known |= {"values_ptr": "*fp32", "bias_gradient_ptr": "*fp32", "total_ptr": "*fp64"}
    types = {n: known[n] for n in kernel.arg_names if n in known and n not in constants}
    return _aot.Specialization(name, kernel, types, constants, config)


def specializations() -> Iterator[_aot.Specialization]:
    """Every shipped configuration with narrow, usual and wide rows, and the kernels that have one."""
    shipped = [e for gpu in _tuned.gpus() for e in _tuned.table("mf_sgd", gpu) if e["backend"] == "triton"]
    for factors in (8, 64, 256, 259):
        shape = {"F": factors, "WIDTH": triton.next_power_of_2(factors)}
        fitting = [_fit(config, shape["WIDTH"]) for config in _aot.configurations(SPACE, DEFAULT, shipped)]
        for config in _aot.configurations(fitting, fitting[0], []):
            for kernel in (_gradients_kernel, _hogwild_kernel):
                yield _specialization(f"{kernel.__name__}-{factors}-{config}", kernel, shape, config)
        for of_item in (False, True):
            absent = ("bias_gradient_ptr",) if of_item else ("weight_ptr",)
            constants = {**shape, "OF_ITEM": of_item, **dict.fromkeys(absent)}
            yield _specialization(f"steps-{factors}-{of_item}", _steps_kernel, constants, {"num_warps": 1})
    yield _specialization("keys", _keys_kernel, {"BLOCK": BLOCK, "TILE": 128}, {"num_warps": 4})
    yield _specialization("bias", _bias_kernel, {"BLOCK": BLOCK}, {"num_warps": 4})
