// How a streamed score of an int8 head is laid out. No CUDA in here; the emulation links it too.
#include <algorithm>

#include "int8_stream.h"

namespace rmcore::cuda {
namespace {

// Sums of both terms, whichever there are: 16 KB at most.
int int8_sums(const StreamPlan& plan) { return 2 * sums_bytes(plan.padded); }

}  // namespace

int int8_slots(const StreamPlan& plan, int rows) {
  const int64_t fixed = int8_sums(plan) + notes_bytes() + byte_operand_bytes(rows, plan.operand_pitch);
  return static_cast<int>(std::min<int64_t>((plan.shared_bytes - fixed) / kSlotBytes, kMaxStreamSlots));
}

StreamPlan plan_int8(const Int8Head& head, int rows, int multiprocessors, int64_t shared_bytes) {
  StreamPlan plan{};
  if (rows < 1 || rows > kStreamRows) return plan;
  plan.padded = padded_rows(rows);
  plan.operand_pitch = byte_pitch(head.hidden_size, head.num_features, two_terms(head.hidden_size, head.num_features));
  plan.shared_bytes = static_cast<int>(shared_bytes);
  const int slots = int8_slots(plan, rows);
  if (slots < kMinStreamSlots) return plan;
  plan.slots = slots;
  plan.grid = std::min(multiprocessors, units_of(head.num_features));
  plan.feature_pitch = round_up(head.num_features, kByteLane);
  const auto take = [&](int64_t bytes) {
    const int64_t at = plan.bytes;
    plan.bytes += (bytes + 255) / 256 * 256;
    return at;
  };
  plan.board = take(int64_t{4} * plan.grid);
  plan.features = take(plan.padded * plan.feature_pitch);
  plan.partial = take(int64_t{8} * plan.padded * plan.grid);
  return plan;
}

Int8Params int8_params(const Int8Head& head, const StreamPlan& plan, const void* hidden, Scalar hidden_dtype,
                       int64_t hidden_stride, int rows, float* out, void* workspace) {
  auto* const base = static_cast<unsigned char*>(workspace);
  Int8Params p{};
  p.rows = rows;
  p.hidden_size = head.hidden_size;
  p.num_features = head.num_features;
  p.slots = int8_slots(plan, rows);
  p.operand_pitch = plan.operand_pitch;
  p.projection = head.projection;
  p.projection_pitch = head.projection_pitch / 2;  // of 16-bit values
  p.phase = head.phase;
  p.beta = head.beta;
  p.factor = head.factor;
  p.hidden = hidden;
  p.hidden_dtype = static_cast<int>(hidden_dtype);
  const int size = hidden_dtype == Scalar::kFloat32 ? 4 : 2;
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
  p.scales = head.projection_scale;
  p.factor_scales = head.factor_scales;
  p.diagonal = head.diagonal;
  p.shift = head.hidden_shift;
  p.balance = head.hidden_balance;
  p.two_terms = two_terms(head.hidden_size, head.num_features);
  return p;
}

}  // namespace rmcore::cuda
