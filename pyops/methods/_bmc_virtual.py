"""Tensors whose addresses are reserved at once and whose memory comes as rows do.

On a GPU by the driver's virtual memory (cuda-bindings): rows of all sequences lie one after the other, [S, B, Hkv, D],
so that growing adds to the end. Pointers never change: captured CUDA graphs stay valid, and nothing is copied. On a CPU
the system gives memory to a page when it is first written, so that reserving is all there is to do.
"""

from __future__ import annotations

import mmap
from typing import Any

import torch
from torch import Tensor


class Reserved:
    """A tensor [B, Hkv, S, D] of zeros, of which the first rows have memory.

    Args:
        sizes: B, Hkv, S, D.
        device, dtype: of the tensor.

    Raises:
        MemoryError: there are not as many addresses.
        ModuleNotFoundError: on a GPU without cuda-bindings.
    """

    def __init__(self, sizes: tuple[int, int, int, int], device: torch.device, dtype: torch.dtype) -> None:
        batch, heads, rows, dim = sizes
        self._range: _DeviceRange | None = None
        self._row_bytes = batch * heads * dim * dtype.itemsize
        if device.type == "cuda" and rows * self._row_bytes:
            self._range = _DeviceRange(rows * self._row_bytes, device)
            self._range.commit(1)  # a pointer without memory is no CUDA pointer to torch
            self.tensor = self._range.tensor(dtype, (rows, batch, heads, dim)).permute(1, 2, 0, 3)
        elif rows * self._row_bytes:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
            try:
                memory = mmap.mmap(-1, rows * self._row_bytes, flags=flags)
            except OSError as error:
                raise MemoryError(f"no addresses for {rows * self._row_bytes} bytes: {error}") from error
            self.tensor = torch.frombuffer(memory, dtype=dtype).view(sizes)  # which keeps the memory
        else:
            self.tensor = torch.empty(sizes, device=device, dtype=dtype)

    def commit(self, rows: int) -> None:
        """Memory behind the first `rows` rows. Raises MemoryError where there is none, what there was stays."""
        if self._range is not None:
            self._range.commit(rows * self._row_bytes)

    def close(self) -> None:
        """Give everything back. The tensor must not be used any more."""
        self.tensor = self.tensor.new_empty(0)
        if self._range is not None:
            self._range.close()


class _DeviceRange:
    """Addresses of a GPU, with memory behind the first of them."""

    def __init__(self, size: int, device: torch.device) -> None:
        self._driver = _driver()
        self._device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.zeros(1, device=self._device)  # makes the context current
        d = self._driver
        self._kind = d.CUmemAllocationProp()
        self._kind.type = d.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._kind.location.type = d.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        self._kind.location.id = self._device.index
        minimum = d.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self._granule = int(self._call(d.cuMemGetAllocationGranularity, self._kind, minimum))
        self._size = self._rounded(size)
        self._bytes = size
        self._address = int(self._call(d.cuMemAddressReserve, self._size, 0, 0, 0))
        self._mapped: list[tuple[int, int, Any]] = []  # address, bytes, handle
        self._committed = 0

    def tensor(self, dtype: torch.dtype, sizes: tuple[int, ...]) -> Tensor:
        """All of it, of which only what is committed may be touched; this object must outlive it."""
        self.__cuda_array_interface__ = {
            "shape": (self._bytes,), "typestr": "|u1", "data": (self._address, False), "version": 3, "strides": None,
        }  # fmt: skip
        return torch.as_tensor(self, device=self._device).view(dtype).view(sizes)

    def commit(self, size: int) -> None:
        """Zeros behind the first `size` bytes."""
        d, more = self._driver, self._rounded(min(size, self._size)) - self._committed
        if more <= 0:
            return
        with torch.cuda.device(self._device):  # whose context the driver's calls take
            try:
                handle = self._call(d.cuMemCreate, more, self._kind, 0)
            except MemoryError:
                torch.cuda.empty_cache()  # torch keeps what it has freed
                handle = self._call(d.cuMemCreate, more, self._kind, 0)
            address = self._address + self._committed
            try:
                self._call(d.cuMemMap, address, more, 0, handle, 0)
            except BaseException:
                self._call(d.cuMemRelease, handle)
                raise
            try:
                access = d.CUmemAccessDesc()
                access.location = self._kind.location
                access.flags = d.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
                self._call(d.cuMemSetAccess, address, more, [access], 1)
                self._call(d.cuMemsetD8Async, address, 0, more, torch.cuda.current_stream(self._device).cuda_stream)
            except BaseException:
                torch.cuda.synchronize(self._device)
                self._call(d.cuMemUnmap, address, more)
                self._call(d.cuMemRelease, handle)
                raise
        self._mapped.append((address, more, handle))
        self._committed += more

    def close(self) -> None:
        """Unmap and free, when the device has finished with it."""
        if not self._address:
            return
        torch.cuda.synchronize(self._device)
        for address, size, handle in self._mapped:
            self._call(self._driver.cuMemUnmap, address, size)
            self._call(self._driver.cuMemRelease, handle)
        self._call(self._driver.cuMemAddressFree, self._address, self._size)
        self._mapped, self._address, self._committed = [], 0, 0

    def __del__(self) -> None:
        if getattr(self, "_address", 0):
            self.close()

    def _rounded(self, size: int) -> int:
        return -(-size // self._granule) * self._granule

    def _call(self, function: Any, *args: Any) -> Any:
        """The result of a driver's call. Raises MemoryError, or RuntimeError with the driver's name of the error."""
        status, *results = function(*args)
        codes = self._driver.CUresult
        if status == codes.CUDA_ERROR_OUT_OF_MEMORY:
            raise MemoryError(f"{function.__name__}: out of memory")
        if status != codes.CUDA_SUCCESS:
            raise RuntimeError(f"bmc: {function.__name__} failed: {status}")
        return results[0] if results else None


def _driver() -> Any:
    """The driver's interface. Raises ModuleNotFoundError with what to install."""
    try:
        from cuda.bindings import driver
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'bmc: growth="virtual" on a GPU needs cuda-bindings: pip install cuda-bindings', name="cuda.bindings"
        ) from error
    return driver
