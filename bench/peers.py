"""The competition: for each op, how each peer does the same work on the same bytes. Peers are imported when first asked
for, so an absent one costs nothing but its line in the output.

A peer's `prepare(call)` does everything a user does once (states, tables) and returns what a user does every time.
Where a library has a faster entry than its documented one, the faster one is measured.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import logging
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastops
from fastops.reference import dense_linear as reference_dense
from fastops.reference.nf4_dequant import NF4_CODE

if TYPE_CHECKING:
    from .harness import Call
    from .timing import Runner


class Absent(Exception):
    """Why a peer is not measured."""


@dataclass(frozen=True)
class Peer:
    """How to call one peer.

    Args:
        prepare: (call of our op) -> the peer's call; raises Absent.
        tolerance: how far its output may be from ours (harness.difference) and still count as the same work.
        not_capturable: why it cannot be timed inside a CUDA graph, or "".
        device: the kind of device where it is a peer; "" for any.
    """

    prepare: Callable[[Call], Runner]
    tolerance: float = 1e-3
    not_capturable: str = ""
    device: str = ""


@functools.cache
def library(name: str) -> ModuleType:
    """The peer's module, or Absent."""
    logging.disable(logging.WARNING)  # peers warn about their own optional parts
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ModuleNotFoundError as why:
        raise Absent(f"{why.name} is not installed") from why
    except Exception as why:  # a broken install raises anything
        raise Absent(f"{name} does not import: {why}") from why
    finally:
        logging.disable(logging.NOTSET)


def _nf4_only(call: Call) -> None:
    if call.kwargs.get("code") is not None:
        raise Absent("it has no code table of the user's")


def _bitsandbytes_weight(call: Call) -> tuple[Tensor, Any]:
    """(packed, QuantState) of an nf4_dequant call, as bitsandbytes' quantize_4bit would have made them."""
    functional = library("bitsandbytes.functional")
    _nf4_only(call)
    packed, absmax, shape, dtype, blocksize = call.args
    state = functional.QuantState(
        absmax=absmax,
        shape=torch.Size(shape),
        code=functional.get_4bit_type("nf4", device=packed.device),
        blocksize=blocksize,
        quant_type="nf4",
        dtype=dtype,
    )
    if "absmax_code" in call.kwargs:
        state.state2 = functional.QuantState(
            absmax=call.kwargs["absmax_scale"],
            code=call.kwargs["absmax_code"],
            blocksize=call.kwargs.get("absmax_blocksize", 256),
            dtype=torch.float32,
        )
        state.offset, state.nested = call.kwargs["absmax_offset"], True
    return packed.reshape(-1, 1), state


def bitsandbytes_dequant(call: Call) -> Runner:
    """The operator itself, or for double quantisation the documented function: three launches."""
    packed, state = _bitsandbytes_weight(call)
    if state.nested:
        return functools.partial(library("bitsandbytes.functional").dequantize_4bit, packed, state)
    _, absmax, shape, dtype, blocksize = call.args
    return functools.partial(
        torch.ops.bitsandbytes.dequantize_4bit.default, packed, absmax, blocksize, "nf4", shape, dtype
    )


def _torchao_weight(call: Call) -> Any:
    """NF4Tensor on our packed bytes; its scales are int8 steps of a block's scale: ours but for rounding."""
    nf4_tensor = library("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    _nf4_only(call)
    packed, absmax, shape, dtype, blocksize = call.args
    if "absmax_code" not in call.kwargs:
        raise Absent("it always double-quantises")
    per_scale = call.kwargs.get("absmax_blocksize", 256)
    if absmax.numel() % per_scale:
        raise Absent(f"its scales come in whole blocks of {per_scale}")
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    meta = nf4_tensor.SubclassTensorArgs(torch.Size(shape), strides, 0, dtype, packed.device, False)
    return nf4_tensor.NF4Tensor(
        meta,
        blocksize,
        absmax.numel(),
        per_scale,
        (call.kwargs["absmax_code"][absmax.int()] * 127).round().to(torch.int8),
        (127 / call.kwargs["absmax_scale"]).to(dtype),
        call.kwargs["absmax_offset"].to(dtype),
        packed,
        nf4=torch.tensor(NF4_CODE, dtype=dtype, device=packed.device),
    )


def torchao_dequant(call: Call) -> Runner:
    """Its one way back to a dense weight."""
    return _torchao_weight(call).get_original_weight  # type: ignore[no-any-return]


def torch_dequant(call: Call) -> Runner:
    """Plain eager PyTorch: look up, scale, round."""
    packed, absmax, shape, dtype, blocksize = call.args
    code = call.kwargs.get("code")
    table = torch.tensor(NF4_CODE, device=packed.device) if code is None else code
    if math.prod(shape) % blocksize:
        raise Absent("a last partial block needs padding")

    def scales() -> Tensor:
        if "absmax_code" not in call.kwargs:
            return absmax  # type: ignore[no-any-return]
        values = call.kwargs["absmax_code"][absmax.int()]
        each = call.kwargs["absmax_scale"].repeat_interleave(
            call.kwargs.get("absmax_blocksize", 256), output_size=values.numel()
        )
        return values * each + call.kwargs["absmax_offset"]  # type: ignore[no-any-return]

    def run() -> Tensor:
        nibbles = torch.stack([packed >> 4, packed & 15], dim=-1).reshape(-1).int()
        values = table.index_select(0, nibbles).reshape(-1, blocksize)
        return (values * scales()[:, None]).to(dtype).reshape(shape)

    return run


def bitsandbytes_quantize(call: Call) -> Runner:
    """The operator itself; the documented function adds a state object."""
    library("bitsandbytes.functional")
    _nf4_only(call)
    w, blocksize = call.args
    op = torch.ops.bitsandbytes.quantize_4bit.default
    return functools.partial(op, w, blocksize, "nf4", torch.uint8)


def torch_quantize(call: Call) -> Runner:
    """Plain eager PyTorch: scale, find the interval between codes, pack."""
    w, blocksize = call.args
    _nf4_only(call)
    if w.numel() % blocksize:
        raise Absent("a last partial block needs padding")
    code = torch.tensor(NF4_CODE, device=w.device)
    bounds = (code[:-1] + code[1:]) / 2

    def run() -> tuple[Tensor, Tensor]:
        blocks = w.reshape(-1, blocksize).float()
        absmax = blocks.abs().amax(dim=1)
        scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
        nibbles = torch.bucketize(scaled.reshape(-1), bounds, out_int32=True).to(torch.uint8)
        return nibbles[0::2] << 4 | nibbles[1::2], absmax

    return run


def _weight(call: Call) -> Call:
    """The nf4_dequant call that expands the weight of an nf4_gemv or nf4_linear call."""
    x, packed, absmax, out_features, blocksize = call.args
    return dataclasses.replace(call, args=(packed, absmax, [out_features, x.shape[-1]], x.dtype, blocksize))


def _weight_of_dx(call: Call) -> Call:
    """The same of an nf4_linear_dx call."""
    dy, packed, absmax, in_features, blocksize = call.args
    return dataclasses.replace(call, args=(packed, absmax, [dy.shape[-1], in_features], dy.dtype, blocksize))


def _expand(weight: Call) -> Tensor:
    return fastops.nf4_dequant(*weight.args, **weight.kwargs)


def bitsandbytes_linear(call: Call) -> Runner:
    """What a Linear4bit calls; on a CPU with AVX512-BF16 it repacks its weight once and always computes in bf16."""
    bitsandbytes, functional = library("bitsandbytes"), library("bitsandbytes.functional")
    x = call.args[0]
    packed, state = _bitsandbytes_weight(_weight(call))
    if x.device.type == "cpu" and functional.has_avx512bf16():
        packed, state = functional._convert_weight_packed_for_cpu(packed, state)
    return functools.partial(bitsandbytes.matmul_4bit, x, packed, quant_state=state)


def bitsandbytes_dx(call: Call) -> Runner:
    """What the backward pass of its MatMul4Bit computes."""
    dy = call.args[0]
    packed, state = _bitsandbytes_weight(_weight_of_dx(call))
    dequantize = library("bitsandbytes.functional").dequantize_4bit
    return lambda: torch.matmul(dy, dequantize(packed, state).to(dy.dtype))


def expanded_linear(call: Call) -> Runner:
    """The dense layer: the weight expanded once, in x's dtype."""
    return functools.partial(F.linear, call.args[0], _expand(_weight(call)))


def _panelled(call: Call) -> Tensor:
    """The plain weight of a dense_linear call."""
    return reference_dense.plain(call.args[1], call.args[2]).contiguous()


def torch_linear(call: Call) -> Runner:
    """torch's own layer on the plain weight."""
    return functools.partial(F.linear, call.args[0], _panelled(call), call.kwargs.get("bias"))


def onednn_linear(call: Call) -> Runner:
    """oneDNN's product of a weight in its own layout, as torch.compile uses it for weights that it may freeze."""
    if not torch.backends.mkldnn.is_available():
        raise Absent("this torch has no oneDNN")
    x = call.args[0]
    laid_out = torch.ops.mkldnn._reorder_linear_weight(_panelled(call), x.shape[0])
    return functools.partial(torch.ops.mkldnn._linear_pointwise, x, laid_out, call.kwargs.get("bias"), "none", [], "")


def expanded_dx(call: Call) -> Runner:
    """The gradient of the dense layer."""
    return functools.partial(torch.matmul, call.args[0], _expand(_weight_of_dx(call)))


def dequant_linear(call: Call) -> Runner:
    """Our nf4_dequant and the dense layer: what a fused product has to beat at any number of rows."""
    x, weight = call.args[0], _weight(call)
    return lambda: F.linear(x, _expand(weight))


def dequant_dx(call: Call) -> Runner:
    """The same of the gradient."""
    dy, weight = call.args[0], _weight_of_dx(call)
    return lambda: torch.matmul(dy, _expand(weight))


def gnf4_linear(call: Call) -> Runner:
    """grouped-nf4-gemm with one group; its scales are plain fp32, so double quantisation is undone beforehand."""
    nf4_grouped = library("nf4_grouped")
    os.environ.setdefault("GNF4_GEMV_BW", "1")  # its faster way with one row, by default off on this GPU
    x = call.args[0]
    packed, absmax, (n, k), _, blocksize = _weight(call).args
    if x.dtype != torch.bfloat16 or blocksize != nf4_grouped.BLOCKSIZE or k % blocksize:
        raise Absent(f"it takes bf16, blocksize {nf4_grouped.BLOCKSIZE} and whole blocks in a row")
    if "absmax_code" in call.kwargs:
        values, scale = call.kwargs["absmax_code"][absmax.int()], call.kwargs["absmax_scale"]
        each = scale.repeat_interleave(call.kwargs.get("absmax_blocksize", 256))[: values.numel()]
        absmax = values * each + call.kwargs["absmax_offset"]
    weight = packed.reshape(1, n, k // 2), absmax.reshape(1, n, k // blocksize)
    group = torch.zeros(1, dtype=torch.int32, device=x.device)
    return functools.partial(nf4_grouped.gemm_4bit_grouped, x, *weight, [x.shape[0]], group)


def torchao_linear(call: Call) -> Runner:
    """NF4Tensor expanded and multiplied."""
    linear_nf4 = library("torchao.quantization.quantize_.workflows.nf4.nf4_tensor").linear_nf4
    return functools.partial(linear_nf4, call.args[0], _torchao_weight(_weight(call)))


def _rotated(call: Call) -> Callable[[], Tensor]:
    """k of a kv_append call in eager PyTorch, its rotary embedding included where the call has one."""
    k, lengths = call.args[2], call.args[4]
    if call.kwargs.get("cos") is None:
        return lambda: k
    cos, sin = call.kwargs["cos"], call.kwargs["sin"]
    if call.kwargs.get("rope_interleaved") or 2 * cos.shape[1] != k.shape[3]:
        raise Absent("it is written for the halves of whole rows")
    new = torch.arange(k.shape[2], device=k.device)

    def rotate() -> Tensor:
        position = lengths[:, None] + new
        c, s = (torch.cat([t[position]] * 2, dim=-1)[:, None] for t in (cos, sin))
        first, second = k.chunk(2, dim=-1)
        return (k * c + torch.cat([-second, first], dim=-1) * s).to(k.dtype)

    return rotate


def _appended(call: Call) -> tuple[Tensor, ...]:
    """Index of the new rows in the caches of a kv_append call, one a sequence and row."""
    k_cache, _, k, _, lengths = call.args
    position = lengths[:, None].long() + torch.arange(k.shape[2], device=k.device)
    table = call.kwargs.get("block_table")
    if table is None:
        return torch.arange(k.shape[0], device=k.device)[:, None], position
    block = k_cache.shape[1]
    return table.long().gather(1, position // block), position % block


def _by_row(cache: Tensor, call: Call) -> Tensor:
    """The cache with rows before heads, so that two indices in front name a row of all heads."""
    return cache if call.kwargs.get("block_table") is not None else cache.transpose(1, 2)


def torch_append(call: Call) -> Runner:
    """Plain eager PyTorch: positions, then an indexed assignment for each cache."""
    k_cache, v_cache, _, v, _ = call.args
    k = _rotated(call)

    def run() -> tuple[Tensor, Tensor]:
        where = _appended(call)
        _by_row(k_cache, call)[where] = k().transpose(1, 2)
        _by_row(v_cache, call)[where] = v.transpose(1, 2)
        return k_cache, v_cache

    return run


def static_append(call: Call) -> Runner:
    """What transformers' StaticCache does: index_copy_ at positions that all sequences share."""
    k_cache, v_cache, _, v, lengths = call.args
    if call.kwargs.get("block_table") is not None or bool((lengths != lengths[0]).any()):
        raise Absent("it has no pages, and one length for all")
    k, position = _rotated(call), lengths[0].long() + torch.arange(v.shape[2], device=v.device)

    def run() -> tuple[Tensor, Tensor]:
        k_cache.index_copy_(2, position, k())
        v_cache.index_copy_(2, position, v)
        return k_cache, v_cache

    return run


def flashinfer_append(call: Call) -> Runner:
    """append_paged_kv_cache; its batch indices and positions, made once a step for all layers, are left out."""
    flashinfer = library("flashinfer")
    k_cache, v_cache, k, v, lengths = call.args
    table = call.kwargs.get("block_table")
    if table is None or call.kwargs.get("cos") is not None:
        raise Absent("it takes pages, and k rotated already")
    batch, _, new_rows, _ = k.shape
    indptr = torch.arange(batch + 1, dtype=torch.int32, device=k.device)
    last = (lengths + new_rows - 1) % k_cache.shape[1] + 1
    pages = (lengths + new_rows - 1) // k_cache.shape[1] + 1
    ends = torch.cat([indptr[:1], pages.cumsum(0).to(torch.int32)])
    used = torch.arange(table.shape[1], device=k.device) < pages[:, None]
    where = flashinfer.get_batch_indices_positions(indptr * new_rows, lengths + new_rows, batch * new_rows)
    rows = [t.transpose(1, 2).reshape(batch * new_rows, *t.shape[1::2]) for t in (k, v)]
    arguments = (*rows, *where, (k_cache, v_cache), table[used], ends, last)

    def run() -> tuple[Tensor, Tensor]:
        flashinfer.append_paged_kv_cache(*arguments, kv_layout="NHD")
        return k_cache, v_cache

    return run


def torch_compact(call: Call) -> Runner:
    """Plain eager PyTorch: gather all rows of the tree, those not accepted to where they are, and put them back."""
    k_cache, v_cache, lengths, index, count = call.args
    table = call.kwargs.get("block_table")
    sequence = torch.arange(index.shape[0], device=index.device)[:, None]

    def run() -> tuple[Tensor, Tensor]:
        row = torch.arange(index.shape[1], device=index.device)
        start = lengths[:, None].long()
        source, to = start + torch.where(row < count[:, None], index, row), start + row
        if table is None:
            source_at, to_at = (sequence, source), (sequence, to)
        else:
            block = k_cache.shape[1]
            source_at, to_at = ((table.long().gather(1, p // block), p % block) for p in (source, to))
        for cache in (_by_row(k_cache, call), _by_row(v_cache, call)):
            cache[to_at] = cache[source_at]
        return k_cache, v_cache

    return run


def torch_scatter(call: Call) -> Runner:
    """Plain eager PyTorch: scatter_ along the rows, the index repeated for heads and columns without a copy."""
    k_cache, v_cache, k, v, index = call.args
    if bool((index < 0).any()):
        raise Absent("it has no row that goes nowhere")

    def run() -> tuple[Tensor, Tensor]:
        where = index.long()[:, None, :, None].expand(k.shape)
        return k_cache.scatter_(2, where, k), v_cache.scatter_(2, where, v)

    return run


def cat_sdpa(call: Call) -> Runner:
    """Join both sets of keys, then torch's attention: what split_attn saves is the joining."""
    q, k_active, v_active, k_cached, v_cached = call.args
    mask = _joined_mask(call)

    def run() -> Tensor:
        k, v = torch.cat([k_active, k_cached], dim=2), torch.cat([v_active, v_cached], dim=2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    return run


# Pairs a step of the loops below: as many as one of our blocks; or so many that a GPU is busy, at fewer steps an epoch.
MF_BATCH, MF_LARGE = 2048, 65536
MF_PAIRS = 1_000_000  # of a GPU's case: longer epochs in small steps take ten seconds
MF_LOOP = "it is a loop of thousands of steps, each with its backward pass"


def _mf_loop(call: Call, sparse: bool, batch: int = MF_BATCH) -> Runner:
    """Embeddings, binary cross-entropy and SGD as everyone writes them; compiled unless gradients are sparse."""
    user, item, _, _, _, pairs = call.args
    if user.is_cuda and batch == MF_BATCH and len(pairs) > MF_PAIRS:
        raise Absent(f"its epoch of {len(pairs)} pairs takes ten seconds")
    negatives, items = call.kwargs["negatives"], item.shape[0]
    tables = torch.nn.ModuleList(
        torch.nn.Embedding(len(t), t.reshape(len(t), -1).shape[1], sparse=sparse, device=t.device)
        for t in call.args[:4]
    )
    for table, before in zip(tables, call.args, strict=False):
        table.weight.data.copy_(before.reshape(len(before), -1))
    bias = torch.nn.Parameter(call.args[4].clone())
    # A loss of means, so the step is larger by as many examples: what sums of gradients would take.
    rate = call.kwargs["lr"] * (1 + negatives)
    optimizer = torch.optim.SGD([*tables.parameters(), bias], lr=rate)

    def loss_of(users: Tensor, each: Tensor) -> Tensor:
        u, v, user_bias, item_bias = tables[0](users), tables[1](each), tables[2](users), tables[3](each)
        z = (u[:, None] * v).sum(-1) + user_bias + item_bias[..., 0] + bias
        label = torch.zeros_like(z)
        label[:, 0] = 1
        return F.binary_cross_entropy_with_logits(z, label)

    compiled = loss_of if sparse else torch.compile(loss_of, dynamic=False)

    def run() -> Tensor:
        total = torch.zeros((), device=user.device)
        for some in pairs.split(batch):
            sampled = torch.randint(items, (len(some), negatives), device=user.device)
            loss = compiled(some[:, 0], torch.cat([some[:, 1:], sampled], dim=1))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            total += loss.detach() * len(some)
        return total / len(pairs)

    return run


def joined_sdpa(call: Call) -> Runner:
    """torch's attention on keys that somebody joined for nothing."""
    q, k_active, v_active, k_cached, v_cached = call.args
    k, v = torch.cat([k_active, k_cached], dim=2), torch.cat([v_active, v_cached], dim=2)
    return functools.partial(F.scaled_dot_product_attention, q, k, v, attn_mask=_joined_mask(call))


def _joined_mask(call: Call) -> Tensor | None:
    """[B, 1, 1, A' + C] of a split_attn call, or None."""
    mask = call.kwargs.get("cached_mask")
    if mask is None:
        return None
    active = mask.new_ones(mask.shape[0], call.args[1].shape[2])
    return torch.cat([active, mask], dim=1)[:, None, None]


def torch_merge(call: Call) -> Runner:
    """Plain eager PyTorch, weights in fp32."""
    o_a, lse_a, o_b, lse_b = call.args

    def run() -> tuple[Tensor, Tensor]:
        lse = torch.logaddexp(lse_a, lse_b)
        w_a, w_b = ((each - lse).exp()[..., None] for each in (lse_a, lse_b))
        return (o_a * w_a + o_b * w_b).to(o_a.dtype), lse

    return run


def torch_mf(call: Call) -> Runner:
    """Eager, with sparse gradients, which torch.compile does not take."""
    return _mf_loop(call, sparse=True)


def torch_compile_mf(call: Call) -> Runner:
    """The loss and its gradients through torch.compile; dense gradients."""
    return _mf_loop(call, sparse=False)


def torch_compile_mf_large(call: Call) -> Runner:
    """The same in steps of MF_LARGE pairs, which learns less in an epoch."""
    return _mf_loop(call, sparse=False, batch=MF_LARGE)


def implicit_bpr(call: Call) -> Runner:
    """An epoch of its Bayesian personalised ranking: as many samples as pairs, one negative each, lock-free threads."""
    bpr, sparse = library("implicit.cpu.bpr"), library("scipy.sparse")
    user, item, _, _, _, pairs = call.args
    if call.kwargs["negatives"] != 1:
        raise Absent("it samples one negative a pair")
    ones = torch.ones(len(pairs)).numpy()
    matrix = sparse.csr_matrix((ones, tuple(pairs.T.numpy())), shape=(len(user), len(item)))
    model = bpr.BayesianPersonalizedRanking(
        factors=user.shape[1], learning_rate=call.kwargs["lr"], regularization=call.kwargs["reg"], iterations=1,
        num_threads=torch.get_num_threads(),
    )  # fmt: skip

    def run() -> Tensor:
        model.fit(matrix, show_progress=False)
        return torch.zeros(())  # it reports no loss

    return run


def flashinfer_merge(call: Call) -> Runner:
    """Its kernel takes [rows, heads, D] and logarithms to base 2, converted beforehand."""
    merge = library("flashinfer").merge_state
    o_a, lse_a, o_b, lse_b = call.args
    rows = [t.reshape(-1, 1, t.shape[-1]) for t in (o_a, o_b)]
    logs = [t.reshape(-1, 1) * math.log2(math.e) for t in (lse_a, lse_b)]
    return lambda: merge(rows[0], logs[0], rows[1], logs[1])[0]


def torch_received(call: Call) -> Runner:
    """Plain eager PyTorch: scores, softmax, sums."""
    q, k = call.args
    scale = q.shape[-1] ** -0.5
    return lambda: (q @ k.mT * scale).softmax(dim=-1, dtype=torch.float32).sum(dim=(1, 2))


# Most products round each weight to 16 bits first, bitsandbytes on a CPU also x and the scales: some 1e-3 in all.
PRODUCT = 1e-2
FORWARD = {
    "bitsandbytes": Peer(bitsandbytes_linear, PRODUCT),
    "cublas": Peer(expanded_linear, PRODUCT, device="cuda"),
    "dequant+cublas": Peer(dequant_linear, PRODUCT, device="cuda"),
    "torch": Peer(expanded_linear, PRODUCT, device="cpu"),
    "gnf4": Peer(gnf4_linear, PRODUCT, device="cuda"),
    "torchao": Peer(torchao_linear, tolerance=2e-2, device="cuda"),
}

PEERS: dict[str, dict[str, Peer]] = {
    "attn_received": {"torch": Peer(torch_received, PRODUCT)},
    "dense_linear": {
        "torch": Peer(torch_linear, PRODUCT),
        "onednn": Peer(onednn_linear, PRODUCT, device="cpu"),
    },
    "merge_state": {"torch": Peer(torch_merge, PRODUCT), "flashinfer": Peer(flashinfer_merge, PRODUCT, device="cuda")},
    "kv_append": {
        "torch": Peer(torch_append),
        "hf_static": Peer(static_append),
        "flashinfer": Peer(flashinfer_append, device="cuda"),
    },
    "kv_compact": {"torch": Peer(torch_compact)},
    "kv_scatter": {"torch": Peer(torch_scatter)},
    # Each samples its own negatives and takes other steps: what is compared is the work of an epoch.
    "mf_sgd": {
        "torch": Peer(torch_mf, 0.3, MF_LOOP),
        "torch_compile": Peer(torch_compile_mf, 0.3, MF_LOOP),
        "torch_compile_large": Peer(torch_compile_mf_large, math.inf, MF_LOOP, device="cuda"),
        "implicit": Peer(implicit_bpr, math.inf, device="cpu"),
    },
    "nf4_dequant": {
        "bitsandbytes": Peer(bitsandbytes_dequant),
        # Its table and scales are rounded to the output's type.
        "torchao": Peer(torchao_dequant, tolerance=2e-2),
        "torch": Peer(torch_dequant),
    },
    "nf4_quantize": {
        "bitsandbytes": Peer(
            bitsandbytes_quantize,
            # A value within 2 ulp of a boundary may go either way on its CUDA path.
            tolerance=1e-2,
            not_capturable="it launches on the legacy default stream, which a capture forbids (and then exits)",
        ),
        "torch": Peer(torch_quantize, tolerance=1e-2),
    },
    "nf4_gemv": FORWARD,
    "nf4_linear": FORWARD,
    "nf4_linear_dx": {
        "bitsandbytes": Peer(bitsandbytes_dx, PRODUCT),
        "cublas": Peer(expanded_dx, PRODUCT, device="cuda"),
        "dequant+cublas": Peer(dequant_dx, PRODUCT, device="cuda"),
        "torch": Peer(expanded_dx, PRODUCT, device="cpu"),
    },
    "split_attn": {"cat+sdpa": Peer(cat_sdpa, PRODUCT), "sdpa": Peer(joined_sdpa, PRODUCT)},
}
