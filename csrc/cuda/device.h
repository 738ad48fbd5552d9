// Questions to the CUDA runtime, and the launch every kernel here shares.
#pragma once

#include <cstdint>
#include <stdexcept>
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

// A barrier of an earlier launch that a thread block never came to. That launch has ended and its results are NaN.
struct BarrierTimeout : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The word of host memory in which kernels report such a barrier; the same address on every device. Throws CudaError.
uint64_t* hang_word();

// Throws BarrierTimeout where one was reported since the last call. Reads host memory: asks nothing of the device.
void check_barriers();

// Launches `kernel` cooperatively with one parameter struct, after check_barriers and after checking that all of its
// blocks fit on the device at once. Throws CudaError, BarrierTimeout and std::runtime_error.
void launch_cooperative(const void* kernel, int grid, int threads, int shared_bytes, void* params, int device,
                        uintptr_t stream);

}  // namespace rmcore::cuda
