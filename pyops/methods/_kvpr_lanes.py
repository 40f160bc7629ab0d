"""Copy, compute and store-back beside each other: three lanes of a device, and what each did when.

On CUDA a lane is a stream and waits are events, none of which the host waits for. Elsewhere all lanes are the caller's
thread, in the order of the calls, so that the same code runs.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ._measured import write_atomically

COPY, COMPUTE, STORE = "copy", "compute", "store"
LANES = (COPY, COMPUTE, STORE)

Mark = Any  # a CUDA event, or None where there is nothing to wait for


class Timeline:
    """Spans of the lanes, for chrome://tracing and ui.perfetto.dev."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._open: dict[str, tuple[str, Any, dict[str, Any]]] = {}
        self._spans: list[tuple[str, str, Any, Any, dict[str, Any]]] = []
        self._zero = self._now(None)

    def _now(self, stream: Any) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream if stream is not None else torch.cuda.current_stream(self._device))
        return event

    def begin(self, lane: str, stream: Any, name: str, **about: Any) -> None:
        """A span begins; one that the lane has not ended ends here."""
        self.end(lane, stream)
        self._open[lane] = (name, self._now(stream), about)

    def end(self, lane: str, stream: Any) -> None:
        """The lane's span ends, if it has one."""
        if lane in self._open:
            name, start, about = self._open.pop(lane)
            self._spans.append((lane, name, start, self._now(stream), about))

    def clear(self) -> None:
        """Forget all spans."""
        self._open, self._spans, self._zero = {}, [], self._now(None)

    def _microseconds(self, moment: Any) -> float:
        if self._device.type != "cuda":
            return float(moment - self._zero) * 1e6
        return float(self._zero.elapsed_time(moment)) * 1e3

    def spans(self) -> list[dict[str, Any]]:
        """{lane, name, start, seconds, ...} of all that has ended, start and seconds in seconds; waits for the device.

        On a GPU the clock is the device's, which ticks every half a microsecond.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        found = []
        for lane, name, start, end, about in self._spans:
            first, last = self._microseconds(start), self._microseconds(end)
            found.append({"lane": lane, "name": name, "start": first / 1e6, "seconds": (last - first) / 1e6, **about})
        return found

    def busy(self, lane: str) -> float:
        """Seconds of a lane's spans."""
        return float(sum(span["seconds"] for span in self.spans() if span["lane"] == lane))

    def save(self, path: str | Path) -> None:
        """Write a Chrome trace."""
        events: list[dict[str, Any]] = [
            {"name": "thread_name", "ph": "M", "pid": 0, "tid": i, "args": {"name": lane}}
            for i, lane in enumerate(LANES)
        ]
        for span in self.spans():
            about = {k: v for k, v in span.items() if k not in ("lane", "name", "start", "seconds")}
            times = {"ts": span["start"] * 1e6, "dur": max(0.0, span["seconds"] * 1e6)}
            where = {"pid": 0, "tid": LANES.index(span["lane"])}
            events.append({"name": span["name"], "ph": "X", **times, **where, "args": about})
        write_atomically(Path(path), json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


class Lanes:
    """The lanes of a device; computing is whatever stream is current.

    Args:
        device: where.
        timeline: record what each lane does.
    """

    def __init__(self, device: torch.device, timeline: bool = False) -> None:
        self.device, self.cuda = device, device.type == "cuda"
        self._streams = {lane: torch.cuda.Stream(device) for lane in (COPY, STORE)} if self.cuda else {}
        self.timeline = Timeline(device) if timeline else None

    def stream(self, lane: str) -> Any:
        """Its stream; None without CUDA."""
        if not self.cuda:
            return None
        return self._streams[lane] if lane in self._streams else torch.cuda.current_stream(self.device)

    @contextlib.contextmanager
    def on(self, lane: str, name: str, **about: Any) -> Iterator[None]:
        """What is launched within is done by the lane, and is a span of it."""
        stream = self.stream(lane)
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            if self.timeline is not None:
                self.timeline.begin(lane, stream, name, **about)
            yield
            if self.timeline is not None:
                self.timeline.end(lane, stream)

    def begin(self, lane: str, name: str, **about: Any) -> None:
        """A span that lasts until the lane's next one."""
        if self.timeline is not None:
            self.timeline.begin(lane, self.stream(lane), name, **about)

    def end(self, lane: str) -> None:
        """The lane's span ends."""
        if self.timeline is not None:
            self.timeline.end(lane, self.stream(lane))

    def mark(self, lane: str) -> Mark:
        """What the lane has been given so far, to wait for."""
        if not self.cuda:
            return None
        event = torch.cuda.Event()
        event.record(self.stream(lane))
        return event

    def wait(self, lane: str, mark: Mark) -> None:
        """What the lane is given from now on is done after the mark; the host goes on."""
        if mark is not None:
            self.stream(lane).wait_event(mark)

    def keep(self, tensor: Tensor, lane: str) -> None:
        """The memory of a tensor of another lane stays until this lane has used it."""
        if self.cuda:
            tensor.record_stream(self.stream(lane))

    def synchronize(self) -> None:
        """The host waits for all lanes."""
        if self.cuda:
            torch.cuda.synchronize(self.device)
