// How a streamed score is laid out: ring depth, shared memory, workspace. No CUDA in here; the emulation links it too.
#include <algorithm>

#include "stream.h"

namespace rmcore::cuda {

int ring_slots(const StreamPlan& plan, int rows) {
  const int64_t fixed = sums_bytes(plan.padded) + operand_bytes(rows, plan.operand_pitch);
  return static_cast<int>(std::min<int64_t>((plan.shared_bytes - fixed) / kSlotBytes, kMaxStreamSlots));
}

StreamPlan plan_stream(const Head& head, int rows, int multiprocessors, int64_t shared_bytes) {
  StreamPlan plan{};
  if (head.layer_size > 0 || rows < 1 || rows > kStreamRows || head.dtype == Scalar::kFloat32) return plan;
  const int padded = padded_rows(rows);
  plan.padded = padded;
  plan.operand_pitch = operand_pitch(head.hidden_size, head.num_features);
  plan.shared_bytes = static_cast<int>(shared_bytes);
  const int slots = ring_slots(plan, rows);
  if (slots < kMinStreamSlots) return plan;
  plan.slots = slots;
  plan.grid = std::min(multiprocessors, units_of(head.num_features));
  plan.feature_pitch = round_up(head.num_features, kLaneColumns);
  const auto take = [&](int64_t bytes) {
    const int64_t at = plan.bytes;
    plan.bytes += (bytes + 255) / 256 * 256;
    return at;
  };
  plan.board = take(int64_t{4} * plan.grid);
  plan.features = take(2 * padded * plan.feature_pitch);
  plan.partial = take(int64_t{8} * padded * plan.grid);
  return plan;
}

StreamParams stream_params(const Head& head, const StreamPlan& plan, const void* hidden, Scalar hidden_dtype,
                           int64_t hidden_stride, int rows, float* out, void* workspace) {
  auto* const base = static_cast<unsigned char*>(workspace);
  StreamParams p{};
  p.rows = rows;
  p.hidden_size = head.hidden_size;
  p.num_features = head.num_features;
  p.slots = ring_slots(plan, rows);
  p.operand_pitch = plan.operand_pitch;
  p.linear = head.linear;
  p.projection = head.projection;
  p.projection_pitch = head.projection_pitch;
  p.phase = head.phase;
  p.beta = head.beta;
  p.factor = head.factor;
  p.hidden = hidden;
  p.hidden_dtype = static_cast<int>(hidden_dtype);
  const int size = hidden_dtype == Scalar::kFloat32 ? 4 : 2;
  p.in_place = readable_in_place(head, hidden, hidden_dtype, hidden_stride);
  p.vectors = head.hidden_size % kLaneColumns == 0 && hidden_stride * size % 16 == 0 &&
              reinterpret_cast<uintptr_t>(hidden) % 16 == 0;
  p.hidden_stride = hidden_stride;
  p.input_scale = head.input_scale;
  p.beta0 = head.beta0;
  p.factor_scale = head.factor_scale;
  p.amplitude = head.amplitude;
  p.features = base + plan.features;
  p.feature_pitch = plan.feature_pitch;
  p.partial = reinterpret_cast<uint64_t*>(base + plan.partial);
  p.board = reinterpret_cast<unsigned*>(base + plan.board);
  p.out = out;
  return p;
}

}  // namespace rmcore::cuda
