import json
import math

import pytest
import torch

import fastops
from fastops import _registry
from fastops.triton_ops import _tuned

NAMES = {
    "NVIDIA H100 80GB HBM3": "h100",
    "NVIDIA H200": "h200",
    "NVIDIA A100-SXM4-80GB": "a100",
    "NVIDIA GeForce RTX 4090": "rtx4090",
    "NVIDIA RTX A6000": "rtxa6000",
    "NVIDIA L40S": "l40s",
    "Tesla T4": "t4",
    "": "unknown",
}
TABLES = sorted(_tuned.SHIPPED.glob("*/*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_device_slug(name):
    assert _tuned.device_slug(name) == NAMES[name]
    if fastops._extension.C is not None:
        assert fastops._extension.C.device_slug(name) == NAMES[name]


@pytest.fixture
def local_table(tmp_path, monkeypatch):
    """A local table that beats the shipped ones."""
    monkeypatch.setenv("FASTOPS_CACHE_DIR", str(tmp_path))
    key = {"dtype": "bfloat16", "double_quant": False}
    entries = [
        {"backend": "triton", "key": key, "size": 2**20, "config": {"WORDS": 256, "num_warps": 4}},
        {"backend": "triton", "key": key, "size": 2**26, "config": {"WORDS": 2048, "num_warps": 8}},
    ]
    path = tmp_path / "tuned" / "toy" / "nf4_dequant.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"op": "nf4_dequant", "gpu": "toy", "entries": entries}))
    _tuned.table.cache_clear()
    yield key
    _tuned.table.cache_clear()


@pytest.mark.parametrize(("size", "words"), [(1, 256), (2**20, 256), (2**22, 256), (2**24, 2048), (2**33, 2048)])
def test_nearest_in_log_size(local_table, size, words):
    assert _tuned.nearest("nf4_dequant", "toy", "triton", local_table, size)["WORDS"] == words


def test_another_key_or_device_finds_nothing(local_table):
    assert _tuned.nearest("nf4_dequant", "toy", "triton", {**local_table, "dtype": "float32"}, 2**20) is None
    assert _tuned.nearest("nf4_dequant", "toy", "cuda", local_table, 2**20) is None
    assert _tuned.nearest("nf4_dequant", "nothing", "triton", local_table, 2**20) is None


def test_no_table_means_the_default():
    default = (("WORDS", 1024), ("num_warps", 8))
    assert _tuned.lookup("nf4_dequant", torch.device("cpu"), (("dtype", "bfloat16"),), 20, default) == dict(default)


@pytest.mark.parametrize("path", TABLES, ids=lambda p: f"{p.parent.name}-{p.stem}")
def test_shipped_tables_are_sound(path):
    """A tuned configuration was measured, is one that can be launched, and is not slower than the default."""
    content = json.loads(path.read_text())
    assert content["op"] == path.stem
    assert content["gpu"] == path.parent.name
    assert path.stem in _registry.registry
    for entry in content["entries"]:
        assert entry["backend"] in ("cuda", "triton")
        assert entry["us"] <= entry["default_us"]
        assert entry["size"] > 0
        assert math.isfinite(entry["us"])
        if entry["backend"] == "cuda":
            assert isinstance(_registry.registry[path.stem].cuda_key(entry["key"]), int)
