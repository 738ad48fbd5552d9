// The streamed score on the host (stream.h, stream.cuh): the numbers, who fetches and reads what, and whether the ring
// can stand still. See emulate.cpp.
//
// Every block first fetches all it will ever fetch, as a list of slots in the kernel's order; its warps then read slot
// after slot as the kernel's do. A ring of any depth serves that list in that order, so what is checked of the ring
// itself is that fetching and giving back never wait for each other (`emulate_ring`).
#include <algorithm>
#include <cstring>
#include <deque>
#include <vector>

#include "emulate.h"
#include "stream.h"

namespace rmcore::cuda {
namespace {

struct Slot {
  bool triangular;
  int bytes;               // of a row of the projection
  int64_t row[kUnitRows];  // sources of the projection's rows
  int64_t slab[kWarps];    // sources of the factor's slabs, -1 where there is none
};

std::vector<Slot> fetches(const StreamParams& p, int block, int grid) {
  std::vector<Slot> out;
  const int units = units_of(p.num_features);
  for (int index = 0; dense_unit(index, block, grid, units) >= 0; ++index) {
    for (int segment = 0; segment < dense_segments(p.hidden_size); ++segment) {
      Slot slot{};
      slot.bytes = dense_bytes(segment, p.hidden_size);
      for (int row = 0; row < kUnitRows; ++row) {
        slot.row[row] =
            dense_source(dense_unit(index, block, grid, units), row, segment, p.num_features, p.projection_pitch);
      }
      out.push_back(slot);
    }
  }
  std::vector<TriangleWalk> lanes;
  for (int lane = 0; lane < kWarps; ++lane) lanes.emplace_back(block, grid, units, lane);
  for (;;) {
    Slot slot{};
    slot.triangular = true;
    int copies = 0;
    for (int lane = 0; lane < kWarps; ++lane) {
      slot.slab[lane] = lanes[lane].unit < 0 ? -1 : lanes[lane].source();
      copies += lanes[lane].unit >= 0;
      expect(lanes[lane].unit < 0 || copies == lane + 1, "a slot has a gap");
      lanes[lane].advance();
    }
    if (copies == 0) return out;
    out.push_back(slot);
  }
}

// The 16 bytes that a lane reads from a slot, as values and the matrix element they come from (-1: not fetched).
struct Read {
  float value[kLaneColumns];
  int64_t source;
};

Read read(const StreamParams& p, const Slot& slot, int warp, int lane, int pair, int turn) {
  const int byte = slab_offset(slot.triangular, warp) + slab_lane_offset(slot.triangular, lane, pair, turn);
  expect(byte % 16 == 0 && byte + 16 <= kSlotBytes, "a lane reads past its slot");
  Read out{};
  out.source = -1;
  if (slot.triangular) {
    const int64_t from = slot.slab[byte / kSlabBytes];
    if (from >= 0) out.source = from + byte % kSlabBytes / 2;
  } else if (byte % slab_pitch(false) < slot.bytes) {
    out.source = slot.row[byte / slab_pitch(false)] + byte % slab_pitch(false) / 2;
  }
  const float* const matrix = static_cast<const float*>(slot.triangular ? p.factor : p.projection);
  for (int k = 0; k < kLaneColumns; ++k) out.value[k] = out.source < 0 ? kPoison : matrix[out.source + k];
  return out;
}

// multiply() of stream.cuh for a whole warp; `operand` holds the batch's rows.
void multiply(const StreamParams& p, const Slot& slot, int warp, const std::vector<float>& operand, int column,
              int width, float (&acc)[2][32][4], std::vector<int>& used) {
  constexpr int kSteps = kSlabColumns / kStepColumns;
  const int steps = width <= 0 ? 0 : std::min(kSteps, divide_up(width, kStepColumns));
  for (int step = 0; step < steps; ++step) {
    float a[2][32][4][2], b[2][32][2][2];
    for (int lane = 0; lane < 32; ++lane) {
      const int at = step * kStepColumns + (lane % 4) * kLaneColumns;
      Read mine = read(p, slot, warp, lane, step / 2, (step % 2) ^ lane_odd(lane));
      if (!slot.triangular && at >= width) {
        for (float& x : mine.value) x = 0.0f;
      } else {
        expect(mine.source >= 0, "a product takes what was not fetched");
        ++used[mine.source / kLaneColumns];
      }
      for (int half = 0; half < 2; ++half) {
        for (int word = 0; word < 2; ++word) {
          for (int e = 0; e < 2; ++e) {
            const int k = 4 * half + 2 * word + e;
            b[half][lane][word][e] = mine.value[k];
            for (int group = 0; group < 2; ++group) {
              const int row = std::min(lane_group(lane) + 8 * group, p.rows - 1);
              const bool there = group == 0 || p.rows > 8;
              a[half][lane][2 * word + group][e] =
                  there ? operand.at(static_cast<size_t>(row) * p.operand_pitch + column + at + k) : 0.0f;
            }
          }
        }
      }
    }
    for (int half = 0; half < 2; ++half) mma(acc[step % 2], a[half], b[half]);
  }
}

struct Sums {
  int padded;
  std::vector<float> memory;
  explicit Sums(int rows) : padded(rows), memory(sums_bytes(rows) / 4, kPoison) {}
  void store(int unit, int warp, const float (&acc)[2][32][4]) {
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) {
        const int row = lane_group(lane) + 8 * (e / 2);
        if (row >= padded) continue;
        memory.at(sums_index(padded, unit, warp, row, (lane % 4) * 2 + e % 2)) = acc[0][lane][e] + acc[1][lane][e];
      }
  }
  float of_warps(int value) const {
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) {
      sum += memory.at(
          sums_index(padded, value_unit(padded, value), warp, value_row(padded, value), value_weight_row(value)));
    }
    return sum;
  }
};

void check_used(const std::vector<int>& used, int rows, int64_t pitch, int columns, bool triangular) {
  for (int row = 0; row < rows; ++row) {
    for (int column = 0; column < (triangular ? row + 1 : columns); column += kLaneColumns) {
      const int64_t at = triangular ? tile_offset(row, column) : dense_offset(row, column, pitch);
      const int times = used[at / kLaneColumns];
      // The last row stands in for those beyond it.
      expect(triangular || row < rows - 1 ? times == 1 : times >= 1, "a weight was not used exactly once");
    }
  }
}

void emulate(const Head& head, const float* hidden, int64_t stride, int rows, int grid, float* out) {
  StreamPlan plan = plan_stream(head, rows, grid, 1 << 30);
  expect(plan.slots > 0, "the head is not served");
  // Elements are twice as wide here as in the serving dtype.
  std::vector<unsigned char> memory(static_cast<size_t>(plan.bytes) * 2 + 256);
  StreamParams p = stream_params(head, plan, hidden, Scalar::kFloat32, stride, rows, out, memory.data());
  const int padded = plan.padded, units = units_of(p.num_features), values = kGroupUnits * padded * kUnitRows;
  std::vector<float> features(static_cast<size_t>(rows) * p.feature_pitch, kPoison);
  const int64_t tiles = divide_up(p.num_features, kTile);
  std::vector<int> dense_used(static_cast<size_t>(p.num_features) * p.projection_pitch / kLaneColumns + 1);
  std::vector<int> factor_used(static_cast<size_t>(tiles * (tiles + 1) / 2 * kTile * kTile / kLaneColumns) + 1);
  std::vector<std::vector<Slot>> slots;
  std::vector<std::vector<float>> logit, square, operand;
  std::vector<size_t> place(plan.grid, 0);
  for (int block = 0; block < plan.grid; ++block) {
    slots.push_back(fetches(p, block, plan.grid));
    logit.emplace_back(kThreads, 0.0f), square.emplace_back(kThreads, 0.0f);
    operand.emplace_back(static_cast<size_t>(operand_bytes(rows, p.operand_pitch)) / 2, kPoison);
    for (int row = 0; row < rows; ++row)
      for (int column = 0; column < round_up(p.hidden_size, kStepColumns); ++column)
        operand[block].at(static_cast<size_t>(row) * p.operand_pitch + column) =
            column < p.hidden_size ? rounded(hidden[row * stride + column] * p.input_scale, head.dtype) : 0.0f;
  }
  for (int block = 0; block < plan.grid; ++block) {
    for (int first = 0; dense_unit(first, block, plan.grid, units) >= 0; first += kGroupUnits) {
      Sums sums(padded);
      for (int k = 0; k < kGroupUnits && dense_unit(first + k, block, plan.grid, units) >= 0; ++k) {
        const size_t start = place[block];
        for (int warp = 0; warp < kWarps; ++warp) {
          float acc[2][32][4] = {};
          place[block] = start;
          for (int segment = 0; segment < dense_segments(p.hidden_size); ++segment) {
            const int column = segment * kSegmentColumns + warp * kSlabColumns;
            const Slot& slot = slots[block].at(place[block]++);
            expect(!slot.triangular, "the ring holds another product");
            multiply(p, slot, warp, operand[block], column, slab_width(column, round_up(p.hidden_size, kLaneColumns)),
                     acc, dense_used);
          }
          sums.store(k, warp, acc);
        }
      }
      for (int value = 0; value < values; ++value) {
        const int unit = dense_unit(first + value_unit(padded, value), block, plan.grid, units);
        if (unit < 0) continue;
        const int row = unit * kUnitRows + value_weight_row(value), batch = value_row(padded, value);
        const bool inside = row < p.num_features;
        float c = sums.of_warps(value) + (inside ? p.phase[row] : 0.0f);
        if (!p.linear) c = static_cast<float>(std::cos(2.0 * M_PI * (c - std::nearbyint(c))));
        if (!inside) c = 0.0f;
        float& mine = logit[block][value % kThreads];
        expect(value_row(padded, value % kThreads) == batch, "a thread owns values of several rows");
        mine = std::fma(inside ? p.beta[row] : 0.0f, c, mine);
        if (batch < rows) features.at(static_cast<size_t>(batch) * p.feature_pitch + row) = rounded(c, head.dtype);
      }
    }
  }
  for (int block = 0; block < plan.grid; ++block) {
    const int longest = triangle_unit(0, block, plan.grid, units);
    expect(longest >= 0, "a block without a part of the triangle");
    for (int row = 0; row < rows; ++row)
      for (int column = 0; column < TriangleWalk::slabs(longest) * kTile; ++column)
        operand[block].at(static_cast<size_t>(row) * p.operand_pitch + column) =
            column < p.feature_pitch ? features.at(static_cast<size_t>(row) * p.feature_pitch + column) : 0.0f;
    std::vector<TriangleWalk> walks;
    std::vector<size_t> places(kWarps, place[block]);
    for (int warp = 0; warp < kWarps; ++warp) walks.emplace_back(block, plan.grid, units, warp);
    for (int first = 0; triangle_unit(first, block, plan.grid, units) >= 0; first += kGroupUnits) {
      Sums sums(padded);
      for (int k = 0; k < kGroupUnits && triangle_unit(first + k, block, plan.grid, units) >= 0; ++k) {
        for (int warp = 0; warp < kWarps; ++warp) {
          float acc[2][32][4] = {};
          TriangleWalk& walk = walks[warp];
          for (; walk.unit >= 0 && walk.index == first + k; walk.advance()) {
            const Slot& slot = slots[block].at(places[warp]++);
            expect(slot.triangular && slot.slab[warp] == walk.source(), "the ring holds another slab");
            multiply(p, slot, warp, operand[block], walk.tile * kTile,
                     slab_width(walk.tile * kTile, (walk.unit + 1) * kUnitRows), acc, factor_used);
          }
          sums.store(k, warp, acc);
        }
      }
      for (int value = 0; value < values; ++value) {
        if (triangle_unit(first + value_unit(padded, value), block, plan.grid, units) < 0) continue;
        const float y = sums.of_warps(value);
        square[block][value % kThreads] += y * y;
      }
    }
    // Every slot but the last is given back by all warps.
    for (const size_t end : places) expect(end + 1 >= slots[block].size(), "a slot is left over");
  }
  check_used(dense_used, p.num_features, p.projection_pitch, p.hidden_size, false);
  check_used(factor_used, p.num_features, 0, 0, true);
  for (int row = 0; row < rows; ++row) {
    float g = 0.0f, v = 0.0f;
    for (int block = 0; block < plan.grid; ++block) {
      for (int thread = 0; thread < kThreads; ++thread) {
        if (value_row(padded, thread) != row) continue;
        g += logit[block][thread], v += square[block][thread];
      }
    }
    out[row] = g + p.beta0;
    out[rows + row] = v * p.factor_scale;
    out[2 * rows + row] = std::sqrt(1 + p.amplitude * out[rows + row]);
    out[3 * rows + row] = out[row] / out[2 * rows + row];
  }
}

}  // namespace
}  // namespace rmcore::cuda

using namespace rmcore::cuda;

extern "C" {

int emulate_stream(int dtype, int h, int d, const float* projection, int64_t projection_pitch, const float* phase,
                   const float* beta, const float* factor, int linear, float input_scale, float beta0,
                   float factor_scale, float amplitude, const float* hidden, int64_t stride, int rows, int grid,
                   float* out) {
  try {
    Head head{};
    head.dtype = static_cast<Scalar>(dtype);
    head.hidden_size = h, head.num_features = d;
    head.projection = projection, head.projection_pitch = projection_pitch, head.phase = phase;
    head.beta = beta, head.factor = factor, head.linear = linear, head.input_scale = input_scale;
    head.beta0 = beta0, head.factor_scale = factor_scale, head.amplitude = amplitude;
    emulate(head, hidden, stride, rows, grid, out);
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}

// Of a full-size head: slots of the ring (0: not served), grid, shared bytes, workspace bytes, and bytes of the weights
// that the busiest and the idlest block fetch.
void emulate_stream_plan(int dtype, int h, int d, int m, int rows, int multiprocessors, int64_t shared_bytes,
                         int64_t* out) {
  Head head{};
  head.dtype = static_cast<Scalar>(dtype);
  head.hidden_size = h, head.num_features = d, head.layer_size = m, head.projection_pitch = round_up(h, kLaneColumns);
  const StreamPlan plan = plan_stream(head, rows, multiprocessors, shared_bytes);
  out[0] = plan.slots, out[1] = plan.grid, out[2] = plan.shared_bytes, out[3] = plan.bytes, out[4] = 0, out[5] = 0;
  if (plan.slots == 0) return;
  const StreamParams p = stream_params(head, plan, nullptr, head.dtype, h, rows, nullptr, nullptr);
  out[5] = INT64_MAX;
  for (int block = 0; block < plan.grid; ++block) {
    int64_t bytes = 0;
    for (const Slot& slot : fetches(p, block, plan.grid)) {
      bytes += slot.triangular ? std::count_if(slot.slab, slot.slab + kWarps, [](int64_t s) { return s >= 0; }) *
                                     int64_t{kSlabBytes}
                               : int64_t{kUnitRows} * slot.bytes;
    }
    out[4] = std::max(out[4], bytes), out[5] = std::min(out[5], bytes);
  }
}

// Fetching and giving back as they wait for each other: `dense` slots of the projection, then `triangle` of the factor,
// in a ring of `slots`. Giving back goes on while a slot is there; between the two products all fetched before must be
// given back by itself. Returns the most slots that were under way at once, or −1 where both wait.
int emulate_ring(int dense, int triangle, int slots) {
  int fetched = 0, given = 0, most = 0;
  for (;;) {
    const bool factor = fetched >= dense;
    const int left =
        factor ? (fetched == dense ? std::min(1, slots - 1) : std::min(slots, kTriangleSlots) - 1) : slots - 1;
    if (fetched == dense + triangle && given == fetched) return most;
    if (fetched < dense + triangle && fetched - given <= left) {
      ++fetched;
      most = std::max(most, fetched - given);
    } else if (given < fetched) {
      ++given;
    } else {
      return -1;
    }
  }
}
}
