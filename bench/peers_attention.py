"""The competition of the attention operators: torch's SDPA and FlashInfer on the same caches.

FlashInfer's caches are pages of 16 rows: where ours are contiguous, it gets a copy. Its plan() (250 to 450 us on the
host whenever a length changes) is left out of the time. Full caches only, as the benches have them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastops.reference import _attention, tree_build

from .peers import Absent, Peer, library

if TYPE_CHECKING:
    from .harness import Call
    from .timing import Runner

PAGE = 16
WORKSPACE = 128 << 20  # bytes, as FlashInfer's documentation has it

_faster: dict[Any, int] = {}  # which of several settings won, by shapes


def _contiguous(call: Call) -> None:
    if "block_table" in call.kwargs:
        raise Absent("it has no pages")


def _expanded(cache: Tensor, heads: int) -> Tensor:
    """A KV head for each query head: what a user without GQA keeps."""
    return cache.repeat_interleave(heads // cache.shape[1], dim=1)


def _seen(call: Call) -> Tensor:
    """[B, T, S] bool of a tree."""
    q, _, _, lengths = call.args
    mask, capacity = call.kwargs["tree_mask"], int(lengths.max())
    return _attention.visible(lengths, None, q.shape[2], capacity, mask)


def sdpa_decode(call: Call) -> Runner:
    """One row sees everything; trees need a mask."""
    _contiguous(call)
    q, k, v, _ = call.args
    mask = _seen(call)[:, None] if "tree_mask" in call.kwargs else None
    if q.device.type == "cpu":
        k, v = _expanded(k, q.shape[1]), _expanded(v, q.shape[1])
        return functools.partial(F.scaled_dot_product_attention, q, k, v, mask)
    gqa = k.shape[1] != q.shape[1]
    return functools.partial(F.scaled_dot_product_attention, q, k, v, mask, enable_gqa=gqa)


def sdpa_prefill(call: Call) -> Runner:
    """Its flash attention, whose causal mask is aligned with the last key; on a CPU with a mask where that matters."""
    _contiguous(call)
    packed, k, v, _, lengths, rows = call.args
    batch, s = lengths.shape[0], int(lengths[0])
    q = packed.unflatten(0, (batch, rows)).transpose(1, 2)
    if q.device.type == "cpu":
        k, v = _expanded(k, q.shape[1]), _expanded(v, q.shape[1])
        mask = None if rows == s else torch.ones(rows, s, dtype=torch.bool).tril(s - rows)
        run = functools.partial(F.scaled_dot_product_attention, q, k, v, mask, is_causal=mask is None)
    else:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        run = lambda: flash(q, k, v, 0.0, True)[0]  # noqa: E731
    return lambda: run().transpose(1, 2)


def _pages(k: Tensor, v: Tensor, lengths: Tensor, table: Tensor | None) -> tuple[Tensor, Tensor, Tensor, int]:
    """(keys and values in pages, table [B, pages of a sequence], rows a page)."""
    if table is not None:
        return k, v, table, k.shape[1]
    batch, _, s, _ = k.shape
    if s % PAGE:
        raise Absent(f"its pages have {PAGE} rows")
    k, v = (c.transpose(1, 2).reshape(batch * s // PAGE, PAGE, *c.shape[1::2]) for c in (k, v))
    return k, v, torch.arange(batch * s // PAGE, dtype=torch.int32, device=k.device).view(batch, -1), PAGE


def _plan(table: Tensor, page: int) -> tuple[Tensor, Tensor, Tensor]:
    """(indptr, indices, last_page_len) of full caches."""
    batch, each = table.shape
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=table.device) * each
    return indptr, table.reshape(-1), torch.full((batch,), page, dtype=torch.int32, device=table.device)


def _workspace(device: torch.device) -> Tensor:
    return torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)


def _best(key: Any, runners: Sequence[Runner]) -> Runner:
    """The fastest of several settings, found once for each shape."""
    if key not in _faster:
        times = []
        for run in runners:
            for _ in range(3):
                run()
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            events[0].record()
            for _ in range(10):
                run()
            events[1].record()
            torch.cuda.synchronize()
            times.append(events[0].elapsed_time(events[1]))
        _faster[key] = times.index(min(times))
    return runners[_faster[key]]


def _head_size(call: Call) -> None:
    """With another one its tensor-core kernels were seen to leave their memory."""
    if call.args[0].shape[-1] not in (64, 128, 256):
        raise Absent(f"it has no heads of {call.args[0].shape[-1]}")


def flashinfer_decode(call: Call) -> Runner:
    """Its decode attention, with tensor cores or without, whichever is faster."""
    _head_size(call)
    flashinfer = library("flashinfer")
    if "tree_mask" in call.kwargs:
        raise Absent("its decode attention has no trees")
    q, k, v, lengths = call.args
    k, v, table, page = _pages(k, v, lengths, call.kwargs.get("block_table"))
    heads, d = q.shape[1], q.shape[3]
    rows = q.squeeze(2)
    runners: list[Runner] = []
    why: Exception | None = None
    for tensor_cores in (True, False):
        try:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                _workspace(q.device), "NHD", use_tensor_cores=tensor_cores
            )
            wrapper.plan(
                *_plan(table, page), heads, k.shape[2], d, page, q_data_type=q.dtype, kv_data_type=q.dtype
            )  # fmt: skip
            run = functools.partial(wrapper.run, rows, (k, v), return_lse=True)
            run()
        except Exception as error:  # it lacks head sizes and ratios in one setting or in both
            why = error
            continue
        runners.append(functools.partial(_first, run))
    if not runners:
        raise Absent(f"it does not take this shape: {why}")
    return _best((q.shape, k.shape, len(runners)), runners)


def _first(run: Runner) -> Any:
    return run()[0]


def flashinfer_tree(call: Call) -> Runner:
    """FA2 with a custom mask of all rows and keys."""
    flashinfer = library("flashinfer")
    if "tree_mask" not in call.kwargs:
        raise Absent("for trees only")
    q, k, v, lengths = call.args
    k, v, table, page = _pages(k, v, lengths, call.kwargs.get("block_table"))
    batch, heads, t, d = q.shape
    wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(_workspace(q.device), "NHD", backend="fa2")
    starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * t
    wrapper.plan(
        starts, *_plan(table, page), heads, k.shape[2], d, page, custom_mask=_seen(call).reshape(-1),
        q_data_type=q.dtype, kv_data_type=q.dtype,
    )  # fmt: skip
    rows = q.transpose(1, 2).reshape(batch * t, heads, d)
    return lambda: wrapper.run(rows, (k, v), return_lse=True)[0].view(batch, t, heads, d).transpose(1, 2)


def flashinfer_xqa(call: Call) -> Runner:
    """XQA: a bit mask of the last T keys, lengths on the device, no plan; it returns no log-sum-exp."""
    decode = library("flashinfer.decode")
    if "tree_mask" not in call.kwargs:
        raise Absent("for trees only")
    q, k, v, lengths = call.args
    k, v, table, _ = _pages(k, v, lengths, call.kwargs.get("block_table"))
    batch, heads, t, d = q.shape
    words = call.kwargs["tree_mask"].contiguous().view(torch.uint16).view(batch, t, 4)
    mask = words[..., : 2 * -(-t // 32)].contiguous()
    run = functools.partial(
        decode.xqa_batch_decode_with_kv_cache,
        q.transpose(1, 2).reshape(batch * t, heads, d), (k, v), _workspace(q.device), table,
        lengths.to(torch.uint32), int(lengths.max()), bmm1_scale=d**-0.5, bmm2_scale=1.0, kv_layout="NHD",
        q_len_per_req=t, mask=mask,
    )  # fmt: skip
    return lambda: run().view(batch, t, heads, d).transpose(1, 2)


def flashinfer_prefill(call: Call) -> Runner:
    """Its attention of one sequence, on the contiguous cache as it is."""
    _head_size(call)
    flashinfer = library("flashinfer")
    _contiguous(call)
    q, k, v, _, lengths, _ = call.args
    if lengths.shape[0] != 1:
        raise Absent("one sequence at a time")
    single = flashinfer.single_prefill_with_kv_cache
    return functools.partial(single, q, k[0], v[0], causal=True, kv_layout="HND")


def torch_tree(call: Call) -> Runner:
    """Plain eager PyTorch: gathers that climb twice as far each time."""
    return functools.partial(tree_build.tree_build, *call.args, **call.kwargs)


# Probabilities are rounded to 16 bits before they are multiplied: some 1e-3, and as much once more where we round too.
ATTENTION = 1e-2
DECODE = {
    "sdpa": Peer(sdpa_decode, ATTENTION),
    "flashinfer": Peer(flashinfer_decode, ATTENTION, device="cuda"),
    "flashinfer_fa2": Peer(flashinfer_tree, ATTENTION, device="cuda"),
    "flashinfer_xqa": Peer(flashinfer_xqa, ATTENTION, device="cuda"),
}
PREFILL = {
    "sdpa": Peer(sdpa_prefill, ATTENTION),
    "flashinfer": Peer(flashinfer_prefill, ATTENTION, device="cuda"),
}
TREE = {"torch": Peer(torch_tree, tolerance=0.0)}
