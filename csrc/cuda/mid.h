// The score of 65 to 512 rows of a folded 16-bit head in one launch: who computes what, and where it lies; for host and
// device.
//
//   stage 1   t = projection · xᵀ (D, B), c = cos 2π(t + phase), g = β · c
//   stage 2   y = U c (D, B), Σ y²
//
// Both have the weights on the M side of wgmma (m64nNk16) and the batch on its N side:
//
//   tile      128 rows of the weights, 64 for each of two warpgroups
//   k-block   64 columns (128 bytes, the width of the swizzle): a slot of the ring holds one of a tile, and under it
//             the same columns of the batch's rows
//   job       a tile and N (stage 1) or N/2 (stage 2) rows of the batch, all k-blocks: of the projection those of h, of
//             U those up to the diagonal. A cluster of four thread blocks takes a job, each a quarter of its k-blocks,
//             and adds the four sums up through distributed shared memory: (0 + 1) + (2 + 3), so that a row's bits do
//             not depend on which block has it. After that block `rank` has the sums of a quarter of the columns.
//
// Of U a cluster takes tiles i and n − 1 − i, which together are as long as any other two, for half as many rows of the
// batch: 32 tiles of h = D = 4096 are 32 jobs of the projection and 16 pairs in two halves. Integer arithmetic without
// CUDA: the kernel (mid.cuh) and the host emulation (emulate_mid.cpp) call the same functions.
#pragma once

#include <cstdint>

#include "schedule.h"
#include "score.h"

namespace rmcore::cuda {

constexpr int kMidLeastRows = kMaxRows + 1;
constexpr int kMidMostRows = 512;
constexpr int kMidTileRows = kTile;
constexpr int kMidDepth = 64;
constexpr int kMidCluster = 4;
constexpr int kMidWarps = kWarps;  // that multiply; one more fetches
constexpr int kMidThreads = kThreads + 32;
constexpr int kMaxMidSlots = 8;
constexpr int kMinMidSlots = 3;
constexpr int kMidInstances[] = {64, 128, 192, 256};  // N

// -- shared memory --------------------------------------------------------------------------------------------------

constexpr int kMidRowBytes = 2 * kMidDepth;
constexpr int kMidWeightBytes = kMidTileRows * kMidRowBytes;  // of a slot, before the batch's rows
constexpr int kMidBarrierBytes = 256;                         // mbarriers and two words, see MidBarriers
RMCORE_HD constexpr int mid_slot_bytes(int columns) { return kMidWeightBytes + columns * kMidRowBytes; }
// What one thread block sends another at once: N / 8 sums of each of 256 threads.
RMCORE_HD constexpr int mid_exchange_bytes(int columns) { return 4 * (columns / 8) * kThreads; }
RMCORE_HD constexpr int mid_sums_bytes(int columns) { return 4 * kMidWarps * columns / 4; }
RMCORE_HD constexpr int mid_fixed_bytes(int columns) {
  return mid_exchange_bytes(columns) + mid_sums_bytes(columns) + kMidBarrierBytes;
}

// The 64-bit description of a matrix in shared memory for wgmma, K-major, 128-byte swizzle: address and distance of
// groups of eight rows in units of 16 bytes; the leading distance has no meaning under this swizzle. `address` is that
// of the first row's first column of 16: 32 bytes on for each 16 columns. What the address is relative to must lie at a
// multiple of 1024.
RMCORE_HD constexpr uint64_t mid_descriptor(uint32_t address) {
  return (uint64_t{address} & 0x3ffff) >> 4 | uint64_t{1} << 16 | uint64_t{8 * kMidRowBytes / 16} << 32 |
         uint64_t{1} << 62;
}
constexpr int kMidStep = 16;  // columns of one wgmma
RMCORE_HD constexpr uint32_t mid_step_bytes(int step) { return static_cast<uint32_t>(2 * kMidStep * step); }
// A warpgroup's 64 rows of the weights in a slot.
RMCORE_HD constexpr int mid_weights_at(int warpgroup) { return warpgroup * 64 * kMidRowBytes; }
RMCORE_HD constexpr int mid_operand_at() { return kMidWeightBytes; }

// Accumulator `i` (of N / 2) of a multiplying thread (0 … 255): its row in the tile and its column of N.
RMCORE_HD int mid_fragment_row(int thread, int i) { return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8; }
RMCORE_HD int mid_fragment_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// -- sums over a cluster --------------------------------------------------------------------------------------------
//
// In turns 0 and 1 a block gives its neighbour (rank ^ 1) that half of its columns which the neighbour keeps, a quarter
// at a time, and adds what comes to the half that it keeps; in turn 2 the same with quarters and rank ^ 2. `values` is
// how many a thread has (N / 2), `i` counts a quarter of them; the same thread of the other block has the same places.

RMCORE_HD int mid_partner(int rank, int turn) { return turn < 2 ? rank ^ 1 : rank ^ 2; }
RMCORE_HD constexpr int mid_kept(int rank, int turn, int values, int i) {
  return (rank & 1) * (values / 2) + (turn < 2 ? turn : rank >> 1) * (values / 4) + i;
}
RMCORE_HD constexpr int mid_sent(int rank, int turn, int values, int i) {
  return turn < 2 ? mid_kept(rank ^ 1, turn, values, i) : mid_kept(rank ^ 2, turn, values, i);
}
// The first column (of `columns`) that a block has the sums of in the end.
RMCORE_HD constexpr int mid_owned_column(int rank, int columns) {
  return (rank & 1) * (columns / 2) + (rank >> 1) * (columns / 4);
}

// What the blocks tell each other: there is something in your buffer (full), or in mine there is room again (free). The
// buffer is written by either partner; signals of two partners would be counted as one's, so each has its own.
enum MidSignal : int { kFullOfPair = 0, kFreeOfPair = 1, kFullOfOther = 2, kFreeOfOther = 3 };
constexpr int kMidSignals = 4;

// One job's exchange, for one warp. `Ops`: wait(signal, parity) on the own block's, arrive(rank, signal) at another's,
// send(rank, turn) and receive(turn). Before a block writes into a buffer its owner has said that it has read what was
// there: in turn 1 what came in turn 0, in turn 2 (from elsewhere) that of turn 1, in the next job that of turn 2. At
// first all buffers are free, so the first wait for kFreeOfPair passes a phase that never was.
template <typename Ops>
RMCORE_HD void mid_exchange(Ops& ops, int rank, int job) {
  const int pair = mid_partner(rank, 0), other = mid_partner(rank, 2);
  const unsigned parity = static_cast<unsigned>(job & 1);
  ops.wait(kFreeOfPair, 1u);
  ops.send(pair, 0);
  ops.arrive(pair, kFullOfPair);
  ops.wait(kFullOfPair, 0u);
  ops.receive(0);
  ops.arrive(pair, kFreeOfPair);

  ops.wait(kFreeOfPair, 0u);
  ops.send(pair, 1);
  ops.arrive(pair, kFullOfPair);
  ops.wait(kFullOfPair, 1u);
  ops.receive(1);
  ops.arrive(other, kFreeOfOther);

  ops.wait(kFreeOfOther, parity);
  ops.send(other, 2);
  ops.arrive(other, kFullOfOther);
  ops.wait(kFullOfOther, parity);
  ops.receive(2);
  ops.arrive(pair, kFreeOfPair);
}

// -- jobs -----------------------------------------------------------------------------------------------------------

struct MidShape {
  int hidden_size;   // h
  int num_features;  // D
  int rows;          // B
  int columns;       // N
  int tiles;         // of 128 features
  int groups;        // of N rows of the batch, stage 1
  int halves;        // of N / 2, stage 2
  int clusters;
};

struct MidJob {
  int tile;
  int column;  // first row of the batch
  int blocks;  // k-blocks
};

// The index-th job of a cluster in stage 1, all groups of a tile next to each other; false past its last one.
RMCORE_HD bool mid_dense_job(const MidShape& s, int cluster, int index, MidJob& job) {
  const int item = cluster + index * s.clusters;
  if (item >= s.tiles * s.groups) return false;
  job.tile = item / s.groups;
  job.column = item % s.groups * s.columns;
  job.blocks = divide_up(s.hidden_size, kMidDepth);
  return true;
}
// The same in stage 2: both tiles of each of its pairs, then those in the middle of an odd number of tiles.
RMCORE_HD bool mid_triangle_job(const MidShape& s, int cluster, int index, MidJob& job) {
  const int pairs = s.tiles / 2 * s.halves;
  const int mine = cluster < pairs ? (pairs - 1 - cluster) / s.clusters + 1 : 0;
  const bool paired = index < 2 * mine;
  const int item = cluster + (paired ? index / 2 : index - mine) * s.clusters;
  if (item >= divide_up(s.tiles, 2) * s.halves) return false;
  const int place = item / s.halves;
  job.tile = index % 2 == 1 ? place : s.tiles - 1 - place;
  job.column = item % s.halves * (s.columns / 2);
  job.blocks = (job.tile + 1) * (kTile / kMidDepth);
  return true;
}
RMCORE_HD bool mid_job(const MidShape& s, bool triangular, int cluster, int index, MidJob& job) {
  return triangular ? mid_triangle_job(s, cluster, index, job) : mid_dense_job(s, cluster, index, job);
}
// A block's share of a job's k-blocks: [begin(rank), begin(rank + 1)).
RMCORE_HD int mid_share_begin(int blocks, int rank) { return blocks * rank / kMidCluster; }

// A thread block's k-blocks of a stage, in the order in which they are fetched and multiplied.
struct MidWalk {
  const MidShape& shape;
  bool triangular;
  int cluster, rank;
  int index;  // of the job
  MidJob job;
  int block, end;
  bool valid;

  RMCORE_HD MidWalk(const MidShape& s, bool stage, int c, int r)
      : shape(s), triangular(stage), cluster(c), rank(r), index(-1), job{}, block(0), end(0), valid(true) {
    settle();
  }
  RMCORE_HD void advance() {
    ++block;
    settle();
  }
  RMCORE_HD void settle() {
    while (valid && block >= end) {
      valid = mid_job(shape, triangular, cluster, ++index, job);
      block = valid ? mid_share_begin(job.blocks, rank) : 0;
      end = valid ? mid_share_begin(job.blocks, rank + 1) : 0;
    }
  }
  // Where the tensor maps' boxes begin. Weights: the projection (D, h), or the packed tiles of U below each other.
  RMCORE_HD int weight_row() const {
    return triangular ? (job.tile * (job.tile + 1) / 2 + block * kMidDepth / kTile) * kTile : job.tile * kMidTileRows;
  }
  RMCORE_HD int weight_column() const { return triangular ? block * kMidDepth % kTile : block * kMidDepth; }
  RMCORE_HD int operand_row() const { return job.column; }
  RMCORE_HD int operand_column() const { return block * kMidDepth; }
};

// A counter for each half of the batch and block of the cluster: the last tile to come writes these rows' results.
RMCORE_HD int mid_ticket(const MidShape& s, int column, int rank) {
  return column / (s.columns / 2) * kMidCluster + rank;
}
constexpr int kMidTickets = kMidCluster * 2 * kMidMostRows / 64;

// -- a launch -------------------------------------------------------------------------------------------------------

// `columns` is 0 where the head or the batch is not served.
struct MidPlan {
  MidShape shape;
  int slots;
  int shared_bytes;
  int64_t feature_pitch;  // D rounded up to 8
  int64_t sum_pitch;      // rows of the batch, padded
  // Offsets into the workspace, bytes.
  int64_t ticket, board, features, logits, squares, bytes;
};

struct MidParams {
  MidShape shape;
  int slots;
  int linear;
  const float* phase;
  const float* beta;
  float beta0;
  float factor_scale;
  float amplitude;
  void* features;  // (B, feature_pitch) c in the serving dtype
  int64_t feature_pitch;
  float* logits;   // (tiles, sum_pitch) β · c of each tile
  float* squares;  // (tiles, sum_pitch) Σ y² of each tile
  int64_t sum_pitch;
  unsigned* tickets;
  unsigned* board;  // (clusters,)
  uint64_t* report;
  float* out;  // (4, B)
};

// CUtensorMap, which mid_launch.cpp fills in and nothing else looks into.
struct alignas(128) MidMap {
  unsigned char bytes[128];
};
struct MidMaps {
  MidMap projection, factor, hidden, features;
};

// Lays out a launch on up to `clusters` clusters of four thread blocks at a time.
MidPlan plan_mid(const Head& head, int rows, int clusters, int64_t shared_bytes);
MidParams mid_params(const Head& head, const MidPlan& plan, float* out, void* workspace);

// A head and the maps of its weights, which must lie at multiples of 16 bytes. Throws CudaError.
struct MidHead {
  Head head;
  MidMap projection, factor;
};
MidHead mid_head(const Head& head);

// The plan for a device (columns 0 where that is no Hopper, or cannot hold clusters), and the launch: `hidden` has the
// head's dtype, rows that begin at multiples of 16 bytes, and no input scale left to multiply with. Throw CudaError,
// BarrierTimeout and std::invalid_argument.
MidPlan plan_mid_on(const MidHead& head, int rows, int device);
void launch_mid(const MidHead& head, const MidPlan& plan, const void* hidden, int64_t hidden_stride, int rows,
                float* out, void* workspace, int64_t workspace_bytes, int device, uintptr_t stream);

const void* mid_kernel_fp16(int columns);
const void* mid_kernel_bf16(int columns);

}  // namespace rmcore::cuda
