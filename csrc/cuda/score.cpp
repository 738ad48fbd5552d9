// The launch of the score kernel.
#include "score.h"

#include <stdexcept>
#include <string>

#include "device.h"
#include "stream.h"

namespace rmcore::cuda {
namespace {

// Kept free of the dynamic shared memory, for the kernel's own static variables.
constexpr int64_t kStaticSharedBytes = 512;

}  // namespace

ScorePlan plan_score_on(const Head& head, int rows, int device, bool streamed) {
  const Properties& machine = properties(device);
  const int64_t shared = machine.shared_bytes - kStaticSharedBytes;
  ScorePlan plan = plan_score(head, rows, machine.multiprocessors, shared);
  // The bulk copy engine came with compute capability 9.0.
  if (streamed && machine.major >= 9) plan.stream = plan_stream(head, rows, machine.multiprocessors, shared);
  if (plan.stream.slots > 0) plan.bytes = plan.stream.bytes;
  return plan;
}

void launch_score(const Head& head, const ScorePlan& plan, const void* hidden, Scalar hidden_dtype,
                  int64_t hidden_stride, int rows, float* out, void* workspace, int64_t workspace_bytes, int device,
                  uintptr_t stream) {
  if (rows < 1 || column_tiles(rows) != plan.tiles || rows > kMaxRows) {
    throw std::invalid_argument("rows: got " + std::to_string(rows) + ", which the plan was not made for");
  }
  if (workspace_bytes < plan.bytes || reinterpret_cast<uintptr_t>(workspace) % 256 != 0) {
    throw std::invalid_argument("workspace: got " + std::to_string(workspace_bytes) + " bytes, expected " +
                                std::to_string(plan.bytes) + ", aligned to 256");
  }
  const bool half = head.dtype == Scalar::kFloat16;
  if (plan.stream.slots > 0) {
    const StreamPlan& stream_plan = plan.stream;
    if (rows > stream_plan.padded) {
      throw std::invalid_argument("rows: got " + std::to_string(rows) + ", which the plan was not made for");
    }
    StreamParams params = stream_params(head, stream_plan, hidden, hidden_dtype, hidden_stride, rows, out, workspace);
    params.report = hang_word();
    const void* kernel = half ? stream_kernel_fp16(stream_plan.padded) : stream_kernel_bf16(stream_plan.padded);
    launch_cooperative(kernel, stream_plan.grid, kStreamThreads, stream_plan.shared_bytes, &params, device, stream);
    return;
  }
  ScoreParams params = score_params(head, plan, hidden, hidden_dtype, hidden_stride, rows, out, workspace);
  params.report = hang_word();
  const void* kernel = half ? score_kernel_fp16(plan.tiles) : score_kernel_bf16(plan.tiles);
  launch_cooperative(kernel, plan.grid, kThreads, plan.shared_bytes, &params, device, stream);
}

}  // namespace rmcore::cuda
