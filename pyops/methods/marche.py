"""MARché: MAR generation that computes again, at most steps, only the tokens whose state changes.

A step computes an active set of rows: the tokens to be generated, those generated just before (their input changed from
a mask to a token), and as many others as fit, those that the tokens to be generated attend to most. All other rows give
only the keys and values that they had when they were computed last. Every few steps all rows are computed.

The first layers, up to the one whose attention selects, always run in full: a row that is to be refreshed in the layers
behind needs its present state. There, attention is fastops.split_attn over the active keys and the cached ones that are
not active, and fastops.kv_scatter puts the active ones into the cache.

No training, and no change of the model: with refresh=1, or with an active set of all rows, it is MAR.

Source: MARché, arXiv:2506.12035. Not in the paper, and ours: that the first step refreshes, that a token generated just
before is active, how the encoder goes about it, and what the halves of guidance do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models._graphs import Graphs
from ..models.mar import Block, Mar, MarConfig, tokens_a_step
from ..ops.attn_received import attn_received
from ..ops.kv_append import kv_scatter
from ..ops.split_attn import split_attn

__all__ = ["Marche", "MarcheConfig", "generate", "rows_computed"]

HALVES = ("each", "conditional", "sum")


@dataclass(frozen=True)
class MarcheConfig:
    """What MARché may vary; the defaults are the paper's.

    Args:
        active: rows of the decoder that a step computes behind the selection layer; more where the tokens that must be
            active are more.
        refresh: every refresh-th step computes all rows, the first one included; 1 is MAR.
        selection_layer: the layer, counted from 1, whose attention selects; layers up to it always run in full.
        encoder: whether the encoder computes an active set too; else it always runs in full.
        encoder_active: rows of the encoder that a step computes behind its selection layer.
        encoder_selection_layer: as selection_layer.
        encoder_buffer: whether the buffer tokens are always active in the encoder, in addition to encoder_active.
        halves: whose attention selects under classifier-free guidance: "each" half's its own rows, the "conditional"
            one's for both, or the "sum" of both for both.
        graphs: whether the layers behind the selection layer run as CUDA graphs on a GPU, which takes the host out of
            them; parameters must not move meanwhile.
    """

    active: int = 64
    refresh: int = 3
    selection_layer: int = 2
    encoder: bool = True
    encoder_active: int = 64
    encoder_selection_layer: int = 2
    encoder_buffer: bool = False
    halves: str = "each"
    graphs: bool = False

    def __post_init__(self) -> None:
        for name in ("refresh", "selection_layer", "encoder_selection_layer"):
            if getattr(self, name) < 1:
                raise ValueError(f"MarcheConfig: {name} must be at least 1, got {getattr(self, name)}")
        for name in ("active", "encoder_active"):
            if getattr(self, name) < 0:
                raise ValueError(f"MarcheConfig: {name} must not be negative, got {getattr(self, name)}")
        if self.halves not in HALVES:
            raise ValueError(f"MarcheConfig: halves must be one of {', '.join(HALVES)}, got {self.halves!r}")


class CachedStack:
    """Transformer blocks that remember the keys, values and outputs of rows.

    Args:
        blocks: of the encoder or the decoder.
        whole: how many of them, all at most, always run in full.
        slots: rows that there can be.
        halves: MarcheConfig.halves, or "each" where nothing is guided.
        graphs: MarcheConfig.graphs.
    """

    def __init__(self, blocks: Iterable[nn.Module], whole: int, slots: int, halves: str, graphs: bool = False) -> None:
        all_blocks = [cast(Block, block) for block in blocks]
        self.first, self.later = all_blocks[:whole], all_blocks[whole:]
        self.slots, self.halves, self.graphs = slots, halves, graphs
        self.caches: list[tuple[Tensor, Tensor]] = []
        self._graphs = Graphs()
        self.out: Tensor | None = None

    def refresh(self, x: Tensor) -> Tensor:
        """The output for all rows of x [B, n, width], which becomes what is remembered."""
        batch, n, width = x.shape
        kept = self.out is not None and self.out.shape[0] == batch and self.out.dtype == x.dtype
        if self.out is None or not kept or self.out.is_inference() != torch.is_inference_mode_enabled():
            self.out, self.caches, self._graphs = x.new_empty(batch, self.slots, width), [], Graphs()
        for block in self.first:
            x = block(x)
        for i, block in enumerate(self.later):
            q, k, v = block.project(x)
            if i == len(self.caches):  # of k's dtype, which under torch.autocast is not that of x
                shape = (*k.shape[:2], self.slots, k.shape[3])
                self.caches.append((k.new_empty(shape), v.new_empty(shape)))
            k_cache, v_cache = self.caches[i]
            k_cache[:, :, :n] = k
            v_cache[:, :, :n] = v
            x = block.finish(x, F.scaled_dot_product_attention(q, k, v))
        self.out[:, :n] = x
        return x

    def update(self, x: Tensor, asking: range, must: Sequence[range], size: int) -> Tensor:
        """The output for all rows of x [B, n, width], most of them as remembered.

        Args:
            x: the input of all rows; what is remembered must be of the same rows but for those in `must`.
            asking: the rows whose attention selects, at least one.
            must: the rows that are computed in any case; the ranges are apart from each other.
            size: rows to compute, where `must` are fewer.
        """
        assert self.out is not None
        n = x.shape[1]
        for block in self.first[:-1]:
            x = block(x)
        q, k, v = self.first[-1].project(x)
        active = self._select(q[:, :, asking.start : asking.stop], k, must, min(size, n) - sum(map(len, must)))
        x = self.first[-1].finish(x, F.scaled_dot_product_attention(q, k, v))
        cached = torch.zeros(x.shape[0], self.slots, dtype=torch.bool, device=x.device)
        cached[:, :n] = True
        cached.scatter_(1, active, False)
        where = active[:, :, None].expand(-1, -1, x.shape[2])
        given = x.gather(1, where), active.int(), cached
        if self.graphs and self.later and x.is_cuda:
            x = self._graphs.load(self._later, *given).replay()
        else:
            x = self._later(*given)
        return self.out[:, :n].scatter_(1, where, x)

    def _later(self, x: Tensor, index: Tensor, cached: Tensor) -> Tensor:
        """The later blocks on active rows x [B, A, width] at `index` [B, A], beside the `cached` [B, slots] ones.

        No size depends on how many rows are known, so that one CUDA graph serves all steps.
        """
        for block, (k_cache, v_cache) in zip(self.later, self.caches, strict=True):
            q, k, v = block.project(x)
            out, _ = split_attn(q, k, v, k_cache, v_cache, cached_mask=cached)
            kv_scatter(k_cache, v_cache, k, v, index)
            x = block.finish(x, out)
        return x

    def _select(self, q: Tensor, k: Tensor, must: Sequence[range], more: int) -> Tensor:
        """[B, rows] int64: `must` and the `more` other rows that receive most attention from q."""
        chosen = torch.cat([torch.arange(r.start, r.stop, device=q.device) for r in must]).expand(q.shape[0], -1)
        if more <= 0:
            return chosen
        received = attn_received(q, k)
        if self.halves != "each":
            conditional, free = received.chunk(2)
            received = (conditional if self.halves == "conditional" else conditional + free).repeat(2, 1)
        received = received.scatter(1, chosen, -1.0)  # behind every row that is not there already
        return torch.cat([chosen, received.topk(more, dim=1, sorted=False).indices], dim=1)


class Marche:
    """Mar.predict in less time; give its predict to Mar.generate. One object serves one generation at a time.

    Args:
        mar: the model.
        config: what may vary.
        guided: whether the rows are two halves, conditional and not, as Mar.generate makes them with cfg other than 1.
    """

    def __init__(self, mar: Mar, config: MarcheConfig | None = None, guided: bool = False) -> None:
        self.mar, self.config = mar, config or MarcheConfig()
        halves = self.config.halves if guided else "each"
        slots = mar.config.buffer + mar.config.tokens
        depth, encoder_layers, layers = (
            mar.config.depth,
            self.config.encoder_selection_layer,
            self.config.selection_layer,
        )
        graphs = self.config.graphs
        self.encoder = CachedStack(mar.encoder_blocks, min(encoder_layers, depth), slots, halves, graphs)
        self.decoder = CachedStack(mar.decoder_blocks, min(layers, depth), slots, halves, graphs)
        self._step, self._known = 0, 0

    @torch.no_grad()
    def predict(self, tokens: Tensor, condition: Tensor, places: Tensor, count: int) -> Tensor:
        """As Mar.predict; call it step after step of one generation, which starts where no token is known."""
        n, buffer, config = tokens.shape[1], self.mar.config.buffer, self.config
        if n == 0:
            self._step = 0
        elif n <= self._known:
            raise ValueError(f"Marche.predict: tokens must be more than the last step's {self._known}, got {n}")
        new = n - self._known if self._step else 0
        refresh = self._step % config.refresh == 0
        x = self.mar.encoder_input(tokens, condition, places)
        if not config.encoder:
            x = self.mar.encode(x)
        elif refresh or buffer + n <= config.encoder_active:
            x = self.mar.encoder_norm(self.encoder.refresh(x))
        else:
            asking = range(buffer + n - new, buffer + n)
            must = [range(buffer), asking] if config.encoder_buffer else [asking]
            size = config.encoder_active + (buffer if config.encoder_buffer else 0)
            x = self.mar.encoder_norm(self.encoder.update(x, asking, must, size))
        x = self.mar.decoder_input(x, places)
        asked = range(buffer + n, buffer + n + count)
        if refresh:
            x = self.decoder.refresh(x)
        else:
            x = self.decoder.update(x, asked, [range(asked.start - new, asked.stop)], config.active)
        self._step, self._known = self._step + 1, n
        decoded: Tensor = self.mar.decoder_norm(x[:, asked.start : asked.stop])
        return self.mar.head_input(decoded, places[:, n : n + count])


def generate(
    mar: Mar, labels: Tensor, *, config: MarcheConfig | None = None, cfg: float = 1.0, **options: Any
) -> Tensor:
    """mar.generate(labels, ...) by MARché.

    Args:
        mar: the model.
        labels: as Mar.generate.
        config: what MARché may vary.
        cfg: as Mar.generate.
        **options: further arguments of Mar.generate.
    """
    marche = Marche(mar, config, guided=cfg != 1.0)
    return mar.generate(labels, cfg=cfg, predict=marche.predict, **options)


def rows_computed(model: MarConfig, steps: int, config: MarcheConfig | None = None) -> tuple[int, int]:
    """Rows times layers that MAR and MARché compute for a sample: their ratio bounds what MARché can gain."""
    config = config or MarcheConfig()
    whole = min(config.selection_layer, model.depth), min(config.encoder_selection_layer, model.depth)
    known = new = all_rows = some_rows = 0
    for step, count in enumerate(tokens_a_step(model.tokens, steps)):
        rows = model.buffer + model.tokens, model.buffer + known
        all_rows += model.depth * sum(rows)
        active = min(rows[0], max(config.active, new + count)), rows[1]
        if config.encoder and rows[1] > config.encoder_active:
            extra = model.buffer if config.encoder_buffer else 0
            active = active[0], min(rows[1], max(config.encoder_active, new) + extra)
        if step % config.refresh == 0:
            active = rows
        for side in range(2):
            some_rows += whole[side] * rows[side] + (model.depth - whole[side]) * active[side]
        known, new = known + count, count
    return all_rows, some_rows
