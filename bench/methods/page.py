"""What the pages of methods share."""

from __future__ import annotations

import abc
import functools
from collections.abc import Mapping, Sequence

import torch

from ..harness import Case, Outcome, Session, first_line
from ..peers import Absent
from ..records import Record
from ..timing import Runner


def five_digits(figures: Mapping[str, float]) -> dict[str, float]:
    """As a record holds figures."""
    return {name: float(f"{value:.5g}") for name, value in figures.items()}


class MethodPage(abc.ABC):
    """A page whose every case is one whole measurement, of a model rather than of a call."""

    op: str
    cases: Sequence[Case]

    @property
    def results(self) -> str:
        """The name of the file of its results."""
        return f"methods/{self.op}"

    @abc.abstractmethod
    def sources(self, backend: str) -> tuple[str, ...]:
        """Globs of the files whose change makes the results of `backend` stale."""

    @abc.abstractmethod
    def record(self, case: Case, session: Session, outcome: Outcome) -> Record:
        """Prove and time one case; notes go to the outcome.

        Raises:
            Absent: something that the whole case needs is missing here.
        """

    def cases_on(self, device: torch.device) -> list[Case]:
        """The cases for this kind of device."""
        return [case for case in self.cases if case.device == device.type]

    def bytes_of(self, record: Record) -> int | None:
        """None: known only beside the model, if time follows bytes at all."""
        return None

    def runner(self, case: Case, session: Session) -> Runner:
        """One whole measurement."""
        return functools.partial(self.measure, case, session)

    def measure(self, case: Case, session: Session) -> Outcome:
        """The case's record, or why there is none."""
        outcome = Outcome(case)
        try:
            outcome.records.append(self.record(case, session, outcome))
        except Absent as why:
            outcome.absent[str(case.sizes.get("model", self.op))] = str(why)
        except Exception as why:  # other libraries' models raise anything; the next case may still run
            outcome.failures.append(f"{type(why).__name__}: {first_line(why)}")
        return outcome
