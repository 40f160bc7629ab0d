"""Every Triton configuration that can be launched compiles for sm_80 and sm_90 without a GPU, spilling nothing."""

import importlib

import pytest

import fastops._registry as registry

pytest.importorskip("triton")
if registry.triton_interprets():
    pytest.skip("the interpreter replaces the compiler in this process", allow_module_level=True)

from fastops.triton_ops import _aot

PAGES = sorted({op._triton for op in registry.registry.values() if op._triton is not None})
SPECS = [
    pytest.param(spec, id=f"{page}-{spec.name}")
    for page in PAGES
    for spec in importlib.import_module(f"fastops.triton_ops.{page}").specializations()
]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("spec", SPECS)
def test_compiles_without_spilling(spec, capability):
    if capability < spec.since:
        pytest.skip(f"never launched so on sm_{capability}")
    report = _aot.compile_for(capability, spec)
    assert report.stack == 0, f"{report}: spills"
    assert report.shared <= _aot.SHARED_LIMIT[capability], f"{report}: too much shared memory"
    assert 0 < report.registers <= 255
