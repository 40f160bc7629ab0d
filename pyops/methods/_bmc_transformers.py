"""BMC's faces to transformers: a Cache that grows in place, and fastops' attention with its masks."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from ..ops.decode_attn import decode_attn
from ..ops.kv_append import kv_append
from ..ops.prefill_attn import prefill_attn
from ._bmc_model import best_r
from ._bmc_profile import Pace, Shape, costs_of, length_aware_r
from .bmc import grown

FEW_ROWS = 64  # that decode_attn takes
MOST_DIM = 256
MASKED = {"eager"}  # attention implementations that make a mask for a single new row too


class Plan:
    """How many rows the layers of a cache have: what the first of them needs in a pass decides for all."""

    def __init__(self, r: int | str, setting: str, limit: int | None, layers: int, heads: int) -> None:
        self.r, self.setting, self.limit = r, setting, limit
        self._layers, self._heads = layers, heads
        self.forget()

    def forget(self) -> None:
        """As of a new text."""
        self.capacity, self._pace = 0, Pace()
        self._lengths: dict[int, Tensor] = {}

    def room(self, rows: int, held: int, k: Tensor) -> int:
        """The capacity for `rows` rows, where `held` are there and others come as in k [B, Hkv, T, D]."""
        if self.limit is not None and rows > self.limit:
            raise ValueError(f"bmc: the cache is full: it has at most {self.limit} rows, {rows} are needed")
        if rows > self.capacity:
            before = held if self.capacity else rows
            wanted = max(rows, before + self._spare(before, k))
            self.capacity = wanted if self.limit is None else min(wanted, self.limit)
        return self.capacity

    def tick(self, grows: bool) -> None:
        """The first layer begins a step."""
        self._pace.tick(grows)

    def lengths(self, rows: int, k: Tensor) -> Tensor:
        """int32 [B] of `rows`, made once for all layers."""
        known = self._lengths.get(rows)
        if known is None or known.shape[0] != k.shape[0] or known.device != k.device:
            known = torch.full((k.shape[0],), rows, device=k.device, dtype=torch.int32)
            self._lengths = {rows: known}
        return known

    def _spare(self, rows: int, k: Tensor) -> int:
        if isinstance(self.r, int):
            return self.r
        shape = Shape(k.shape[0], self._layers, self._heads, k.shape[1], k.shape[3], k.device, k.dtype)
        if self.setting == "padded":
            return best_r(costs_of(shape, rows), rows, 0)
        return length_aware_r(shape, rows, self._pace)


class GrowingLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """A layer of a cache whose memory grows by a plan: [B, Hkv, capacity, D], of which the first rows are held."""

    is_compileable = False
    is_croppable = True
    is_sliding = False

    def __init__(self, plan: Plan, first: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.plan, self.first, self.rows = plan, first, 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing yet, of the type and on the device of the first rows."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The new rows in place; returns all that are held, or, padded and behind a prompt, the whole capacity."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, rows = self.rows, self.rows + key_states.shape[2]
        if self.first and before:
            self.plan.tick(rows > self._storage[0].shape[2])
        capacity = self.plan.room(rows, before, key_states)
        lengths = self.plan.lengths(before, key_states)
        if self._storage[0].shape[2] < capacity:
            self._grow(capacity, lengths)
        keys, values = self._storage
        kv_append(keys, values, key_states, value_states, lengths)
        self.rows = rows
        if self.plan.setting == "padded" and before:
            return keys, values
        return keys[:, :, :rows], values[:, :, :rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(rows that attention will get, 0)."""
        rows = self.rows + query_length
        if self.plan.setting == "padded" and self.rows:
            return self.plan.room(rows, self.rows, self._storage[0]), 0
        return rows, 0

    def get_seq_length(self) -> int:
        """Rows that are held."""
        return self.rows

    def get_max_length(self) -> int:
        """The limit; -1 where there is none."""
        return -1 if self.plan.limit is None else self.plan.limit

    def reset(self) -> None:
        """Empty, its memory given back."""
        self.keys = self.values = None
        self.rows, self.is_initialized = 0, False
        self.plan.forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last -tokens_to_remove rows; their memory stays."""
        if tokens_to_remove > 0:
            raise ValueError(f"bmc: tokens_to_remove must not be more than 0, got {tokens_to_remove}")
        self.rows = max(0, self.rows + tokens_to_remove)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every sequence `repeats` times."""
        if self.is_initialized:
            self.keys, self.values = (x.repeat_interleave(repeats, dim=0) for x in self._storage)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Only some of the sequences."""
        if self.is_initialized:
            self.keys, self.values = (x[indices] for x in self._storage)

    @property
    def _storage(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def _grow(self, capacity: int, lengths: Tensor) -> None:
        keys, values = self._storage
        try:
            self.keys, self.values = grown(keys, values, self.rows, capacity, lengths, self.plan.setting == "padded")
        except (RuntimeError, MemoryError) as error:
            reason = str(error).split("\n", 1)[0]
            raise MemoryError(
                f"bmc: no memory to grow from {keys.shape[2]} to {capacity} rows; the cache still holds its rows "
                f"({reason})"
            ) from error


def cache_of(model: Any, r: int | str, setting: str, limit: int | None) -> Cache:
    """A Cache of a layer for each of the model's."""
    config = model.config.get_text_config(decoder=True)
    name = getattr(config, "_attn_implementation", None)
    if setting == "padded" and name not in MASKED:
        raise ValueError(
            f"bmc: the attention of model must mask rows behind the text where setting is padded, which "
            f"register_attention()'s and eager do: one of {', '.join(sorted(MASKED))}, got {name}"
        )
    layers = config.num_hidden_layers
    plan = Plan(r, setting, limit, layers, config.num_attention_heads)
    return Cache(layers=[GrowingLayer(plan, first=i == 0) for i in range(layers)])


def register(name: str) -> str:
    """Make `attention` and `mask` known under `name`."""
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)
    MASKED.add(name)
    return name


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | None:
    """None where every row sees all before it and the last row is the last key; else [B, 1, T, S] bool."""
    plain = (
        allow_is_causal_skip
        and isinstance(q_offset, int)
        and kv_offset == 0
        and kv_length == q_offset + q_length
        and (local_size is None or kv_length < local_size)
        and (attention_mask is None or bool(attention_mask[:, :kv_length].all()))
    )
    if plain:
        return None
    full: Tensor | None = sdpa_mask(
        batch_size=batch_size, q_length=q_length, kv_length=kv_length, kv_offset=kv_offset, mask_function=mask_function,
        attention_mask=attention_mask, local_size=local_size, allow_is_causal_skip=False,
        **{"q_offset": q_offset, **options},
    )  # fmt: skip
    return full


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[B, T, Hq, D] of query [B, Hq, T, D] over key and value [B, Hkv, S, D], as transformers calls attention."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    shared = key.shape == value.shape and query.shape[1] % key.shape[1] == 0 and query.shape[3] <= MOST_DIM
    plain = shared and dropout == 0.0 and not _needs_grad(query, key)
    if plain and causal and attention_mask is None and kwargs.get("position_bias") is None:
        return _causal(query, key, value, scaling), None
    if (
        plain
        and attention_mask is not None
        and attention_mask.dtype == torch.bool
        and query.shape[1] % key.shape[1] == 0
    ):
        return _masked(query, key, value, attention_mask, scaling), None
    rows, keys = query.shape[2], key.shape[2]
    if attention_mask is None and causal and 1 < rows < keys:  # its own causal mask begins at the first key
        place = torch.arange(keys - rows, keys, device=query.device)
        attention_mask = torch.arange(keys, device=query.device) <= place[:, None]
    out, _ = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=causal, **kwargs
    )
    return out, None


def _causal(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    """Each row sees all keys up to its own, the last of which is the last row's."""
    batch, _, rows, _ = query.shape
    lengths = torch.full((batch,), key.shape[2], device=query.device, dtype=torch.int32)
    if rows <= FEW_ROWS:
        few: Tensor = decode_attn(query, key, value, lengths, scale=scale)[0]
        return few.transpose(1, 2)
    starts = torch.arange(0, batch * rows + 1, rows, device=query.device, dtype=torch.int32)
    packed = query.transpose(1, 2).flatten(0, 1)
    out = prefill_attn(packed, key, value, starts, lengths, rows, scale=scale)[0]
    whole: Tensor = out.unflatten(0, (batch, rows))
    return whole


def _masked(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scale: float | None) -> Tensor:
    """Query heads that share keys as rows of one head, so that nothing is expanded; 0 for rows that see nothing."""
    group, rows = query.shape[1] // key.shape[1], query.shape[2]
    if seen.shape[1] != 1:
        seen = seen.unflatten(1, (key.shape[1], group)).flatten(2, 3)
    else:
        seen = seen.expand(query.shape[0], 1, rows, key.shape[2]).repeat(1, 1, group, 1)
    grouped = query.unflatten(1, (key.shape[1], group)).flatten(2, 3)
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=seen, scale=scale)
    if rows > 1:  # a single row is the newest, and sees itself
        out = torch.where(seen.any(-1, keepdim=True), out, 0)
    heads: Tensor = out.unflatten(2, (group, rows)).flatten(1, 2)
    return heads.transpose(1, 2)


def _needs_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
