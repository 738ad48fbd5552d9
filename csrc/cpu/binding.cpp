// Python binding of rmcore._cpu. Only translates: no maths, no policy, no allocation.
#include <pybind11/pybind11.h>

#include "isa.h"

namespace py = pybind11;

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of rmcore";
  m.def("isa", [] { return rmcore::cpu::isa_name(rmcore::cpu::detect_isa()); },
        "The best instruction set of this machine: scalar, avx2, avx512 or avx512_bf16.");
}
