// How a score launch is laid out: stages, shares, ring depth, workspace. No CUDA in here; the emulation links it too.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "score.h"

namespace rmcore::cuda {
namespace {

constexpr int64_t kAlignment = 256;
constexpr int64_t kMaxSize = 1 << 19;

// Takes `bytes` from a workspace that is being laid out.
int64_t take(int64_t& used, int64_t bytes) {
  const int64_t at = used;
  used += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  return at;
}

}  // namespace

bool readable_in_place(const Head& head, const void* hidden, Scalar dtype, int64_t stride) {
  return dtype == head.dtype && head.input_scale == 1.0f && head.hidden_size % kLaneColumns == 0 &&
         stride % kLaneColumns == 0 && reinterpret_cast<uintptr_t>(hidden) % 16 == 0;
}

ScorePlan plan_score(const Head& head, int rows, int multiprocessors, int64_t shared_bytes, int force_split) {
  if (rows < 1 || rows > kMaxRows) {
    throw std::invalid_argument("rows: got " + std::to_string(rows) + ", expected 1 to " + std::to_string(kMaxRows));
  }
  // Steps are counted in 32 bits: a 16th of the rows times a 32nd of the columns.
  const int64_t longest = std::max({head.hidden_size, head.num_features, head.layer_size});
  if (longest > kMaxSize) {
    throw std::invalid_argument("head: got sizes of up to " + std::to_string(longest) + ", expected at most " +
                                std::to_string(kMaxSize));
  }
  if (head.dtype == Scalar::kFloat32) throw std::invalid_argument("dtype: got float32, expected float16 or bfloat16");
  ScorePlan plan{};
  plan.tiles = column_tiles(rows);
  const int columns = 8 * plan.tiles, d = head.num_features, m = head.layer_size;
  const int widest = 2 * divide_up(std::max(d, m), 2 * kStripRows);
  plan.grid = std::min(multiprocessors, widest);
  plan.slots = ring_slots(plan.tiles, shared_bytes);
  if (plan.slots < 1) {
    throw std::invalid_argument("shared memory: got " + std::to_string(shared_bytes) +
                                " bytes a thread block, expected " +
                                std::to_string(reduction_bytes(plan.tiles) + slot_bytes(plan.tiles)) + " for " +
                                std::to_string(rows) + " rows");
  }
  plan.shared_bytes = reduction_bytes(plan.tiles) + plan.slots * slot_bytes(plan.tiles);

  const int wide = rectangular_strips(plan.tiles), narrow = triangular_strips(plan.tiles);
  const auto add = [&](int stage_rows, int stage_columns, bool triangular, int strips) {
    plan.work[plan.stages++] = plan_stage(stage_rows, stage_columns, triangular, strips, plan.grid, force_split);
  };
  if (m > 0) add(m, head.hidden_size, false, wide);
  add(d, m > 0 ? m : head.hidden_size, false, wide);
  add(d, d, true, narrow);

  plan.converted_pitch = round_up(head.hidden_size, kStepColumns);
  plan.layer_pitch = round_up(m, kStepColumns);
  plan.feature_pitch = round_up(d, kStepColumns);
  int64_t partial = 0;
  for (int i = 0; i < plan.stages; ++i) {
    const Work& w = plan.work[i];
    partial = std::max<int64_t>(partial, int64_t{4} * partial_slots(w) * w.strips_per_block * kStripRows * columns);
  }
  int64_t used = 0;
  plan.ticket = take(used, sizeof(unsigned));
  plan.board = take(used, int64_t{4} * plan.grid);
  plan.converted = take(used, 2 * columns * plan.converted_pitch);
  plan.unnormalised = take(used, head.layernorm ? 4 * columns * plan.layer_pitch : 0);
  plan.layer = take(used, 2 * columns * plan.layer_pitch);
  plan.features = take(used, 2 * columns * plan.feature_pitch);
  plan.partial = take(used, partial);
  plan.logit = take(used, int64_t{4} * columns * plan.grid);
  plan.variance = take(used, int64_t{4} * columns * plan.grid);
  plan.bytes = used;
  return plan;
}

ScoreParams score_params(const Head& head, const ScorePlan& plan, const void* hidden, Scalar hidden_dtype,
                         int64_t hidden_stride, int rows, float* out, void* workspace) {
  auto* const base = static_cast<unsigned char*>(workspace);
  const int columns = 8 * plan.tiles;
  const bool in_place = readable_in_place(head, hidden, hidden_dtype, hidden_stride);
  ScoreParams p{};
  p.stages = plan.stages;
  p.slots = plan.slots;
  p.rows = rows;
  p.hidden = hidden;
  p.hidden_dtype = static_cast<int>(hidden_dtype);
  p.hidden_stride = hidden_stride;
  p.hidden_size = head.hidden_size;
  p.converted = in_place ? nullptr : base + plan.converted;
  p.converted_pitch = plan.converted_pitch;
  p.input_scale = head.input_scale;
  p.tanh = head.tanh;
  p.layernorm = head.layernorm;
  p.linear = head.linear;
  p.beta = head.beta;
  p.beta0 = head.beta0;
  p.factor_scale = head.factor_scale;
  p.amplitude = head.amplitude;
  p.logit_partial = reinterpret_cast<float*>(base + plan.logit);
  p.variance_partial = reinterpret_cast<float*>(base + plan.variance);
  p.ticket = reinterpret_cast<unsigned*>(base + plan.ticket);
  p.board = reinterpret_cast<unsigned*>(base + plan.board);
  p.out = out;

  // The operand of a stage is the result of the one before; the first reads the hidden rows.
  const void* operand = in_place ? hidden : p.converted;
  int64_t operand_pitch = in_place ? hidden_stride : plan.converted_pitch;
  int operand_rows = in_place ? rows : columns;
  int operand_columns = in_place ? head.hidden_size : static_cast<int>(plan.converted_pitch);
  int stage = 0;
  const auto add = [&](Kind kind, const void* weights, int64_t pitch, int valid, int stage_columns, const float* bias,
                       void* result, int64_t result_pitch) {
    StageParams& s = p.stage[stage];
    s.work = plan.work[stage++];
    s.kind = kind;
    s.weights = weights;
    s.pitch = pitch;
    // Packed tiles hold zeros wherever there is no weight, so every address that is asked for may be read.
    s.weight_rows = kind == kFactor ? INT32_MAX : valid;
    s.weight_columns = kind == kFactor ? INT32_MAX : round_up(stage_columns, kLaneColumns);
    s.operand = operand;
    s.operand_pitch = operand_pitch;
    s.operand_rows = operand_rows;
    s.operand_columns = operand_columns;
    s.partial = reinterpret_cast<float*>(base + plan.partial);
    s.bias = bias;
    s.result = result;
    s.result_pitch = result_pitch;
    s.unnormalised = nullptr;
    s.valid = valid;
    operand = result;
    operand_pitch = result_pitch;
    operand_rows = columns;
    operand_columns = static_cast<int>(result_pitch);
  };
  if (head.layer_size > 0) {
    add(kLayer, head.layer, head.layer_pitch, head.layer_size, head.hidden_size, head.layer_bias, base + plan.layer,
        plan.layer_pitch);
    if (head.layernorm) p.stage[0].unnormalised = reinterpret_cast<float*>(base + plan.unnormalised);
  }
  add(kProjection, head.projection, head.projection_pitch, head.num_features,
      head.layer_size > 0 ? head.layer_size : head.hidden_size, head.phase, base + plan.features, plan.feature_pitch);
  add(kFactor, head.factor, kTile, head.num_features, head.num_features, nullptr, nullptr, 0);
  return p;
}

}  // namespace rmcore::cuda
