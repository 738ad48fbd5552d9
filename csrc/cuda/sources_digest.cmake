# cmake -DFOLDER=csrc/cuda -DOUT=sources_digest.h -P sources_digest.cmake
#
# Writes the digests of what computes in rmcore._cuda: kernels, plans, launchers and their headers, by name and content.
# Two builds of the same sources have the same digest whatever compiler made them, so what was measured of one is known
# of the other (rmcore/ops/proven.py). The first is of all but the files that belong to one kernel alone (int8_*: int8
# heads, mid_*: 65 to 512 rows), so that those say nothing against the others; each of these kernels has a digest of its
# own files and of all that the first is of. No part of them: the binding, which only translates, and the host
# emulation, which is of the tests.
file(GLOB all RELATIVE ${FOLDER} ${FOLDER}/*.cpp ${FOLDER}/*.cu ${FOLDER}/*.cuh ${FOLDER}/*.h)
list(FILTER all EXCLUDE REGEX "^(binding|emulate)")
list(SORT all COMPARE STRING)
set(left_out "^(int8_|mid_|mid\\.)")
set(left_out_INT8 "^(mid_|mid\\.)")
set(left_out_MID "^int8_")
set(text "")
foreach(which IN ITEMS "" "_INT8" "_MID")
  set(files ${all})
  list(FILTER files EXCLUDE REGEX "${left_out${which}}")
  set(lines "")
  foreach(name IN LISTS files)
    file(SHA256 ${FOLDER}/${name} digest)
    string(APPEND lines "${digest}  ${name}\n")
  endforeach()
  string(SHA256 digest "${lines}")
  string(APPEND text "#define RMCORE_CUDA_SOURCES${which} \"${digest}\"\n")
endforeach()
file(CONFIGURE OUTPUT ${OUT} CONTENT "${text}" @ONLY)
