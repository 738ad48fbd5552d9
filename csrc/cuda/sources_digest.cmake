# cmake -DFOLDER=csrc/cuda -DOUT=sources_digest.h -P sources_digest.cmake
#
# Writes one digest of what computes in rmcore._cuda: kernels, plans, launchers and their headers, by name and content.
# Two builds of the same sources have the same digest whatever compiler made them, so what was measured of one is known
# of the other (rmcore/ops/proven.py). No part of it: the binding, which only translates, and the host emulation, which
# is of the tests.
file(GLOB files RELATIVE ${FOLDER} ${FOLDER}/*.cpp ${FOLDER}/*.cu ${FOLDER}/*.cuh ${FOLDER}/*.h)
list(FILTER files EXCLUDE REGEX "^(binding|emulate)")
list(SORT files COMPARE STRING)
set(lines "")
foreach(name IN LISTS files)
  file(SHA256 ${FOLDER}/${name} digest)
  string(APPEND lines "${digest}  ${name}\n")
endforeach()
string(SHA256 digest "${lines}")
file(CONFIGURE OUTPUT ${OUT} CONTENT "#define RMCORE_CUDA_SOURCES \"${digest}\"\n" @ONLY)
