"""Functions of tensors as CUDA graphs, captured at their first use: replays take the host out of a chain of kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Captured(NamedTuple):
    """A graph, the tensors it reads (and may write), and what the function returned, which lives until a replay."""

    graph: torch.cuda.CUDAGraph
    given: tuple[Tensor, ...]
    result: Any

    def replay(self) -> Any:
        """Run the kernels again on `given` as it is now."""
        self.graph.replay()
        return self.result


class Graphs:
    """One graph for each set of shapes that a function meets; a copy of the object, or of its owner, starts empty.

    Other tensors that the function uses, weights above all, must stay where they are, or be part of the `key`.
    """

    def __init__(self) -> None:
        self._captured: dict[Any, Captured] = {}

    def __reduce__(self) -> tuple[type[Graphs], tuple[()]]:
        return Graphs, ()

    def load(self, function: Callable[..., Any], *given: Tensor, key: Any = None) -> Captured:
        """The graph of function(*given), which it is handed a copy of; on a CUDA device.

        Args:
            function: runs once before it is captured, on copies of `given`, to compile what it needs.
            *given: tensors; all shapes and dtypes, and autocast's, tell one graph from another.
            key: what else does.
        """
        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        sort = (key, autocast, tuple((t.shape, t.dtype, t.device) for t in given))
        if sort not in self._captured:
            self._captured[sort] = self._capture(function, tuple(t.clone() for t in given), *autocast)
        captured = self._captured[sort]
        for kept, new in zip(captured.given, given, strict=True):
            kept.copy_(new)
        return captured

    @staticmethod
    def _capture(function: Callable[..., Any], given: tuple[Tensor, ...], cast: bool, dtype: torch.dtype) -> Captured:
        # Without autocast's cache: what it holds may be freed before the replay.
        with torch.cuda.device_of(given[0]), torch.autocast("cuda", dtype, enabled=cast, cache_enabled=False):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function(*given)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = function(*given)
        return Captured(graph, given, result)
