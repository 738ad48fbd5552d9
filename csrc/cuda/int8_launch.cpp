// The launch of the int8 score kernel.
#include <stdexcept>
#include <string>

#include "device.h"
#include "int8_stream.h"

namespace rmcore::cuda {
namespace {

// Kept free of the dynamic shared memory, for the kernel's own static variables.
constexpr int64_t kStaticSharedBytes = 512;

}  // namespace

StreamPlan plan_int8_on(const Int8Head& head, int rows, int device) {
  const Properties& machine = properties(device);
  if (machine.major < 9) return {};  // the bulk copy engine came with compute capability 9.0
  return plan_int8(head, rows, machine.multiprocessors, machine.shared_bytes - kStaticSharedBytes);
}

void launch_int8(const Int8Head& head, const StreamPlan& plan, const void* hidden, Scalar hidden_dtype,
                 int64_t hidden_stride, int rows, float* out, void* workspace, int64_t workspace_bytes, int device,
                 uintptr_t stream) {
  if (rows < 1 || rows > plan.padded || plan.slots < 1) {
    throw std::invalid_argument("rows: got " + std::to_string(rows) + ", which the plan was not made for");
  }
  if (workspace_bytes < plan.bytes || reinterpret_cast<uintptr_t>(workspace) % 256 != 0) {
    throw std::invalid_argument("workspace: got " + std::to_string(workspace_bytes) + " bytes, expected " +
                                std::to_string(plan.bytes) + ", aligned to 256");
  }
  Int8Params params = int8_params(head, plan, hidden, hidden_dtype, hidden_stride, rows, out, workspace);
  params.report = hang_word();
  const void* kernel = int8_kernel(plan.padded, params.two_terms != 0);
  launch_cooperative(kernel, plan.grid, kStreamThreads, plan.shared_bytes, &params, device, stream);
}

}  // namespace rmcore::cuda
