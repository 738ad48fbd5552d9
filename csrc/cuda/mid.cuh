// score of a folded 16-bit head for 65 to 512 rows on Hopper: one cooperative launch of clusters of four thread blocks.
//
//   t = x projectionᵀ + phase, c = cos(2π t);  g = c · β + β₀;  v = factor_scale · ‖U c‖²;  u = √(1 + a v);  p = g / u
//
//   hidden (B, h) in the serving dtype → out (4, B) fp32
//
// Who computes what: mid.h. Bytes: 2 D h + D (D + 128) of weights, once from memory where the batch fits in one group
// of N rows, 50 MB at h = D = 4096, 16.9 µs at 3.04 TB/s. FLOP: 2 B (D h + D²/2), 12.9 G at B = 256: 13 µs at Hopper's
// peak. Through the L2 each thread block reads its quarter of a tile and of N rows: at B = 256 768 KB and then 530 KB,
// some 20 µs at what an SM was seen to get. Three launches of Triton take 42 µs there.
//
// Eight warps in two warpgroups multiply, a ninth fetches by tensor maps into a ring; it runs ahead across the end of
// the first product, so that the first slots of U are on their way while the grid barrier holds back c. Sums have one
// order: k-blocks within a block, blocks as mid_exchange pairs them, rows within a tile, tiles by number. No atomics on
// values. It has not run on a GPU.
//
// c is written by threads and read by the copy engine of other blocks, which are different proxies: the writers fence
// before the grid barrier and the thread that fetches after it. Nobody leaves while another block of its cluster may
// still write into its shared memory or arrive there.
#pragma once

#include "barrier.cuh"
#include "device.cuh"
#include "mid.h"
#include "mid_ptx.cuh"
#include "mid_wgmma.cuh"

namespace rmcore::cuda {

// A thread block's shared memory: the ring, what another block sends, sums of warps, barriers.
template <int N>
struct MidMemory {
  unsigned char* base;
  int slots;
  __device__ __forceinline__ uint32_t slot(int i) const { return mid_address(base) + i * mid_slot_bytes(N); }
  __device__ __forceinline__ unsigned char* after_ring() const { return base + slots * mid_slot_bytes(N); }
  __device__ __forceinline__ float4* inbox() const { return reinterpret_cast<float4*>(after_ring()); }
  __device__ __forceinline__ float* sums() const {
    return reinterpret_cast<float*>(after_ring() + mid_exchange_bytes(N));
  }
  __device__ __forceinline__ uint64_t* barriers() const {
    return reinterpret_cast<uint64_t*>(after_ring() + mid_exchange_bytes(N) + mid_sums_bytes(N));
  }
  __device__ __forceinline__ uint32_t full(int i) const { return mid_address(barriers() + i); }
  __device__ __forceinline__ uint32_t empty(int i) const { return mid_address(barriers() + kMaxMidSlots + i); }
  __device__ __forceinline__ uint32_t signal(int i) const { return mid_address(barriers() + 2 * kMaxMidSlots + i); }
  // The four blocks have written c; the grid barrier is open, or will not open.
  __device__ __forceinline__ uint32_t gathered() const { return signal(kMidSignals); }
  __device__ __forceinline__ uint32_t decided() const { return signal(kMidSignals + 1); }
  __device__ __forceinline__ unsigned* verdict() const {
    return reinterpret_cast<unsigned*>(barriers() + 2 * kMaxMidSlots + kMidSignals + 2);
  }
  __device__ __forceinline__ unsigned* last() const { return verdict() + 1; }
  static_assert((2 * kMaxMidSlots + kMidSignals + 2) * 8 + 8 <= kMidBarrierBytes, "barriers and two words");

  __device__ __forceinline__ void init() const {
    for (int i = 0; i < slots; ++i) {
      mid_init(full(i), 1);
      mid_init(empty(i), kMidWarps);
    }
    for (int i = 0; i < kMidSignals; ++i) mid_init(signal(i), kMidWarps);
    mid_init(gathered(), kMidCluster);
    mid_init(decided(), 1);
    mid_fence_init();
  }
};

// A position in the ring: slot and the parity of its round.
struct MidPlace {
  int slot;
  uint32_t parity;
  __device__ __forceinline__ void next(int slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

// -- the thread that fetches ----------------------------------------------------------------------------------------

template <int N>
__device__ __forceinline__ void mid_produce(const MidParams& p, const MidMaps& maps, const MidMemory<N>& memory,
                                            int cluster, int rank) {
  MidPlace place{0, 1};  // a slot's first round has nothing to wait for
  const auto weights = [&](const MidMap& map, const MidWalk& walk, int operand_rows) {
    mid_wait<false>(memory.empty(place.slot), place.parity);
    mid_arrive_expecting(memory.full(place.slot), mid_slot_bytes(operand_rows));
    mid_fetch(memory.slot(place.slot), map, walk.weight_column(), walk.weight_row(), memory.full(place.slot));
  };
  const auto operand = [&](const MidMap& map, const MidWalk& walk, int slot) {
    mid_fetch(memory.slot(slot) + mid_operand_at(), map, walk.operand_column(), walk.operand_row(), memory.full(slot));
  };
  for (MidWalk walk(p.shape, false, cluster, rank); walk.valid; walk.advance()) {
    weights(maps.projection, walk, N);
    operand(maps.hidden, walk, place.slot);
    place.next(p.slots);
  }
  MidWalk lead(p.shape, true, cluster, rank), follow(p.shape, true, cluster, rank);
  MidPlace behind = place;
  int ahead = 0;
  for (; ahead < p.slots && lead.valid; ++ahead, lead.advance()) {
    weights(maps.factor, lead, N / 2);
    place.next(p.slots);
  }
  mid_wait<true>(memory.decided(), 0);
  const bool open = *const_cast<volatile unsigned*>(memory.verdict()) != 0;
  __threadfence();
  mid_proxy_fence();
  MidPlace first = behind;
  for (int i = 0; i < ahead; ++i, follow.advance()) {
    operand(maps.features, follow, behind.slot);
    behind.next(p.slots);
  }
  if (!open) {  // nobody will multiply these, but they must have come before the block may leave
    for (int i = 0; i < ahead; ++i, first.next(p.slots)) mid_wait<false>(memory.full(first.slot), first.parity ^ 1);
    return;
  }
  for (; lead.valid; lead.advance()) {
    weights(maps.factor, lead, N / 2);
    operand(maps.features, lead, place.slot);
    place.next(p.slots);
  }
}

// -- the warps that multiply ----------------------------------------------------------------------------------------

// sums = this block's k-blocks of a job.
template <typename T, int N, int Columns>
__device__ __forceinline__ void mid_multiply(const MidMemory<N>& memory, MidPlace& place, int blocks,
                                             float (&sums)[Columns / 2]) {
  const int warpgroup = threadIdx.x / 128;
#pragma unroll
  for (int i = 0; i < Columns / 2; ++i) sums[i] = 0.0f;
  int before = place.slot;
  const auto release = [&](int slot) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mid_arrive(memory.empty(slot));
  };
  for (int block = 0; block < blocks; ++block) {
    mid_wait<false>(memory.full(place.slot), place.parity);
    const uint32_t slot = memory.slot(place.slot);
    const uint32_t a = slot + mid_weights_at(warpgroup), b = slot + mid_operand_at();
    wgmma_pin(sums);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kMidDepth / kMidStep; ++step) {
      Wgmma<T, Columns>::add(sums, mid_descriptor(a + mid_step_bytes(step)), mid_descriptor(b + mid_step_bytes(step)));
    }
    wgmma_commit();
    wgmma_pin(sums);
    wgmma_wait<1>();
    if (block > 0) release(before);
    before = place.slot;
    place.next(memory.slots);
  }
  wgmma_wait<0>();
  wgmma_pin(sums);
  if (blocks > 0) release(before);
}

// mid_exchange for a thread: the sums of the four blocks, of the quarter of the columns that this one keeps.
template <int N, int Columns>
struct MidExchange {
  static constexpr int kValues = Columns / 2, kQuarter = kValues / 4;
  const MidMemory<N>& memory;
  int rank;
  float (&sums)[kValues];
  float half[kValues / 2];
  float quarter[kQuarter];

  __device__ __forceinline__ void wait(MidSignal signal, uint32_t parity) {
    mid_wait<true>(memory.signal(signal), parity);
  }
  __device__ __forceinline__ void arrive(int to, MidSignal signal) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mid_arrive_remote(mid_remote(memory.signal(signal), to));
  }
  // Of places that depend on the rank both are named, so that the sums stay in registers.
  __device__ __forceinline__ void send(int to, int turn) {
    const uint32_t there = mid_remote(mid_address(memory.inbox() + threadIdx.x), to);
#pragma unroll
    for (int i = 0; i < kQuarter; i += 4) {
      float x[4];
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (turn < 2) {
          x[k] = (rank & 1) != 0 ? sums[mid_sent(1, turn, kValues, i + k)] : sums[mid_sent(0, turn, kValues, i + k)];
        } else {
          x[k] = (rank & 2) != 0 ? half[i + k] : half[kQuarter + i + k];
        }
      }
      mid_store_remote(there + i / 4 * kThreads * 16, float4{x[0], x[1], x[2], x[3]});
    }
  }
  __device__ __forceinline__ void receive(int turn) {
#pragma unroll
    for (int i = 0; i < kQuarter; i += 4) {
      const float4 come = memory.inbox()[i / 4 * kThreads + threadIdx.x];
      const float x[4] = {come.x, come.y, come.z, come.w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        if (turn < 2) {
          const float own =
              (rank & 1) != 0 ? sums[mid_kept(1, turn, kValues, i + k)] : sums[mid_kept(0, turn, kValues, i + k)];
          half[turn * kQuarter + i + k] = own + x[k];
        } else {
          quarter[i + k] = ((rank & 2) != 0 ? half[kQuarter + i + k] : half[i + k]) + x[k];
        }
      }
    }
  }
};

// The sum of x over the warp's rows: lanes of the same columns.
__device__ __forceinline__ float mid_sum_of_rows(float x) {
#pragma unroll
  for (int offset = 4; offset < 32; offset *= 2) x += __shfl_xor_sync(0xffffffffu, x, offset);
  return x;
}

// What `column_sum(i)` (of a thread's two rows, accumulators i and i + 2) gives for each column, over the tile's rows,
// into `target`, a row of the workspace from the block's first column on; `valid` columns of it count.
template <int N, int Columns, typename ColumnSum>
__device__ __forceinline__ void mid_add_up_rows(const MidMemory<N>& memory, float* target, int valid,
                                                const ColumnSum& column_sum) {
  constexpr int kOwned = Columns / 4;
  float* const sums = memory.sums();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kOwned / 2; ++i) {
    if (i & 2) continue;
    const float x = mid_sum_of_rows(column_sum(i));
    if (lane < 4) sums[warp * kOwned + mid_fragment_column(lane, i)] = x;
  }
  mid_multipliers_meet();
  if (threadIdx.x < kOwned && static_cast<int>(threadIdx.x) < valid) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kMidWarps; ++w) sum += sums[w * kOwned + threadIdx.x];
    target[threadIdx.x] = sum;
  }
}

// The end of a job of stage 1: c, and β · c of the tile.
template <typename T, int N>
__device__ __forceinline__ void mid_finish_dense(const MidParams& p, const MidMemory<N>& memory, const MidJob& job,
                                                 int rank, const float (&sums)[N / 8], const float (&phase)[2],
                                                 const float (&beta)[2]) {
  const int first = job.column + mid_owned_column(rank, N), thread = threadIdx.x;
  const int row = job.tile * kMidTileRows + mid_fragment_row(thread, 0), other = row + 8;
  T* const features = static_cast<T*>(p.features);
  const auto feature = [&](float t, int at) {
    if (!p.linear) t = cospif(2.0f * (t - rintf(t)));
    return at < p.shape.num_features ? t : 0.0f;
  };
  const auto column_sum = [&](int i) {
    const float c = feature(sums[i] + phase[0], row), d = feature(sums[i + 2] + phase[1], other);
    const int column = first + mid_fragment_column(thread, i);
    if (column < p.shape.rows) {
      T* const at = features + column * p.feature_pitch;
      if (row < p.shape.num_features) at[row] = round_to<T>(c);
      if (other < p.shape.num_features) at[other] = round_to<T>(d);
    }
    return fmaf(beta[0], c, beta[1] * d);
  };
  float* const target = p.logits + job.tile * p.sum_pitch + first;
  mid_add_up_rows<N, N>(memory, target, p.shape.rows - first, column_sum);
}

// g, v, u, p of `count` rows of the batch, by all multiplying threads: eight to a row, tiles in turn.
__device__ __forceinline__ void mid_conclude(const MidParams& p, int first, int count) {
  const int rows = p.shape.rows;
  for (int base = 0; base < count; base += kThreads / 8) {
    const int at = base + static_cast<int>(threadIdx.x) / 8, column = first + at;
    const bool inside = at < count && column < rows;
    float g = 0.0f, v = 0.0f;
    for (int tile = threadIdx.x % 8; inside && tile < p.shape.tiles; tile += 8) {
      g += __ldcg(p.logits + tile * p.sum_pitch + column);
      v += __ldcg(p.squares + tile * p.sum_pitch + column);
    }
#pragma unroll
    for (int offset = 1; offset < 8; offset *= 2) {
      g += __shfl_xor_sync(0xffffffffu, g, offset);
      v += __shfl_xor_sync(0xffffffffu, v, offset);
    }
    if (!inside || threadIdx.x % 8 != 0) continue;
    const float logit = g + p.beta0, variance = v * p.factor_scale;
    const float u = sqrtf(fmaf(p.amplitude, variance, 1.0f));
    p.out[column] = logit;
    p.out[rows + column] = variance;
    p.out[2 * rows + column] = u;
    p.out[3 * rows + column] = logit / u;
  }
}

// The end of a job of stage 2: Σ y² of the tile; the last tile of these rows of the batch writes their results.
template <int N>
__device__ __forceinline__ void mid_finish_triangle(const MidParams& p, const MidMemory<N>& memory, const MidJob& job,
                                                    int rank, const float (&sums)[N / 16]) {
  const int first = job.column + mid_owned_column(rank, N / 2);
  const auto column_sum = [&](int i) { return fmaf(sums[i], sums[i], sums[i + 2] * sums[i + 2]); };
  float* const target = p.squares + job.tile * p.sum_pitch + first;
  mid_add_up_rows<N, N / 2>(memory, target, p.shape.rows - first, column_sum);
  __threadfence();
  mid_multipliers_meet();
  if (threadIdx.x == 0) {
    const unsigned before = atomicAdd(p.tickets + mid_ticket(p.shape, job.column, rank), 1u);
    *memory.last() = before + 1 == static_cast<unsigned>(p.shape.tiles);
    __threadfence();
  }
  mid_multipliers_meet();
  if (*const_cast<volatile unsigned*>(memory.last())) mid_conclude(p, first, N / 8);
  mid_multipliers_meet();
}

// The grid barrier of clusters: what blocks of theirs wrote before is visible after. Reports name the first block of a
// cluster.
struct MidGrid : GridBarrier {
  __device__ __forceinline__ MidGrid(unsigned* board, uint64_t* word) : GridBarrier(KernelName::kScore, board, word) {}
  __device__ __forceinline__ void report(uint64_t word) const {
    const int missing = hang_missing(word);
    GridBarrier::report(hang_report(KernelName::kScore, hang_phase(word), kMidCluster * hang_waiting(word),
                                    missing < 0 ? missing : kMidCluster * missing));
  }
};

// All multiplying threads; one of the cluster asks, and tells its blocks, so that these never disagree.
template <int N>
__device__ __forceinline__ bool mid_grid_meet(const MidParams& p, const MidMemory<N>& memory, int cluster, int rank) {
  __threadfence();
  mid_proxy_fence();
  mid_multipliers_meet();
  if (threadIdx.x == 0) {
    mid_arrive_remote(mid_remote(memory.gathered(), 0));
    if (rank == 0) {
      mid_wait<true>(memory.gathered(), 0);
      const bool open = meet(MidGrid(p.board, p.report), KernelName::kScore, cluster, p.shape.clusters, 1);
      for (int block = 0; block < kMidCluster; ++block) {
        mid_store_remote(mid_remote(mid_address(memory.verdict()), block), open ? 1u : 0u);
        mid_arrive_remote(mid_remote(memory.decided(), block));
      }
    }
  }
  mid_wait<true>(memory.decided(), 0);
  return *const_cast<volatile unsigned*>(memory.verdict()) != 0;
}

template <typename T, int N>
__device__ __forceinline__ void mid_consume(const MidParams& p, const MidMemory<N>& memory, int cluster, int rank) {
  MidPlace place{0, 0};
  int jobs = 0;
  MidJob job;
  if (cluster == 0 && rank == 0) {  // counted after the grid barrier at the earliest
    for (int i = threadIdx.x; i < kMidTickets; i += kThreads) p.tickets[i] = 0;
  }
  for (int index = 0; mid_dense_job(p.shape, cluster, index, job); ++index, ++jobs) {
    const int row = job.tile * kMidTileRows + mid_fragment_row(threadIdx.x, 0);
    float phase[2], beta[2];
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const bool inside = row + 8 * k < p.shape.num_features;
      phase[k] = inside ? __ldg(p.phase + row + 8 * k) : 0.0f;
      beta[k] = inside ? __ldg(p.beta + row + 8 * k) : 0.0f;
    }
    float sums[N / 2];
    mid_multiply<T, N, N>(memory, place, mid_share_begin(job.blocks, rank + 1) - mid_share_begin(job.blocks, rank),
                          sums);
    MidExchange<N, N> exchange{memory, rank, sums, {}, {}};
    mid_exchange(exchange, rank, jobs);
    mid_finish_dense<T, N>(p, memory, job, rank, exchange.quarter, phase, beta);
    mid_multipliers_meet();
  }
  if (!mid_grid_meet<N>(p, memory, cluster, rank)) {
    // A cluster did not come: no result may pass for one.
    for (int i = threadIdx.x; i < 4 * p.shape.rows; i += kThreads) p.out[i] = __int_as_float(0x7fffffff);
    return;
  }
  for (int index = 0; mid_triangle_job(p.shape, cluster, index, job); ++index, ++jobs) {
    float sums[N / 4];
    mid_multiply<T, N, N / 2>(memory, place, mid_share_begin(job.blocks, rank + 1) - mid_share_begin(job.blocks, rank),
                              sums);
    MidExchange<N, N / 2> exchange{memory, rank, sums, {}, {}};
    mid_exchange(exchange, rank, jobs);
    mid_finish_triangle<N>(p, memory, job, rank, exchange.quarter);
  }
}

template <typename T, int N>
__global__ void __launch_bounds__(kMidThreads, 1)
    mid_kernel(const __grid_constant__ MidParams p, const __grid_constant__ MidMaps maps) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  const MidMemory<N> memory{mid_dynamic_shared(), p.slots};
  const int rank = blockIdx.x % kMidCluster, cluster = blockIdx.x / kMidCluster;
  if (threadIdx.x == kThreads) {
    if (memory.slot(0) % 1024 != 0) __trap();  // where the swizzle begins
    memory.init();
    mid_expect_map(maps.projection);
    mid_expect_map(maps.hidden);
    mid_expect_map(maps.factor);
    mid_expect_map(maps.features);
  }
  mid_cluster_meet();
  if (threadIdx.x < kThreads) {
    mid_consume<T, N>(p, memory, cluster, rank);
  } else if (threadIdx.x == kThreads) {
    mid_produce<N>(p, maps, memory, cluster, rank);
  }
  mid_cluster_meet();
#endif
}

template <typename T>
const void* mid_kernel_of(int columns) {
  switch (columns) {
    case 64:
      return reinterpret_cast<const void*>(&mid_kernel<T, 64>);
    case 128:
      return reinterpret_cast<const void*>(&mid_kernel<T, 128>);
    case 192:
      return reinterpret_cast<const void*>(&mid_kernel<T, 192>);
    case 256:
      return reinterpret_cast<const void*>(&mid_kernel<T, 256>);
    default:
      return nullptr;
  }
}

}  // namespace rmcore::cuda
