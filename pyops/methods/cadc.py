"""CADC: train a recommender on a tenth of its interactions.

All interactions are first folded into user and item embeddings by a cheap matrix factorisation (mf_sgd); the real model
then trains on a small uniform sample of them, with those embeddings as its frozen input.

    artefact = compress(load_interactions("ratings.csv"), rate=0.1)
    artefact.save("ratings.safetensors")                # what any trainer needs: sampled pairs and embeddings
    model = Compressed.load("ratings.safetensors").train()
    evaluate(model, split.test, split.train)            # HR@10, NDCG@10

Source: CADC, arXiv:2407.08108: the two steps, the frozen transfer and the uniform sample. What it leaves open (sizes,
negatives, the towers' inside, the protocol) is ours and stands where it is decided.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..models.two_tower import TwoTower
from ._cadc_data import (
    Interactions,
    Split,
    check_pairs,
    check_rate,
    leave_one_out,
    load_content,
    load_interactions,
    map_pairs,
    optional,
    sample_rows,
)
from ._cadc_train import (
    STRATEGIES,
    Factors,
    MfSettings,
    Progress,
    TowerSettings,
    evaluate,
    factorize,
    train_two_tower,
)

__all__ = [
    "STRATEGIES",
    "Cadc",
    "Compressed",
    "Factors",
    "Interactions",
    "MfSettings",
    "Split",
    "TowerSettings",
    "compress",
    "evaluate",
    "factorize",
    "leave_one_out",
    "load_content",
    "load_interactions",
    "map_pairs",
    "sample_rows",
    "train_two_tower",
]

FORMAT = "fastops-cadc-1"


@dataclass(frozen=True)
class Compressed:
    """A tenth (or so) of the interactions, and what all of them say of each user and item.

    Args:
        pairs: int64 [m, 2], the sample, in the order in which it stood.
        factors: the embeddings.
        rate, seed: how the sample was drawn.
        total: interactions it was drawn from.
        user_ids, item_ids: the names that ids stand for, where known.
        settings: of the factorisation.
    """

    pairs: Tensor
    factors: Factors
    rate: float
    seed: int
    total: int
    user_ids: list[Any] | None = None
    item_ids: list[Any] | None = None
    settings: MfSettings = field(default_factory=MfSettings)

    @property
    def users(self) -> int:
        """How many the embeddings know, also beyond the sample."""
        return self.factors.user.shape[0]

    @property
    def items(self) -> int:
        """Likewise."""
        return self.factors.item.shape[0]

    def train(self, settings: TowerSettings | None = None, *, strategy: str = "init-freeze", **more: Any) -> TwoTower:
        """The two towers on the sample; `more` as train_two_tower has it (content, seed, device, progress)."""
        seed = more.pop("seed", self.seed)
        return train_two_tower(
            self.pairs, self.users, self.items, self.factors, settings, strategy=strategy, seed=seed, **more
        )

    def save(self, path: str | Path) -> Path:
        """Write one safetensors file: pairs, user, item, user_bias, item_bias, global_bias; the rest as metadata."""
        safetensors = optional("safetensors.torch", "saving the artefact")
        f, path = self.factors, Path(path)
        tensors = {"pairs": self.pairs, "user": f.user, "item": f.item, "user_bias": f.user_bias}
        tensors |= {"item_bias": f.item_bias, "global_bias": f.global_bias}
        about = {"rate": self.rate, "seed": self.seed, "total": self.total, "settings": asdict(self.settings)}
        names = {"user_ids": _plain(self.user_ids), "item_ids": _plain(self.item_ids)}
        metadata = {"format": FORMAT, "about": json.dumps(about), "names": json.dumps(names)}
        safetensors.save_file({k: t.detach().cpu().contiguous() for k, t in tensors.items()}, str(path), metadata)
        return path

    @classmethod
    def load(cls, path: str | Path) -> Compressed:
        """Read what save() wrote."""
        safetensors = optional("safetensors", "loading the artefact")
        with safetensors.safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError(f"{path} must be written by Compressed.save ({FORMAT}), got {metadata.get('format')}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
        about, names = json.loads(metadata["about"]), json.loads(metadata["names"])
        settings, pairs = MfSettings(**about.pop("settings")), tensors.pop("pairs")
        return cls(pairs, Factors(**tensors), settings=settings, **about, **names)


def _plain(ids: list[Any] | None) -> list[Any] | None:
    """Names as JSON has them."""
    return None if ids is None else [i.item() if hasattr(i, "item") else i for i in ids]


class Cadc:
    """The compressor, in the manner of scikit-learn: fit() factorises, transform() samples.

    Args:
        rate: share of the interactions to keep, above 0 and at most 1.
        factors, negatives, epochs, lr, reg: of the factorisation.
        seed: of its start, its order, its negatives, and the sample.
        deterministic: the same bits every time; False is lock-free.
        device: where to factorise.
        backend: of mf_sgd.

    Attributes:
        factors_: the embeddings, after fit().
    """

    def __init__(
        self,
        rate: float = 0.1,
        *,
        factors: int = MfSettings.factors,
        negatives: int = MfSettings.negatives,
        epochs: int = MfSettings.epochs,
        lr: float = MfSettings.lr,
        reg: float = MfSettings.reg,
        seed: int = 0,
        deterministic: bool = True,
        device: torch.device | str = "cpu",
        backend: str | None = None,
    ) -> None:
        check_rate(rate)
        for name, value, least in (("factors", factors, 1), ("negatives", negatives, 1), ("epochs", epochs, 1)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.rate, self.seed, self.device, self.backend = rate, seed, device, backend
        self.settings = MfSettings(factors, negatives, epochs, lr, reg, deterministic)
        self.factors_: Factors | None = None

    def fit(self, interactions: Interactions, y: None = None, *, progress: Progress | None = None) -> Cadc:
        """Factorise all interactions: of the training part only, where something is to be evaluated."""
        check_pairs(interactions.pairs, interactions.users, interactions.items)
        self.factors_ = factorize(
            interactions.pairs, interactions.users, interactions.items, self.settings, seed=self.seed,
            device=self.device, backend=self.backend, progress=progress,
        )  # fmt: skip
        return self

    def transform(self, interactions: Interactions) -> Compressed:
        """A uniform sample without replacement of the interactions, beside the embeddings."""
        f = self.factors_
        if f is None:
            raise ValueError("Cadc.transform needs the factors of fit(), which was not called")
        sizes, known = (interactions.users, interactions.items), (f.user.shape[0], f.item.shape[0])
        if sizes != known:
            raise ValueError(f"interactions must be of the {known} users and items of fit(), got {sizes}")
        sample = interactions.pairs[sample_rows(interactions.n, self.rate, self.seed)].clone()
        return Compressed(
            sample, f, self.rate, self.seed, interactions.n, interactions.user_ids, interactions.item_ids, self.settings
        )

    def fit_transform(
        self, interactions: Interactions, y: None = None, *, progress: Progress | None = None
    ) -> Compressed:
        """Both."""
        return self.fit(interactions, progress=progress).transform(interactions)


def compress(
    interactions: Interactions | Any, rate: float = 0.1, *, progress: Progress | None = None, **settings: Any
) -> Compressed:
    """Fold all interactions into embeddings and keep a sample of them.

    Args:
        interactions: Interactions, or what load_interactions() reads with its usual names: a DataFrame, a CSV or
            parquet file.
        rate: share of the interactions to keep.
        progress: called with (pairs done, pairs in all) while factorising.
        **settings: as Cadc has them.
    """
    check_rate(rate)
    found = interactions if isinstance(interactions, Interactions) else load_interactions(interactions)
    return Cadc(rate, **settings).fit_transform(found, progress=progress)
