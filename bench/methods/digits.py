"""A small MAR trained on real images, and what judges its samples: a classifier, and a Fréchet distance.

The images are scikit-learn's digits (1797 scans of 8 x 8 pixels, from UCI), a file in its wheel; the library itself is
neither imported nor needed: an installed one, or a wheel in .models/ (pip download --no-deps -d .models scikit-learn),
will do. A token is a pixel, of the image or of its enlargement to 16 x 16.

    python -m bench.methods.digits --device cuda     # train, keep the weights in .models/, print the quality, draw

Everything is seeded; on one machine a run repeats.
"""

from __future__ import annotations

import argparse
import functools
import gzip
import hashlib
import math
import time
import zipfile
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn

from fastops.methods import Marche, MarcheConfig
from fastops.methods.marche import rows_computed
from fastops.models import Mar, MarConfig
from fastops.models._diffusion import TRAINED_STEPS, cosine_signal
from fastops.models.mar import random_places

from ..peers import Absent

KEPT = Path(__file__).parents[2] / ".models"
INSIDE = "sklearn/datasets/data/digits.csv.gz"
HELD_OUT = 360  # images that the classifier does not see
COUNTS = 24  # moments of generation that training knows


@dataclass(frozen=True)
class Setting:
    """A model, its training, and how it is sampled."""

    name: str
    side: int  # pixels, and tokens, of an edge
    model: MarConfig
    steps: int
    batch: int
    rate: float
    generation_steps: int
    head_steps: int
    cfg: float
    a_class: int  # samples of each class that are judged
    seed: int = 0


FULL = Setting(
    "digits", 16, MarConfig(192, 6, 3, 256, 3, tokens=256, token_dim=1, buffer=64, classes=10),
    steps=12000, batch=128, rate=6e-4, generation_steps=64, head_steps=50, cfg=2.0, a_class=100,
)  # fmt: skip
SMALL = Setting(
    "digits-small", 8, MarConfig(64, 3, 2, 96, 2, tokens=64, token_dim=1, buffer=8, classes=10),
    steps=800, batch=32, rate=1.5e-3, generation_steps=16, head_steps=25, cfg=2.0, a_class=20,
)  # fmt: skip
SETTINGS = {setting.name: setting for setting in (FULL, SMALL)}


def digits_file() -> bytes:
    """The rows of pixels and labels, from an installed scikit-learn or its wheel."""
    try:
        for file in metadata.files("scikit-learn") or []:
            if str(file).endswith("digits.csv.gz"):
                return Path(str(file.locate())).read_bytes()
    except metadata.PackageNotFoundError:
        pass
    for wheel in sorted(KEPT.glob("scikit_learn-*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            return archive.read(INSIDE)
    raise Absent("scikit-learn's digits are missing: pip download --no-deps -d .models scikit-learn")


@functools.cache
def images(side: int) -> tuple[Tensor, Tensor]:
    """([N, side, side] from 0 to 1, [N] labels), shuffled once and for all."""
    rows = gzip.decompress(digits_file()).decode().split()
    table = torch.tensor([[float(cell) for cell in row.split(",")] for row in rows])
    table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
    pixels = table[:, None, :-1].reshape(-1, 1, 8, 8) / 16
    if side != 8:
        pixels = F.interpolate(pixels, size=(side, side), mode="bilinear", align_corners=False)
    return pixels[:, 0], table[:, -1].long()


@functools.cache
def moments(side: int) -> tuple[float, float]:
    """Mean and deviation of a pixel: the model sees (pixel - mean) / deviation."""
    pixels, _ = images(side)
    return float(pixels.mean()), float(pixels.std())


class Classifier(nn.Module):
    """Two convolutions and a layer of features."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * (side // 2) ** 2, 64), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(64, 10)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(features [N, 64], scores [N, 10])."""
        features = self.body(pixels[:, None] - 0.3)
        return features, self.head(features)


@functools.cache
def classifier(side: int) -> tuple[Classifier, float]:
    """Trained on the CPU in seconds, and its accuracy on images that it has not seen."""
    pixels, labels = images(side)
    torch.manual_seed(0)
    net = Classifier(side)
    optimizer = torch.optim.AdamW(net.parameters(), 2e-3, weight_decay=0.05)
    seen = len(pixels) - HELD_OUT
    for _ in range(15):
        for some in torch.randperm(seen).split(64):
            loss = F.cross_entropy(net(pixels[some])[1], labels[some], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    net.eval().requires_grad_(False)
    return net, float((net(pixels[seen:])[1].argmax(1) == labels[seen:]).float().mean())


def frechet(a: Tensor, b: Tensor) -> float:
    """Fréchet distance between Gaussians with the means and covariances of two sets of features."""
    (mean_a, cov_a), (mean_b, cov_b) = ((t.double().mean(0), t.double().T.cov()) for t in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    mixed = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * mixed)


def judge(pixels: Tensor, labels: Tensor) -> tuple[float, float]:
    """(accuracy in percent, Fréchet distance to all real images) of samples [N, side, side] of these labels."""
    side = pixels.shape[1]
    net, _ = classifier(side)
    features, scores = net(pixels)
    real, _ = net(images(side)[0])
    return 100 * float((scores.argmax(1) == labels).float().mean()), frechet(features, real)


def initialise(mar: Mar) -> None:
    """Small weights; modulations and the last layer start at 0, so that the head starts as the identity."""
    for name, parameter in mar.named_parameters():
        if name.endswith("bias") or "adaLN" in name or "final_layer" in name:
            nn.init.zeros_(parameter)
        elif parameter.dim() == 2 and "emb.weight" not in name and name != "fake_latent":
            nn.init.xavier_uniform_(parameter)
        elif parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.02)


def known_counts(total: int) -> list[int]:
    """How many tokens may be known in a training step: as the cosine schedule of generation meets them, evenly."""
    moments = ((2 * i + 1) / (2 * COUNTS) for i in range(COUNTS))
    counts = (min(total - 1, math.floor(total * (1 - math.cos(math.pi / 2 * moment)))) for moment in moments)
    return list(dict.fromkeys(counts))


def loss_of(mar: Mar, tokens: Tensor, labels: Tensor, known: int, generator: torch.Generator) -> Tensor:
    """Mean squared error of the noise predicted for all but `known` tokens of a batch [B, tokens, token_dim]."""
    batch, total, device = len(tokens), mar.config.tokens, tokens.device
    places = random_places(batch, total, generator)
    ordered = tokens.gather(1, places[:, :, None].expand_as(tokens))
    dropped = torch.rand(batch, 1, generator=generator, device=device) < 0.1
    condition = torch.where(dropped, mar.fake_latent, mar.class_emb(labels))
    z = mar.predict(ordered[:, :known], condition, places, total - known).flatten(0, 1)
    target = ordered[:, known:].flatten(0, 1)
    step = torch.randint(TRAINED_STEPS, (len(target),), generator=generator, device=device)
    signal = signal_on(device)[step][:, None]
    noise = torch.randn(target.shape, generator=generator, device=device)
    net = mar.diffloss.net
    noisy = signal.sqrt() * target + (1 - signal).sqrt() * noise
    predicted = net(noisy, net.cond_embed(z) + net.time_embed(step))[:, : mar.config.token_dim]
    return F.mse_loss(predicted.float(), noise)


@functools.cache
def signal_on(device: torch.device) -> Tensor:
    """cosine_signal() in fp32 on a device."""
    return cosine_signal().to(device, torch.float32)


class Training:
    """A setting's model on a device, and what a step of its training needs; on a GPU in bf16, and no step waits for it.

    Eager, launches bound a step, however small the batch. So steps are compiled, and captured in CUDA graphs, one for
    each count.
    """

    def __init__(self, setting: Setting, device: torch.device) -> None:
        pixels, labels = images(setting.side)
        mean, deviation = moments(setting.side)
        self.batch, self.device = setting.batch, device
        self.data = ((pixels - mean) / deviation).flatten(1)[:, :, None].to(device)
        self.labels = labels.to(device)
        torch.manual_seed(setting.seed)
        self.mar = Mar(setting.model)
        initialise(self.mar)
        self.mar.to(device)
        self.generator = torch.Generator(device).manual_seed(setting.seed)
        self.averaged = {name: p.detach().clone() for name, p in self.mar.named_parameters()}
        self.rate = torch.zeros((), device=device)
        gpu = device.type == "cuda"
        self.optimizer = torch.optim.AdamW(
            self.mar.parameters(), self.rate, betas=(0.9, 0.95), weight_decay=0.02, fused=gpu, capturable=gpu
        )
        self.captured: dict[int, torch.cuda.CUDAGraph] = {}

    def eager(self, known: int) -> None:
        """A step on a random batch, of whose tokens so many are known."""
        some = torch.randint(len(self.data), (self.batch,), generator=self.generator, device=self.device)
        gpu = self.device.type == "cuda"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=gpu, cache_enabled=False):
            loss = loss_of(self.mar, self.data[some], self.labels[some], known, self.generator)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.mar.parameters(), 1.0)
        self.optimizer.step()

    def capture(self, counts: list[int]) -> None:
        """Graphs of the steps, in one pool of memory: none runs beside another."""
        self.mar.compile_glue()
        stream = torch.cuda.Stream(self.device)
        with torch.cuda.stream(stream):
            for known in counts:  # at a rate of 0: what is compiled or made at first use is there
                self.eager(known)
        stream.synchronize()
        pool = torch.cuda.graph_pool_handle()
        for known in counts:
            self.optimizer.zero_grad()
            graph = torch.cuda.CUDAGraph()
            graph.register_generator_state(self.generator)
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                self.eager(known)
            self.captured[known] = graph

    def step(self, known: int, rate: float, keep: float) -> None:
        """A step at this rate, after which the moving average keeps this share of itself."""
        self.rate.fill_(rate)
        if self.captured:
            self.captured[known].replay()
        else:
            self.eager(known)
        with torch.no_grad():
            parameters = [p for _, p in self.mar.named_parameters()]
            torch._foreach_lerp_(list(self.averaged.values()), parameters, 1 - keep)


def train(setting: Setting, device: torch.device) -> Mar:
    """The model with the moving average of its weights."""
    training = Training(setting, device)
    counts = known_counts(setting.model.tokens)
    if device.type == "cuda" and setting.steps > 0:
        training.capture(counts)
    chosen = torch.randint(len(counts), (setting.steps,), generator=torch.Generator().manual_seed(setting.seed))
    warm = max(1, min(500, setting.steps // 10))
    for step, place in enumerate(track(chosen.tolist(), description="training", transient=True)):
        rate = min(1.0, (step + 1) / warm) * (0.5 + 0.5 * math.cos(math.pi * step / setting.steps))
        training.step(counts[place], setting.rate * rate, min(0.999, (1 + step) / (10 + step)))
    mar = Mar(setting.model)
    mar.load_state_dict(training.averaged)
    return mar.to(device).eval().requires_grad_(False)


@functools.cache
def trained(setting: Setting, device: torch.device) -> Mar:
    """The weights in .models/ where this setting was trained before, else trained now and kept there."""
    training = (setting.side, setting.model, setting.steps, setting.batch, setting.rate, setting.seed, COUNTS)
    stamp = hashlib.sha256(repr(training).encode()).hexdigest()[:12]
    path = KEPT / f"mar-{setting.name}-{stamp}.pt"
    if path.is_file():
        mar = Mar(setting.model)
        mar.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        return mar.to(device).eval().requires_grad_(False)
    mar = train(setting, device)
    KEPT.mkdir(exist_ok=True)
    torch.save(mar.state_dict(), path)
    return mar


def samples(
    setting: Setting, device: torch.device, config: MarcheConfig | None, seed: int = 1
) -> tuple[Tensor, Tensor]:
    """([N, side, side] from 0 to 1, their labels) on the CPU; by MAR, or by MARché where there is a config.

    Products in TF32 on a GPU: as exact as the bf16 they were trained in, and twice as fast as fp32.
    """
    mar = trained(setting, device)
    mar.diffloss.graphs = device.type == "cuda"
    labels = torch.arange(10, device=device).repeat(setting.a_class)
    generator = torch.Generator(device).manual_seed(seed)
    options = dict(steps=setting.generation_steps, cfg=setting.cfg, head_steps=setting.head_steps, generator=generator)
    predict = mar.predict if config is None else Marche(mar, config, guided=setting.cfg != 1.0).predict
    exact = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        tokens = mar.generate(labels, predict=predict, **options)
    finally:
        torch.set_float32_matmul_precision(exact)
    mean, deviation = moments(setting.side)
    pixels = (tokens[:, :, 0].float().cpu() * deviation + mean).clamp(0, 1)
    return pixels.unflatten(1, (setting.side, setting.side)), labels.cpu()


def sheet(rows: list[tuple[str, Tensor]], path: Path) -> None:
    """Ten samples a row, one of each class, under each name."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), 10, figsize=(8, 0.9 * len(rows)), squeeze=False)
    for line, (name, pixels) in zip(axes, rows, strict=True):
        for axis, image in zip(line, pixels[:10], strict=True):
            axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
            axis.axis("off")
        line[0].set_title(name, loc="left", fontsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def plot(points: list[tuple[str, int, float, float, float]], plain: tuple[float, float], path: Path) -> None:
    """Accuracy and distance over what the rows bound the gain to; (active set, refresh, bound, accuracy, distance)."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4))
    for at, (axis, what) in enumerate(zip(axes, ("accuracy, %", "Fréchet distance"), strict=True)):
        for active in dict.fromkeys(point[0] for point in points):
            of = [point for point in points if point[0] == active]
            axis.plot([p[2] for p in of], [p[3 + at] for p in of], marker="o", label=f"active {active}")
            for _, refresh, bound, *quality in of:
                axis.annotate(str(refresh), (bound, quality[at]), fontsize=7)
        axis.axhline(plain[at], color="gray", linestyle="--", label="MAR")
        axis.set_xlabel("rows of MAR / rows of MARché")
        axis.set_ylabel(what)
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    """Train, judge real images, MAR and MARché, and draw samples."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=SETTINGS, default=FULL.name)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--refresh", type=int, nargs="*", default=[1, 2, 3, 5])
    parser.add_argument("--active", type=int, nargs="*", default=[64])
    parser.add_argument("--draw", type=Path, help="write a sheet of samples here")
    parser.add_argument("--plot", type=Path, help="write the trade-off between quality and rows here")
    arguments = parser.parse_args()
    setting, device = SETTINGS[arguments.setting], torch.device(arguments.device)
    print(f"classifier: {100 * classifier(setting.side)[1]:.1f} % of {HELD_OUT} held-out images")
    start = time.perf_counter()
    mar = trained(setting, device)
    millions = sum(p.numel() for p in mar.parameters()) / 1e6
    print(f"MAR of {millions:.1f} M parameters: {time.perf_counter() - start:.0f} s")
    half = len(images(setting.side)[0]) // 2
    net, _ = classifier(setting.side)
    parts = [net(images(setting.side)[0][some])[0] for some in (slice(0, half), slice(half, None))]
    print(f"real images, one half against the other: Fréchet distance {frechet(*parts):.2f}")
    rows: list[tuple[str, Tensor]] = []

    def tried(name: str, config: MarcheConfig | None) -> tuple[float, float]:
        pixels, labels = samples(setting, device, config)
        accuracy, distance = judge(pixels, labels)
        print(f"{name}: accuracy {accuracy:.1f} %, Fréchet distance {distance:.2f}", flush=True)
        rows.append((name, pixels))
        return accuracy, distance

    plain, points = tried("MAR", None), []
    for active in arguments.active:
        for refresh in arguments.refresh:
            config = MarcheConfig(active=active, encoder_active=active, refresh=refresh)
            computed = rows_computed(setting.model, setting.generation_steps, config)
            quality = tried(f"MARché, refresh {refresh}, active {active}", config)
            points.append((str(active), refresh, computed[0] / computed[1], *quality))
    if arguments.draw:
        sheet(rows, arguments.draw)
    if arguments.plot:
        plot(points, plain, arguments.plot)


if __name__ == "__main__":
    main()
