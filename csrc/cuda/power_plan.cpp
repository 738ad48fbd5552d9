// How a power iteration is laid out. No CUDA in here; the emulation links it too.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "power_iteration.h"

namespace rmcore::cuda {

PowerPlan plan_power(int rows, int columns, int element_bytes, int multiprocessors, int64_t shared_bytes) {
  if (rows < 1 || columns < 1 || columns > max_power_columns(element_bytes)) {
    throw std::invalid_argument("weight: got shape (" + std::to_string(rows) + ", " + std::to_string(columns) +
                                "), expected 1 to " + std::to_string(max_power_columns(element_bytes)) +
                                " columns and at least one row");
  }
  const auto aligned = [](int64_t bytes) { return (bytes + 255) / 256 * 256; };
  PowerPlan plan{};
  plan.wide = columns > 16 * kThreads;
  plan.group_rows = plan.wide ? 1 : 4;
  const int chunk_values = 16 / element_bytes;
  plan.chunks = divide_up(columns, kThreads * chunk_values);
  const int group_bytes = plan.group_rows * plan.chunks * kThreads * 16;
  plan.slots = static_cast<int>(std::min<int64_t>(kMaxSlots, shared_bytes / group_bytes));
  if (plan.slots < 1) {
    throw std::invalid_argument("shared memory: got " + std::to_string(shared_bytes) +
                                " bytes a thread block, expected " + std::to_string(group_bytes));
  }
  plan.shared_bytes = plan.slots * group_bytes;
  plan.grid = std::min(multiprocessors, rows);
  plan.partial_pitch = static_cast<int64_t>(plan.chunks) * kThreads * chunk_values;
  plan.product = aligned(4 * plan.partial_pitch * plan.grid);
  plan.norms = plan.product + aligned(int64_t{4} * columns);
  plan.squares = plan.norms + aligned(int64_t{4} * plan.grid);
  plan.board = plan.squares + aligned(int64_t{4} * plan.grid);
  plan.bytes = plan.board + aligned(int64_t{4} * plan.grid);
  return plan;
}

}  // namespace rmcore::cuda
