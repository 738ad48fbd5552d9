// Questions to the CUDA runtime, and the launch every kernel here shares.
#pragma once

#include <cstdint>
#include <string>

namespace rmcore::cuda {

struct Properties {
  std::string name;
  int major;
  int minor;
  int multiprocessors;
  int64_t shared_bytes;  // shared memory one thread block may have
  int64_t l2_bytes;
  int64_t memory_bytes;
  int cooperative;  // whether cooperative launches are possible
};

// Devices this process can use; 0 without a driver.
int device_count();

// Asked once per device and kept. Throws CudaError.
const Properties& properties(int device);

// Makes a device current for a scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device);
  ~DeviceGuard();
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_;
  int device_;
};

// Launches `kernel` cooperatively with one parameter struct, after checking that all of its blocks fit on the device at
// once. Throws CudaError and std::runtime_error.
void launch_cooperative(const void* kernel, int grid, int threads, int shared_bytes, void* params, int device,
                        uintptr_t stream);

}  // namespace rmcore::cuda
