"""One small decoder that the methods plug into: Llama, Mistral, Qwen2, Qwen3 and OPT, exact against Hugging Face.

    decoder = Decoder.from_pretrained("SmolLM2-135M-Instruct.Q4_1.gguf", weights="nf4")
    for text in decoder.generate(["The capital of France is"], max_new_tokens=32): print(text)

The parts that vary plug in: the cache (caches.py), the attention (`FullAttention` here), the choice of tokens
(Sampling) and the way a step makes them (generation.py's `OneToken`). docs/decoder.md shows how to write one's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..ops.decode_attn import decode_attn
from ..ops.prefill_attn import prefill_attn
from . import _loading
from ._architecture import Architecture
from ._glue import glue
from ._linear import Dense, Nf4
from ._rows import Rows
from .caches import KVCache, Layer, UpfrontCache, per_sequence


class Attention(Protocol):
    """Attention of the new rows of a layer over its cache: the part that chooses what is read."""

    def __call__(self, layer: int, q: Tensor, cache: Layer, rows: Rows, window: int | None) -> Tensor:
        """[N, Hq, D] of q [N, Hq, D]; the cache holds the new rows already."""


class FullAttention:
    """Every row that the mask allows."""

    def __call__(self, layer: int, q: Tensor, cache: Layer, rows: Rows, window: int | None) -> Tensor:
        """decode_attn for few rows a sequence, prefill_attn for packed ones."""
        k, v, table = cache
        if rows.starts is not None:
            longest = max(rows.counts, default=0)
            return prefill_attn(q, k, v, rows.starts, rows.after, longest, block_table=table, window=window)[0]
        out, _ = decode_attn(
            per_sequence(q, rows.width), k, v, rows.after,
            tree_mask=rows.tree_mask, block_table=table, q_lens=rows.q_lens, window=window,
        )  # fmt: skip
        return out.transpose(1, 2).flatten(0, 1)


class Block(nn.Module):
    """The weights of a layer; norms are [H], qk_norm [Hq + Hkv, D]."""

    input_norm: Tensor
    input_bias: Tensor | None
    mlp_norm: Tensor
    mlp_bias: Tensor | None
    qk_norm: Tensor | None

    def __init__(
        self,
        qkv: Dense | Nf4,
        out: Dense | Nf4,
        up: Dense | Nf4,
        down: Dense | Nf4,
        norms: dict[str, Tensor | None],
    ) -> None:
        super().__init__()
        self.qkv, self.out, self.up, self.down = qkv, out, up, down
        for name, value in norms.items():
            self.register_buffer(name, value)


class Decoder(nn.Module):
    """A decoder-only transformer, and text from it.

    Build it with `from_hf` or `from_pretrained`. It computes in the type of its weights, keeps residuals in it too, and
    never records gradients.

    Args:
        architecture: its sizes.
        blocks: its layers.
        embedding: [V, H].
        head: the product that makes logits.
        norm, norm_bias: the last norm.
        positions: learned positions [max_positions + offset, H], or None.
        frequencies: rotary frequencies [R / 2] fp32, or None.
        rotary_scale: of cos and sin.
        compiled: glue through torch.compile; on a GPU when None.
        tokenizer: a transformers tokenizer, for prompts and stop strings that are text.
    """

    embedding: Tensor
    norm: Tensor
    norm_bias: Tensor | None
    positions: Tensor | None
    frequencies: Tensor | None

    def __init__(
        self,
        architecture: Architecture,
        blocks: Sequence[Block],
        embedding: Tensor,
        head: Dense | Nf4,
        norm: Tensor,
        norm_bias: Tensor | None = None,
        positions: Tensor | None = None,
        frequencies: Tensor | None = None,
        rotary_scale: float = 1.0,
        compiled: bool | None = None,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        self.architecture, self.tokenizer, self.rotary_scale = architecture, tokenizer, rotary_scale
        self.blocks, self.head = nn.ModuleList(blocks), head
        for name, value in (
            ("embedding", embedding), ("norm", norm), ("norm_bias", norm_bias), ("positions", positions),
            ("frequencies", frequencies),
        ):  # fmt: skip
            self.register_buffer(name, value)
        self.compiled = compiled
        self._angles: tuple[Tensor, Tensor] | None = None
        self._eps: Tensor | None = None

    @classmethod
    def from_hf(
        cls,
        model: Any,
        *,
        weights: str = "dense",
        blocksize: int = 64,
        nf4_head: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        compiled: bool | None = None,
        tokenizer: Any = None,
        progress: bool = False,
    ) -> Decoder:
        """From a Hugging Face model in memory, which stays as it is.

        Args:
            model: a LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM or OPTForCausalLM with
                dense weights.
            weights: "dense", or "nf4" for linear layers in 4 bits.
            blocksize: weights a block of NF4.
            nf4_head: the head in 4 bits too.
            dtype, device: of the decoder; the model's when None.
            compiled: glue through torch.compile; on a GPU when None.
            tokenizer: its tokenizer, for text.
            progress: show a bar while layers are taken over.

        Raises:
            ValueError: naming the feature, or the argument, that is not supported.
        """
        parts = _loading.take(model, weights, blocksize, nf4_head, dtype, device, progress)
        return cls(**parts, compiled=compiled, tokenizer=tokenizer).eval()

    @classmethod
    def from_pretrained(cls, path: str | Path, *, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Decoder:
        """From a folder that save_pretrained wrote, or a GGUF file, by way of transformers; nothing is downloaded.

        Args:
            path: the folder or the file.
            dtype: of the decoder's weights.
            **options: as from_hf's.

        Raises:
            FileNotFoundError: there is no such folder or file.
            ValueError: a family or feature that is not supported, or tensors that the file lacks.
        """
        model, tokenizer = _loading.load(Path(path), dtype)
        return cls.from_hf(model, dtype=dtype, **{"tokenizer": tokenizer, **options})

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """What it computes in."""
        return self.embedding.dtype

    @property
    def step_bytes(self) -> int:
        """Bytes of weights that one step must read, whatever the batch: linear layers, head and norms."""
        small = sum(b.numel() * b.element_size() for block in self.blocks for b in block.buffers(recurse=False))
        products = [m.weight_bytes for m in self.modules() if isinstance(m, (Dense, Nf4))]
        return sum(products) + small + self.norm.numel() * self.norm.element_size()

    @property
    def memory(self) -> tuple[int, int]:
        """Bytes of (the layers' products, all weights)."""
        linear = sum(m.weight_bytes for block in self.blocks for m in block.children() if isinstance(m, (Dense, Nf4)))
        shared = isinstance(self.head, Dense) and self.head.is_held(self.embedding)
        own = [m for m in self.modules() if not isinstance(m, (Dense, Nf4))]
        rest = sum(b.numel() * b.element_size() for m in own for b in m.buffers(recurse=False))
        return linear, linear + rest + (0 if shared else self.head.weight_bytes)

    @property
    def glue(self) -> Any:
        """The functions between the products, compiled or not."""
        compiled = self.device.type == "cuda" if self.compiled is None else self.compiled
        return glue(compiled, self.dtype, self.norm_bias is None) if compiled else glue(False)

    def embed(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """[N, H] of tokens [N] at positions [N]."""
        x = self.embedding[tokens]
        return x if self.positions is None else x + self.positions[positions + self.architecture.position_offset]

    def eps(self, bias: Tensor | None) -> float | Tensor:
        """The norms', as add_norm wants it: [1] fp32 for RMSNorm."""
        if bias is not None:
            return self.architecture.eps
        if self._eps is None or self._eps.device != self.device:
            self._eps = torch.tensor([self.architecture.eps], device=self.device)
        return self._eps

    def angles(self, positions: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """cos and sin [N, 1, R] fp32 of the rotary embedding at positions [N], for both halves of what it rotates.

        The first half's sin is negated, as the rotation wants it: x cos + (x with its halves swapped) sin.
        """
        if self.frequencies is None:
            return None, None
        cos, sin = (table[positions][:, None] for table in self.angle_table)
        return torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1)

    @property
    def angle_table(self) -> tuple[Tensor, Tensor]:
        """cos and sin of every position, [max_positions, R / 2] fp32."""
        assert self.frequencies is not None
        if self._angles is None or self._angles[0].device != self.device:
            places = torch.arange(self.architecture.max_positions, device=self.device, dtype=torch.float32)
            angle = places[:, None] * self.frequencies.float()
            self._angles = angle.cos() * self.rotary_scale, angle.sin() * self.rotary_scale
        return self._angles

    def layer(
        self,
        index: int,
        x: Tensor,
        delta: Tensor | None,
        angles: tuple[Tensor | None, Tensor | None],
        rows: Rows,
        cache: KVCache,
        attention: Attention,
    ) -> tuple[Tensor, Tensor]:
        """One layer: (x, delta), whose sum [N, H] is its output, from those of the layer before.

        The sum is left for the next norm to do, with which it is one pass over memory.
        """
        a, fused, block = self.architecture, self.glue, self.blocks[index]
        assert isinstance(block, Block)
        eps = self.eps(block.input_bias)
        x, h = fused.add_norm(x, delta, block.input_norm, block.input_bias, eps)
        append_input = getattr(cache, "append_input", None)
        if append_input is not None:
            append_input(index, h, rows)
        q, k, v = fused.split_heads(block.qkv(h), *angles, block.qk_norm, eps, a.heads, a.kv_heads)
        cache.append(index, k, v, rows)
        attended = attention(index, q, cache.layer(index), rows, a.windows[index])
        x, h = fused.add_norm(x, block.out(attended.flatten(1)), block.mlp_norm, block.mlp_bias, eps)
        return x, block.down(fused.activate(block.up(h), a.gated))

    def normed(self, x: Tensor, delta: Tensor | None) -> Tensor:
        """What the head multiplies, [N, H]."""
        hidden: Tensor = self.glue.add_norm(x, delta, self.norm, self.norm_bias, self.eps(self.norm_bias))[1]
        return hidden

    @torch.no_grad()
    def hidden(
        self, tokens: Tensor, rows: Rows, cache: KVCache, attention: Attention, wanted: Tensor | slice | None = None
    ) -> Tensor:
        """The normed output of the last layer for rows `wanted` (all when None) of tokens [N]; the cache advances."""
        x, delta = self.embed(tokens, rows.positions), None
        angles = self.angles(rows.positions)
        for index in range(self.architecture.layers):
            x, delta = self.layer(index, x, delta, angles, rows, cache, attention)
        cache.advance(rows.after)
        if wanted is not None:
            x, delta = x[wanted], None if delta is None else delta[wanted]
        return self.normed(x, delta)

    @torch.no_grad()
    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, V] of token ids [B, T], each row seeing those before it; for scores, not for generation."""
        batch, width = tokens.shape
        cache = UpfrontCache()
        cache.start(self.architecture, batch, width, self.device, self.dtype)
        rows = Rows.packed([0] * batch, [width] * batch, self.device)
        hidden = self.hidden(tokens.reshape(-1), rows, cache, FullAttention())
        logits: Tensor = self.head(hidden).unflatten(0, (batch, width))
        return logits

    def generate(self, prompts: Any, max_new_tokens: int, **options: Any) -> Any:
        """Continue each prompt by up to max_new_tokens tokens.

        Args:
            prompts: texts (needs a tokenizer), or token ids: a list of lists of any lengths, or a tensor [B, N].
            max_new_tokens: at most this many a sequence.
            **options: as stream()'s.

        Returns:
            The new tokens of each prompt as a list, without what ended it; texts where prompts are texts.

        Raises:
            ValueError: naming the argument, what it must be and what it is.
        """
        from . import generation

        return generation.generate(self, prompts, max_new_tokens, **options)

    def stream(self, prompts: Any, max_new_tokens: int, **options: Any) -> Iterator[list[list[int]]]:
        """As generate(), a step at a time: the new tokens of each sequence, none of those that have ended.

        Args:
            prompts: as generate()'s.
            max_new_tokens: at most this many a sequence.
            **options: temperature, top_k, top_p, seed (see Sampling; greedy by default); eos (ids that end a sequence;
                the model's own when None); stop (strings that end a sequence); cache, attention, decoding (parts of
                one's own); chunk (tokens of prompts in one pass); graphs (capture steps; on a GPU when None);
                progress (show a bar).
        """
        from . import generation

        return generation.stream(self, prompts, max_new_tokens, **options)
