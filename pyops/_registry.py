"""The machinery behind an op page: define, check, fake, backends, choose, explain.

An `Op` joins what one operator has: its schema (written once, on its page), one check used by every Python path, a fake
kernel, and up to four backends. `torch.ops.fastops.<op>` runs the process default (compiled, else Triton, else
reference); `fastops.<op>(..., backend=...)` runs a named one and never falls back.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import _extension
from ._checks import fail
from ._ops import NAMESPACE, library, overload, qualified
from .reference._truth import member
from .triton_ops import _tuned

BACKENDS = ("cuda", "triton", "cpu", "reference")
_KEYS = {"cpu": "CPU", "cuda": "CUDA"}  # device type -> dispatch key

registry: dict[str, Op] = {}


_TRITON_MISSING = "" if importlib.util.find_spec("triton") else "triton is not installed"


def triton_missing() -> str:
    """Why Triton cannot be used at all, or ""; a constant, so that torch.compile can trace the choice of a backend."""
    return _TRITON_MISSING


def triton_interprets() -> bool:
    """Whether TRITON_INTERPRET=1 runs Triton kernels on the CPU (tests do)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _without_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    """What a kernel computes with is the kernel's business, also where it is made of torch's operators."""
    if not torch.is_autocast_enabled(device_type):
        return contextlib.nullcontext()
    return torch.autocast(device_type, enabled=False)


@dataclass(frozen=True)
class Explanation:
    """What `fastops.explain` returns; print it, or read its fields."""

    op: str
    device: str
    backend: str
    reason: str
    config: str
    unavailable: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{qualified(self.op)} on {self.device}: backend {self.backend} ({self.reason})"]
        if self.config:
            lines.append(f"  configuration: {self.config}")
        lines += [f"  {name} is not available: {why}" for name, why in self.unavailable.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class TuningCase:
    """One row of a tuned table to be: what must match, the size that may be near, and arguments of that size."""

    key: Mapping[str, Any]
    size: int
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class Op:
    """One operator. The arguments of every callable are the schema's, with its defaults.

    Args:
        schema: as in native_functions.yaml, without the namespace.
        check: raises RuntimeError on a bad argument, reading no values; runs before every Python path and the fake.
        fake: returns empty outputs for fake tensors.
        reference: the pure PyTorch function, the backend that is always there.
        triton: module under `triton_ops` whose `launch` (`<op>_launch` where ops share it) runs the op, or None.
        check_values: reads values (lengths, indices) and raises; always runs on the CPU, on a GPU under debug_checks().
        describe: (backend, *args) -> the configuration that would run, for explain().
        family: the op after which the files are named, where several ops share them; the op itself when None.
        cuda_configs: how many compiled CUDA configurations there are to choose from.
        cuda_key: turns the key of a tuned CUDA entry into the integer its kernel looks up.
        tuning: (device) -> the cases `python -m fastops tune` measures.
        choose: (available backends, *args) -> (backend, why) where the default order is not the best one.
        tags: torch.Tag of the op.
    """

    def __init__(
        self,
        schema: str,
        *,
        check: Callable[..., None],
        fake: Callable[..., Any],
        reference: Callable[..., Any],
        triton: str | None = None,
        check_values: Callable[..., None] | None = None,
        describe: Callable[..., str] | None = None,
        family: str | None = None,
        cuda_configs: int = 0,
        cuda_key: Callable[[Mapping[str, Any]], int] | None = None,
        tuning: Callable[[torch.device], Iterator[TuningCase]] | None = None,
        choose: Callable[..., tuple[str, str]] | None = None,
        tags: tuple[torch.Tag, ...] = (),
    ) -> None:
        self.name = schema.partition("(")[0]
        self.schema = schema
        self._check, self._check_values = check, check_values
        self._reference, self._triton, self._describe, self._choose = reference, triton, describe, choose
        self._overrides: dict[str, tuple[str, torch.library.Library]] = {}  # dispatch key -> backend, its registration

        self.family = family or self.name
        self._fake = fake
        self._define(self.name, tags)
        self.default = overload(self.name)
        arguments = self.default._schema.arguments
        self.written = tuple(i for i, a in enumerate(arguments) if a.alias_info is not None and a.alias_info.is_write)
        has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        self._compiled = {
            key: torch.library.get_kernel(self.default, key)
            for key in _KEYS.values()
            if has_kernel(qualified(self.name), key)
        }
        library.impl(self.name, self._kernel("reference"), "CompositeExplicitAutograd")
        if "CUDA" not in self._compiled and triton is not None and not triton_missing():
            library.impl(self.name, self._kernel("triton"), "CUDA")
        self._named = {backend: self._define_named(backend) for backend in BACKENDS if self._has(backend)}
        self.cuda_configs, self.cuda_key, self.tuning = cuda_configs, cuda_key, tuning
        self.load_tuned()
        registry[self.name] = self

    def __call__(self, backend: str | None, *args: Any, **kwargs: Any) -> Any:
        """Run the op with `backend`, or with the process default (or the page's choice) when it is None."""
        if backend is None:
            if self._choose is None:
                return self.default(*args, **kwargs)
            backend = self._chosen(*args, **kwargs)[0]
        return self._run(backend, *args, **kwargs)

    def results(self, returned: Any, args: tuple[Any, ...]) -> Any:
        """What a call made: what it returned, then the tensors it wrote in place; just that where it wrote none."""
        if not self.written:
            return returned
        more = () if returned is None else returned if isinstance(returned, tuple) else (returned,)
        return (*more, *(args[i] for i in self.written))

    def _define(self, name: str, tags: tuple[torch.Tag, ...] = ()) -> None:
        """Define the schema under `name`, with the checked fake kernel."""
        library.define(name + self.schema.removeprefix(self.name), tags=(torch.Tag.pt2_compliant_tag, *tags))

        def checked_fake(*args: Any, **kwargs: Any) -> Any:
            self._check(*args, **kwargs)
            return self._fake(*args, **kwargs)

        torch.library.register_fake(qualified(name), checked_fake, lib=library)
        if not any(a.alias_info for a in overload(name)._schema.arguments):
            # Results are constants of the autograd graph; without this, torch would warn in a backward pass instead.
            library.impl(name, torch.library.fallthrough_kernel, "Autograd")

    def _define_named(self, backend: str) -> torch._ops.OpOverload:
        """`<op>__<backend>`: one backend as an op of its own, opaque to torch.compile and seen by debug_checks."""
        name = f"{self.name}__{backend}"
        self._define(name)
        library.impl(name, self._kernel(backend), "CompositeExplicitAutograd")
        return overload(name)

    def _has(self, backend: str) -> bool:
        if backend in _KEYS:
            return _KEYS[backend] in self._compiled
        return backend == "reference" or self._triton is not None

    def unavailable(self, backend: str, device: torch.device) -> str:
        """Why `backend` cannot run on tensors of `device`, or "" when it can."""
        if backend not in BACKENDS:
            fail(self.name, f"backend must be one of {', '.join(BACKENDS)} or None, got {backend!r}")
        if backend == "reference":
            return ""
        if backend == "triton":
            return self._triton_unavailable(device)
        if device.type != backend:
            return f"it needs {backend} tensors, got {device.type}"
        if _extension.C is None:
            return _extension.C_MISSING
        if _KEYS[backend] not in self._compiled:
            built = "" if backend == "cpu" or _extension.HAS_CUDA_KERNELS else " (the extension was built without nvcc)"
            return f"the op has no compiled {backend} kernel{built}"
        return ""

    def available(self, device: torch.device | str) -> list[str]:
        """The backends that can run on tensors of `device`."""
        return [b for b in BACKENDS if not self.unavailable(b, torch.device(device))]

    def process_default(self, device: torch.device) -> tuple[str, str]:
        """The backend torch.ops runs on `device`, and why."""
        key = _KEYS.get(device.type)
        if key in self._overrides:
            return self._overrides[key][0], "set by use_backend"
        if key in self._compiled:
            return device.type, "compiled kernel"
        if device.type == "cuda" and not self._triton_unavailable(device):
            return "triton", "no compiled CUDA kernel"
        return "reference", "no compiled kernel for this device"

    def explain(self, *args: Any, **kwargs: Any) -> Explanation:
        """Which backend these arguments would run on, why, and with what configuration; raises what the call would."""
        named = kwargs.pop("backend", None)
        self._check(*args, **kwargs)
        device = self._device(args, kwargs)
        if device.type == "meta":
            return Explanation(self.name, "meta", "fake", "meta tensors hold no values", "", {})
        if named is not None:
            self._require(named, device)
        backend, reason = (named, "named") if named is not None else self._chosen(*args, **kwargs)
        config = self._describe(backend, *args, **kwargs) if self._describe else ""
        missing = {b: self.unavailable(b, device) for b in BACKENDS if self.unavailable(b, device)}
        return Explanation(self.name, str(device), backend, reason, config, missing)

    def load_tuned(self) -> None:
        """Hand the compiled kernel its tuned configurations for every known device; no device is touched."""
        if _extension.C is None or self.cuda_key is None:
            return
        for gpu in _tuned.gpus():
            entries = [e for e in _tuned.table(self.name, gpu) if e["backend"] == "cuda"]
            rows = ";".join(f"{self.cuda_key(e['key'])} {e['size']} {e['config']['index']}" for e in entries)
            _extension.C.set_tuned(self.name, gpu, rows)

    def triton_page(self) -> Any:
        """The op's module under triton_ops (imports Triton)."""
        return importlib.import_module(f".triton_ops.{self._triton}", __package__)

    def triton_member(self, name: str) -> Any:
        """`<op>_<name>` of that module where the op shares it, else `<name>`: launch, DEFAULT, SPACE."""
        return member(self.triton_page(), self.name, name)

    def check_values(self, *args: Any, **kwargs: Any) -> None:
        """Raise if a value inside a tensor is out of range (synchronises with the device)."""
        if self._check_values is not None:
            self._check_values(*args, **kwargs)

    def override(self, backend: str | None) -> dict[str, str]:
        """Make `backend` the process default (None: the built-in order); returns what was overridden before."""
        before = {key: name for key, (name, _) in self._overrides.items()}
        keys = list(_KEYS.values()) if backend in (None, "reference") else self._keys_of(str(backend))
        self._set_overrides({**before, **{key: backend for key in keys}})
        return before

    def restore(self, overrides: Mapping[str, str]) -> None:
        """Undo an override: exactly these stay in force."""
        self._set_overrides({key: overrides.get(key) for key in _KEYS.values()})

    def _set_overrides(self, wanted: Mapping[str, str | None]) -> None:
        for key, backend in wanted.items():
            if key in self._overrides:
                self._overrides.pop(key)[1]._destroy()
            if backend is None or (backend in _KEYS and key in self._compiled):
                continue
            registration = torch.library.Library(NAMESPACE, "IMPL")
            with warnings.catch_warnings():  # torch warns that a kernel is overridden; that is what was asked for
                warnings.simplefilter("ignore", UserWarning)
                registration.impl(self.name, self._kernel(backend), key, allow_override=True)
            self._overrides[key] = (backend, registration)

    def _keys_of(self, backend: str) -> list[str]:
        """The dispatch keys a backend can serve; refuses one that no device here could run."""
        if backend == "triton":
            device = torch.device("cpu" if triton_interprets() else "cuda")
        else:
            device = torch.device(backend if backend in _KEYS else "cpu")
        why = self.unavailable(backend, device)
        if why:
            fail(self.name, f"backend {backend!r} is not available: {why}")
        return [_KEYS[device.type]]

    def _triton_unavailable(self, device: torch.device) -> str:
        if self._triton is None:
            return "the op has no Triton kernel"
        if triton_missing():
            return triton_missing()
        if device.type == "cpu" and not triton_interprets():
            return "it needs cuda tensors, got cpu (TRITON_INTERPRET=1 runs it on the CPU, slowly)"
        if device.type not in _KEYS:
            return f"it needs cuda tensors, got {device.type}"
        return ""

    def _chosen(self, *args: Any, **kwargs: Any) -> tuple[str, str]:
        device = self._device(args, kwargs)
        if self._choose is None or _KEYS.get(device.type) in self._overrides:
            return self.process_default(device)
        return self._choose(self.available(device), *args, **kwargs)

    def _run(self, backend: str, *args: Any, **kwargs: Any) -> Any:
        self._require(backend, self._device(args, kwargs))
        if backend in _KEYS and _KEYS[backend] not in self._overrides:
            return self.default(*args, **kwargs)
        return self._named[backend](*args, **kwargs)

    def _require(self, backend: str, device: torch.device) -> None:
        """Raise unless `backend` can run on `device`."""
        why = self.unavailable(backend, device)
        if why:
            others = ", ".join(self.available(device))
            fail(self.name, f"backend {backend!r} is not available: {why}; available here: {others}")

    def _kernel(self, backend: str) -> Callable[..., Any]:
        """`backend` as a function for the dispatcher: checked if it is Python, as compiled otherwise."""
        if backend in _KEYS:
            compiled = self._compiled[_KEYS[backend]]
            keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _KEYS[backend]))
            return functools.partial(compiled.call_boxed, keys)
        return functools.partial(self._run_python, backend)

    def _run_python(self, backend: str, *args: Any, **kwargs: Any) -> Any:
        self._check(*args, **kwargs)
        if self._check_values is not None and self._device(args, kwargs).type == "cpu":
            self._check_values(*args, **kwargs)
        with torch.no_grad(), _without_autocast(self._device(args, kwargs).type):
            return (self._reference if backend == "reference" else self._launch_triton)(*args, **kwargs)

    def _launch_triton(self, *args: Any, **kwargs: Any) -> Any:
        return self.triton_member("launch")(*args, **kwargs)  # imported at the first call: importing Triton is slow

    @staticmethod
    def _device(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> torch.device:
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                return value.device
        return torch.device("cpu")


def find(op: str | Callable[..., Any]) -> Op:
    """The op of this name, or of this public function."""
    name = op if isinstance(op, str) else getattr(op, "__name__", str(op))
    if name not in registry:
        raise RuntimeError(f"{NAMESPACE}: op must be one of {', '.join(sorted(registry))}, got {name!r}")
    return registry[name]


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend `op` would choose for these arguments, why, and with which configuration.

    Args:
        op: the op's name or its function, e.g. "nf4_dequant" or fastops.nf4_dequant.
        *args: the op's arguments.
        **kwargs: the op's keyword arguments.
    """
    return find(op).explain(*args, **kwargs)


class use_backend:
    """Make `backend` the process default of `op`, also for torch.ops: for good, or within a `with` block.

    Args:
        op: the op's name or its function.
        backend: "cuda" | "triton" | "cpu" | "reference", or None for the built-in order.
    Raises:
        RuntimeError: an unknown op or backend, or one that cannot run in this process.

    It holds for the whole process, all threads. Set it before torch.compile, which keeps the kernels it has traced.
    """

    def __init__(self, op: str | Callable[..., Any], backend: str | None) -> None:
        self._op, self._backend = find(op), backend
        self._before = self._op.override(backend)
        self._active = True

    def __enter__(self) -> None:
        if not self._active:  # the same object, entered again
            self._before, self._active = self._op.override(self._backend), True

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._op.restore(self._before)
        self._active = False


class debug_checks(TorchDispatchMode):
    """Within this block, ops also check the values inside CUDA tensors (lengths, indices, pages) before they run.

    Outside it a bad value is skipped on the GPU, never read or written out of bounds; on the CPU values are always
    checked. Reading values back synchronises with the device: use it to find a bug, not in production.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Check the values of our ops' arguments, then run them as usual."""
        op = registry.get(func._opname.partition("__")[0]) if func.namespace == NAMESPACE else None
        if op is not None:
            op.check_values(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))
