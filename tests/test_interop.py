import numpy as np
import pytest
import torch

import fastops
from fastops import _registry, interop


def weights():
    return np.random.default_rng(0).standard_normal((64, 128), dtype=np.float32)


@pytest.mark.parametrize("dtype", ["float16", np.float16, np.dtype("float16"), torch.float16], ids=repr)
def test_numpy_in_numpy_out(dtype):
    w = weights()
    packed, absmax = interop.nf4_quantize(w)
    assert isinstance(packed, np.ndarray)
    got = interop.nf4_dequant(packed, absmax, (64, 128), dtype)
    assert got.dtype == np.float16
    want = fastops.nf4_dequant(*fastops.nf4_quantize(torch.from_numpy(w)), (64, 128), torch.float16)
    assert np.array_equal(got, want.numpy())


def test_nothing_is_copied():
    """The tensor the op sees lies where the array lies."""
    w = weights()
    assert interop._to_torch("nf4_quantize", "w", w, False).data_ptr() == w.ctypes.data


def test_double_quantisation_comes_back_as_arrays():
    packed, absmax, dq = interop.nf4_quantize(weights(), double_quant=True)
    assert all(isinstance(v, np.ndarray) for k, v in dq.items() if k != "absmax_blocksize")
    assert interop.nf4_dequant(packed, absmax, (64, 128), "float32", **dq).shape == (64, 128)


def test_negative_strides_are_refused():
    with pytest.raises(RuntimeError, match=r"w must have no negative stride, got strides \(-512, 4\)"):
        interop.nf4_quantize(weights()[::-1])


def test_too_many_arguments():
    with pytest.raises(TypeError, match="too many positional arguments"):
        interop.nf4_quantize(weights(), 64, None)


def test_array_subclasses_come_back_as_arrays():
    class Mine(np.ndarray):
        pass

    assert isinstance(interop.nf4_quantize(weights().view(Mine))[0], np.ndarray)


def test_read_only_input_is_fine_when_it_is_only_read():
    w = weights()
    want = interop.nf4_quantize(w)[0]
    w.setflags(write=False)
    assert np.array_equal(interop.nf4_quantize(w)[0], want)


def test_numpy_has_no_bfloat16():
    packed, absmax = interop.nf4_quantize(weights())
    with pytest.raises(RuntimeError, match="dtype must be float32 or float16 for NumPy"):
        interop.nf4_dequant(packed, absmax, (64, 128), "bfloat16")


def test_unknown_dtype_is_named():
    packed, absmax = interop.nf4_quantize(weights())
    with pytest.raises(RuntimeError, match="dtype must be a floating-point dtype or its name, got 'floaty'"):
        interop.nf4_dequant(packed, absmax, (64, 128), "floaty")


def test_tensors_stay_tensors():
    assert isinstance(interop.nf4_quantize(torch.zeros(64))[0], torch.Tensor)


def test_unknown_op():
    with pytest.raises(AttributeError, match=r"no op 'nf5_dequant'; it has .*nf4_dequant"):
        interop.nf5_dequant  # noqa: B018


def test_errors_are_the_op_s_own():
    with pytest.raises(RuntimeError, match=r"fastops::nf4_dequant: packed must be uint8, got float32"):
        interop.nf4_dequant(weights(), weights(), (64, 128), "float32")


def test_in_place_ops_refuse_what_cannot_be_written():
    w = weights()
    w.setflags(write=False)
    with pytest.raises(RuntimeError, match="x must be a writable array, got a read-only one"):
        interop._to_torch("toy", "x", w, True)
    jax = pytest.importorskip("jax")
    with pytest.raises(RuntimeError, match="x must be a writable array, got a JAX array, which is immutable"):
        interop._to_torch("toy", "x", jax.numpy.zeros(3), True)


def test_written_arguments_are_found_in_the_schema(monkeypatch):
    """An in-place op refuses a JAX array through the public path, by the alias marks of its schema."""
    jax = pytest.importorskip("jax")

    def fill(x, value):
        x.copy_(value)

    if "toy_fill" not in _registry.registry:
        _registry.Op(
            "toy_fill(Tensor(a!) x, Tensor value) -> ()",
            check=lambda x, value: None,
            fake=lambda x, value: None,
            reference=fill,
        )
    monkeypatch.setattr(
        fastops, "toy_fill", lambda x, value: _registry.registry["toy_fill"](None, x, value), raising=False
    )
    target = np.zeros(3, np.float32)
    try:
        interop.toy_fill(target, np.full(3, 7, np.float32))
        assert target.tolist() == [7, 7, 7]
        with pytest.raises(RuntimeError, match="x must be a writable array, got a JAX array"):
            interop.toy_fill(jax.numpy.zeros(3), np.zeros(3, np.float32))
    finally:
        interop._wrapped.cache_clear()
        del _registry.registry["toy_fill"]


def test_jax_in_jax_out():
    jax = pytest.importorskip("jax")
    w = weights()
    packed, absmax = interop.nf4_quantize(jax.numpy.asarray(w))
    got = interop.nf4_dequant(packed, absmax, (64, 128), jax.numpy.bfloat16)
    assert isinstance(got, jax.Array)
    assert got.dtype == jax.numpy.bfloat16
    want = fastops.nf4_dequant(*fastops.nf4_quantize(torch.from_numpy(w)), (64, 128), torch.bfloat16)
    assert np.array_equal(np.asarray(got.astype(np.float32)), want.float().numpy())


@pytest.mark.gpu
def test_cupy_runs_on_its_own_stream():
    cupy = pytest.importorskip("cupy")
    w = cupy.asarray(weights())
    want = interop.nf4_quantize(weights())
    with cupy.cuda.Stream(non_blocking=True) as stream:
        w2 = w * 1
        packed, absmax = interop.nf4_quantize(w2)
        stream.synchronize()
    assert isinstance(packed, cupy.ndarray)
    assert np.array_equal(packed.get(), want[0])
    assert np.array_equal(absmax.get(), want[1])


@pytest.mark.gpu
def test_jax_on_the_gpu():
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("this JAX has no GPU")
    packed, _ = interop.nf4_quantize(jax.numpy.asarray(weights()))
    assert np.array_equal(np.asarray(packed), interop.nf4_quantize(weights())[0])
