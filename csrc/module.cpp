// The Python face of the extension: importing fastops._C runs the static registrations of every kernel in it.
// Schemas live in Python (pyops/ops), so no op is defined here; what is here is about the library itself.
#include <Python.h>

#include <string>

#include "common/cpu_isa.h"
#include "common/cpu_output.h"
#include "common/tuned.h"

#if defined(FASTOPS_WITH_CUDA)
namespace fastops::nf4_gemv {
std::string describe(int device, int64_t rows, int64_t n, int64_t k, int64_t item_bytes, int64_t blocksize,
                     bool double_quant, bool aligned);
}
#endif

namespace {

using fastops::Isa;

// The UTF-8 text of a str, or "" with a Python error set.
std::string text(PyObject* object) {
  PyObject* utf8 = PyUnicode_AsUTF8String(object);
  if (!utf8) return {};
  std::string value = PyBytes_AsString(utf8);
  Py_DECREF(utf8);
  return value;
}

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(fastops::isa_name(fastops::active_isa)); }

// Never raises the level above what the machine has.
PyObject* limit_cpu_isa(PyObject*, PyObject* name) {
  const std::string wanted = text(name);
  if (PyErr_Occurred()) return nullptr;
  const Isa best = fastops::detect_isa();
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16}) {
    if (wanted != fastops::isa_name(isa)) continue;
    fastops::active_isa = isa < best ? isa : best;
    return cpu_isa(nullptr, nullptr);
  }
  PyErr_Format(PyExc_ValueError, "limit_cpu_isa: name must be scalar, avx2, avx512 or avx512_bf16, got %s",
               wanted.c_str());
  return nullptr;
}

PyObject* enable_output_pool(PyObject*, PyObject* on) {
  const int wanted = PyObject_IsTrue(on);
  if (wanted < 0) return nullptr;
  return PyBool_FromLong(fastops::HostPool::get().enabled.exchange(wanted != 0));
}

PyObject* has_cuda_kernels(PyObject*, PyObject*) {
#if defined(FASTOPS_WITH_CUDA)
  Py_RETURN_TRUE;
#else
  Py_RETURN_FALSE;
#endif
}

PyObject* set_tuned(PyObject*, PyObject* args) {
  PyObject *op, *gpu, *rows;
  if (!PyArg_ParseTuple(args, "UUU", &op, &gpu, &rows)) return nullptr;
  const std::string op_name = text(op), gpu_name = text(gpu), row_text = text(rows);
  if (PyErr_Occurred()) return nullptr;
  fastops::TunedTable::get().set(op_name, gpu_name, row_text);
  Py_RETURN_NONE;
}

PyObject* device_slug(PyObject*, PyObject* name) {
  const std::string value = text(name);
  if (PyErr_Occurred()) return nullptr;
  return PyUnicode_FromString(fastops::device_slug(value).c_str());
}

PyObject* describe_product(PyObject*, PyObject* args) {
  int device, double_quant, aligned;
  long long rows, n, k, item_bytes, blocksize;
  if (!PyArg_ParseTuple(args, "iLLLLLpp", &device, &rows, &n, &k, &item_bytes, &blocksize, &double_quant, &aligned)) {
    return nullptr;
  }
#if defined(FASTOPS_WITH_CUDA)
  const std::string plan =
      fastops::nf4_gemv::describe(device, rows, n, k, item_bytes, blocksize, double_quant != 0, aligned != 0);
  return PyUnicode_FromString(plan.c_str());
#else
  return PyUnicode_FromString("");
#endif
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "cpu_isa() -> str: the instruction set the CPU kernels use."},
    {"limit_cpu_isa", limit_cpu_isa, METH_O,
     "limit_cpu_isa(name) -> str: use at most this set; returns the one in use."},
    {"enable_output_pool", enable_output_pool, METH_O,
     "enable_output_pool(on) -> bool: whether large CPU results come from the pool; returns what was set before."},
    {"has_cuda_kernels", has_cuda_kernels, METH_NOARGS, "has_cuda_kernels() -> bool: built with nvcc."},
    {"set_tuned", set_tuned, METH_VARARGS, "set_tuned(op, gpu, rows): tuned CUDA configurations, 'key size config;…'."},
    {"describe_product", describe_product, METH_VARARGS,
     "describe_product(device, rows, n, k, item_bytes, blocksize, double_quant, aligned) -> str: how the CUDA products "
     "would multiply."},
    {"device_slug", device_slug, METH_O, "device_slug(name) -> str: how tuned tables name a CUDA device."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
