// The Python face of the extension: importing fastops._C runs the static registrations of every kernel in it.
// Schemas live in Python (pyops/ops), so no op is defined here; what is here is about the library itself.
#include <Python.h>

#include <string>

#include "common/cpu_isa.h"

namespace {

using fastops::Isa;

PyObject* cpu_isa(PyObject*, PyObject*) { return PyUnicode_FromString(fastops::isa_name(fastops::active_isa)); }

// Never raises the level above what the machine has.
PyObject* limit_cpu_isa(PyObject*, PyObject* name) {
  PyObject* utf8 = PyUnicode_AsUTF8String(name);
  if (!utf8) return nullptr;
  const std::string wanted = PyBytes_AsString(utf8);
  Py_DECREF(utf8);
  const Isa best = fastops::detect_isa();
  for (const Isa isa : {Isa::kScalar, Isa::kAvx2, Isa::kAvx512}) {
    if (wanted != fastops::isa_name(isa)) continue;
    fastops::active_isa = isa < best ? isa : best;
    return cpu_isa(nullptr, nullptr);
  }
  PyErr_Format(PyExc_ValueError, "limit_cpu_isa: name must be scalar, avx2 or avx512, got %s", wanted.c_str());
  return nullptr;
}

PyObject* has_cuda_kernels(PyObject*, PyObject*) {
#if defined(FASTOPS_WITH_CUDA)
  Py_RETURN_TRUE;
#else
  Py_RETURN_FALSE;
#endif
}

PyMethodDef methods[] = {
    {"cpu_isa", cpu_isa, METH_NOARGS, "cpu_isa() -> str: the instruction set the CPU kernels use."},
    {"limit_cpu_isa", limit_cpu_isa, METH_O, "limit_cpu_isa(name) -> str: use at most this set; returns the one in use."},
    {"has_cuda_kernels", has_cuda_kernels, METH_NOARGS, "has_cuda_kernels() -> bool: built with nvcc."},
    {nullptr, nullptr, 0, nullptr}};

}  // namespace

PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}
