// Devices and cooperative launches; see device.h.
#include "device.h"

#include <map>
#include <mutex>
#include <tuple>

#include "barrier.h"
#include "error.h"

namespace rmcore::cuda {
namespace {

int attribute(cudaDeviceAttr what, int device) {
  int value = 0;
  check(cudaDeviceGetAttribute(&value, what, device), "cudaDeviceGetAttribute");
  return value;
}

// Raises the kernel's shared-memory limit and returns how many of its blocks fit on the device at once. Asked once for
// each kernel, size and device: the answer does not change, and a launch must stay cheap.
int resident_blocks(const void* kernel, int threads, int shared_bytes, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(kernel, shared_bytes, device);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  cudaFuncAttributes attributes{};
  check(cudaFuncGetAttributes(&attributes, kernel), "cudaFuncGetAttributes");
  const int limit = static_cast<int>(properties(device).shared_bytes) - static_cast<int>(attributes.sharedSizeBytes);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit), "cudaFuncSetAttribute");
  int per_multiprocessor = 0;
  check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_multiprocessor, kernel, threads,
                                                      static_cast<size_t>(shared_bytes)),
        "cudaOccupancyMaxActiveBlocksPerMultiprocessor");
  return known[key] = per_multiprocessor * properties(device).multiprocessors;
}

}  // namespace

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

const Properties& properties(int device) {
  static std::mutex mutex;
  static std::map<int, Properties> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  if (found != known.end()) return found->second;
  cudaDeviceProp p{};
  check(cudaGetDeviceProperties(&p, device), "cudaGetDeviceProperties");
  Properties result{};
  result.name = p.name;
  result.major = p.major;
  result.minor = p.minor;
  result.multiprocessors = p.multiProcessorCount;
  result.shared_bytes = static_cast<int64_t>(p.sharedMemPerBlockOptin);
  result.l2_bytes = p.l2CacheSize;
  result.memory_bytes = static_cast<int64_t>(p.totalGlobalMem);
  result.cooperative = attribute(cudaDevAttrCooperativeLaunch, device);
  return known[device] = result;
}

DeviceGuard::DeviceGuard(int device) : previous_(device), device_(device) {
  check(cudaGetDevice(&previous_), "cudaGetDevice");
  if (previous_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
}

DeviceGuard::~DeviceGuard() {
  if (previous_ != device_) cudaSetDevice(previous_);
}

uint64_t* hang_word() {
  static uint64_t* const word = [] {
    // Allocating is forbidden to a thread that captures a graph, unless it says that it knows: nothing here depends on
    // the graph's work.
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    void* made = nullptr;
    const cudaError_t code = cudaHostAlloc(&made, sizeof(uint64_t), cudaHostAllocMapped | cudaHostAllocPortable);
    check(cudaThreadExchangeStreamCaptureMode(&mode), "cudaThreadExchangeStreamCaptureMode");
    check(code, "cudaHostAlloc");
    *static_cast<uint64_t*>(made) = 0;
    return static_cast<uint64_t*>(made);
  }();
  return word;
}

void check_barriers() {
  uint64_t* const word = hang_word();
  if (__atomic_load_n(word, __ATOMIC_RELAXED) == 0) return;
  throw BarrierTimeout(hang_message(__atomic_exchange_n(word, 0, __ATOMIC_RELAXED)));
}

void launch_cooperative(const void* kernel, int grid, int threads, int shared_bytes, void* params, int device,
                        uintptr_t stream) {
  check_barriers();
  const DeviceGuard guard(device);
  const int resident = resident_blocks(kernel, threads, shared_bytes, device);
  if (grid > resident) {
    throw std::runtime_error(
        "cooperative launch: " + std::to_string(grid) + " thread blocks of " + std::to_string(shared_bytes) +
        " bytes of shared memory do not fit on the device at once; " + std::to_string(resident) + " do");
  }
  void* arguments[] = {params};
  check(
      cudaLaunchCooperativeKernel(kernel, dim3(static_cast<unsigned>(grid)), dim3(static_cast<unsigned>(threads)),
                                  arguments, static_cast<size_t>(shared_bytes), reinterpret_cast<cudaStream_t>(stream)),
      "cudaLaunchCooperativeKernel");
}

}  // namespace rmcore::cuda
