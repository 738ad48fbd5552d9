// CUDA errors as exceptions that name the call.
#pragma once

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace rmcore::cuda {

struct CudaError : std::runtime_error {
  CudaError(const char* call, cudaError_t code)
      : std::runtime_error(std::string(call) + ": " + cudaGetErrorString(code) + " (" + std::to_string(code) + ")") {}
};

inline void check(cudaError_t code, const char* call) {
  if (code == cudaSuccess) return;
  cudaGetLastError();  // forget an error that is not sticky, so that it is not reported again elsewhere
  throw CudaError(call, code);
}

}  // namespace rmcore::cuda
