// Tensor maps and the launch of the score of 65 to 512 rows.
#include <cuda.h>  // types and names: nothing of the driver is linked

#include <map>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>

#include "device.h"
#include "error.h"
#include "mid.h"

namespace rmcore::cuda {
namespace {

static_assert(sizeof(MidMap) == sizeof(CUtensorMap) && alignof(MidMap) >= alignof(CUtensorMap), "as the driver's");

// The driver's function, which the runtime finds, so that the module loads without a driver.
decltype(&cuTensorMapEncodeTiled) encode_tiled() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION >= 12050
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status),
          "cudaGetDriverEntryPointByVersion");
#else
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &status),
          "cudaGetDriverEntryPoint");
#endif
    if (status != cudaDriverEntryPointSuccess || function == nullptr) {
      throw std::runtime_error("cuTensorMapEncodeTiled: the driver has no such function");
    }
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  return found;
}

// Boxes of 64 columns and `box_rows` rows of a row-major 16-bit matrix whose rows lie `pitch` elements apart.
MidMap map_of(Scalar dtype, const void* data, int64_t rows, int64_t columns, int64_t pitch, int box_rows) {
  MidMap map{};
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(2 * pitch)};
  const cuuint32_t box[] = {kMidDepth, static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult code =
      encode_tiled()(reinterpret_cast<CUtensorMap*>(&map),
                     dtype == Scalar::kFloat16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2,
                     const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (code != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(code) + " for " + std::to_string(rows) +
                             " rows of " + std::to_string(columns) + " columns, " + std::to_string(pitch) + " apart");
  }
  return map;
}

const void* kernel_of(Scalar dtype, int columns) {
  return dtype == Scalar::kFloat16 ? mid_kernel_fp16(columns) : mid_kernel_bf16(columns);
}

// A launch of `clusters` clusters; `attributes` must live as long as the result.
cudaLaunchConfig_t launch_config(int clusters, int shared_bytes, uintptr_t stream,
                                 cudaLaunchAttribute (&attributes)[2]) {
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = kMidCluster;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(clusters * kMidCluster));
  config.blockDim = dim3(kMidThreads);
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = reinterpret_cast<cudaStream_t>(stream);
  config.attrs = attributes;
  config.numAttrs = 2;
  return config;
}

// Raises the kernel's shared-memory limit and returns how many of its clusters the device holds at once: a cluster must
// find its multiprocessors in one group of them, so these are fewer than the multiprocessors say. Asked once.
int resident_clusters(const void* kernel, int shared_bytes, int device) {
  static std::mutex mutex;
  static std::map<std::tuple<const void*, int, int>, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_tuple(kernel, shared_bytes, device);
  const auto found = known.find(key);
  if (found != known.end()) return found->second;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(properties(device).shared_bytes)),
        "cudaFuncSetAttribute");
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t config = launch_config(1, shared_bytes, 0, attributes);
  config.numAttrs = 1;
  int clusters = 0;
  check(cudaOccupancyMaxActiveClusters(&clusters, kernel, &config), "cudaOccupancyMaxActiveClusters");
  return known[key] = clusters;
}

}  // namespace

MidHead mid_head(const Head& head) {
  const int64_t tiles = divide_up(head.num_features, kTile);
  MidHead made{};
  made.head = head;
  made.projection =
      map_of(head.dtype, head.projection, head.num_features, head.hidden_size, head.projection_pitch, kMidTileRows);
  made.factor = map_of(head.dtype, head.factor, tiles * (tiles + 1) / 2 * kTile, kTile, kTile, kMidTileRows);
  return made;
}

MidPlan plan_mid_on(const MidHead& head, int rows, int device) {
  const Properties& machine = properties(device);
  if (machine.major != 9 || machine.minor != 0) return {};  // wgmma is Hopper's alone
  const DeviceGuard guard(device);
  // Of every instance a multiprocessor holds one block, so they have the same clusters; the largest may be asked.
  const MidPlan largest = plan_mid(head.head, kMidMostRows, 1, machine.shared_bytes);
  if (largest.shape.columns == 0) return {};
  const void* kernel = kernel_of(head.head.dtype, largest.shape.columns);
  return plan_mid(head.head, rows, resident_clusters(kernel, largest.shared_bytes, device), machine.shared_bytes);
}

void launch_mid(const MidHead& head, const MidPlan& plan, const void* hidden, int64_t hidden_stride, int rows,
                float* out, void* workspace, int64_t workspace_bytes, int device, uintptr_t stream) {
  const MidShape& s = plan.shape;
  if (rows != s.rows || s.columns == 0) {
    throw std::invalid_argument("rows: got " + std::to_string(rows) + ", which the plan was not made for");
  }
  if (workspace_bytes < plan.bytes || reinterpret_cast<uintptr_t>(workspace) % 256 != 0) {
    throw std::invalid_argument("workspace: got " + std::to_string(workspace_bytes) + " bytes, expected " +
                                std::to_string(plan.bytes) + ", aligned to 256");
  }
  if (reinterpret_cast<uintptr_t>(hidden) % 16 != 0 || hidden_stride % kLaneColumns != 0 ||
      hidden_stride < s.hidden_size) {
    throw std::invalid_argument("hidden: got rows " + std::to_string(hidden_stride) +
                                " elements apart, expected them to begin at multiples of 16 bytes");
  }
  check_barriers();
  const DeviceGuard guard(device);
  const void* kernel = kernel_of(head.head.dtype, s.columns);
  const int resident = resident_clusters(kernel, plan.shared_bytes, device);
  if (s.clusters > resident) {
    throw std::runtime_error("cooperative launch: " + std::to_string(s.clusters) + " clusters of thread blocks with " +
                             std::to_string(plan.shared_bytes) + " bytes of shared memory do not fit on the device " +
                             "at once; " + std::to_string(resident) + " do");
  }
  MidParams params = mid_params(head.head, plan, out, workspace);
  params.report = hang_word();
  MidMaps maps{};
  maps.projection = head.projection;
  maps.factor = head.factor;
  maps.hidden = map_of(head.head.dtype, hidden, rows, s.hidden_size, hidden_stride, s.columns);
  maps.features = map_of(head.head.dtype, params.features, rows, s.num_features, plan.feature_pitch, s.columns / 2);
  cudaLaunchAttribute attributes[2]{};
  const cudaLaunchConfig_t config = launch_config(s.clusters, plan.shared_bytes, stream, attributes);
  void* arguments[] = {&params, &maps};
  check(cudaLaunchKernelExC(&config, kernel, arguments), "cudaLaunchKernelExC");
}

}  // namespace rmcore::cuda
