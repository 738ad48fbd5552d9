// The streamed score of an int8 head on the host (int8_stream.h, int8_stream.cuh): whole numbers, who fetches and reads
// what, and the epilogues. Rows come in whole numbers already. See emulate_stream.cpp, of which this is the same in
// bytes; the ring's waiting is that one's.
#include <algorithm>
#include <cstring>
#include <vector>

#include "emulate.h"
#include "int8_stream.h"

namespace rmcore::cuda {
namespace {

struct ByteSlot {
  bool triangular;
  int bytes;
  int64_t source[kUnitRows];  // byte offsets: the projection's rows, or the factor's slabs (-1: none)
};

std::vector<ByteSlot> fetches(const Int8Params& p, int block, int grid) {
  std::vector<ByteSlot> out;
  const int units = units_of(p.num_features), pairs = pairs_of(p.hidden_size);
  for (int index = 0; dense_unit(index, block, grid, units) >= 0; ++index) {
    for (int segment = 0; segment < dense_segments(pairs); ++segment) {
      ByteSlot slot{};
      slot.bytes = dense_bytes(segment, pairs);
      expect(slot.bytes % 16 == 0, "the copy engine takes multiples of 16 bytes");
      for (int row = 0; row < kUnitRows; ++row) {
        slot.source[row] =
            2 * dense_source(dense_unit(index, block, grid, units), row, segment, p.num_features, p.projection_pitch);
      }
      out.push_back(slot);
    }
  }
  std::vector<TriangleWalk> lanes;
  for (int lane = 0; lane < kWarps; ++lane) lanes.emplace_back(block, grid, units, lane);
  for (;;) {
    ByteSlot slot{};
    slot.triangular = true;
    int copies = 0;
    for (int lane = 0; lane < kWarps; ++lane) {
      slot.source[lane] = lanes[lane].unit < 0 ? -1 : lanes[lane].source();
      copies += lanes[lane].unit >= 0;
      expect(lanes[lane].unit < 0 || copies == lane + 1, "a slot has a gap");
      lanes[lane].advance();
    }
    if (copies == 0) return out;
    out.push_back(slot);
  }
}

// Where the 16 bytes lie that a lane reads from a slot: offset in the matrix, -1: not fetched.
int64_t source_of(const ByteSlot& slot, int warp, int lane, int pair, int turn) {
  const int byte = byte_slab_offset(slot.triangular, warp) + byte_lane_offset(slot.triangular, lane, pair, turn);
  expect(byte % 16 == 0 && byte + 16 <= kSlotBytes, "a lane reads past its slot");
  const int pitch = slot.triangular ? kByteSlabBytes : slab_pitch(false);
  const int64_t from = slot.source[byte / pitch];
  if (slot.triangular ? from < 0 : byte % pitch >= slot.bytes) return -1;
  return from + byte % pitch;
}

// mma.m16n8k32 with bytes, as PTX lays them out: a[lane][4 words][4], b[lane][2 words][4], d[lane][4].
void mma_bytes(int (&d)[32][4], const int8_t (&a)[32][4][4], const int8_t (&b)[32][2][4]) {
  int left[16][32], right[32][8];
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e) {
      for (int w = 0; w < 4; ++w) left[lane / 4 + w % 2 * 8][lane % 4 * 4 + e + w / 2 * 16] = a[lane][w][e];
      for (int w = 0; w < 2; ++w) right[lane % 4 * 4 + e + w * 16][lane / 4] = b[lane][w][e];
    }
  for (int lane = 0; lane < 32; ++lane)
    for (int e = 0; e < 4; ++e)
      for (int k = 0; k < 32; ++k) d[lane][e] += left[lane / 4 + e / 2 * 8][k] * right[k][lane % 4 * 2 + e % 2];
}

using Sums = int[2][32][4];

// multiply_bytes() of int8_stream.cuh for a whole warp; `x` is the operand's first row from the slab's column on.
void multiply(const Int8Params& p, const ByteSlot& slot, int warp, const int8_t* x, int width, Sums& acc,
              std::vector<int>& used) {
  const int steps = std::min(byte_steps(slot.triangular), divide_up(width, kByteStep));
  const auto* const matrix = static_cast<const int8_t*>(slot.triangular ? p.factor : p.projection);
  for (int step = 0; step < steps; ++step) {
    int8_t a[2][32][4][4] = {}, b[2][32][2][4] = {};
    for (int lane = 0; lane < 32; ++lane) {
      const int at = step * kByteStep + lane % 4 * kByteLane;
      int8_t mine[kByteLane] = {};
      if (slot.triangular || at < width) {
        const int64_t source = source_of(slot, warp, lane, step / 2, step % 2 ^ lane_odd(lane));
        expect(source >= 0, "a product takes what was not fetched");
        std::memcpy(mine, matrix + source, sizeof mine);
        ++used.at(source / kByteLane);
      }
      for (int k = 0; k < kByteLane; ++k) {
        b[k / 8][lane][k / 4 % 2][k % 4] = mine[k];
        for (int group = 0; group < 2; ++group) {
          const int row = std::min(lane_group(lane) + 8 * group, p.rows - 1);
          if (group == 0 || p.rows > 8)
            a[k / 8][lane][k / 4 % 2 * 2 + group][k % 4] = x[int64_t{row} * p.operand_pitch + at + k];
        }
      }
    }
    for (int half = 0; half < 2; ++half) mma_bytes(acc[step % 2], a[half], b[half]);
  }
}

struct WholeSums {
  int padded;
  std::vector<int> memory;
  explicit WholeSums(int rows) : padded(rows), memory(sums_bytes(rows) / 4, 1 << 30) {}
  void store(int unit, int warp, const Sums& acc) {
    for (int lane = 0; lane < 32; ++lane)
      for (int e = 0; e < 4; ++e) {
        const int row = lane_group(lane) + 8 * (e / 2);
        if (row < padded)
          memory.at(sums_index(padded, unit, warp, row, lane % 4 * 2 + e % 2)) = acc[0][lane][e] + acc[1][lane][e];
      }
  }
  float of_warps(int value) const {
    int sum = 0;
    for (int warp = 0; warp < kWarps; ++warp)
      sum += memory.at(
          sums_index(padded, value_unit(padded, value), warp, value_row(padded, value), value_weight_row(value)));
    return static_cast<float>(sum);
  }
};

// x' (B, h) with `low` or null, factors (B); outliers (B, h) float, zero where there is none.
void emulate(const Int8Head& head, const int8_t* whole, const int8_t* low, const float* factors, const float* outliers,
             int rows, int grid, float* out, int8_t* kept) {
  const StreamPlan plan = plan_int8(head, rows, grid, 1 << 30);
  expect(plan.slots > 0, "the head is not served");
  std::vector<unsigned char> memory(static_cast<size_t>(plan.bytes) + 256);
  const Int8Params p = int8_params(head, plan, nullptr, Scalar::kFloat32, head.hidden_size, rows, out, memory.data());
  const int h = p.hidden_size, term = second_term(h), padded = plan.padded, units = units_of(p.num_features);
  const int values = kGroupUnits * padded * kUnitRows;
  expect((low != nullptr) == (p.two_terms != 0), "rows in another number of terms than the head takes");
  std::vector<int8_t> features(static_cast<size_t>(rows) * p.feature_pitch, 77);
  const int64_t tiles = divide_up(p.num_features, kTile);
  std::vector<int> dense_used(static_cast<size_t>(p.num_features) * 2 * p.projection_pitch / kByteLane + 1);
  std::vector<int> factor_used(static_cast<size_t>(tiles * (tiles + 1) / 2 * kTile * kTile / kByteLane) + 1);
  std::vector<float> logit(static_cast<size_t>(plan.grid) * kThreads), square(logit.size());
  std::vector<std::vector<ByteSlot>> slots;
  std::vector<size_t> place(plan.grid, 0);
  std::vector<int8_t> operand(static_cast<size_t>(byte_operand_bytes(rows, p.operand_pitch)), 77);
  for (int row = 0; row < rows; ++row)
    for (int k = 0; k < (low != nullptr ? 2 : 1); ++k)
      for (int column = 0; column < term; ++column)
        operand.at(static_cast<size_t>(row) * p.operand_pitch + k * term + column) =
            column < h ? (k == 0 ? whole : low)[row * h + column] : 0;
  for (int block = 0; block < plan.grid; ++block) {
    slots.push_back(fetches(p, block, plan.grid));
    for (int first = 0; dense_unit(first, block, plan.grid, units) >= 0; first += kGroupUnits) {
      WholeSums sums(padded), low_sums(padded);
      for (int k = 0; k < kGroupUnits && dense_unit(first + k, block, plan.grid, units) >= 0; ++k) {
        const size_t start = place[block];
        for (int warp = 0; warp < kWarps; ++warp) {
          Sums acc = {}, low_acc = {};
          place[block] = start;
          for (int segment = 0; segment < dense_segments(pairs_of(h)); ++segment) {
            const int column = 2 * (segment * kSegmentColumns + warp * kSlabColumns);
            const ByteSlot& slot = slots[block].at(place[block]++);
            expect(!slot.triangular, "the ring holds another product");
            const int width = slab_width(column, round_up(h, kByteLane));
            multiply(p, slot, warp, operand.data() + column, width, acc, dense_used);
            std::vector<int> again(dense_used.size());
            if (low != nullptr) multiply(p, slot, warp, operand.data() + term + column, width, low_acc, again);
          }
          sums.store(k, warp, acc), low_sums.store(k, warp, low_acc);
        }
      }
      for (int value = 0; value < values; ++value) {
        const int unit = dense_unit(first + value_unit(padded, value), block, plan.grid, units);
        if (unit < 0) continue;
        const int row = unit * kUnitRows + value_weight_row(value), batch = value_row(padded, value);
        float c = 0.0f;
        if (batch < rows && row < p.num_features) {
          float t = sums.of_warps(value) * p.scales[row] * factors[batch];
          if (low != nullptr) t += low_sums.of_warps(value) * p.scales[row] * (factors[batch] * (1.0f / 254.0f));
          for (int k = 0; k < h; ++k)
            t += outliers[batch * h + k] * (head.projection[row * head.projection_pitch + k] * p.scales[row]);
          t += p.phase[row];
          c = static_cast<float>(std::cos(2.0 * M_PI * (t - std::nearbyint(t))));
          logit[block * kThreads + value % kThreads] += p.beta[row] * c;
        }
        if (batch < rows)
          features.at(batch * p.feature_pitch + row) =
              std::isfinite(c) ? static_cast<int8_t>(std::nearbyint(127.0f * c)) : 0;
      }
    }
  }
  for (int row = 0; row < rows; ++row)
    for (int d = 0; d < p.num_features; ++d) kept[row * p.num_features + d] = features[row * p.feature_pitch + d];
  for (int block = 0; block < plan.grid; ++block) {
    const int longest = triangle_unit(0, block, plan.grid, units);
    expect(longest >= 0, "a block without a part of the triangle");
    std::fill(operand.begin(), operand.end(), 77);
    for (int row = 0; row < rows; ++row)
      for (int column = 0; column < TriangleWalk::slabs(longest) * kTile; ++column)
        operand.at(static_cast<size_t>(row) * p.operand_pitch + column) =
            column < p.feature_pitch ? features.at(row * p.feature_pitch + column) : 0;
    std::vector<TriangleWalk> walks;
    std::vector<size_t> places(kWarps, place[block]);
    for (int warp = 0; warp < kWarps; ++warp) walks.emplace_back(block, plan.grid, units, warp);
    for (int first = 0; triangle_unit(first, block, plan.grid, units) >= 0; first += kGroupUnits) {
      WholeSums sums(padded);
      for (int k = 0; k < kGroupUnits && triangle_unit(first + k, block, plan.grid, units) >= 0; ++k)
        for (int warp = 0; warp < kWarps; ++warp) {
          Sums acc = {};
          TriangleWalk& walk = walks[warp];
          for (; walk.unit >= 0 && walk.index == first + k; walk.advance()) {
            const ByteSlot& slot = slots[block].at(places[warp]++);
            expect(slot.triangular && slot.source[warp] == walk.source(), "the ring holds another slab");
            multiply(p, slot, warp, operand.data() + walk.tile * kTile,
                     slab_width(walk.tile * kTile, (walk.unit + 1) * kUnitRows), acc, factor_used);
          }
          sums.store(k, warp, acc);
        }
      for (int value = 0; value < values; ++value) {
        const int unit = triangle_unit(first + value_unit(padded, value), block, plan.grid, units);
        if (unit < 0) continue;
        const int row = unit * kUnitRows + value_weight_row(value), batch = value_row(padded, value);
        if (batch >= rows || row >= p.num_features) continue;
        const float own = operand.at(static_cast<size_t>(batch) * p.operand_pitch + row);
        float y = sums.of_warps(value) * p.factor_scales[row] * (1.0f / 127.0f);
        y = std::fma(p.diagonal[row] * (1.0f / 127.0f), own, y);
        square[block * kThreads + value % kThreads] += y * y;
      }
    }
    for (const size_t end : places) expect(end + 1 >= slots[block].size(), "a slot is left over");
  }
  for (int row = 0; row < p.num_features; ++row) {
    for (int column = 0; column < round_up(h, kByteLane); column += kByteLane) {
      const int times = dense_used[(int64_t{row} * 2 * p.projection_pitch + column) / kByteLane];
      expect(row < p.num_features - 1 ? times == 1 : times >= 1, "a weight was not used exactly once");
    }
    for (int column = 0; column <= row; column += kByteLane)
      expect(factor_used[tile_offset(row, column) / kByteLane] == 1, "a weight of the factor was not used once");
  }
  for (int row = 0; row < rows; ++row) {
    float g = 0.0f, v = 0.0f;
    for (size_t thread = 0; thread < logit.size(); ++thread) {
      if (value_row(padded, static_cast<int>(thread % kThreads)) != row) continue;
      g += logit[thread], v += square[thread] + (logit[thread] - logit[thread]);
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

const char* emulate_int8_message() { return message.c_str(); }

int emulate_int8(int h, int d, const int8_t* projection, int64_t pitch, const float* scale, const float* phase,
                 const float* beta, const int8_t* factor, const float* factor_scales, const float* diagonal,
                 float beta0, float factor_scale, float amplitude, const int8_t* whole, const int8_t* low,
                 const float* factors, const float* outliers, int rows, int grid, float* out, int8_t* kept) {
  try {
    const Int8Head head{h,        d,       projection, pitch, scale, phase,        beta,     factor, factor_scales,
                        diagonal, nullptr, nullptr,    1.0f,  beta0, factor_scale, amplitude};
    emulate(head, whole, low, factors, outliers, rows, grid, out, kept);
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}

// Slots of the ring (0: not served), grid, bytes of the workspace.
void emulate_int8_plan(int h, int d, int rows, int multiprocessors, int64_t shared_bytes, int64_t* out) {
  Int8Head head{};
  head.hidden_size = h, head.num_features = d;
  const StreamPlan plan = plan_int8(head, rows, multiprocessors, shared_bytes);
  out[0] = plan.slots, out[1] = plan.grid, out[2] = plan.bytes;
}
}
