// score: hidden rows to logit, variance, uncertainty and preference in one cooperative launch, for B ≤ 64.
//
//   z = layernorm(tanh(x layerᵀ + layer_bias))     only for heads that do not fold; else z = x
//   t = z projectionᵀ + phase, c = cos(2π t)       D features, c rounded to the serving dtype
//   g = c · β + β₀                                 from the unrounded c
//   v = factor_scale · ‖U c‖²                      U lower-triangular, packed in 128×128 tiles
//   u = √(1 + a v), p = g / u
//
//   hidden (B, h) fp16 / bf16 / fp32 → out (4, B) fp32.  N = B padded to 8, 16, 32 or 64.
//
// Bytes: 2 D h + D (D + 128) for folded heads, once each: 50 MB at h = D = 4096, 11.7 µs at 4.3 TB/s.
// FLOP: 2 B (D h + D²/2), 3.2 GFLOP at B = 64. Below B ≈ 180 it is the bytes that count, so the kernel is built to keep
// them coming:
//
// - One thread block per SM, 8 warps, each a stream of its own. A warp walks its steps (16·strips rows × 32 columns) of
//   all stages in one order. Every thread fetches with cp.async into a ring in shared memory and reads back only what
//   it fetched itself (schedule.h says why that suffices), so nothing but cp.async.wait_group guards the ring, and
//   96 to 128 KB of weights per H200 SM are under way at any time.
// - Weights do not depend on earlier stages. The ring therefore runs ahead across a stage's end: while the last
//   products of the projection are taken, and during the grid barrier, the first steps of U arrive. What the barrier
//   does hold back, the operand of those steps (c, from L2), is fetched as soon as it opens.
// - Sums have one order: steps within a warp, warps within a block, blocks by number. No atomics on values.
//
// The barrier counts where cooperative_groups' grid.sync() does: its state belongs to the launch, so a workspace may
// hold anything before the call and captured graphs may be replayed at will. Unlike that one it does not wait for ever
// (barrier.h): a thread block that gives up fills the output with NaN, reports and ends.
#pragma once

#include "barrier.cuh"
#include "device.cuh"
#include "score.h"

namespace rmcore::cuda {

constexpr float kLayerNormEps = 1e-5f;

// A warp's stream of fetched steps.
template <typename T, int Tiles>
struct Stream {
  static constexpr int kWeightPieces = ring_pieces(Tiles) - Tiles;
  static constexpr int kPieces = ring_pieces(Tiles);

  const ScoreParams& p;
  uint4* ring;
  Work const* work;  // of all stages, in shared memory
  int warp, lane;
  Cursor tail;    // next step to fetch
  int tail_slot;  // where it goes
  int head_slot;  // next step to consume

  __device__ __forceinline__ Stream(const ScoreParams& params, uint4* memory, const Work* works)
      : p(params),
        ring(memory),
        work(works),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        tail_slot(0),
        head_slot(0) {
    tail.start(work, p.stages, blockIdx.x, warp);
  }

  __device__ __forceinline__ void move(Cursor& cursor) const { cursor.advance(work, p.stages, blockIdx.x, warp); }
  __device__ __forceinline__ int next(int slot) const { return slot + 1 == p.slots ? 0 : slot + 1; }

  // Everything the fetches need is read before the first of them: they are memory barriers to the compiler.
  __device__ __forceinline__ void issue_weights(const Cursor& c, int slot) {
    const StageParams& s = p.stage[c.stage];
    const Work& w = work[c.stage];
    const bool triangular = w.triangular != 0;
    const int pieces = 2 * w.strips_per_block;
    const int column = lane_column(c.step(warp), lane);
    const int row = piece_row(w, c.at.block, 0, lane);
    const int rows_left = column < s.weight_columns ? s.weight_rows - row : 0;
    const int64_t pitch = triangular ? static_cast<int64_t>(kTile) : s.pitch;
    const T* base = static_cast<const T*>(s.weights);
    const T* first = base + (triangular ? tile_offset(row, column) : dense_offset(row, column, pitch));
    uint4* target = &ring[ring_index(slot, kPieces, 0, threadIdx.x)];
#pragma unroll
    for (int piece = 0; piece < kWeightPieces; ++piece) {
      if (piece < pieces) {
        const bool valid = 8 * piece < rows_left;
        fetch_weights(target + piece * kThreads, valid ? first + 8 * piece * pitch : base, valid);
      }
    }
  }

  __device__ __forceinline__ void issue_operand(const Cursor& c, int slot) {
    const StageParams& s = p.stage[c.stage];
    const int column = lane_column(c.step(warp), lane), row = lane_group(lane);
    const int rows_left = column < s.operand_columns ? s.operand_rows - row : 0;
    const int64_t pitch = s.operand_pitch;
    const T* base = static_cast<const T*>(s.operand);
    const T* first = base + dense_offset(row, column, pitch);
    uint4* target = &ring[ring_index(slot, kPieces, kWeightPieces, threadIdx.x)];
#pragma unroll
    for (int tile = 0; tile < Tiles; ++tile) {
      const bool valid = 8 * tile < rows_left;
      fetch_operand(target + tile * kThreads, valid ? first + 8 * tile * pitch : base, valid);
    }
  }

  // Before the first stage: weights of the first steps.
  __device__ __forceinline__ void prefetch() {
    for (int i = 0; i < p.slots; ++i) {
      if (!tail.done(p.stages)) {
        issue_weights(tail, tail_slot);
        move(tail);
      }
      fetch_commit();
      tail_slot = next(tail_slot);
    }
  }

  // At the start of a stage, when its operand exists: the operand of the steps whose weights are already on their way.
  // One group for each slot, so that from here on slots − 1 groups are younger than the step at the head.
  __device__ __forceinline__ void enter(int stage) {
    Cursor c;
    c.stage = stage;
    c.segment = c.index = c.steps = 0;
    c.settle(work, p.stages, blockIdx.x, warp);
    int slot = head_slot;
    for (int i = 0; i < p.slots; ++i) {
      if (!c.done(p.stages) && c.stage == stage) {
        issue_operand(c, slot);
        move(c);
      }
      fetch_commit();
      slot = next(slot);
    }
  }

  // acc += this warp's steps of a segment of stage `stage`, `strips` strips to a block.
  template <int Strips>
  __device__ __forceinline__ void consume(int stage, int steps, float (&acc)[Strips][Tiles][4]) {
    for (int i = 0; i < steps; ++i) {
      fetch_wait(p.slots - 1);
      const uint4* slot = &ring[ring_index(head_slot, kPieces, 0, threadIdx.x)];
      uint4 a[2 * Strips];
#pragma unroll
      for (int piece = 0; piece < 2 * Strips; ++piece) a[piece] = slot[piece * kThreads];
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile) {
        const uint4 b = slot[(kWeightPieces + tile) * kThreads];
#pragma unroll
        for (int r = 0; r < Strips; ++r) {
          mma<T>(acc[r][tile], a[2 * r].x, a[2 * r + 1].x, a[2 * r].y, a[2 * r + 1].y, b.x, b.y);
          mma<T>(acc[r][tile], a[2 * r].z, a[2 * r + 1].z, a[2 * r].w, a[2 * r + 1].w, b.z, b.w);
        }
      }
      // The slot is free: its loads were consumed by the products above.
      if (!tail.done(p.stages)) {
        issue_weights(tail, head_slot);
        if (tail.stage == stage) issue_operand(tail, head_slot);
        move(tail);
      }
      fetch_commit();
      head_slot = next(head_slot);
    }
  }
};

// What a thread keeps through the launch: sums over the rows it owned, for its columns.
template <int Tiles>
struct Sums {
  float logit[owned_columns(Tiles)];
  float square[owned_columns(Tiles)];
};

// The end of a product: one value of a stage's output (weight row `row`, batch column `column`) is complete.
template <typename T, int Tiles>
__device__ __forceinline__ void finish(const ScoreParams& p, const StageParams& s, int row, int column, float value,
                                       float bias, float beta, float& logit, float& square) {
  if (s.kind == kFactor) {
    square += value * value;
    return;
  }
  const bool inside = row < s.valid;
  value += bias;
  if (s.kind == kProjection) {
    if (!p.linear) value = cospif(2.0f * (value - rintf(value)));
    if (inside) logit = fmaf(beta, value, logit);
  } else {
    // tanh saturates: an infinite value would come out as a confident answer. value − value keeps it NaN.
    if (p.tanh) value = tanhf(value) + (value - value);
    if (s.unnormalised != nullptr) {
      if (inside) s.unnormalised[column * s.result_pitch + row] = value;
      return;
    }
  }
  if (row < s.result_pitch) {
    static_cast<T*>(s.result)[column * s.result_pitch + row] = round_to<T>(inside ? value : 0.0f);
  }
}

// One stage: all segments of this thread block.
template <typename T, int Tiles, int Strips>
__device__ __forceinline__ void run_stage(const ScoreParams& p, int stage, Stream<T, Tiles>& stream, float* reduction,
                                          Sums<Tiles>& sums) {
  constexpr int kOwned = owned_columns(Tiles);
  const StageParams& s = p.stage[stage];
  const Work& w = stream.work[stage];
  const int thread = threadIdx.x, lane = stream.lane, warp = stream.warp;
  Segment segment;
  for (int index = 0; segment_of(w, blockIdx.x, index, segment); ++index) {
    const int row0 = segment.block * w.strips_per_block * kStripRows;
    // Asked for before the products, so that they are here when the products are done.
    float bias[Strips], beta[Strips];
#pragma unroll
    for (int r = 0; r < Strips; ++r) {
      const int row = row0 + r * kStripRows + owned_row(thread);
      bias[r] = !w.split && s.bias != nullptr && row < s.valid ? __ldg(s.bias + row) : 0.0f;
      beta[r] = !w.split && s.kind == kProjection && row < s.valid ? __ldg(p.beta + row) : 0.0f;
    }
    float acc[Strips][Tiles][4];
#pragma unroll
    for (int r = 0; r < Strips; ++r)
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[r][tile][e] = 0.0f;
    stream.template consume<Strips>(stage, warp_steps(segment, warp), acc);
#pragma unroll
    for (int r = 0; r < Strips; ++r) {
#pragma unroll
      for (int tile = 0; tile < Tiles; ++tile)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          reduction[reduction_index(Tiles, warp, tile * 8 + accumulator_column(lane, e), accumulator_row(lane, e))] =
              acc[r][tile][e];
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kOwned; ++i) {
        const int row = owned_row(thread), column = owned_column(thread, i);
        if (column < 8 * Tiles) {
          float value = 0.0f;
#pragma unroll
          for (int from = 0; from < kWarps; ++from) value += reduction[reduction_index(Tiles, from, column, row)];
          if (w.split) {
            s.partial[partial_index(w, Tiles, partial_slot(blockIdx.x, segment.block), r, column, row)] = value;
          } else {
            finish<T, Tiles>(p, s, row0 + r * kStripRows + row, column, value, bias[r], beta[r], sums.logit[i],
                             sums.square[i]);
          }
        }
      }
      __syncthreads();
    }
  }
}

// Split mode, after the barrier: adds the partial sums of each strip in the order of their thread blocks.
template <typename T, int Tiles>
__device__ __forceinline__ void finish_split(const ScoreParams& p, int stage, const Work& w, Sums<Tiles>& sums) {
  const StageParams& s = p.stage[stage];
  const int row_in_strip = owned_row(threadIdx.x);
  for (int strip = blockIdx.x; strip < w.strips; strip += gridDim.x) {
    const int block = strip >> w.strips_shift, r = strip & (w.strips_per_block - 1);
    const int first = first_contributor(w, block), last = last_contributor(w, block);
    const int row = strip * kStripRows + row_in_strip;
    const float bias = s.bias != nullptr && row < s.valid ? __ldg(s.bias + row) : 0.0f;
    const float beta = s.kind == kProjection && row < s.valid ? __ldg(p.beta + row) : 0.0f;
#pragma unroll
    for (int i = 0; i < owned_columns(Tiles); ++i) {
      const int column = owned_column(threadIdx.x, i);
      if (column < 8 * Tiles) {
        float value = 0.0f;
        for (int worker = first; worker <= last; ++worker) {
          value += __ldcg(s.partial + partial_index(w, Tiles, partial_slot(worker, block), r, column, row_in_strip));
        }
        finish<T, Tiles>(p, s, row, column, value, bias, beta, sums.logit[i], sums.square[i]);
      }
    }
  }
}

template <typename S>
__device__ __forceinline__ float load_hidden(const void* hidden, int64_t index) {
  return to_float(__ldg(static_cast<const S*>(hidden) + index));
}

// hidden → converted: scaled, rounded to the serving dtype, zero-padded to (N, converted_pitch).
template <typename T, int Tiles>
__device__ __forceinline__ void convert(const ScoreParams& p) {
  const int pitch = static_cast<int>(p.converted_pitch);
  for (int i = blockIdx.x * kThreads + threadIdx.x; i < 8 * Tiles * pitch; i += gridDim.x * kThreads) {
    const int row = i / pitch, column = i % pitch;
    float value = 0.0f;
    if (row < p.rows && column < p.hidden_size) {
      const int64_t at = row * p.hidden_stride + column;
      const Scalar dtype = static_cast<Scalar>(p.hidden_dtype);
      value = dtype == Scalar::kFloat16    ? load_hidden<__half>(p.hidden, at)
              : dtype == Scalar::kBFloat16 ? load_hidden<__nv_bfloat16>(p.hidden, at)
                                           : load_hidden<float>(p.hidden, at);
      value *= p.input_scale;
    }
    static_cast<T*>(p.converted)[i] = round_to<T>(value);
  }
}

// Layer norm of the batch rows, one thread block a row: mean, then the variance of the differences.
template <typename T, int Tiles>
__device__ __forceinline__ void normalise(const StageParams& s, float* scratch) {
  for (int row = blockIdx.x; row < 8 * Tiles; row += gridDim.x) {
    const float* x = s.unnormalised + row * s.result_pitch;
    T* out = static_cast<T*>(s.result) + row * s.result_pitch;
    float sum = 0.0f;
    for (int i = threadIdx.x; i < s.valid; i += kThreads) sum += __ldcg(x + i);
    const float mean = block_sum(sum, scratch) / static_cast<float>(s.valid);
    float squares = 0.0f;
    for (int i = threadIdx.x; i < s.valid; i += kThreads) {
      const float d = __ldcg(x + i) - mean;
      squares += d * d;
    }
    const float scale = 1.0f / sqrtf(block_sum(squares, scratch) / static_cast<float>(s.valid) + kLayerNormEps);
    for (int i = threadIdx.x; i < s.result_pitch; i += kThreads) {
      out[i] = round_to<T>(i < s.valid ? (__ldcg(x + i) - mean) * scale : 0.0f);
    }
  }
}

// How many thread blocks have counted themselves before this one, which now has. Releases what the block has written
// before its __syncthreads() and acquires what the others have.
__device__ __forceinline__ unsigned came_before(unsigned* ticket) {
  unsigned before;
  asm volatile("atom.add.acq_rel.gpu.u32 %0, [%1], 1;" : "=r"(before) : "l"(ticket) : "memory");
  return before;
}

// Writes this thread block's sums; the last one to do so adds them up, in the order of the blocks.
//
// Nothing hides what this takes, so it is few and wide accesses: one atomic that orders, where a fence of every thread
// before it and another after it each waited for the memory; and the sums of all blocks asked for at once.
template <int Tiles>
__device__ __forceinline__ void conclude(const ScoreParams& p, const Sums<Tiles>& sums) {
  __shared__ bool last;
  const int grid = gridDim.x;
#pragma unroll
  for (int i = 0; i < owned_columns(Tiles); ++i) {
    const float logit = group_sum<16>(sums.logit[i]), square = group_sum<16>(sums.square[i]);
    const int column = owned_column(threadIdx.x, i);
    if (owned_row(threadIdx.x) == 0 && column < 8 * Tiles) {
      p.logit_partial[column * grid + blockIdx.x] = logit;
      p.variance_partial[column * grid + blockIdx.x] = square;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) last = came_before(p.ticket) == static_cast<unsigned>(grid - 1);
  __syncthreads();
  if (!last) return;
  constexpr int kAtOnce = 5;  // of 32: the multiprocessors of an H100 or B200
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int column = warp; column < p.rows; column += kWarps) {
    float logit = 0.0f, square = 0.0f;
    for (int start = lane; start < grid; start += 32 * kAtOnce) {
      float logits[kAtOnce], squares[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int block = start + 32 * i;
        logits[i] = block < grid ? __ldcg(p.logit_partial + column * grid + block) : 0.0f;
        squares[i] = block < grid ? __ldcg(p.variance_partial + column * grid + block) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        logit += logits[i];
        square += squares[i];
      }
    }
    const float g = group_sum<32>(logit) + p.beta0;
    const float v = group_sum<32>(square) * p.factor_scale;
    const float u = sqrtf(fmaf(p.amplitude, v, 1.0f));
    if (lane == 0) {
      p.out[column] = g;
      p.out[p.rows + column] = v;
      p.out[2 * p.rows + column] = u;
      p.out[3 * p.rows + column] = g / u;
    }
  }
}

// The end of a thread block whose barrier did not open: no result may pass for one.
__device__ __forceinline__ void give_up(const ScoreParams& p) {
  fetch_wait(0);
  for (int i = threadIdx.x; i < 4 * p.rows; i += kThreads) p.out[i] = __int_as_float(0x7fffffff);
}

template <typename T, int Tiles>
__global__ void __launch_bounds__(kThreads, 1) score_kernel(const __grid_constant__ ScoreParams p) {
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ Work work[kMaxStages];
  GridBarrier barrier(KernelName::kScore, p.board, p.report);
  float* reduction = reinterpret_cast<float*>(memory);
  uint4* ring = reinterpret_cast<uint4*>(memory + reduction_bytes(Tiles));
  if (threadIdx.x < kMaxStages) work[threadIdx.x] = p.stage[threadIdx.x].work;
  if (blockIdx.x == 0 && threadIdx.x == 0) *p.ticket = 0;  // read after the first grid barrier at the earliest
  __syncthreads();

  Stream<T, Tiles> stream(p, ring, work);
  stream.prefetch();
  if (p.converted != nullptr) {
    convert<T, Tiles>(p);
    if (!barrier.sync()) return give_up(p);
  }
  Sums<Tiles> sums;
#pragma unroll
  for (int i = 0; i < owned_columns(Tiles); ++i) sums.logit[i] = sums.square[i] = 0.0f;

  for (int stage = 0; stage < p.stages; ++stage) {
    stream.enter(stage);
    if (rectangular_strips(Tiles) == triangular_strips(Tiles) || p.stage[stage].kind != kFactor) {
      run_stage<T, Tiles, rectangular_strips(Tiles)>(p, stage, stream, reduction, sums);
    } else {
      run_stage<T, Tiles, triangular_strips(Tiles)>(p, stage, stream, reduction, sums);
    }
    if (work[stage].split) {
      if (!barrier.sync()) return give_up(p);
      finish_split<T, Tiles>(p, stage, work[stage], sums);
    }
    if (p.stage[stage].kind == kLayer && p.layernorm) {
      if (!barrier.sync()) return give_up(p);
      normalise<T, Tiles>(p.stage[stage], reduction);
    }
    if (stage + 1 < p.stages && !barrier.sync()) return give_up(p);
  }
  conclude<Tiles>(p, sums);
}

template <typename T>
const void* score_kernel_of(int tiles) {
  switch (tiles) {
    case 1:
      return reinterpret_cast<const void*>(&score_kernel<T, 1>);
    case 2:
      return reinterpret_cast<const void*>(&score_kernel<T, 2>);
    case 4:
      return reinterpret_cast<const void*>(&score_kernel<T, 4>);
    default:
      return reinterpret_cast<const void*>(&score_kernel<T, 8>);
  }
}

}  // namespace rmcore::cuda
