import pytest
import torch

import fastops.testing
from fastops.cli import smollm2


@pytest.hookimpl(tryfirst=True)  # before -m selects
def pytest_collection_modifyitems(items):
    """Mark what runs on a GPU, skip what this machine cannot run, and say why."""
    for item in items:
        parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if any(isinstance(value, torch.device) and value.type == "cuda" for value in parameters):
            item.add_marker(pytest.mark.gpu)
    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for item in items:
        if item.get_closest_marker("gpu") and devices < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("multi_gpu") and devices < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices"))


@pytest.fixture(autouse=True)
def forget_compiled(request):
    """Tests that compile share code objects, and torch.compile keeps only so many variants of one."""
    yield
    if "compile" in request.node.name:
        torch._dynamo.reset()


@pytest.fixture
def poison():
    """Uninitialised memory is NaN."""
    with fastops.testing.poison():
        yield


@pytest.fixture(params=["avx512_bf16", "avx512", "avx2", "scalar"])
def cpu_isa(request):
    """Every instruction set of the CPU kernels that this machine has."""
    extension = fastops._extension.C
    if extension is None:
        pytest.skip("fastops._C was not built")
    before = extension.cpu_isa()
    if extension.limit_cpu_isa(request.param) != request.param:
        extension.limit_cpu_isa(before)
        pytest.skip(f"this CPU has no {request.param}")
    yield request.param
    extension.limit_cpu_isa(before)


@pytest.fixture(scope="session")
def smol():
    """(SmolLM2-135M-Instruct in fp32, the tokens of a real text: chapters of the Python language reference)."""
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # where others use the cores, two threads that wait for each other are many times slower
    try:
        model, tokenizer = smollm2.load(smollm2.gguf_file(), torch.device("cpu"), torch.float32)
        yield model, tokenizer(smollm2.real_text(), return_tensors="pt").input_ids[0]
    except smollm2.Missing as missing:
        pytest.skip(str(missing))
    finally:
        torch.set_num_threads(threads)
