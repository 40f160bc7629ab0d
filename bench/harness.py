"""A bench page is data: an op, its cases, how to make a case's inputs, how to check its output piece by piece.

`Bench.measure` turns one case into records: every backend that can run here is first proven right on the very output
that will be timed, then timed beside every peer by the same clock. A backend that is wrong gets no record, only a
failure; a peer that is missing, cannot run the case or computes something else is absent, with the reason.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastops import _registry
from fastops.reference._truth import Cost, Truth, truth
from fastops.testing import poison

from . import records
from .floors import Peaks, measure_peaks
from .peers import PEERS, Absent, Peer
from .records import Record
from .timing import (
    FULL,
    QUICK,
    Effort,
    Runner,
    cpu_us,
    cuda_eager_us,
    cuda_graph_us,
    free_memory,
    rotation,
    tensor_bytes,
    tensors_of,
)


@dataclass(frozen=True)
class Case:
    """One line of results: named sizes as they go into the record, a dtype, and the kind of device it is for."""

    sizes: Mapping[str, Any]
    dtype: torch.dtype
    device: str = "cuda"

    @property
    def dtype_name(self) -> str:
        """`bfloat16`, …"""
        return str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return case_label({"case": self.sizes, "dtype": self.dtype_name})


def case_label(record: Mapping[str, Any]) -> str:
    """`N=4096 K=4096 blocksize=64 double_quant bfloat16` of a record, or of a case in a record's words."""
    sizes = [name if value is True else f"{name}={value}" for name, value in record["case"].items()]
    return " ".join([*sizes, record["dtype"]])


@dataclass(frozen=True)
class Call:
    """The arguments of one call of an op."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def clone(self) -> Call:
        """The same values in other memory."""
        return Call(
            tuple(a.clone() if isinstance(a, Tensor) else a for a in self.args),
            {k: v.clone() if isinstance(v, Tensor) else v for k, v in self.kwargs.items()},
        )


def pick_device(kind: str | None = None) -> torch.device:
    """The GPU where there is one, or the kind of device named: "cuda" or "cpu"."""
    here = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    if kind not in (None, *here):
        raise ValueError(f"device must be {' or '.join(here)} on this machine, got {kind!r}")
    kind = kind or here[0]
    return torch.device("cuda", torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


@dataclass(frozen=True)
class Session:
    """One run: where, what is possible there, how long to measure."""

    device: torch.device
    peaks: Peaks
    effort: Effort = FULL

    @classmethod
    def start(cls, device: torch.device, effort: Effort = FULL) -> Session:
        """Measure the floors of `device`."""
        return cls(device, measure_peaks(device, effort), effort)

    def looked_again(self) -> Session:
        """On a CPU, the best peaks seen so far and now: others may have been busy when the run began."""
        if self.device.type == "cuda":
            return self
        return dataclasses.replace(self, peaks=self.peaks.or_better(measure_peaks(self.device, QUICK)))

    @property
    def modes(self) -> tuple[bool, ...]:
        """Graphed or not: both on a GPU."""
        return (False, True) if self.device.type == "cuda" else (False,)


@dataclass
class Outcome:
    """What measuring a case gave."""

    case: Case
    records: list[Record] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)  # peer -> why
    failures: list[str] = field(default_factory=list)


class Page(Protocol):
    """What a bench file offers as BENCH, or in BENCHES where ops share it."""

    @property
    def op(self) -> str:
        """Its name: an op's, or a method's."""

    @property
    def results(self) -> str:
        """The name of the file of its results: the op, or "methods/<method>"."""

    def sources(self, backend: str) -> tuple[str, ...]:
        """Globs of the files whose change makes the results of `backend` stale."""

    def cases_on(self, device: torch.device) -> list[Case]:
        """The cases for this kind of device."""

    def measure(self, case: Case, session: Session) -> Outcome:
        """Prove and time one case."""

    def runner(self, case: Case, session: Session) -> Runner:
        """One plain call of the case, the way a user would make it."""

    def bytes_of(self, record: Record) -> int | None:
        """The bytes a record's case must move; None where time has nothing to do with bytes."""


@dataclass(frozen=True)
class Bench:
    """The page of an operator.

    Args:
        op: its name.
        cases: all of its cases, for every kind of device.
        make: (case, device) -> its inputs, from torch's global generator; also called with the meta device.
        chunks: (call, output) -> pieces of the output small enough for the reference, each with the call that makes it.
        family: the op whose files hold this one, where that is another op.
        effort: at most this for each measurement, where a page has many cases.
    """

    op: str
    cases: Sequence[Case]
    make: Callable[[Case, torch.device], Call]
    chunks: Callable[[Call, Any], Iterator[tuple[Any, Call]]]
    family: str = ""
    effort: Effort = FULL

    @property
    def results(self) -> str:
        """A file an op, also where they share a page."""
        return self.op

    def sources(self, backend: str) -> tuple[str, ...]:
        """The kernel's files."""
        return records.op_sources(self.family or self.op, backend)

    @functools.cached_property
    def reference(self) -> Truth:
        """The op's own cost, error and budget."""
        return truth(self.op, self.family)

    def cases_on(self, device: torch.device) -> list[Case]:
        """The cases for this kind of device."""
        return [case for case in self.cases if case.device == device.type]

    def inputs(self, case: Case, device: torch.device) -> Call:
        """The same inputs every time."""
        torch.manual_seed(0)
        return self.make(case, device)

    def runner(self, case: Case, session: Session) -> Runner:
        """One plain call with the backend that fastops chooses."""
        return self._ours(None)(self.inputs(case, session.device))

    def cost(self, case: Case) -> Cost:
        """What the reference's cost() says of the case, from shapes alone."""
        call = self.make(case, torch.device("meta"))
        return self.reference.cost(*call.args, **call.kwargs)

    def bytes_of(self, record: Record) -> int:
        """The bytes of that."""
        return int(self.cost(Case(record["case"], getattr(torch, record["dtype"]))).bytes)

    def measure(self, case: Case, session: Session) -> Outcome:
        """Prove and time every backend, and time every peer."""
        outcome = Outcome(case)
        session = dataclasses.replace(session, effort=session.effort.at_most(self.effort))
        call = self.inputs(case, session.device)
        errors, output = self._prove(call, session.device, outcome)
        peers = self._peers(call, output, outcome) if errors else {}
        footprint = tensor_bytes((call.args, call.kwargs, output))
        del output
        free_memory()
        for graphed in session.modes if errors else ():
            extra = rotation(session.device, footprint) - 1 if graphed else 0
            sets = [call, *(call.clone() for _ in range(extra))]
            self._time(sets, graphed, errors, peers, session, outcome)
            del sets
            free_memory()
        return outcome

    def _ours(self, backend: str | None) -> Callable[[Call], Runner]:
        op = _registry.find(self.op)
        return lambda call: functools.partial(op, backend, *call.args, **call.kwargs)

    def _fresh(self, call: Call) -> Call:
        """The call itself, or one of its own to an op that writes in place: the call keeps what was there before."""
        return call.clone() if _registry.find(self.op).written else call

    def _prove(self, call: Call, device: torch.device, outcome: Outcome) -> tuple[dict[str, float], Any]:
        """({backend: its error} of every backend that is right, the last right output); the rest are failures."""
        errors: dict[str, float] = {}
        right: Any = None
        for backend in _registry.find(self.op).available(device):
            if backend == "reference" or (backend == "triton" and device.type == "cpu"):
                continue  # slow by design: the truth, and Triton's interpreter
            mine = self._fresh(call)
            try:
                with poison():  # memory that still holds an earlier right answer proves nothing
                    output = _registry.find(self.op).results(self._ours(backend)(mine)(), mine.args)
            except RuntimeError as why:
                outcome.failures.append(f"{backend}: {first_line(why)}")
                continue
            error = max(self.reference.error(o, *c.args, **c.kwargs) for o, c in self.chunks(call, output))
            if error <= self.reference.budget:
                errors[backend], right = error, output
            else:
                outcome.failures.append(f"{backend}: error {error:.3g}, at most {self.reference.budget:g} allowed")
            del output
            free_memory()
        return errors, right

    def _peers(self, call: Call, output: Any, outcome: Outcome) -> dict[str, Peer]:
        """The peers that are here and compute what we compute."""
        found: dict[str, Peer] = {}
        for name, peer in PEERS.get(self.op, {}).items():
            if peer.device not in ("", outcome.case.device):
                continue
            try:
                distance = difference(peer.prepare(self._fresh(call))(), output)
                if distance > peer.tolerance:
                    raise Absent(f"its output differs from ours by {distance:.2g}")
                found[name] = peer
            except Exception as why:  # whatever ails a peer, we go on without it
                outcome.absent[name] = first_line(why)
            free_memory()
        return found

    def _time(
        self,
        sets: Sequence[Call],
        graphed: bool,
        errors: Mapping[str, float],
        peers: Mapping[str, Peer],
        session: Session,
        outcome: Outcome,
    ) -> None:
        """Append a record for each backend in `errors`, timed in one mode beside the peers."""
        where = " (graph)" if graphed else ""
        ours: dict[str, float] = {}
        for backend in errors:
            try:
                ours[backend] = _clock(self._ours(backend), sets, graphed, session)
            except RuntimeError as why:
                outcome.failures.append(f"{backend}{where}: {first_line(why)}")
        theirs: dict[str, float] = {}
        for name, peer in peers.items():
            try:
                if graphed and peer.not_capturable:
                    raise Absent(peer.not_capturable)
                theirs[name] = round(_clock(peer.prepare, sets, graphed, session), 3)
            except Exception as why:
                outcome.absent[name + where] = first_line(why)
        floor = self._floor_us(sets[0], outcome.case, session)
        for backend, us in ours.items():
            outcome.records.append(
                make_record(self, outcome.case, backend, us, floor, errors[backend], theirs, graphed, session.device)
            )

    def _floor_us(self, call: Call, case: Case, session: Session) -> float:
        """What the case takes at the device's peaks."""
        return session.peaks.floor_us(self.reference.cost(*call.args, **call.kwargs), case.dtype)


def first_line(error: Exception) -> str:
    """What an exception says, in brief."""
    return str(error).partition("\n")[0] or type(error).__name__


def _clock(prepare: Callable[[Call], Runner], sets: Sequence[Call], graphed: bool, session: Session) -> float:
    """The time of a call, whoever made it; the first set's where nothing rotates."""
    runners = [prepare(call) for call in sets]
    try:
        if graphed:
            return cuda_graph_us(runners, session.effort)
        return (cuda_eager_us if session.device.type == "cuda" else cpu_us)(runners[0], session.effort)
    finally:
        runners.clear()
        free_memory()


def difference(theirs: Any, ours: Any) -> float:
    """The worst pair of tensors: relative distance of floats, share of unequal elements otherwise."""
    pairs = list(zip(tensors_of(theirs), tensors_of(ours), strict=False))
    if any(a.numel() != b.numel() for a, b in pairs):
        return float("inf")
    return max(_distance(a.reshape(-1), b.reshape(-1)) for a, b in pairs)


def _distance(a: Tensor, b: Tensor) -> float:
    if not b.is_floating_point():
        return float((a != b).float().mean())
    return float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30))


def make_record(
    page: Page,
    case: Case,
    backend: str,
    us: float,
    floor_us: float,
    error_ratio: float | None,
    peers: Mapping[str, float],
    graphed: bool,
    device: torch.device,
) -> Record:
    """A record with the keys, and in the order, that every report reads."""
    env = dict(records.environment(device))
    date = env.pop("date")
    return {
        "op": page.op,
        "case": dict(case.sizes),
        "backend": backend,
        "dtype": case.dtype_name,
        "us": round(us, 3),
        "floor_us": round(floor_us, 3),
        "floor_share": round(floor_us / us, 4),
        **({} if error_ratio is None else {"error_ratio": round(error_ratio, 4)}),
        "peers": dict(peers),
        "graphed": graphed,
        **env,
        "kernel_hash": records.kernel_hash(page.sources(backend)),
        "date": date,
    }


@functools.cache
def _pages() -> dict[str, Page]:
    """Every page by its name: the operators' in bench_<op>.py, then the methods' in methods/bench_<method>.py."""
    folder, found = Path(__file__).parent, dict[str, Page]()
    for pattern in ("bench_*.py", "methods/bench_*.py"):
        for file in sorted(folder.glob(pattern)):
            parts = file.relative_to(folder).with_suffix("").parts
            module = importlib.import_module(".".join([str(__package__), *parts]))
            found |= {page.op: page for page in ((module.BENCH,) if hasattr(module, "BENCH") else module.BENCHES)}
    return found


def page_names() -> list[str]:
    """Everything that has a bench page."""
    return list(_pages())


def page(name: str) -> Page:
    """The bench page of an op or a method."""
    return _pages()[name]


def matches(case: Case, only: Sequence[str]) -> bool:
    """Whether the case has every word of one of `only` ("M=1", "M=8 double_quant", "M=1,N=4096"); any where none is."""
    words = set(str(case).split())
    return not only or any(words.issuperset(wish.replace(",", " ").split()) for wish in only)


def run(
    pages: Sequence[Page], session: Session, keep: bool = True, only: Sequence[str] = ()
) -> Iterator[tuple[Page, Outcome]]:
    """Measure every case of `pages`, or those that match `only`.

    With `keep`, write each result, and the peaks, as soon as they are there; results of cases left out stay.
    """
    device = records.device_name(session.device)
    try:
        for page in pages:
            cases = page.cases_on(session.device)
            for case in cases:
                if not matches(case, only):
                    continue
                session = session.looked_again()
                gc.collect()
                gc.freeze()  # what lives on, libraries above all, is not searched again after each measurement
                outcome = page.measure(case, session)
                if keep and outcome.records:
                    records.save(device, page.results, outcome.records)
                    records.save_peaks(session.device, dataclasses.asdict(session.peaks))
                yield page, outcome
            if keep:
                every = [records.case_key({"case": c.sizes, "dtype": c.dtype_name}) for c in cases]
                records.prune(device, page.results, every)
    finally:
        gc.unfreeze()
