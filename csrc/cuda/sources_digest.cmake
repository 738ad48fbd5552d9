# cmake -DFOLDER=csrc/cuda -DOUT=sources_digest.h -P sources_digest.cmake
#
# Writes two digests of what computes in rmcore._cuda: kernels, plans, launchers and their headers, by name and content.
# Two builds of the same sources have the same digest whatever compiler made them, so what was measured of one is known
# of the other (rmcore/ops/proven.py). The first is of all but the int8 kernel's own files, so that it says nothing
# against the others; the second, for that kernel, is of all. No part of them: the binding, which only translates, and
# the host emulation, which is of the tests.
file(GLOB all RELATIVE ${FOLDER} ${FOLDER}/*.cpp ${FOLDER}/*.cu ${FOLDER}/*.cuh ${FOLDER}/*.h)
list(FILTER all EXCLUDE REGEX "^(binding|emulate)")
list(SORT all COMPARE STRING)
set(text "")
foreach(which IN ITEMS "" "_INT8")
  set(files ${all})
  if(which STREQUAL "")
    list(FILTER files EXCLUDE REGEX "^int8_")
  endif()
  set(lines "")
  foreach(name IN LISTS files)
    file(SHA256 ${FOLDER}/${name} digest)
    string(APPEND lines "${digest}  ${name}\n")
  endforeach()
  string(SHA256 digest "${lines}")
  string(APPEND text "#define RMCORE_CUDA_SOURCES${which} \"${digest}\"\n")
endforeach()
file(CONFIGURE OUTPUT ${OUT} CONTENT "${text}" @ONLY)
