import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

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


KEY = {"dtype": "bfloat16", "double_quant": False}
TRITON = {"backend": "triton", "key": KEY, "size": 2**20, "config": {"WORDS": 256, "num_warps": 4}}
CUDA = {"backend": "cuda", "key": KEY, "size": 2**20, "config": {"index": 1}}


@pytest.fixture
def local_file(tmp_path, monkeypatch):
    """The path of an op's local table on the device "toy"."""
    monkeypatch.setenv("FASTOPS_CACHE_DIR", str(tmp_path))
    path = tmp_path / "tuned" / "toy" / "nf4_dequant.json"
    path.parent.mkdir(parents=True)
    _tuned.table.cache_clear()
    yield path
    _tuned.table.cache_clear()


@pytest.fixture
def local_table(local_file):
    """A local table that beats the shipped ones."""
    entries = [TRITON, {**TRITON, "size": 2**26, "config": {"WORDS": 2048, "num_warps": 8}}]
    local_file.write_text(json.dumps({"op": "nf4_dequant", "gpu": "toy", "entries": entries}))
    return KEY


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


@pytest.mark.parametrize(
    "content",
    [b"", b'{"op": "nf4_dequant", "entr', b"[]", b"7", b"null", b"{}", b'{"entries": {}}', b"\xff\xfe", b"[" * 100_000],
)
def test_a_damaged_local_file_is_ignored_with_a_warning(local_file, content):
    local_file.write_bytes(content)
    with pytest.warns(UserWarning, match=r"toy/nf4_dequant\.json"):
        assert _tuned.table("nf4_dequant", "toy") == ()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        assert _tuned.table("nf4_dequant", "toy") == ()


BAD_ENTRIES = {
    "no object": 3,
    "no backend": {k: v for k, v in TRITON.items() if k != "backend"},
    "no key": {k: v for k, v in CUDA.items() if k != "key"},
    "no size": {k: v for k, v in TRITON.items() if k != "size"},
    "no config": {k: v for k, v in TRITON.items() if k != "config"},
    "a list for a key": {**TRITON, "key": []},
    "a word for a config": {**TRITON, "config": "fast"},
    "size 0": {**TRITON, "size": 0},
    "a fractional size": {**CUDA, "size": 0.5},
    "cuda without index": {**CUDA, "config": {}},
    "a word for an index": {**CUDA, "config": {"index": "1"}},
    "a negative index": {**CUDA, "config": {"index": -1}},
    "an unknown dtype": {**CUDA, "key": {**KEY, "dtype": "bf17"}},
    "a word for a flag": {**CUDA, "key": {**KEY, "double_quant": "no"}},
    "the key of another version": {**CUDA, "key": {"dtype": "bfloat16"}},
    "the configuration of another version": {**TRITON, "config": {"TILE": 2048, "num_warps": 4}},
}


@pytest.mark.parametrize("bad", BAD_ENTRIES.values(), ids=BAD_ENTRIES)
def test_a_malformed_local_entry_is_skipped_with_a_warning(local_file, bad):
    local_file.write_text(json.dumps({"entries": [TRITON, bad, CUDA]}))
    with pytest.warns(UserWarning, match=r"toy/nf4_dequant\.json: 1 of its 3 entries"):
        assert _tuned.table("nf4_dequant", "toy") == (TRITON, CUDA)
    _registry.registry["nf4_dequant"].load_tuned()


def test_a_damaged_shipped_table_is_an_error(local_file, monkeypatch):
    monkeypatch.setattr(_tuned, "SHIPPED", local_file.parent.parent)
    local_file.write_text('{"op"')
    with pytest.raises(json.JSONDecodeError):
        _tuned._shipped("nf4_dequant", "toy")


@pytest.mark.parametrize("error", [RuntimeError("Could not determine home directory."), PermissionError(13, "denied")])
def test_without_a_folder_of_ones_own_the_shipped_tables_remain(monkeypatch, error):
    def fail():
        raise error

    _tuned.table.cache_clear()
    monkeypatch.setattr(_tuned, "local_folder", fail)
    assert _tuned.gpus() == sorted({path.parent.name for path in TABLES})
    for path in TABLES:
        assert list(_tuned.table(path.stem, path.parent.name)) == json.loads(path.read_text())["entries"]
    _tuned.table.cache_clear()


def test_a_file_that_may_not_be_read_is_no_file(local_table, monkeypatch):
    def denied(self):
        raise PermissionError(13, "denied", str(self))

    assert _tuned._local("nf4_dequant", "toy")
    monkeypatch.setattr(Path, "read_bytes", denied)
    assert _tuned._local("nf4_dequant", "toy") == []


IMPORT = "import fastops, torch; print(fastops.nf4_quantize(torch.ones(64))[1].item())"
NO_HOME = (
    "import os, pwd\nos.environ.pop('HOME', None)\n"
    "def nobody(uid): raise KeyError(uid)\npwd.getpwuid = nobody\n" + IMPORT
)


def run_python(code, **environment):
    env = {k: v for k, v in os.environ.items() if k != "FASTOPS_CACHE_DIR"} | environment
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


def test_import_without_a_home():
    done = run_python(NO_HOME)
    assert (done.returncode, done.stdout.strip()) == (0, "1.0"), done.stderr


def test_import_with_damaged_local_tables(local_file):
    local_file.write_text('{"entries": [')
    local_file.with_name("nf4_quantize.json").write_text(json.dumps({"entries": [{**CUDA, "config": {}}]}))
    done = run_python(IMPORT, FASTOPS_CACHE_DIR=str(local_file.parents[2]))
    assert (done.returncode, done.stdout.strip()) == (0, "1.0"), done.stderr
