// Who computes what, and where it lies: the index arithmetic of the latency kernels, for host and device.
//
// A score is a chain of stages, each a product  out (rows, N) = weights (rows, K) · operandᵀ (K, N)  with a small N,
// the batch padded to 8, 16, 32 or 64. Everything below is integer arithmetic without CUDA, so the kernel (score.cuh)
// and the host emulation that checks it (emulate.cpp) call the same functions.
//
//   strip    16 rows of the weights: the M of one mma.m16n8k16
//   block    1, 2 or 4 consecutive strips, which share one fetch of the operand
//   step     32 columns (K): two mma. One lane holds 16 bytes (8 columns) of each row it owns
//   segment  a block and a range of its steps: what a thread block accumulates before it reduces. Its steps go to the
//            8 warps in turn, and the warps' sums are added in warp order
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define RMCORE_HD __host__ __device__ __forceinline__
#else
#define RMCORE_HD inline
#endif

namespace rmcore::cuda {

constexpr int kWarps = 8;
constexpr int kThreads = 32 * kWarps;
constexpr int kStripRows = 16;
constexpr int kStepColumns = 32;
constexpr int kLaneColumns = 8;  // 16 bytes of 16-bit values
constexpr int kTile = 128;       // edge of the packed triangular factor's tiles
constexpr int kMaxStages = 3;
constexpr int kMaxRows = 64;
constexpr int kMaxSlots = 11;  // of 20 KB at up to 8 rows: all the shared memory of an H100

// What splitting K costs, in steps of one thread block: a further grid barrier and partial sums, but above all short
// segments. An H100 took 70 µs with both products of h = 4096, D = 2048 split, 20 with whole blocks (2026-11-28).
constexpr int kBarrierSteps = 256;

RMCORE_HD int divide_up(int a, int b) { return (a + b - 1) / b; }
RMCORE_HD int round_up(int a, int b) { return divide_up(a, b) * b; }

// Columns (mma n-tiles of 8) a batch is padded to, and the strips of one block for the rectangular stages and for the
// triangular one. Small batches take narrow triangular blocks: they balance without splitting K. Large batches take
// wide ones, because there the operand's traffic from L2 outweighs the weights'.
RMCORE_HD int column_tiles(int rows) { return rows <= 8 ? 1 : rows <= 16 ? 2 : rows <= 32 ? 4 : 8; }
RMCORE_HD constexpr int rectangular_strips(int tiles) { return tiles <= 2 ? 2 : 4; }
RMCORE_HD constexpr int triangular_strips(int tiles) { return tiles <= 2 ? 1 : 4; }

enum Kind : int { kLayer = 0, kProjection = 1, kFactor = 2 };

// The shape of a stage's work and how it is shared out.
struct Work {
  int strips;            // even, so that whole steps of the next stage's K are written
  int strips_per_block;  // 1, 2 or 4
  int blocks;
  int steps;       // steps of a full row
  int triangular;  // row block b stops at its diagonal
  int split;       // 0: whole blocks, longest first in snake order; 1: equal shares of all steps, partial sums
  int workers;     // thread blocks that take part
  // Divided on the host, since a division costs the device a dozen instructions, of 64 bits several dozen:
  int quotient;      // steps of all blocks / workers
  int remainder;     // and what is left: so many workers take one step more
  int strips_shift;  // strips_per_block = 1 << strips_shift
};

struct Segment {
  int block;
  int begin;  // first step
  int end;    // one past the last
};

RMCORE_HD int block_steps(const Work& w, int block) {
  if (!w.triangular) return w.steps;
  int last = (block + 1) * w.strips_per_block - 1;
  if (last >= w.strips) last = w.strips - 1;
  return last / 2 + 1;  // columns 0 … 16·(last+1) − 1, two strips to a step
}

// Steps of all blocks before `block`.
RMCORE_HD int steps_before(const Work& w, int block) {
  if (!w.triangular) return block * w.steps;
  if (w.strips_per_block == 1) {
    const int q = block / 2;
    return q * (q + 1) + (block % 2) * (q + 1);
  }
  const int half = w.strips_per_block / 2;
  if (block == w.blocks && w.blocks > 0) return half * ((block - 1) * block / 2) + block_steps(w, block - 1);
  return half * (block * (block + 1) / 2);
}

RMCORE_HD int total_steps(const Work& w) { return steps_before(w, w.blocks); }

// Share of worker i in split mode: [share_begin(i), share_begin(i + 1)) of all steps, no two differing by more than 1.
RMCORE_HD int share_begin(const Work& w, int worker) {
  return worker * w.quotient + (worker < w.remainder ? worker : w.remainder);
}
RMCORE_HD int worker_of(const Work& w, int step) {
  const int longer = w.remainder * (w.quotient + 1);
  return step < longer ? step / (w.quotient + 1) : w.remainder + (step - longer) / w.quotient;
}

RMCORE_HD int block_of(const Work& w, int step) {
  int low = 0, high = w.blocks - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (steps_before(w, middle) <= step) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// The index-th segment of a worker; false past its last one.
RMCORE_HD bool segment_of(const Work& w, int worker, int index, Segment& out) {
  if (worker >= w.workers) return false;
  if (!w.split) {
    const int place = index * w.workers + (index % 2 == 0 ? worker : w.workers - 1 - worker);
    if (place >= w.blocks) return false;
    out.block = w.blocks - 1 - place;
    out.begin = 0;
    out.end = block_steps(w, out.block);
    return true;
  }
  const int begin = share_begin(w, worker), end = share_begin(w, worker + 1);
  if (begin >= end) return false;
  const int block = block_of(w, begin) + index;
  if (block >= w.blocks) return false;
  const int start = steps_before(w, block);
  if (start >= end) return false;
  const int stop = start + block_steps(w, block);
  out.block = block;
  out.begin = (begin > start ? begin : start) - start;
  out.end = (end < stop ? end : stop) - start;
  return true;
}

// Split mode keeps one partial sum for each segment. Along the shares, worker + block grows from segment to segment.
RMCORE_HD int partial_slot(int worker, int block) { return worker + block; }
RMCORE_HD int partial_slots(const Work& w) { return w.split ? w.workers + w.blocks : 0; }
RMCORE_HD int first_contributor(const Work& w, int block) { return worker_of(w, steps_before(w, block)); }
RMCORE_HD int last_contributor(const Work& w, int block) {
  return worker_of(w, steps_before(w, block) + block_steps(w, block) - 1);
}

// Steps of a segment that warp `warp` takes: begin + warp, begin + warp + 8, …
RMCORE_HD int warp_steps(const Segment& s, int warp) {
  const int n = s.end - s.begin - warp;
  return n > 0 ? (n + kWarps - 1) / kWarps : 0;
}
RMCORE_HD int warp_step(const Segment& s, int warp, int i) { return s.begin + warp + kWarps * i; }

// A warp's position in its steps over all stages, in the order in which they are fetched and consumed.
struct Cursor {
  int stage;
  int segment;
  int index;  // step of this warp in the segment
  Segment at;
  int steps;

  RMCORE_HD bool done(int stages) const { return stage >= stages; }
  RMCORE_HD int step(int warp) const { return warp_step(at, warp, index); }

  // Moves on to the next segment with work for this warp, from (stage, segment) on.
  RMCORE_HD void settle(const Work* work, int stages, int worker, int warp) {
    while (stage < stages) {
      if (!segment_of(work[stage], worker, segment, at)) {
        ++stage;
        segment = 0;
        continue;
      }
      steps = warp_steps(at, warp);
      if (steps > 0) return;
      ++segment;
    }
  }
  RMCORE_HD void start(const Work* work, int stages, int worker, int warp) {
    stage = segment = index = steps = 0;
    settle(work, stages, worker, warp);
  }
  RMCORE_HD void advance(const Work* work, int stages, int worker, int warp) {
    if (++index < steps) return;
    index = 0;
    ++segment;
    settle(work, stages, worker, warp);
  }
};

// -- where a lane's data lies ----------------------------------------------------------------------------------------
//
// mma.m16n8k16 wants in lane (g = lane / 4, t = lane % 4): A at rows g, g+8 and columns 2t, 2t+1, 2t+8, 2t+9; B at
// columns (K) 2t, 2t+1, 2t+8, 2t+9 of row g of the operand. A product does not change when the K columns of both
// factors are permuted alike, so a lane takes the 8 consecutive columns 8t … 8t+7 of a step: one 16-byte access in
// row-major memory, words 0, 1 for the first mma and words 2, 3 for the second. Nothing is exchanged between lanes.

RMCORE_HD int lane_group(int lane) { return lane / 4; }
RMCORE_HD int lane_column(int step, int lane) { return step * kStepColumns + (lane % 4) * kLaneColumns; }

// Row of piece p (0 … 2·strips − 1) of a block; pieces 2r and 2r+1 are rows g and g+8 of strip r.
RMCORE_HD int piece_row(const Work& w, int block, int piece, int lane) {
  return block * w.strips_per_block * kStripRows + piece * 8 + lane_group(lane);
}

// Element offset in a row-major matrix, and in the packed lower tiles: tile (i, j ≤ i) is number i(i+1)/2 + j.
RMCORE_HD int64_t dense_offset(int row, int column, int64_t pitch) { return row * pitch + column; }
RMCORE_HD int64_t tile_offset(int row, int column) {
  const int64_t i = row / kTile, j = column / kTile;
  return (i * (i + 1) / 2 + j) * (kTile * kTile) + (row % kTile) * kTile + column % kTile;
}

// The ring of fetched steps in shared memory: every thread reads back only what it fetched itself, so no barrier guards
// it. Pieces of the weights first, then the operand's n-tiles; 16 bytes a thread, so a warp's access has no conflict.
RMCORE_HD constexpr int ring_pieces(int tiles) {
  const int r = rectangular_strips(tiles), s = triangular_strips(tiles);
  return 2 * (r > s ? r : s) + tiles;
}
RMCORE_HD int ring_index(int slot, int pieces, int piece, int thread) {
  return (slot * pieces + piece) * kThreads + thread;
}
RMCORE_HD constexpr int slot_bytes(int tiles) { return ring_pieces(tiles) * kThreads * 16; }
RMCORE_HD constexpr int reduction_bytes(int tiles) { return kWarps * kStripRows * 8 * tiles * 4; }

// The reduction buffer holds one strip of every warp, row fastest. Rows of odd column pairs are rotated by 8, which
// halves the bank conflicts of the stores.
RMCORE_HD int reduction_index(int tiles, int warp, int column, int row) {
  return (warp * 8 * tiles + column) * kStripRows + ((row + ((column >> 1) & 1) * 8) & 15);
}
// Accumulator element e (0 … 3) of a lane: row and column in its 16×8 tile.
RMCORE_HD int accumulator_row(int lane, int e) { return lane_group(lane) + (e / 2) * 8; }
RMCORE_HD int accumulator_column(int lane, int e) { return (lane % 4) * 2 + e % 2; }

// After the reduction thread `thread` owns row thread % 16 of columns thread / 16 + 16 i; false past the last column.
RMCORE_HD constexpr int owned_columns(int tiles) { return tiles <= 2 ? 1 : tiles / 2; }
RMCORE_HD int owned_row(int thread) { return thread % kStripRows; }
RMCORE_HD int owned_column(int thread, int i) { return thread / kStripRows + i * (kThreads / kStripRows); }

// A strip's partial sums (row fastest) in the workspace.
RMCORE_HD int64_t partial_index(const Work& w, int tiles, int slot, int strip, int column, int row) {
  return ((static_cast<int64_t>(slot) * w.strips_per_block + strip) * 8 * tiles + column) * kStripRows + row;
}

// -- sharing out -----------------------------------------------------------------------------------------------------

// Steps of the busiest worker when blocks stay whole.
inline int64_t longest_share(const Work& w) {
  int64_t longest = 0;
  for (int worker = 0; worker < w.workers; ++worker) {
    int64_t steps = 0;
    Segment s;
    for (int i = 0; segment_of(w, worker, i, s); ++i) steps += s.end - s.begin;
    if (steps > longest) longest = steps;
  }
  return longest;
}

// The work of a stage with `rows` weight rows and `columns` weight columns on up to `grid` thread blocks. Splitting K
// balances exactly and costs one more grid barrier; `force` -1 decides by the estimate above, 0 or 1 by order.
inline Work plan_stage(int rows, int columns, bool triangular, int strips_per_block, int grid, int force = -1) {
  Work w{};
  w.strips = 2 * divide_up(rows, 2 * kStripRows);
  w.strips_per_block = strips_per_block;
  w.strips_shift = strips_per_block / 2;  // of 1, 2 and 4: 0, 1 and 2
  w.blocks = divide_up(w.strips, strips_per_block);
  w.steps = divide_up(columns, kStepColumns);
  w.triangular = triangular ? 1 : 0;
  w.workers = grid < w.blocks ? grid : w.blocks;
  const int total = total_steps(w);
  const int share = (total + grid - 1) / grid;
  w.split = force >= 0 ? force : longest_share(w) > share + kBarrierSteps ? 1 : 0;
  if (w.split) w.workers = total < grid ? total : grid;
  w.quotient = total / w.workers;
  w.remainder = total % w.workers;
  return w;
}

// How many slots the ring gets from a thread block's shared memory; at least 2 are needed.
inline int ring_slots(int tiles, int64_t shared_bytes) {
  const int64_t slots = (shared_bytes - reduction_bytes(tiles)) / slot_bytes(tiles);
  return slots > kMaxSlots ? kMaxSlots : static_cast<int>(slots);
}

// -- power iteration -------------------------------------------------------------------------------------------------
//
// Rows of W go to thread blocks in consecutive, equal shares; a thread owns the same 16-byte columns of every row:
// chunk c of thread t starts at column (c · 256 + t) · (16 / element size).

RMCORE_HD int share_of_rows(int rows, int worker, int workers) {
  const int quotient = rows / workers, remainder = rows % workers;
  return worker * quotient + (worker < remainder ? worker : remainder);
}
RMCORE_HD int chunk_column(int chunk, int thread, int chunk_values) {
  return (chunk * kThreads + thread) * chunk_values;
}

}  // namespace rmcore::cuda
