"""MAR: images from a masked autoregressive transformer over continuous tokens, each sampled by a diffusion head.

The names and shapes of the parameters are those of the official MAR-B, -L and -H checkpoints, which load as they are.

Inside, the tokens of a sample stand in the order in which they are generated, behind the buffer tokens. Attention does
not mind, positions are added by table, and in every sample the same rows are known, generated or still masked, whatever
the samples' own orders are.

Source: Autoregressive Image Generation without Vector Quantization, arXiv:2406.11838.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._diffusion import NORM_EPS, DiffusionHead

CFG_SCHEDULES = ("linear", "constant")


@dataclass(frozen=True)
class MarConfig:
    """Sizes of a MAR.

    Args:
        width: of the transformer.
        depth: blocks of the encoder, and as many of the decoder.
        heads: of attention.
        head_width: of the diffusion head.
        head_depth: its residual blocks.
        tokens: in an image.
        token_dim: elements of a token.
        buffer: class tokens in front of an image's.
        classes: labels.
    """

    width: int = 768
    depth: int = 12
    heads: int = 12
    head_width: int = 1024
    head_depth: int = 6
    tokens: int = 256
    token_dim: int = 16
    buffer: int = 64
    classes: int = 1000


MAR_BASE = MarConfig()
MAR_LARGE = MarConfig(width=1024, depth=16, heads=16, head_width=1280, head_depth=8)
MAR_HUGE = MarConfig(width=1280, depth=20, heads=16, head_width=1536, head_depth=12)


class Attention(nn.Module):
    """The projections of multi-head attention; who attends to what is the caller's."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v [B, H, N, D] of x [B, N, width]; views of one tensor."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return q, k, v

    def join(self, out: Tensor) -> Tensor:
        """[B, N, width] of out [B, H, N, D]."""
        return self.proj(out.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class Mlp(nn.Module):
    """Two layers with a GELU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width]."""
        return self.fc2(F.gelu(self.fc1(x)))  # type: ignore[no-any-return]


class Block(nn.Module):
    """A pre-norm transformer block, in halves between which attention can be anything."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=NORM_EPS)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = Mlp(width)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v [B, H, N, D] of the normed x [B, N, width]."""
        return self.attn.project(self.norm1(x))

    def finish(self, x: Tensor, out: Tensor) -> Tensor:
        """x after attention gave `out` [B, H, N, D] and the MLP its part."""
        x = x + self.attn.join(out)
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Full attention among the rows of x [B, N, width]."""
        return self.finish(x, F.scaled_dot_product_attention(*self.project(x)))


class Predict(Protocol):
    """What a generation step asks for: Mar.predict, or a method that does it in less time."""

    def __call__(self, tokens: Tensor, condition: Tensor, places: Tensor, count: int) -> Tensor:
        """As Mar.predict; called once a step, with more tokens each time, from none on."""


class Mar(nn.Module):
    """The model; random weights until a state dict is loaded.

    mar = Mar(fastops.models.MAR_BASE)
    mar.load_state_dict(torch.load("checkpoint-last.pth")["model_ema"])
    latents = mar.generate(torch.tensor([207, 360]), cfg=2.9)  # [2, 256, 16], for the VAE's decoder
    """

    def __init__(self, config: MarConfig = MAR_BASE) -> None:
        super().__init__()
        self.config = config
        width, rows = config.width, config.buffer + config.tokens

        def learned(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape) * 0.02)

        self.fake_latent = learned(1, width)  # the condition of no class
        self.encoder_pos_embed_learned = learned(1, rows, width)
        self.decoder_pos_embed_learned = learned(1, rows, width)
        self.diffusion_pos_embed_learned = learned(1, config.tokens, width)
        self.mask_token = learned(1, 1, width)
        self.class_emb = nn.Embedding(config.classes, width)
        self.z_proj = nn.Linear(config.token_dim, width)
        self.z_proj_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.encoder_blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.encoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.decoder_embed = nn.Linear(width, width)
        self.decoder_blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.decoder_norm = nn.LayerNorm(width, eps=NORM_EPS)
        self.diffloss = DiffusionHead(config.token_dim, width, config.head_width, config.head_depth)

    def _rows(self, places: Tensor) -> Tensor:
        """Rows of the position tables: the buffer's, then those of `places` [B, n]."""
        buffer = torch.arange(self.config.buffer, device=places.device).expand(places.shape[0], -1)
        return torch.cat([buffer, places + self.config.buffer], dim=1)

    def encoder_input(self, tokens: Tensor, condition: Tensor, places: Tensor) -> Tensor:
        """[B, buffer + n, width] of the n known tokens [B, n, token_dim]; only the first n `places` are used."""
        n = tokens.shape[1]
        buffer = condition[:, None].expand(-1, self.config.buffer, -1)
        x = torch.cat([buffer, self.z_proj(tokens.to(buffer.dtype))], dim=1)
        # Not by indexing, here and below: its gradient adds in any order, and a training would not repeat.
        x = x + F.embedding(self._rows(places[:, :n]), self.encoder_pos_embed_learned[0])
        return self.z_proj_ln(x)  # type: ignore[no-any-return]

    def encode(self, x: Tensor) -> Tensor:
        """The encoder's output for its input."""
        for block in self.encoder_blocks:
            x = block(x)
        return self.encoder_norm(x)  # type: ignore[no-any-return]

    def decoder_input(self, encoded: Tensor, places: Tensor) -> Tensor:
        """[B, buffer + tokens, width] of the encoder's output [B, buffer + n, width]: the rest are mask tokens."""
        x = self.decoder_embed(encoded)
        masked = self.mask_token.expand(x.shape[0], self.config.buffer + self.config.tokens - x.shape[1], -1)
        return torch.cat([x, masked], dim=1) + F.embedding(self._rows(places), self.decoder_pos_embed_learned[0])

    def decode(self, x: Tensor) -> Tensor:
        """The decoder's output for its input."""
        for block in self.decoder_blocks:
            x = block(x)
        return self.decoder_norm(x)  # type: ignore[no-any-return]

    def head_input(self, decoded: Tensor, places: Tensor) -> Tensor:
        """The diffusion head's conditions [B, n, width] of decoded tokens [B, n, width] and their places [B, n]."""
        return decoded + F.embedding(places, self.diffusion_pos_embed_learned[0])

    def predict(self, tokens: Tensor, condition: Tensor, places: Tensor, count: int) -> Tensor:
        """The diffusion head's conditions of the next tokens.

        Args:
            tokens: [B, n, token_dim], the tokens known so far, in the order of their generation.
            condition: [B, width], the embedding of the class.
            places: [B, config.tokens] int64: where in the image the i-th token to be generated lies.
            count: tokens to predict.

        Returns:
            [B, count, width] for tokens n to n + count - 1.
        """
        n = tokens.shape[1]
        encoded = self.encode(self.encoder_input(tokens, condition, places))
        decoded = self.decode(self.decoder_input(encoded, places))
        first = self.config.buffer + n
        return self.head_input(decoded[:, first : first + count], places[:, n : n + count])

    def conditions(self, labels: Tensor, guided: bool) -> Tensor:
        """[B, width] of the labels [B], or [2 B, width] with as many of no class behind them."""
        known: Tensor = self.class_emb(labels)
        return torch.cat([known, self.fake_latent.expand_as(known)]) if guided else known

    def compile_glue(self, graphs: bool = False, **options: Any) -> Mar:
        """Put what lies around attention, and the diffusion head's network, through torch.compile; returns self.

        Norms, projections, activations and residuals of a block become few kernels, compiled once for all blocks and
        sizes; attention, and what methods do in its place, stays as it is. Parameters keep their names.

        Args:
            graphs: whether the head's steps are CUDA graphs too, on a GPU: weights must stay where they are then.
            **options: further arguments of torch.compile.
        """
        self.diffloss.graphs = graphs
        for block in (*self.encoder_blocks, *self.decoder_blocks):
            for part in ("project", "finish"):
                setattr(block, part, torch.compile(getattr(block, part), dynamic=True, **options))
        self.diffloss.net.compile(dynamic=True, **options)
        return self

    @torch.no_grad()
    def generate(
        self,
        labels: Tensor,
        *,
        steps: int = 64,
        cfg: float = 1.0,
        cfg_schedule: str = "linear",
        temperature: float = 1.0,
        head_steps: int = 100,
        places: Tensor | None = None,
        generator: torch.Generator | None = None,
        predict: Predict | None = None,
    ) -> Tensor:
        """Latent images of the classes `labels`.

        Args:
            labels: [B] int64 on the model's device.
            steps: of generation, at most config.tokens; the cosine schedule says how many tokens each one adds.
            cfg: strength of classifier-free guidance; 1 is none and costs half.
            cfg_schedule: "linear", from 1 to cfg as tokens become known, or "constant".
            temperature: of the noise that the diffusion head adds.
            head_steps: of the diffusion head.
            places: [B, config.tokens] int64, each sample's order of generation; random when None.
            generator: of all random numbers, on any device.
            predict: what computes conditions; Mar.predict when None.

        Returns:
            [B, config.tokens, token_dim] fp32, in the image's raster order.
        """
        if cfg_schedule not in CFG_SCHEDULES:
            raise ValueError(f"generate: cfg_schedule must be one of {', '.join(CFG_SCHEDULES)}, got {cfg_schedule!r}")
        total, guided, predict = self.config.tokens, cfg != 1.0, predict or self.predict
        if places is None:
            places = random_places(labels.shape[0], total, generator).to(labels.device)
        condition = self.conditions(labels, guided)
        twice = 2 if guided else 1
        tokens = condition.new_zeros(labels.shape[0], 0, self.config.token_dim, dtype=torch.float32)
        for count in tokens_a_step(total, steps):
            n = tokens.shape[1]
            z = predict(tokens.repeat(twice, 1, 1), condition, places.repeat(twice, 1), count)
            known = min(n + count, total - 1)  # the schedule keeps one masked to the end
            strength = cfg if cfg_schedule == "constant" else 1 + (cfg - 1) * known / total
            new = self.diffloss.sample(
                z.flatten(0, 1),
                steps=head_steps,
                temperature=temperature,
                cfg=strength if guided else None,
                generator=generator,
            )
            tokens = torch.cat([tokens, new.unflatten(0, (-1, count))], dim=1)
        return torch.empty_like(tokens).scatter_(1, places[:, :, None].expand_as(tokens), tokens)


def random_places(batch: int, tokens: int, generator: torch.Generator | None = None) -> Tensor:
    """[batch, tokens] int64: an order of generation for each sample."""
    device = None if generator is None else generator.device
    return torch.rand(batch, tokens, generator=generator, device=device).argsort(dim=1)


def tokens_a_step(tokens: int, steps: int) -> list[int]:
    """How many tokens each step adds: floor(tokens cos(pi t / 2 steps)) are masked after t, each step adds one or more.

    Raises:
        ValueError: steps is not from 1 to tokens.
    """
    if not 1 <= steps <= tokens:
        raise ValueError(f"tokens_a_step: steps must be from 1 to tokens = {tokens}, got {steps}")
    masked = [tokens]
    for step in range(1, steps):
        wanted = math.floor(tokens * math.cos(math.pi / 2 * step / steps))
        masked.append(max(1, min(masked[-1] - 1, wanted)))
    masked.append(0)
    return [before - after for before, after in itertools.pairwise(masked) if before > after]
