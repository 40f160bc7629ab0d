"""The page of mf_sgd."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .. import _extension
from .._checks import check_dtype, check_same_device, fail
from .._registry import Op, TuningCase
from ..reference import mf_sgd as reference

NAME = "mf_sgd"
MAX_ROWS = 2**31  # a sampled id is made from 32 random bits
MAX_NEGATIVES = 1024

SCHEMA = (
    "mf_sgd(Tensor(a!) user, Tensor(b!) item, Tensor(c!) user_bias, Tensor(d!) item_bias, Tensor(e!) global_bias, "
    "Tensor pairs, *, int negatives, float lr, float reg, int seed, int offset=0, bool deterministic=True) -> Tensor"
)


def _check_table(name: str, table: Tensor, rows: Any, factors: Any, user: Tensor) -> None:
    """fp32 [rows, factors] or [rows], contiguous, beside `user`."""
    check_same_device(NAME, name, table, "user", user)
    check_dtype(NAME, name, table, torch.float32)
    wanted = [rows] if factors is None else [rows, factors]
    if list(table.shape) != wanted:
        fail(NAME, f"{name} must have shape {wanted}, got {list(table.shape)}")
    _check_contiguous(name, table)


def _check_contiguous(name: str, table: Tensor) -> None:
    if not table.is_contiguous():
        fail(NAME, f"{name} must be contiguous, got strides {list(table.stride())} of shape {list(table.shape)}")


def _check_matrix(name: str, table: Tensor) -> None:
    check_dtype(NAME, name, table, torch.float32)
    if table.dim() != 2:
        fail(NAME, f"{name} must have 2 dimensions, got {table.dim()}")


def _span(t: Tensor) -> tuple[Any, Any]:
    """Bytes [begin, end) of its storage from the first element to the last."""
    begin = t.storage_offset() * t.element_size()
    last = sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return begin, begin + ((last + 1) * t.element_size() if t.numel() else 0)


def _check_apart(tables: dict[str, Tensor]) -> None:
    """No two arguments share memory, since all but the last are written."""
    held: dict[int, list[tuple[str, Tensor]]] = {}
    for name, table in tables.items():
        for other_name, other in held.setdefault(table.untyped_storage()._cdata, []):
            (begin, end), (other_begin, other_end) = _span(table), _span(other)
            if begin < other_end and other_begin < end:
                fail(NAME, f"{name} must not overlap {other_name}, got tensors that share memory")
        held[table.untyped_storage()._cdata].append((name, table))


def _check(
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
) -> None:
    _check_matrix("user", user)
    _check_contiguous("user", user)
    check_same_device(NAME, "item", item, "user", user)
    _check_matrix("item", item)
    if user.shape[1] < 1:
        fail(NAME, f"user must have at least 1 factor, got shape {list(user.shape)}")
    _check_table("item", item, item.shape[0], user.shape[1], user)
    _check_table("user_bias", user_bias, user.shape[0], None, user)
    _check_table("item_bias", item_bias, item.shape[0], None, user)
    check_same_device(NAME, "global_bias", global_bias, "user", user)
    check_dtype(NAME, "global_bias", global_bias, torch.float32)
    if global_bias.dim() > 1 or global_bias.numel() != 1:
        fail(NAME, f"global_bias must have shape [] or [1], got {list(global_bias.shape)}")
    check_same_device(NAME, "pairs", pairs, "user", user)
    check_dtype(NAME, "pairs", pairs, torch.int64)
    if pairs.dim() != 2 or pairs.shape[1] != 2:
        fail(NAME, f"pairs must have shape [n, 2], got {list(pairs.shape)}")
    for name, table in (("user", user), ("item", item)):
        if table.shape[0] > MAX_ROWS:
            fail(NAME, f"{name} must have at most {MAX_ROWS} rows, got {table.shape[0]}")
    if not 0 <= negatives <= MAX_NEGATIVES:
        fail(NAME, f"negatives must be from 0 to {MAX_NEGATIVES}, got {negatives}")
    for name, value in (("lr", lr), ("reg", reg)):
        if not (math.isfinite(value) and value >= 0):
            fail(NAME, f"{name} must be finite and at least 0, got {value:g}")
    if not 0 <= offset < 2**62:
        fail(NAME, f"offset must be from 0 to 2^62 - 1, got {offset}")
    tables = {"user": user, "item": item, "user_bias": user_bias, "item_bias": item_bias, "global_bias": global_bias}
    _check_apart({**tables, "pairs": pairs})


def _check_values(
    user: Tensor, item: Tensor, user_bias: Tensor, item_bias: Tensor, global_bias: Tensor, pairs: Tensor, **_: Any
) -> None:
    """Every id names a row."""
    if pairs.shape[0] == 0:
        return
    for column, (name, table) in enumerate((("users", user), ("items", item))):
        low, high = (int(v) for v in pairs[:, column].aminmax())
        if low < 0 or high >= table.shape[0]:
            bad = low if low < 0 else high
            fail(NAME, f"pairs must hold {name} from 0 to {table.shape[0] - 1}, got {bad}")


def _fake(user: Tensor, *_: Tensor, **__: Any) -> Tensor:
    return user.new_empty(())


def _describe(backend: str, user: Tensor, *_: Tensor, deterministic: bool = True, **__: Any) -> str:
    how = f"blocks of {reference.BLOCK} positives" if deterministic or backend == "reference" else "lock-free"
    if backend == "cpu" and _extension.C is not None:
        return f"{how}, {_extension.C.cpu_isa()}, {torch.get_num_threads()} threads"
    if backend == "triton":
        from ..triton_ops import mf_sgd as triton_page

        return f"{how}, {triton_page.config_for(user.device, user.shape[1])}"
    return how


def _tuning(device: torch.device) -> Iterator[TuningCase]:
    for factors in (32, 64, 128):
        generator = torch.Generator(device).manual_seed(0)
        rows = {"user": 6040, "item": 3706}
        tables = [torch.randn(n, factors, device=device, generator=generator) * 0.1 for n in rows.values()]
        biases = [torch.zeros(n, device=device) for n in (*rows.values(), 1)]
        ids = [torch.randint(n, (1 << 18,), device=device, generator=generator) for n in rows.values()]
        keywords = {"negatives": 4, "lr": 0.01, "reg": 0.01, "seed": 0, "deterministic": False}
        yield TuningCase({"factors": factors}, 1 << 18, (*tables, *biases, torch.stack(ids, 1)), keywords)


OP = Op(
    SCHEMA,
    check=_check,
    fake=_fake,
    reference=reference.mf_sgd,
    triton="mf_sgd",
    check_values=_check_values,
    describe=_describe,
    tuning=_tuning,
)


def mf_sgd(
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
    backend: str | None = None,
) -> Tensor:
    """Train a matrix factorisation in place: one pass of SGD over positive pairs and negatives sampled as it goes.

    p(u, i) = sigmoid(user[u] . item[i] + user_bias[u] + item_bias[i] + global_bias); binary cross-entropy, label 1 for
    the pairs and 0 for `negatives` uniform items each, which may be positives of the same user. Every example adds
    reg times a row (and its bias) to that row's gradient. Negatives come from Philox4x32-10 with the key `seed` and the
    counter (offset + i, j): the same on every backend, and the same however a stream of pairs is cut into calls, as
    long as each call's offset is the number of pairs before it.

    Shuffle the pairs: what is close together in them is trained together.

    Args:
        user, item: fp32 [U, F] and [I, F], contiguous, changed in place; any F >= 1, tuned for 8 to 256.
        user_bias, item_bias: fp32 [U] and [I], contiguous, changed in place.
        global_bias: fp32 [1] or [], changed in place; it is not regularised.
        pairs: int64 [n, 2] of (user, item); may be a memory-mapped file.
        negatives: sampled items a pair, 0 to 1024.
        lr, reg: step size and L2 weight, at least 0.
        seed: any integer of 64 bits.
        offset: where the first pair stands in the stream.
        deterministic: True: gradients of BLOCK = 2048 consecutive pairs (counted from the start of the stream) are
            taken at the values before the block, and a row that occurs c times in it moves by lr min(1, 16 / c) times
            their sum, added up in the order of the pairs: the same bits for any number of threads, and for any cut of
            the stream at multiples of 2048. False: lock-free, "Hogwild": examples are applied as they come, each at
            whatever values it finds; updates of the same row may be lost, and only one CPU thread gives the same bits
            twice (there it is sequential SGD, a pair with its negatives at a time). On "reference" as True.
        backend: None to choose, or "cuda" | "triton" | "cpu" | "reference".

    Returns:
        fp32 []: the mean loss over the n (1 + negatives) examples, each at the values its gradient was taken at; 0 if
        there are none.

    Raises:
        RuntimeError: naming the argument, what it must be and what it is; nothing is written then. Ids out of range
            raise on the CPU; on a GPU (unless under debug_checks) such a pair is skipped with its negatives.

    Source: CADC, arXiv:2407.08108, section on pre-training; negatives and blocks are ours. Cost: 8 (F + 1) bytes a row
    and table if tables stay in cache, else 8 (F + 1) (2 + negatives) + 16 a pair. No gradient flows through it.
    """
    return OP(  # type: ignore[no-any-return]
        backend, user, item, user_bias, item_bias, global_bias, pairs, negatives=negatives, lr=lr, reg=reg, seed=seed,
        offset=offset, deterministic=deterministic,
    )  # fmt: skip
