"""Host memory, the profile on disk, and the timeline: what needs no model."""

import json
import re
import threading

import pytest
import torch

from fastops.methods import _kvpr_profile, _kvpr_store
from fastops.methods._kvpr_lanes import COMPUTE, COPY, STORE, Lanes
from fastops.methods._kvpr_profile import Profile, profile_of
from fastops.methods._kvpr_store import Codec, HostMemoryError, HostStore, Plane, available_memory

PLANES = [Plane(6, torch.float32), Plane(5, torch.uint8)]


def store(tokens=50, segment=8, **options):
    return HostStore(PLANES, 3, 2, tokens, pin=False, segment=segment, **options)


class TestStore:
    def test_a_range_is_a_piece_for_each_segment_and_rows_stay(self):
        s = store()
        s.reserve(5)
        for at, piece in s.pieces(1, 0, 0, 5):
            piece[:] = torch.arange(at, at + piece.shape[0], dtype=torch.float32)[:, None, None]
        address = next(s.pieces(1, 0, 0, 1))[1].data_ptr()
        s.reserve(50)
        assert next(s.pieces(1, 0, 0, 1))[1].data_ptr() == address
        assert [(at, p.shape[0]) for at, p in s.pieces(1, 0, 3, 30)] == [(3, 5), (8, 8), (16, 8), (24, 6)]
        assert all(p.is_contiguous() for _, p in s.pieces(1, 0, 3, 30))
        kept = [float(row[0, 0]) for _, p in s.pieces(1, 0, 0, 5) for row in p]
        assert kept == [0, 1, 2, 3, 4]
        assert list(s.pieces(1, 0, 4, 4)) == []
        s.close()

    def test_layers_and_planes_are_apart(self):
        s = store()
        s.reserve(50)
        for layer in range(3):
            for plane in range(2):
                for _, piece in s.pieces(layer, plane, 0, 50):
                    piece.fill_(10 * layer + plane)
        for layer in range(3):
            for plane in range(2):
                assert all((piece == 10 * layer + plane).all() for _, piece in s.pieces(layer, plane, 0, 50))
        s.close()

    def test_it_grows_by_segments_ahead_of_need(self, monkeypatch):
        s = store(tokens=100)
        made = []
        real = _kvpr_store.empty_host

        def empty(*args):
            made.append(threading.current_thread().name.startswith("fastops-kvpr"))
            return real(*args)

        monkeypatch.setattr(_kvpr_store, "empty_host", empty)
        s.reserve(1)
        assert s.committed == 8
        first = len(made)
        assert not any(made)
        for tokens in range(2, 101):
            s.reserve(tokens)
            assert s.committed >= tokens
            if s._coming is not None:
                s._coming.exception()  # the thread has time enough
        assert all(made[first:])
        assert s.committed == 104
        assert s.bytes == s.needed(100)
        s.close()

    def test_a_segment_fills_a_pinned_block(self):
        """torch rounds pinned memory up to powers of two: what is needed counts that, and rows fill it."""
        s = HostStore([Plane(5120, torch.float16)], 2, 3, 1000, pin=True, segment=10)
        row = 3 * 5120 * 2
        assert s.segment == [(512 << 10) // row]
        assert s.needed(s.segment[0] + 1) == 2 * 2 * (512 << 10)

    def test_a_limit_is_checked_before_anything_is_allocated(self, monkeypatch):
        monkeypatch.setattr(_kvpr_store, "empty_host", lambda *a: pytest.fail("allocated"))
        s = store(limit=1000)
        want = "host memory must have 0.010 MB for 50 tokens of 2 sequences in 3 layers, got 0.001 MB (host_limit)"
        with pytest.raises(HostMemoryError, match=re.escape(f"OffloadedCache: {want}")):
            s.check(50)
        with pytest.raises(MemoryError):
            s.reserve(20)

    def test_what_the_machine_has_is_checked(self, monkeypatch):
        monkeypatch.setattr(_kvpr_store, "available_memory", lambda: (_kvpr_store.SPARE + 100, "the control group"))
        with pytest.raises(HostMemoryError, match=r"got 0\.000 MB \(the control group\)$"):
            store().check(1)
        monkeypatch.setattr(_kvpr_store, "available_memory", lambda: (_kvpr_store.SPARE + 10_000_000, ""))
        store().check(50)

    def test_pinned_memory_that_nothing_uses_is_given_back_first(self, monkeypatch):
        given_back = []
        monkeypatch.setattr(_kvpr_store, "release_pinned", lambda: given_back.append(True))
        monkeypatch.setattr(_kvpr_store, "available_memory", lambda: (1 << 40 if given_back else 0, "the machine"))
        HostStore(PLANES, 3, 2, 50, pin=True).check(50)
        assert given_back
        given_back.clear()
        with pytest.raises(HostMemoryError):
            store().check(50)  # plain memory has no such pool
        assert not given_back

    def test_refused_memory_names_what_was_wanted(self, monkeypatch):
        def refuse(*args):
            raise RuntimeError("CUDA error: out of memory\nmore")

        monkeypatch.setattr(_kvpr_store, "empty_host", refuse)
        s = HostStore(PLANES, 3, 2, 50, pin=True, segment=8)
        with pytest.raises(
            HostMemoryError, match=r"pinned memory must have .* got an error: CUDA error: out of memory;"
        ):
            s.reserve(1)
        assert s.committed == 0
        monkeypatch.undo()
        s = store()
        s.reserve(8)
        s.close()

    def test_memory_that_the_thread_could_not_have_is_asked_for_again(self, monkeypatch):
        s = store()
        s.reserve(1)
        monkeypatch.setattr(_kvpr_store, "empty_host", lambda *a: (_ for _ in ()).throw(RuntimeError("no")))
        s.reserve(5)  # the next segment is asked for, ahead of need
        s._coming.exception()
        s.reserve(8)
        monkeypatch.undo()
        s.reserve(20)
        assert s.committed >= 20
        s.close()

    def test_what_is_available(self, tmp_path):
        proc, groups = tmp_path / "proc", tmp_path / "cgroup"
        (proc / "self").mkdir(parents=True)
        (groups / "a/b").mkdir(parents=True)
        (proc / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:   2000 kB\n")
        assert available_memory(proc, groups) == (2000 << 10, "the machine")
        (proc / "self/cgroup").write_text("0::/a/b\n")
        (groups / "a/memory.max").write_text("900000\n")
        (groups / "a/memory.current").write_text("300000\n")
        (groups / "a/b/memory.max").write_text("max\n")
        (groups / "a/b/memory.current").write_text("300000\n")
        assert available_memory(proc, groups) == (600_000, "the control group")
        (groups / "a/memory.stat").write_text("anon 5\ninactive_file 50000\n")
        assert available_memory(proc, groups) == (650_000, "the control group")
        old = groups / "memory/job"
        old.mkdir(parents=True)
        (proc / "self/cgroup").write_text("4:cpu:/x\n3:memory:/job\n")
        (old / "memory.limit_in_bytes").write_text("70000")
        (old / "memory.usage_in_bytes").write_text("69000")
        assert available_memory(proc, groups) == (1000, "the control group")
        assert available_memory(tmp_path / "none", tmp_path / "none")[0] > 1 << 60
        assert available_memory()[0] > 0


class TestCodec:
    @pytest.mark.parametrize("width", [64, 96, 160])
    def test_four_bits_and_back(self, width):
        codec = Codec(2 * width, torch.float32, packed=True, parts=2)
        rows = torch.randn(7, 2 * width)
        stored = codec.encode(rows)
        assert [t.shape[1] for t in stored] == [p.width for p in codec.planes]
        assert [t.dtype for t in stored] == [p.dtype for p in codec.planes]
        back = codec.decode([t.reshape(7, 1, -1) for t in stored]).reshape(7, -1)
        blocks = rows.reshape(-1, codec.blocksize)
        step = 0.1520  # half of NF4's widest gap, of the block's largest value
        assert ((back.reshape(blocks.shape) - blocks).abs() <= step * blocks.abs().amax(1, keepdim=True) + 1e-6).all()

    def test_as_they_are(self):
        codec = Codec(10, torch.float16, packed=False)
        rows = torch.randn(3, 10).half()
        assert codec.decode(codec.encode(rows)) is rows

    def test_rows_that_blocks_do_not_divide(self):
        with pytest.raises(ValueError, match=r"compress must be None where rows are no multiple of 32 .* rows of 48$"):
            Codec(96, torch.float32, packed=True, parts=2)
        assert Codec(96, torch.float32, packed=True).blocksize == 32


class TestProfile:
    ARGS = (torch.device("cpu"), 64, 32, torch.float32)

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch, tmp_path):
        monkeypatch.setattr(_kvpr_profile, "SIZES", {"cpu": [1 << 12, 1 << 14]})
        monkeypatch.setattr(_kvpr_profile, "ROWS", {"cpu": 16})
        monkeypatch.setattr(_kvpr_profile, "MEMORY_BYTES", {"cpu": 1 << 16})
        monkeypatch.delenv("FASTOPS_CACHE_DIR", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def test_it_is_measured_once(self, monkeypatch, tmp_path):
        first = profile_of(*self.ARGS, pin=False, progress=True)
        assert first.flops > 0
        assert sorted(first.by_size) == [1 << 12, 1 << 14]
        (file,) = (tmp_path / "fastops/kvpr").iterdir()
        monkeypatch.setattr(_kvpr_profile, "measure", lambda *a, **k: pytest.fail("measured again"))
        assert profile_of(*self.ARGS, pin=False) == first
        monkeypatch.setenv("FASTOPS_CACHE_DIR", str(tmp_path / "own"))
        (tmp_path / "own/kvpr").mkdir(parents=True)
        file.rename(tmp_path / "own/kvpr" / file.name)
        assert profile_of(*self.ARGS, pin=False) == first

    @pytest.mark.parametrize("damage", ["", "{", "[]", "null", "version", "rate", "missing", "words", "deep"])
    def test_a_file_that_is_not_sound_is_measured_again(self, damage, monkeypatch, tmp_path):
        first = profile_of(*self.ARGS, pin=False)
        (file,) = (tmp_path / "fastops/kvpr").iterdir()
        content = json.loads(file.read_text())
        if damage == "version":
            content["about"]["version"] += 1
        elif damage == "rate":
            content["measured"]["flops"] = float("nan")
        elif damage == "missing":
            del content["measured"]["memory"]
        elif damage == "words":
            content["measured"]["by_size"] = {"many": 3.0}
        damaged = damage in ("version", "rate", "missing", "words")
        file.write_text(json.dumps(content) if damaged else "[" * 100_000 if damage == "deep" else damage)
        other = Profile({1: 1.0}, 2.0, 3.0)
        monkeypatch.setattr(_kvpr_profile, "measure", lambda *a, **k: other)
        assert profile_of(*self.ARGS, pin=False) == other != first
        assert json.loads(file.read_text())["measured"]["flops"] == 2.0
        monkeypatch.undo()

    def test_other_things_have_another_file(self, tmp_path):
        profile_of(*self.ARGS, pin=False)
        profile_of(self.ARGS[0], 96, 32, torch.float32, pin=False)
        profile_of(*self.ARGS[:3], torch.bfloat16, pin=False)
        assert len(list((tmp_path / "fastops/kvpr").iterdir())) == 3

    def test_a_folder_that_cannot_be_written(self, monkeypatch, tmp_path):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
        assert profile_of(*self.ARGS, pin=False).flops > 0

    def test_rates(self):
        rates = Profile({1 << 10: 1e9, 1 << 20: 4e9}, 1e12, 2e9, 0.5, 0.8, 1e-5).rates(4e9)
        assert (rates.copy, rates.flops, rates.other, rates.launch) == (2e9, 0.8e12, 2.0, 1e-5)
        assert rates.copy_seconds(1 << 10) == (1 << 10) / 0.5e9

    @pytest.mark.parametrize("bad", [dict(by_size={}), dict(flops=0.0), dict(memory=float("inf")), dict(launch=-1.0)])
    def test_rejects(self, bad):
        with pytest.raises(ValueError, match="profile must hold finite rates"):
            Profile(**{**dict(by_size={1: 1.0}, flops=1.0, memory=1.0), **bad})


class TestLanes:
    def test_a_trace(self, tmp_path):
        lanes = Lanes(torch.device("cpu"), timeline=True)
        with lanes.on(COPY, "X 0", rows=3):
            pass
        lanes.begin(COMPUTE, "layer 0")
        with lanes.on(COMPUTE, "recompute 1"):  # ends the span before
            pass
        lanes.end(COMPUTE)
        lanes.begin(STORE, "never ends")
        names = [(s["lane"], s["name"]) for s in lanes.timeline.spans()]
        assert names == [(COPY, "X 0"), (COMPUTE, "layer 0"), (COMPUTE, "recompute 1")]
        assert lanes.timeline.busy(COPY) >= 0
        path = tmp_path / "new/trace.json"
        lanes.timeline.save(path)
        events = json.loads(path.read_text())["traceEvents"]
        assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"copy", "compute", "store"}
        assert [e["args"] for e in events if e["ph"] == "X"] == [{"rows": 3}, {}, {}]
        lanes.timeline.clear()
        assert lanes.timeline.spans() == []

    def test_without_a_timeline_nothing_is_kept(self):
        lanes = Lanes(torch.device("cpu"))
        with lanes.on(COPY, "x"):
            lanes.wait(COPY, lanes.mark(STORE))
        lanes.begin(COMPUTE, "y")
        lanes.end(COMPUTE)
        lanes.synchronize()
        assert lanes.timeline is None
