"""Host memory for an offloaded KV cache: rows token after token, in segments that are added as a text grows.

A plane holds one array of every layer, [tokens, batch, width]: K and V of a token beside each other, the layers' inputs
X, or their packed nibbles and scales. The tokens of a range lie one after the other, so that a range within a segment
is a single copy. Segments are added, never moved, and the next one is allocated by a thread before it is needed.

Pinned segments come from torch's own host allocator (`pin_memory=True`), not from reserved addresses registered piece
by piece: its blocks are known to torch's copies, live until copies in flight are done, go back to a pool for the next
text, and no copy can straddle two registrations. It rounds sizes up to powers of two, so segments are as many tokens as
fill one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ops.nf4_dequant import nf4_dequant
from ..ops.nf4_quantize import nf4_quantize
from ._kvpr_plan import NF4_BLOCK, WHO

SPARE = 256 << 20  # bytes of host memory that others keep


class HostMemoryError(MemoryError):
    """Host memory is short, or was refused; the message says how much is needed and how much there is."""


def available_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> tuple[int, str]:
    """(bytes of host memory that this process can still have, what limits it): the machine or a control group."""
    known = re.search(r"^MemAvailable:\s+(\d+) kB", _read(proc / "meminfo"), flags=re.M)
    best = (int(known[1]) << 10 if known else 1 << 62, "the machine")
    for line in _read(proc / "self" / "cgroup").splitlines():
        _, controllers, path = (*line.split(":", 2), "", "")[:3]
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = (
            (cgroups / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes"))
            if controllers
            else (cgroups, ("memory.max", "memory.current"))
        )
        folder = root / path.strip("/")
        for place in (folder, *folder.parents):
            limit, used = (_read(place / name).strip() for name in names)
            if limit.isdigit() and used.isdigit():
                cached = re.search(r"^(?:total_)?inactive_file (\d+)", _read(place / "memory.stat"), flags=re.M)
                free = max(0, int(limit) - int(used) + (int(cached[1]) if cached else 0))
                best = min(best, (free, "the control group"))
            if place == root:
                break
    return best


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def gigabytes(size: float) -> str:
    """`12.3 GB`; small sizes in MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.3f} MB"


@dataclass(frozen=True)
class Plane:
    """An array of every layer: `width` elements of `dtype` a token and sequence."""

    width: int
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Of a token and sequence."""
        return self.width * self.dtype.itemsize


class Codec:
    """How rows of `width` elements are stored: as they are, or in 4 bits with a scale for each block of a row.

    Args:
        width: elements of a row.
        dtype: of the elements.
        packed: in 4 bits.
        parts: arrays within a row (K and V) that no block may straddle.
    """

    def __init__(self, width: int, dtype: torch.dtype, packed: bool, parts: int = 1) -> None:
        self.width, self.dtype, self.packed = width, dtype, packed
        self.blocksize = NF4_BLOCK if width // parts % NF4_BLOCK == 0 else NF4_BLOCK // 2
        if packed and width // parts % self.blocksize:
            raise ValueError(
                f"{WHO}: compress must be None where rows are no multiple of {self.blocksize} elements, "
                f"got rows of {width // parts}"
            )

    @property
    def planes(self) -> list[Plane]:
        """What it fills."""
        if not self.packed:
            return [Plane(self.width, self.dtype)]
        return [Plane(self.width // 2, torch.uint8), Plane(self.width // self.blocksize, torch.float32)]

    def encode(self, rows: Tensor) -> list[Tensor]:
        """A tensor [N, plane's width] for each plane, of rows [N, width]."""
        if not self.packed:
            return [rows]
        packed, absmax = nf4_quantize(rows, self.blocksize)
        return [packed.view(rows.shape[0], -1), absmax.view(rows.shape[0], -1)]

    def decode(self, stored: Sequence[Tensor]) -> Tensor:
        """[..., width] of what encode() made, each [..., plane's width]."""
        if not self.packed:
            return stored[0]
        packed, absmax = stored
        shape = (*packed.shape[:-1], self.width)
        return nf4_dequant(packed.reshape(-1), absmax.reshape(-1), shape, self.dtype, self.blocksize)


class HostStore:
    """The planes of all layers.

    Args:
        planes: what a layer has.
        layers, batch: how many.
        tokens: the most that a text will have.
        pin: in pinned memory.
        segment: tokens that are added at a time, at least.
        limit: bytes that it may have; what available_memory() says when None.
    """

    def __init__(
        self,
        planes: Sequence[Plane],
        layers: int,
        batch: int,
        tokens: int,
        pin: bool,
        segment: int = 128,
        limit: int | None = None,
    ) -> None:
        self.planes, self.layers, self.batch, self.tokens, self.pin = list(planes), layers, batch, tokens, pin
        self.limit, self.committed = limit, 0
        self.segment = [_segment_tokens(p.bytes * batch, min(segment, max(tokens, 1)), pin) for p in self.planes]
        self._segments: list[list[list[Tensor]]] = [[[] for _ in range(layers)] for _ in self.planes]
        self._worker: ThreadPoolExecutor | None = None
        self._coming: Future[list[list[list[Tensor]]]] | None = None

    @property
    def bytes(self) -> int:
        """What it holds."""
        return sum(s.numel() * s.element_size() for plane in self._segments for layer in plane for s in layer)

    def needed(self, tokens: int) -> int:
        """Bytes that it holds with room for so many tokens."""
        return sum(
            -(-tokens // n) * self.layers * allocated(n * p.bytes * self.batch, self.pin)
            for p, n in zip(self.planes, self.segment, strict=True)
        )

    def check(self, tokens: int) -> None:
        """Raises HostMemoryError where so many tokens do not fit into host memory beside what is there."""
        need = self.needed(tokens)
        if self.limit is not None:
            have, what = self.limit, "host_limit"
        else:
            need -= self.needed(self.committed)
            have, what = available_memory()
            if need > have - SPARE and self.pin:
                release_pinned()  # what torch keeps of caches that are gone
                have, what = available_memory()
            have -= SPARE
        if need > have:
            raise HostMemoryError(
                f"{WHO}: host memory must have {gigabytes(need)} for {tokens} tokens of {self.batch} sequences in "
                f"{self.layers} layers, got {gigabytes(max(have, 0))} ({what})"
            )

    def reserve(self, tokens: int) -> None:
        """Room for so many tokens. What is missing is allocated, or was already by the thread; the next one begins."""
        if self._coming is not None and (tokens > self.committed or self._coming.done()):
            coming, self._coming = self._coming, None
            if coming.exception() is None:
                self._install(coming.result())
        if tokens > self.committed:
            self.check(tokens)
            self._install(self._allocate(tokens))
        step = min(self.segment, default=0)
        if self._coming is None and self.committed < self.tokens and self.committed - tokens < step // 2:
            self._worker = self._worker or _worker(self.pin)
            self._coming = self._worker.submit(self._ahead, min(self.tokens, self.committed + step))

    def _ahead(self, tokens: int) -> list[list[list[Tensor]]]:
        self.check(tokens)
        return self._allocate(tokens)

    def _allocate(self, tokens: int) -> list[list[list[Tensor]]]:
        """The missing segments of each plane and layer."""
        return [
            [[self._new(plane, n) for _ in range(len(layer), -(-tokens // n))] for layer in self._segments[i]]
            for i, (plane, n) in enumerate(zip(self.planes, self.segment, strict=True))
        ]

    def _new(self, plane: Plane, tokens: int) -> Tensor:
        try:
            return empty_host((tokens, self.batch, plane.width), plane.dtype, self.pin)
        except RuntimeError as why:
            size = gigabytes(tokens * self.batch * plane.bytes)
            kind = "pinned memory" if self.pin else "host memory"
            more = "; pin=False takes pageable memory, which is slower" if self.pin else ""
            raise HostMemoryError(
                f"{WHO}: {kind} must have another {size} beside the {gigabytes(self.bytes)} of this cache, got an "
                f"error: {str(why).splitlines()[0]}{more}"
            ) from why

    def _install(self, new: list[list[list[Tensor]]]) -> None:
        for plane, fresh in zip(self._segments, new, strict=True):
            for layer, segments in zip(plane, fresh, strict=True):
                layer += segments
        counts = [len(plane[0]) * n for plane, n in zip(self._segments, self.segment, strict=True) if plane]
        self.committed = min(counts, default=self.tokens)

    def pieces(self, layer: int, plane: int, first: int, last: int) -> Iterator[tuple[int, Tensor]]:
        """(token, [n, batch, width]) of tokens first … last - 1, a piece for each segment, each contiguous."""
        n, at = self.segment[plane], first
        while at < last:
            segment, within = divmod(at, n)
            until = min(n, within + last - at)
            yield at, self._segments[plane][layer][segment][within:until]
            at += until - within

    def close(self) -> None:
        """End the thread; what it still allocates is dropped."""
        if self._worker is not None:
            self._worker.shutdown(wait=True)
            self._worker = self._coming = None


def _worker(pin: bool) -> ThreadPoolExecutor:
    """A thread that works on this thread's device."""
    if not pin:
        return ThreadPoolExecutor(1, "fastops-kvpr")
    return ThreadPoolExecutor(1, "fastops-kvpr", torch.cuda.set_device, (torch.cuda.current_device(),))


def release_pinned() -> None:
    """Give pinned memory that nothing uses back to the system; torch keeps it for later."""
    empty: Any = getattr(torch.accelerator, "empty_host_cache", None) or getattr(torch._C, "_host_emptyCache", None)
    if empty is not None:
        empty()


def empty_host(shape: tuple[int, ...], dtype: torch.dtype, pin: bool) -> Tensor:
    """A host tensor; the one place where memory is asked for."""
    return torch.empty(shape, dtype=dtype, pin_memory=pin)


def allocated(size: int, pin: bool) -> int:
    """What torch's host allocator takes: a power of two if pinned."""
    return 1 << max(size - 1, 0).bit_length() if pin else size


def _segment_tokens(token_bytes: int, least: int, pin: bool) -> int:
    """Tokens that fill the block which `least` of them need."""
    return allocated(least * token_bytes, pin) // token_bytes
