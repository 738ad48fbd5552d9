// The streamed score of a folded head, B ≤ 16: its work, its shared memory and its workspace; for host and device.
//
// Two products, each  out (B, rows) = operand (B, K) · weights (rows, K)ᵀ:  the projection (D, h), then U (D, D), lower
// triangular. Both are cut into the same pieces:
//
//   unit     8 rows of the weights: the N of one mma.m16n8k16, whose M is the batch
//   slab     128 columns of a unit (2 KB), four steps of 32: what a warp takes from a slot of the ring, always the w-th
//            of eight
//   segment  of the projection: 1024 columns of a unit, one slot. Of the packed factor a slot holds the next eight
//            slabs, whichever units they belong to: eight rows of eight of its tiles
//
// A thread block takes units block, block + grid, … of the projection, and of the triangle every grid-th too, longest
// first and back again, so that all blocks read about the same. Index arithmetic without CUDA: the kernel (stream.cuh)
// and the host emulation (emulate_stream.cpp) call the same functions.
#pragma once

#include <cstdint>

#include "schedule.h"
#include "score.h"

namespace rmcore::cuda {

constexpr int kUnitRows = 8;
constexpr int kSegmentColumns = 1024;
constexpr int kSlabColumns = kSegmentColumns / kWarps;
constexpr int kSlotBytes = 2 * kUnitRows * kSegmentColumns;
constexpr int kStreamRows = 16;
constexpr int kStreamThreads = kThreads + 32;  // 8 warps that multiply, one that fetches
constexpr int kGroupUnits = 4;                 // units whose sums over warps are taken together
constexpr int kMinStreamSlots = 4;             // 64 KB under way: twice what the memory's latency asks for
constexpr int kMaxStreamSlots = 12;
constexpr int kTriangleSlots = 6;  // under way at most while the factor is fetched
static_assert(kSlabColumns == kTile, "a slab of the factor is a tile's");

// The batch is padded to half a product's M or to all of it.
RMCORE_HD int padded_rows(int rows) { return rows <= 8 ? 8 : 16; }
RMCORE_HD int units_of(int rows) { return divide_up(rows, kUnitRows); }

// The index-th unit of a block, or -1.
RMCORE_HD int dense_unit(int index, int block, int grid, int units) {
  const int unit = index * grid + block;
  return unit < units ? unit : -1;
}
RMCORE_HD int triangle_unit(int index, int block, int grid, int units) {
  const int place = index * grid + (index % 2 == 0 ? block : grid - 1 - block);
  return place < units ? units - 1 - place : -1;
}

// Segments of a unit of the projection, and the bytes of a row in one; `columns` is h, and rows are zero up to the next
// multiple of 8.
RMCORE_HD int dense_segments(int columns) { return divide_up(columns, kSegmentColumns); }
RMCORE_HD int dense_bytes(int segment, int columns) {
  const int left = round_up(columns, kLaneColumns) - segment * kSegmentColumns;
  return 2 * (left < kSegmentColumns ? left : kSegmentColumns);
}
// Rows past the last are read as the last, and their results are thrown away.
RMCORE_HD int64_t dense_source(int unit, int row, int segment, int rows, int64_t pitch) {
  const int at = unit * kUnitRows + row;
  return dense_offset(at < rows ? at : rows - 1, segment * kSegmentColumns, pitch);
}

// A walk over every eighth slab of a block's triangle, from the `first` on: slab n lies in slot n / 8 at place n % 8.
struct TriangleWalk {
  int block, grid, units;
  int index;  // of the unit in the block's order
  int unit;   // -1 past the end
  int tile;   // slab of the unit: 128 columns of it

  RMCORE_HD static int slabs(int unit) { return unit * kUnitRows / kTile + 1; }
  RMCORE_HD TriangleWalk(int b, int g, int u, int first) : block(b), grid(g), units(u), index(0), tile(first) {
    unit = triangle_unit(0, b, g, u);
    settle();
  }
  RMCORE_HD void settle() {
    while (unit >= 0 && tile >= slabs(unit)) {
      tile -= slabs(unit);
      unit = triangle_unit(++index, block, grid, units);
    }
  }
  RMCORE_HD void advance() {
    tile += kWarps;
    settle();
  }
  // 8 rows of a packed tile lie together.
  RMCORE_HD int64_t source() const { return tile_offset(unit * kUnitRows, tile * kTile); }
};
constexpr int kSlabBytes = 2 * kUnitRows * kTile;

// Columns that count in a slab that begins at `first`, where the matrix or its triangle ends at `end`; 0 or less: none.
RMCORE_HD int slab_width(int first, int end) { return end - first; }

// Where a warp's slab lies in a slot, bytes, and the distance of its rows.
RMCORE_HD int slab_offset(bool triangular, int warp) { return warp * (triangular ? kSlabBytes : 2 * kSlabColumns); }
RMCORE_HD int slab_pitch(bool triangular) { return 2 * (triangular ? kTile : kSegmentColumns); }
// Lanes of an odd row take the second step of a pair first: without that, two rows would meet in the same banks.
// Offset in a slab of the 16 bytes that a lane takes `turn`-th (0, 1) of a pair of steps; they belong to step
// 2 pair + (turn ^ odd).
RMCORE_HD int lane_odd(int lane) { return lane_group(lane) & 1; }
RMCORE_HD int slab_lane_offset(bool triangular, int lane, int pair, int turn) {
  const int step = 2 * pair + (turn ^ lane_odd(lane));
  return lane_group(lane) * slab_pitch(triangular) + 2 * (step * kStepColumns + (lane % 4) * kLaneColumns);
}

// The operand in shared memory: padded rows of `operand_pitch` elements, 64 bytes more than whole 256-byte lines, so
// that 8 rows lie in different banks. It holds x, then c.
RMCORE_HD int operand_pitch(int hidden_size, int num_features) {
  return round_up(hidden_size > num_features ? hidden_size : num_features, kTile) + 32;
}
// The sums of a group's units over warps: (unit, warp, row of the batch, row of the unit).
RMCORE_HD int sums_index(int padded, int unit, int warp, int row, int weight_row) {
  return ((unit * kWarps + warp) * padded + row) * kUnitRows + weight_row;
}
// After that a thread owns value `thread + 256 i` of (unit, row of the batch, row of the unit): always of the same
// rows.
RMCORE_HD int value_unit(int padded, int value) { return value / (padded * kUnitRows); }
RMCORE_HD int value_row(int padded, int value) { return value / kUnitRows % padded; }
RMCORE_HD int value_weight_row(int value) { return value % kUnitRows; }

struct StreamParams {
  int rows;  // B
  int hidden_size;
  int num_features;
  int slots;
  int operand_pitch;
  int linear;
  const void* projection;
  int64_t projection_pitch;
  const float* phase;
  const float* beta;
  const void* factor;
  const void* hidden;
  int hidden_dtype;
  int in_place;           // rows have the serving dtype, no scale, and
  int vectors;            // may be read 16 bytes at a time
  int64_t hidden_stride;  // elements
  float input_scale;
  float beta0;
  float factor_scale;
  float amplitude;
  void* features;         // (B, feature_pitch) c in the serving dtype
  int64_t feature_pitch;  // D rounded up to 8
  uint64_t* partial;      // (B, grid) the blocks' sums: logit and square, or kNothing
  unsigned* board;
  uint64_t* report;
  float* out;
};

// A word of two floats that no arithmetic makes: NaNs that a GPU makes are 0x7fffffff.
constexpr uint64_t kNothing = ~uint64_t{0};

// Shared memory: sums, operand (only the batch's own rows: those of the padding need no values, since no row of a
// product looks at another), ring.
RMCORE_HD int sums_bytes(int padded) { return 4 * kGroupUnits * kWarps * padded * kUnitRows; }
RMCORE_HD int operand_bytes(int rows, int pitch) { return round_up(2 * rows * pitch, 128); }

// How many slots the ring gets beside that many rows.
int ring_slots(const StreamPlan& plan, int rows);

// Lays out a launch; `slots` is 0 where the head has a layer, the batch is too large, or the shared memory too small.
StreamPlan plan_stream(const Head& head, int rows, int multiprocessors, int64_t shared_bytes);

StreamParams stream_params(const Head& head, const StreamPlan& plan, const void* hidden, Scalar hidden_dtype,
                           int64_t hidden_stride, int rows, float* out, void* workspace);

}  // namespace rmcore::cuda
