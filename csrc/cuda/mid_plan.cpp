// How a score of 65 to 512 rows is laid out: rows of the batch at once, clusters, ring depth, workspace. No CUDA in
// here; the emulation links it too.
#include <algorithm>

#include "mid.h"

namespace rmcore::cuda {
namespace {

int mid_slots(int columns, int64_t shared_bytes) {
  const int64_t slots = (shared_bytes - mid_fixed_bytes(columns)) / mid_slot_bytes(columns);
  return static_cast<int>(std::min<int64_t>(slots, kMaxMidSlots));
}

// What a thread block has to read of the projection, in rows of the weights and of the batch for each k-block: both
// come through the L2, which is the limit where the batch is large. Few tiles are made more by cutting the batch.
int64_t mid_cost(int columns, int rows, int tiles, int clusters) {
  return int64_t{divide_up(tiles * divide_up(rows, columns), clusters)} * (kMidTileRows + columns);
}

}  // namespace

MidPlan plan_mid(const Head& head, int rows, int clusters, int64_t shared_bytes) {
  MidPlan plan{};
  constexpr int kMaxSize = 1 << 19;
  if (head.layer_size > 0 || head.dtype == Scalar::kFloat32 || rows < kMidLeastRows || rows > kMidMostRows) return plan;
  if (clusters < 1 || std::max(head.hidden_size, head.num_features) > kMaxSize) return plan;
  const int tiles = divide_up(head.num_features, kMidTileRows);
  int best = 0;
  for (const int columns : kMidInstances) {
    if (mid_slots(columns, shared_bytes) < kMinMidSlots) continue;
    if (best == 0 || mid_cost(columns, rows, tiles, clusters) <= mid_cost(best, rows, tiles, clusters)) best = columns;
  }
  if (best == 0) return plan;
  MidShape& s = plan.shape;
  s = {head.hidden_size, head.num_features, rows, best, tiles, divide_up(rows, best), divide_up(rows, best / 2), 0};
  s.clusters = std::min(clusters, s.tiles * s.groups);
  plan.slots = mid_slots(best, shared_bytes);
  plan.shared_bytes = plan.slots * mid_slot_bytes(best) + mid_fixed_bytes(best);
  plan.feature_pitch = round_up(head.num_features, kLaneColumns);
  plan.sum_pitch = s.groups * s.columns;
  const auto take = [&](int64_t bytes) {
    const int64_t at = plan.bytes;
    plan.bytes += (bytes + 255) / 256 * 256;
    return at;
  };
  plan.ticket = take(4 * kMidTickets);
  plan.board = take(int64_t{4} * s.clusters);
  plan.features = take(2 * rows * plan.feature_pitch);
  plan.logits = take(4 * s.tiles * plan.sum_pitch);
  plan.squares = take(4 * s.tiles * plan.sum_pitch);
  return plan;
}

MidParams mid_params(const Head& head, const MidPlan& plan, float* out, void* workspace) {
  auto* const base = static_cast<unsigned char*>(workspace);
  MidParams p{};
  p.shape = plan.shape;
  p.slots = plan.slots;
  p.linear = head.linear;
  p.phase = head.phase;
  p.beta = head.beta;
  p.beta0 = head.beta0;
  p.factor_scale = head.factor_scale;
  p.amplitude = head.amplitude;
  p.features = base + plan.features;
  p.feature_pitch = plan.feature_pitch;
  p.logits = reinterpret_cast<float*>(base + plan.logits);
  p.squares = reinterpret_cast<float*>(base + plan.squares);
  p.sum_pitch = plan.sum_pitch;
  p.tickets = reinterpret_cast<unsigned*>(base + plan.ticket);
  p.board = reinterpret_cast<unsigned*>(base + plan.board);
  p.out = out;
  return p;
}

}  // namespace rmcore::cuda
