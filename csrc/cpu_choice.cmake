# Whether rmcore._cpu can be built, and one status line that says so. Without it rmcore runs on the torch backend, which
# is slower and otherwise the same: a machine without a compiler can install rmcore all the same.

macro(rmcore_miss why)
  if("${RMCORE_CPU}" STREQUAL "AUTO" AND "${RMCORE_CUDA}$ENV{RMCORE_CUDA}" MATCHES "^(ON|1|TRUE|YES)")
    message(FATAL_ERROR "rmcore: RMCORE_CUDA asks for rmcore._cuda, but ${why}")
  elseif("${RMCORE_CPU}" STREQUAL "AUTO")
    message(STATUS "rmcore: building without rmcore._cpu: ${why}. The head will run on torch, which is slower "
                   "(install what is missing and then rmcore again)")
    return()
  endif()
  message(FATAL_ERROR "rmcore: -DRMCORE_CPU=${RMCORE_CPU}, but ${why} (RMCORE_CPU=AUTO builds without)")
endmacro()

function(rmcore_choose_cpu result)
  set(${result} FALSE PARENT_SCOPE)
  if(NOT "${RMCORE_CPU}" MATCHES "^(AUTO|ON|OFF|1|0|TRUE|FALSE|YES|NO)$")
    message(FATAL_ERROR "rmcore: -DRMCORE_CPU=${RMCORE_CPU}: expected ON, OFF or AUTO")
  endif()
  include(CheckLanguage)
  check_language(CXX)
  if(NOT CMAKE_CXX_COMPILER)
    rmcore_miss("no C++ compiler that works is found (CXX names one)")
  endif()
  set(${result} TRUE PARENT_SCOPE)
endfunction()
