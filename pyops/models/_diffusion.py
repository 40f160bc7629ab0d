"""MAR's head: a small network that turns a token's condition into a sample of the token, by denoising.

A residual MLP whose layer norms are shifted, scaled and gated by the condition and the time step (AdaLN), and DDPM
sampling over a few of the 1000 time steps it was trained on, with a learned variance and classifier-free guidance.

Sources: MAR, arXiv:2406.11838, section 3; improved DDPM, arXiv:2102.09672 (cosine schedule, learned variance).
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ._graphs import Graphs

TRAINED_STEPS = 1000
FREQUENCIES = 128  # of the sinusoidal embedding of a time step
NORM_EPS = 1e-6


class Schedule:
    """The variances of a diffusion over some of the trained time steps; all tensors are float64 on the CPU.

    Args:
        steps: how many, evenly spread from the first to the last.
    """

    def __init__(self, steps: int) -> None:
        if not 2 <= steps <= TRAINED_STEPS:
            raise ValueError(f"Schedule: steps must be from 2 to {TRAINED_STEPS}, got {steps}")
        kept = cosine_signal()
        spread = [round(i * (TRAINED_STEPS - 1) / (steps - 1)) for i in range(steps)]
        self.times = torch.tensor(spread)  # of the trained diffusion
        self.signal = kept[self.times]  # the variance that is left of the data
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.signal[:-1]])
        beta = 1 - self.signal / before
        posterior = beta * (1 - before) / (1 - self.signal)
        self.log_beta = beta.log()
        # The first step's is 0, and its logarithm is never used but to be interpolated: it takes the second's.
        self.log_posterior = torch.cat([posterior[1:2], posterior[1:]]).log()
        self.from_data = beta * before.sqrt() / (1 - self.signal)  # weights of the posterior's mean
        self.from_noisy = (1 - before) * (1 - beta).sqrt() / (1 - self.signal)

    def table(self) -> Tensor:
        """[steps, 6]: what DiffusionHead._denoise multiplies with in each step, the first one (the noisiest) first."""
        noise, data = (1 - self.signal).sqrt(), self.signal.sqrt()
        columns = [noise, data, self.from_data, self.from_noisy, self.log_beta, self.log_posterior]
        return torch.stack(columns, dim=1).flip(0)

    def __len__(self) -> int:
        return len(self.times)


@functools.cache
def schedule(steps: int) -> Schedule:
    """A Schedule, made once."""
    return Schedule(steps)


@functools.cache
def cosine_signal() -> Tensor:
    """[TRAINED_STEPS] float64: the variance of the data that is left after each time step."""
    time = torch.arange(TRAINED_STEPS + 1, dtype=torch.float64) / TRAINED_STEPS
    signal = ((time + 0.008) / 1.008 * math.pi / 2).cos().square()
    beta = (1 - signal[1:] / signal[:-1]).clamp(max=0.999)
    return (1 - beta).cumprod(0)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """What AdaLN does to a normalised x."""
    return x * (1 + scale) + shift


class TimeEmbedding(nn.Module):
    """Sines and cosines of a time step through two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, time: Tensor) -> Tensor:
        """[N, width] of N time steps."""
        rate = torch.exp(torch.arange(FREQUENCIES, device=time.device) * (-math.log(10000) / FREQUENCIES))
        angle = time.float()[:, None] * rate
        waves = torch.cat([angle.cos(), angle.sin()], dim=1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))  # type: ignore[no-any-return]


class ResidualBlock(nn.Module):
    """x + gate * MLP(modulated norm of x)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.in_ln = nn.LayerNorm(width, eps=NORM_EPS)
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 3 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[N, width]; y is the activated embedding of condition and time, the same for all blocks."""
        shift, scale, gate = self.adaLN_modulation[1](y).chunk(3, dim=-1)
        return x + gate * self.mlp(modulate(self.in_ln(x), shift, scale))  # type: ignore[no-any-return]


class FinalLayer(nn.Module):
    """A modulated norm and a projection to the outputs."""

    def __init__(self, width: int, outputs: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """[N, outputs], y as in ResidualBlock."""
        shift, scale = self.adaLN_modulation[1](y).chunk(2, dim=-1)
        normed = F.layer_norm(x, x.shape[-1:], eps=NORM_EPS)
        return self.linear(modulate(normed, shift, scale))  # type: ignore[no-any-return]


class Denoiser(nn.Module):
    """The network: (noise, variance) predicted from a noisy token, its time step and its condition."""

    def __init__(self, token_dim: int, condition: int, width: int, depth: int) -> None:
        super().__init__()
        self.time_embed = TimeEmbedding(width)
        self.cond_embed = nn.Linear(condition, width)
        self.input_proj = nn.Linear(token_dim, width)
        self.res_blocks = nn.ModuleList(ResidualBlock(width) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token_dim)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """[N, 2 token_dim] of x [N, token_dim]; `embedding` is cond_embed(condition) + time_embed(time)."""
        hidden, embedding = self.input_proj(x), F.silu(embedding)
        for block in self.res_blocks:
            hidden = block(hidden, embedding)
        return self.final_layer(hidden, embedding)  # type: ignore[no-any-return]


class DiffusionHead(nn.Module):
    """Samples tokens given their conditions.

    Args:
        token_dim: elements of a token.
        condition: elements of a condition.
        width: of the network.
        depth: its residual blocks.
    """

    def __init__(self, token_dim: int, condition: int, width: int, depth: int) -> None:
        super().__init__()
        self.token_dim = token_dim
        self.net = Denoiser(token_dim, condition, width, depth)
        self.graphs = False  # whether, on a GPU, a denoising step is a CUDA graph: few rows leave the GPU waiting
        self._graphs = Graphs()

    @torch.no_grad()
    def sample(
        self,
        z: Tensor,
        *,
        steps: int = 100,
        temperature: float = 1.0,
        cfg: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """[N, token_dim] fp32 for conditions z [N, D]; with cfg, z is [2 N, D]: N conditional, then N unconditional.

        The state is fp32, the network computes in its weights' dtype. Noise is drawn from `generator` on its device
        (z's own when None), the same whether guided or not.
        """
        plan, count = schedule(steps), z.shape[0] // (1 if cfg is None else 2)
        device = z.device if generator is None else generator.device
        noise = torch.randn(steps, count, self.token_dim, generator=generator, device=device).to(z.device)
        x, nothing = noise[0].clone(), torch.zeros_like(noise[:1])  # the last step adds none
        weight = self.net.input_proj.weight
        state = (
            x, torch.zeros(1, dtype=torch.int64, device=z.device), torch.cat([noise[1:] * temperature, nothing]),
            plan.table().to(z.device, torch.float32), self.net.time_embed(plan.times.flip(0).to(z.device)),
            self.net.cond_embed(z.to(weight.dtype)), torch.tensor(1.0 if cfg is None else cfg, device=z.device),
        )  # fmt: skip
        if not (self.graphs and z.is_cuda):
            for _ in range(steps):
                self._denoise(*state)
            return x
        captured = self._graphs.load(self._denoise, *state, key=weight.data_ptr())
        for _ in range(steps):
            captured.replay()
        return captured.given[0].clone()

    def _denoise(
        self, x: Tensor, at: Tensor, noise: Tensor, table: Tensor, times: Tensor, condition: Tensor, cfg: Tensor
    ) -> None:
        """Step `at` [1] in place: x [N, token_dim] becomes the next one's, and `at` its number.

        `noise`, `table` and `times` hold a row for each step; `condition` has N rows, or 2 N with guidance.
        """
        guided = len(condition) > len(x)
        given = torch.cat([x, x]) if guided else x
        embedding = condition + times.index_select(0, at)
        eps, spread = self.net(given.to(embedding.dtype), embedding).float().chunk(2, dim=1)
        if guided:
            conditional, unconditional = eps.chunk(2)
            eps, spread = unconditional + cfg * (conditional - unconditional), spread[: len(x)]
        of_eps, of_data, from_data, from_noisy, log_beta, log_posterior = table.index_select(0, at)[0].unbind()
        mean = from_data * ((x - of_eps * eps) / of_data) + from_noisy * x
        part = (spread + 1) / 2
        log_variance = part * log_beta + (1 - part) * log_posterior
        x.copy_(mean + (log_variance / 2).exp() * noise.index_select(0, at)[0])
        at.add_(1)
