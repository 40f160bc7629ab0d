// fastops._host: objects that hold no tensors. No torch headers here, so this module never depends on torch's ABI.
#include <pybind11/pybind11.h>
#include <unistd.h>

#include "common/cpu_isa.h"

namespace py = pybind11;

namespace {

// Facts about this processor that explain a measured number: `python -m fastops info` and result files show them.
struct Cpu {
  const char* isa = fastops::isa_name(fastops::detect_isa());
  long cores = sysconf(_SC_NPROCESSORS_ONLN);
  long l2_bytes = sysconf(_SC_LEVEL2_CACHE_SIZE);
  long l3_bytes = sysconf(_SC_LEVEL3_CACHE_SIZE);
};

}  // namespace

PYBIND11_MODULE(_host, m) {
  m.doc() = "Host objects of fastops that hold no tensors.";
  py::class_<Cpu>(m, "Cpu", "This processor: isa, cores, l2_bytes, l3_bytes (0 where the system does not tell).")
      .def(py::init<>())
      .def_readonly("isa", &Cpu::isa)
      .def_readonly("cores", &Cpu::cores)
      .def_readonly("l2_bytes", &Cpu::l2_bytes)
      .def_readonly("l3_bytes", &Cpu::l3_bytes);
}
