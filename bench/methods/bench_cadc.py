"""CADC on MovieLens-100k: how two towers rank that were trained on all interactions, on a sample, and with CADC.

Each user's last interaction is held out; a case is an arm, trained with SEEDS seeds (of the factorisation, the sample,
the towers and the candidates). `_ci` is the half width of the 95 % interval of the mean over seeds (Student's t); the
users are the same 940 in all of them. Epochs and rates of each arm were chosen on a validation split of the training
part, never on the test: docs/cadc.md says how. The last case sums up, in the words of every report.
"""

from __future__ import annotations

import contextlib
import functools
import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch

from fastops import _registry
from fastops.cli import movielens
from fastops.methods import cadc
from fastops.methods.cadc import Factors, MfSettings, TowerSettings
from fastops.reference._truth import Cost

from .. import bench_mf_sgd, records
from ..harness import Case, Outcome, Session, make_record
from ..peers import Absent, implicit_bpr, library, torch_compile_mf, torch_mf
from ..records import Record
from ..timing import QUICK, Runner, cpu_us, cuda_eager_us
from .page import MethodPage, five_digits

SEEDS, QUICK_SEEDS = 5, 2
T_95 = {2: 12.706, 5: 2.776}  # Student's t, two-sided, by seeds
MF = MfSettings()
FULL = TowerSettings(epochs=10, lr=3e-3, weight_decay=0.1)
PLAIN = TowerSettings(epochs=20, lr=1e-3)
CADC = TowerSettings(epochs=5, lr=1e-3)


@dataclass(frozen=True)
class Arm:
    """How a model is made."""

    name: str
    rate: float = 1.0
    strategy: str = "random"
    towers: TowerSettings | None = None

    @property
    def case(self) -> dict[str, Any]:
        """Its sizes in results."""
        towers = {"rate": self.rate, "strategy": self.strategy} if self.towers else {}
        return {"model": movielens.NAME, "arm": self.name, **towers}


ARMS = [
    Arm("full", 1.0, "random", FULL),
    Arm("plain", 0.1, "random", PLAIN),
    *(Arm("cadc", rate, "init-freeze", CADC) for rate in (0.05, 0.1, 0.2, 0.5)),
    Arm("cadc", 0.1, "init-finetune", CADC),
    Arm("factorisation"),
    Arm("implicit-als"),
    Arm("implicit-bpr"),
]
HEADLINE = {"hr10_full": ARMS[0], "plain": ARMS[1], "cadc": ARMS[3], "mf": ARMS[7]}
SUMMARY = {"model": movielens.NAME, "summary": True}


@functools.cache
def data() -> tuple[cadc.Split, torch.Tensor, torch.Tensor]:
    """(split, users' content, items' content)."""
    try:
        found, users, items = movielens.load()
    except movielens.Missing as missing:
        raise Absent(str(missing)) from missing
    return cadc.leave_one_out(found), users, items


@functools.cache
def factors(seed: int, device: str) -> tuple[Factors, float]:
    """(of all training interactions, seconds)."""
    split, _, _ = data()
    start = time.perf_counter()
    found = cadc.factorize(split.train.pairs, split.train.users, split.train.items, MF, seed=seed, device=device)
    if device != "cpu":
        torch.cuda.synchronize()
    return found, time.perf_counter() - start


class Library:
    """A model of implicit, which scores by factors alone."""

    def __init__(self, user: Any, item: Any) -> None:
        self.user, self.item = torch.as_tensor(user), torch.as_tensor(item)

    def scores(self, users: torch.Tensor) -> torch.Tensor:
        """[n, items]."""
        return self.user[users.cpu()] @ self.item.T


def of_implicit(name: str, seed: int) -> Library:
    """Its ALS or BPR."""
    split, _, _ = data()
    sparse = library("scipy.sparse")
    shape = (split.train.users, split.train.items)
    matrix = sparse.csr_matrix((torch.ones(split.train.n).numpy(), tuple(split.train.pairs.T.numpy())), shape=shape)
    if name == "implicit-als":
        model = library("implicit.cpu.als").AlternatingLeastSquares(random_state=seed, **ALS)
    else:
        model = library("implicit.cpu.bpr").BayesianPersonalizedRanking(random_state=seed, **BPR)
    model.fit(matrix, show_progress=False)
    return Library(model.user_factors, model.item_factors)


# Of some settings of each, the one with the best AUC on the validation split.
ALS = {"factors": 16}
BPR = {"factors": 63, "learning_rate": 0.05, "regularization": 0.02, "iterations": 200}  # and a bias


def make(arm: Arm, seed: int, device: str) -> tuple[Any, float]:
    """(the model, seconds of everything that it needs)."""
    split, users, items = data()
    f, spent = factors(seed, device)
    if arm.name == "factorisation":
        return f, spent
    start = time.perf_counter()
    if arm.towers is None:
        model: Any = of_implicit(arm.name, seed)
    else:
        rows = cadc.sample_rows(split.train.n, arm.rate, seed)
        model = cadc.train_two_tower(
            split.train.pairs[rows], split.train.users, split.train.items, f if arm.strategy != "random" else None,
            arm.towers, strategy=arm.strategy, user_content=users, item_content=items, seed=seed, device=device,
        )  # fmt: skip
        if device != "cpu":
            torch.cuda.synchronize()
    took = time.perf_counter() - start
    return model, took + (spent if arm.strategy != "random" else 0.0)


@functools.cache
def run(arm: Arm, seeds: int, device: str) -> tuple[dict[str, float], ...]:
    """What each seed gave: hr10, ndcg10 (among 100), hr10_all, ndcg10_all, auc (among all), seconds."""
    split, _, _ = data()
    found = []
    for seed in range(seeds):
        model, seconds = make(arm, seed, device)
        on = "cpu" if isinstance(model, Library) else device
        some = cadc.evaluate(model, split.test, split.train, seed=seed, device=on)
        every = cadc.evaluate(model, split.test, split.train, candidates=None, device=on)
        ranks = {"hr10": some["hr10"], "ndcg10": some["ndcg10"], "hr10_all": every["hr10"]}
        found.append({**ranks, "ndcg10_all": every["ndcg10"], "auc": every["auc"], "seconds": seconds})
    return tuple(found)


def mean_ci(values: list[float]) -> tuple[float, float]:
    """(mean, half width of its 95 % interval)."""
    spread = statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), T_95[len(values)] * spread


def figures_of(found: tuple[dict[str, float], ...]) -> dict[str, float]:
    """Means and intervals."""
    figures: dict[str, float] = {}
    for name in found[0]:
        values = [each[name] for each in found]
        if name == "seconds":  # others may share the cores: the least is what it takes
            figures[name] = min(values)
        else:
            figures[name], figures[f"{name}_ci"] = mean_ci(values)
    return figures


def mf_speedups(session: Session) -> dict[str, float]:
    """An epoch of the peers over one of ours, on tables of this set's shape.

    Ours is in blocks, the default, beside PyTorch; lock-free, as implicit is too, beside implicit.
    """
    clock = cpu_us if session.device.type == "cpu" else cuda_eager_us

    def us(negatives: int, prepare: Any) -> float:
        case = bench_mf_sgd.case("ml-100k", MF.factors, negatives, negatives > 1, session.device.type)
        return clock(prepare(bench_mf_sgd.BENCH.inputs(case, session.device)), QUICK)

    def ours(call: Any) -> Runner:
        return functools.partial(_registry.find("mf_sgd"), None, *call.args, **call.kwargs)

    figures = {"mf_speedup_vs_torch": min(us(4, p) for p in (torch_mf, torch_compile_mf)) / us(4, ours)}
    if session.device.type == "cpu":
        with contextlib.suppress(Absent):
            figures["mf_speedup_vs_implicit"] = us(1, implicit_bpr) / us(1, ours)
    return figures


def summary(seeds: int, session: Session) -> dict[str, float]:
    """In design.md's names."""
    device = session.device.type
    full, plain, small, mf = (run(HEADLINE[n], seeds, device) for n in ("hr10_full", "plain", "cadc", "mf"))
    figures: dict[str, float] = {}
    figures["hr10_full"], figures["hr10_full_ci"] = mean_ci([each["hr10"] for each in full])
    for name, wanted in (("hr10_ratio_10pct", "hr10"), ("ndcg10_ratio_10pct", "ndcg10")):
        ratios = [a[wanted] / b[wanted] for a, b in zip(small, full, strict=True)]
        figures[name], figures[f"{name}_ci"] = mean_ci(ratios)
    ratios = [a["hr10"] / b["hr10"] for a, b in zip(plain, full, strict=True)]
    figures["hr10_ratio_plain_10pct"], figures["hr10_ratio_plain_10pct_ci"] = mean_ci(ratios)
    least = {name: min(each["seconds"] for each in found) for name, found in (("full", full), ("cadc", small))}
    figures["time_ratio_10pct"] = least["cadc"] / least["full"]
    figures["mf_seconds"] = min(each["seconds"] for each in mf)
    return figures | mf_speedups(session)


def cost(arm: Arm) -> Cost:
    """What the arm's arithmetic is: the factorisation where it has one, and three passes through the towers."""
    split, users, items = data()
    flops = 0
    if arm.towers is None or arm.strategy != "random":
        flops += MF.epochs * 10 * MF.factors * split.train.n * (1 + MF.negatives)
    if arm.towers:
        t, width = arm.towers, MF.factors
        mlp = 2 * (2 * width * t.hidden + t.hidden * (width + 1))
        each = mlp + 2 * users.shape[1] * width, mlp + 2 * items.shape[1] * width
        flops += 3 * t.epochs * round(arm.rate * split.train.n) * (each[0] + (1 + t.negatives) * each[1])
    return Cost(16 * split.train.n, flops)


class CadcMethod(MethodPage):
    """The page: a record for each arm, and the summary."""

    op = "cadc"

    def sources(self, backend: str) -> tuple[str, ...]:
        """The kernel of the factorisation, the method and its network."""
        method = [f"pyops/methods/{name}.py" for name in ("cadc", "_cadc_data", "_cadc_train")]
        return (*records.op_sources("mf_sgd", backend), *method, "pyops/models/two_tower.py")

    def cases_on(self, device: torch.device) -> list[Case]:
        """The same everywhere."""
        return [Case(sizes, torch.float32, device.type) for sizes in (*(arm.case for arm in ARMS), SUMMARY)]

    def record(self, case: Case, session: Session, outcome: Outcome) -> Record:
        """Train and evaluate an arm with every seed."""
        seeds = QUICK_SEEDS if session.effort == QUICK else SEEDS
        arm = next((arm for arm in ARMS if arm.case == dict(case.sizes)), HEADLINE["cadc"])
        if "summary" in case.sizes:
            figures = summary(seeds, session)
            seconds = min(each["seconds"] for each in run(arm, seeds, session.device.type))
        else:
            figures = figures_of(run(arm, seeds, session.device.type))
            seconds = figures["seconds"]
        backend = _registry.find("mf_sgd").process_default(session.device)[0]
        floor = session.peaks.floor_us(cost(arm), case.dtype)
        record = make_record(self, case, backend, seconds * 1e6, floor, None, {}, False, session.device)
        return {**record, "seeds": seeds, "figures": five_digits(figures)}


BENCH = CadcMethod()
