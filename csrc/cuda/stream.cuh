// score of a folded head for B ≤ 16 on Hopper and later: the weights as a stream that one warp fetches.
//
//   t = x projectionᵀ + phase, c = cos(2π t);  g = c · β + β₀;  v = factor_scale · ‖U c‖²;  u = √(1 + a v);  p = g / u
//
// What score.cuh does with a fetch by every thread is here done by the bulk copy engine: a warp of its own asks for
// 2 KB pieces into a ring of 16 KB slots as fast as they are given back, from the first row of the projection to the
// last tile of U, whatever the other warps wait for. At h = D = 4096 the ring and what it has given up hold all of U by
// the time the grid barrier opens. The eight warps that multiply keep nothing in registers but one unit's sums
// (stream.h): the operand, x and then c, lies in shared memory. An H100 took 23.5 µs at B = 1 with a first form of
// this, 29 with score.cuh; reading the weights alone takes 19.6 (2026-11-28).
//
// Sums have one order: columns within a warp, warps within a block, blocks by number. No atomics on values.
#pragma once

#include "barrier.cuh"
#include "device.cuh"
#include "score.cuh"
#include "stream.h"

namespace rmcore::cuda {

// -- the ring's barriers (mbarrier) and the copy engine --------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void ring_barrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void ring_expect(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void ring_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(shared_address(barrier)) : "memory");
}
__device__ __forceinline__ void ring_wait(uint64_t* barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again%=:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra.uni again%=;\n"
      "}\n" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
// `bytes`, a multiple of 16, counted by the barrier when they are there.
__device__ __forceinline__ void bulk_copy(void* target, const void* source, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];\n" ::"r"(
                   shared_address(target)),
               "l"(source), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
// The warps that multiply; the one that fetches goes its own way.
__device__ __forceinline__ void multipliers_meet() { asm volatile("bar.sync 1, 256;\n" ::: "memory"); }

// A position in the ring: slot and the parity of its round.
struct RingPlace {
  int slot = 0;
  uint32_t parity;
  __device__ __forceinline__ explicit RingPlace(uint32_t first) : parity(first) {}
  __device__ __forceinline__ void next(int slots) {
    if (++slot == slots) {
      slot = 0;
      parity ^= 1;
    }
  }
};

struct Ring {
  unsigned char* memory;
  uint64_t* full;
  uint64_t* empty;
};

// The fetching warp, from the first segment to the last.
template <typename T>
__device__ __forceinline__ void fetch_all(const StreamParams& p, const Ring& ring) {
  const int lane = threadIdx.x % 32, grid = gridDim.x, units = units_of(p.num_features);
  const T* const projection = static_cast<const T*>(p.projection);
  const T* const factor = static_cast<const T*>(p.factor);
  RingPlace place(0), behind(0);
  int under_way = 0, most = p.slots;
  const auto give_way = [&](int left) {  // until no more than `left` slots are under way or not given back
    for (; under_way > left; --under_way) {
      ring_wait(&ring.empty[behind.slot], behind.parity);
      behind.next(p.slots);
    }
  };
  const auto fetch = [&](int copies, int bytes, const T* source, int pitch) {
    give_way(most - 1);
    ++under_way;
    if (lane == 0) ring_expect(&ring.full[place.slot], copies * bytes);
    __syncwarp();
    if (lane < copies) {
      bulk_copy(ring.memory + place.slot * kSlotBytes + lane * pitch, source, bytes, &ring.full[place.slot]);
    }
    place.next(p.slots);
  };
  for (int index = 0;; ++index) {
    const int unit = dense_unit(index, blockIdx.x, grid, units);
    if (unit < 0) break;
    for (int segment = 0; segment < dense_segments(p.hidden_size); ++segment) {
      fetch(kUnitRows, dense_bytes(segment, p.hidden_size),
            projection + dense_source(unit, lane % kUnitRows, segment, p.num_features, p.projection_pitch),
            slab_pitch(false));
    }
  }
  // The factor waits until this block has its part of the projection, and then keeps fewer slots under way: what is
  // asked for early here is missing in another block, for which all wait at the grid barrier. (H100, B = 1: 22.3 µs so,
  // 24.5 with all slots at once.)
  give_way(1);
  most = min(p.slots, kTriangleSlots);
  // Every lane of eight walks along slabs of its own.
  for (TriangleWalk walk(blockIdx.x, grid, units, lane < kWarps ? lane : 1 << 28);; walk.advance()) {
    const int copies = __popc(__ballot_sync(0xffffffffu, walk.unit >= 0));
    if (copies == 0) break;
    fetch(copies, kSlabBytes, walk.unit >= 0 ? factor + walk.source() : factor, kSlabBytes);
  }
}

// The products of one slab: acc += operand · slabᵀ; two sums, of even and odd steps, so that neither waits for itself.
// `slab` is the warp's, `x` the lane's first 16 bytes of the operand under it, `apart` elements before those of the row
// 8 further on; of its columns `width` count.
template <typename T, int Halves, bool Triangular, bool Whole>
__device__ __forceinline__ void multiply_steps(const unsigned char* slab, const T* x, int apart, int steps, int width,
                                               float (&acc)[2][4]) {
  constexpr int kSteps = kSlabColumns / kStepColumns;
  const int lane = threadIdx.x % 32;
  const bool odd = lane_odd(lane) != 0;
  uint4 w[kSteps], low[kSteps], high[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    w[step] = *reinterpret_cast<const uint4*>(slab + slab_lane_offset(Triangular, lane, step / 2, step % 2));
    low[step] = high[step] = uint4{0, 0, 0, 0};
    if (!Whole && step >= steps) continue;  // the operand may end there
    low[step] = *reinterpret_cast<const uint4*>(x + step * kStepColumns);
    if (Halves == 2) high[step] = *reinterpret_cast<const uint4*>(x + apart + step * kStepColumns);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (!Whole && step >= steps) break;
    const uint4 one = w[step & ~1], two = w[step | 1];
    uint4 mine = odd == (step % 2 == 0) ? two : one;
    // What lies beyond the matrix is whatever the slot held before. The packed factor has zeros there.
    if (!Whole && !Triangular && step * kStepColumns + (lane % 4) * kLaneColumns >= width) mine = uint4{0, 0, 0, 0};
    mma<T>(acc[step % 2], low[step].x, high[step].x, low[step].y, high[step].y, mine.x, mine.y);
    mma<T>(acc[step % 2], low[step].z, high[step].z, low[step].w, high[step].w, mine.z, mine.w);
  }
}

template <typename T, int Halves, bool Triangular>
__device__ __forceinline__ void multiply(const unsigned char* slab, const T* x, int apart, int width,
                                         float (&acc)[2][4]) {
  if (width >= kSlabColumns) {
    multiply_steps<T, Halves, Triangular, true>(slab, x, apart, kSlabColumns / kStepColumns, width, acc);
  } else if (width > 0) {
    multiply_steps<T, Halves, Triangular, false>(slab, x, apart, divide_up(width, kStepColumns), width, acc);
  }
}

// The batch's rows into shared memory, 16 bytes at a time: `read(row, column)` asks for a chunk and `put` makes it what
// is stored. Of `Rows` rows the chunks are asked for before the first is put down, so that their latencies pass
// together; without a condition between them, which would keep the compiler from it, but not of many rows more than
// there are: all blocks ask for the same lines of the L2, which serves them one after another.
template <int Rows, typename T, typename Read, typename Put>
__device__ __forceinline__ void load_together(const StreamParams& p, T* operand, int columns, const Read& read,
                                              const Put& put) {
  constexpr int kTogether = sizeof(decltype(read(0, 0))) > 16 && Rows > 4 ? 4 : Rows;
  for (int column = threadIdx.x * kLaneColumns; column < columns; column += kThreads * kLaneColumns) {
    for (int first = 0; first < p.rows; first += kTogether) {
      decltype(read(0, 0)) chunk[kTogether];
#pragma unroll
      for (int row = 0; row < kTogether; ++row) chunk[row] = read(min(first + row, p.rows - 1), column);
#pragma unroll
      for (int row = 0; row < kTogether; ++row) {
        if (first + row >= p.rows) break;
        *reinterpret_cast<uint4*>(operand + (first + row) * p.operand_pitch + column) = put(chunk[row]);
      }
    }
  }
}
template <int Halves, typename T, typename Read, typename Put>
__device__ __forceinline__ void load_operand(const StreamParams& p, T* operand, int columns, const Read& read,
                                             const Put& put) {
  if (Halves == 2) {
    load_together<16>(p, operand, columns, read, put);
  } else if (p.rows > 4) {
    load_together<8>(p, operand, columns, read, put);
  } else if (p.rows > 1) {
    load_together<4>(p, operand, columns, read, put);
  } else {
    load_together<1>(p, operand, columns, read, put);
  }
}

// Eight values of a row that has another dtype, or another alignment, than the serving one.
template <typename S>
struct Eight {
  S value[kLaneColumns];
};

template <int Halves, typename S, bool Vectors, typename T>
__device__ __forceinline__ void load_converted(const StreamParams& p, T* operand, int columns) {
  const auto read = [&](int row, int column) {
    const S* const from = static_cast<const S*>(p.hidden) + row * p.hidden_stride + column;
    Eight<S> out;
    if (Vectors) {
      uint4 words[sizeof out / 16];
#pragma unroll
      for (unsigned i = 0; i < sizeof out / 16; ++i) {
        words[i] = column < p.hidden_size ? __ldg(reinterpret_cast<const uint4*>(from) + i) : uint4{0, 0, 0, 0};
      }
      memcpy(&out, words, sizeof out);
    } else {
#pragma unroll
      for (int k = 0; k < kLaneColumns; ++k) out.value[k] = column + k < p.hidden_size ? __ldg(from + k) : S(0.0f);
    }
    return out;
  };
  load_operand<Halves>(p, operand, columns, read, [&](const Eight<S>& in) {
    Eight<T> out;
#pragma unroll
    for (int k = 0; k < kLaneColumns; ++k) out.value[k] = round_to<T>(to_float(in.value[k]) * p.input_scale);
    uint4 chunk;
    memcpy(&chunk, &out, sizeof chunk);
    return chunk;
  });
}

__device__ __forceinline__ uint4 as_it_is(const uint4& chunk) { return chunk; }

// x, in the serving dtype, up to whole steps.
template <int Halves, typename T>
__device__ __forceinline__ void load_rows(const StreamParams& p, T* operand) {
  const int columns = round_up(p.hidden_size, kStepColumns);
  const Scalar dtype = static_cast<Scalar>(p.hidden_dtype);
  if (p.in_place) {
    const auto read = [&](int row, int column) {
      const T* const from = static_cast<const T*>(p.hidden) + row * p.hidden_stride + column;
      return column < p.hidden_size ? __ldg(reinterpret_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
    };
    load_operand<Halves>(p, operand, columns, read, as_it_is);
  } else if (dtype == Scalar::kFloat32) {
    p.vectors ? load_converted<Halves, float, true>(p, operand, columns)
              : load_converted<Halves, float, false>(p, operand, columns);
  } else if (dtype == Scalar::kFloat16) {
    p.vectors ? load_converted<Halves, __half, true>(p, operand, columns)
              : load_converted<Halves, __half, false>(p, operand, columns);
  } else {
    p.vectors ? load_converted<Halves, __nv_bfloat16, true>(p, operand, columns)
              : load_converted<Halves, __nv_bfloat16, false>(p, operand, columns);
  }
}

// c, which all blocks wrote, over x: `columns` of it, a multiple of 128, zeros beyond D.
template <int Halves, typename T>
__device__ __forceinline__ void load_features(const StreamParams& p, T* operand, int columns) {
  const auto read = [&](int row, int column) {
    const T* const from = static_cast<const T*>(p.features) + row * p.feature_pitch + column;
    return column < p.feature_pitch ? __ldcg(reinterpret_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
  };
  load_operand<Halves>(p, operand, columns, read, as_it_is);
}

// A warp's sums of one unit into shared memory.
template <int Halves>
__device__ __forceinline__ void store_sums(float* sums, int unit, const float (&acc)[2][4]) {
  constexpr int padded = 8 * Halves;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int half = 0; half < Halves; ++half) {
    const float2 two{acc[0][2 * half] + acc[1][2 * half], acc[0][2 * half + 1] + acc[1][2 * half + 1]};
    *reinterpret_cast<float2*>(sums + sums_index(padded, unit, warp, lane_group(lane) + 8 * half, (lane % 4) * 2)) =
        two;
  }
}

template <int Halves>
__device__ __forceinline__ float sum_of_warps(const float* sums, int value) {
  constexpr int padded = 8 * Halves;
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    sum += sums[sums_index(padded, value_unit(padded, value), warp, value_row(padded, value), value_weight_row(value))];
  }
  return sum;
}

// Every thread's logit and square, all of one row of the batch, to the block's sums: a word for each row that says by
// itself that it is there. NaN where the block gave up.
template <int Halves>
__device__ __forceinline__ void hand_over(const StreamParams& p, float* sums, float logit, float square, bool valid) {
  constexpr int padded = 8 * Halves, groups = kThreads / (padded * kUnitRows);
  const int thread = threadIdx.x;
#pragma unroll
  for (int offset = kUnitRows / 2; offset > 0; offset /= 2) {
    logit += __shfl_xor_sync(0xffffffffu, logit, offset);
    square += __shfl_xor_sync(0xffffffffu, square, offset);
  }
  float2* const pairs = reinterpret_cast<float2*>(sums);
  if (value_weight_row(thread) == 0)
    pairs[value_unit(padded, thread) * padded + value_row(padded, thread)] = {logit, square};
  multipliers_meet();
  if (thread < p.rows) {
    float2 sum{0.0f, 0.0f};
#pragma unroll
    for (int group = 0; group < groups; ++group) {
      sum.x += pairs[group * padded + thread].x;
      sum.y += pairs[group * padded + thread].y;
    }
    if (!valid || sum.x != sum.x) sum.x = __int_as_float(0x7fffffff);
    if (!valid || sum.y != sum.y) sum.y = __int_as_float(0x7fffffff);
    uint64_t word;
    memcpy(&word, &sum, sizeof word);
    *const_cast<volatile uint64_t*>(p.partial + thread * gridDim.x + blockIdx.x) = word;
  }
}

// One block waits for the sums of all and adds them up, in the order of the blocks. All have come to the grid barrier.
template <int Halves>
__device__ __forceinline__ void conclude_stream(const StreamParams& p) {
  constexpr int kAtOnce = 8;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, grid = gridDim.x;
  if (warp >= p.rows) return;
  const int second = Halves == 2 && warp + kWarps < p.rows ? warp + kWarps : warp;
  const uint64_t* const rows[2] = {p.partial + warp * grid, p.partial + second * grid};
  float g[2] = {}, v[2] = {};
  for (int first = lane; first < grid; first += 32 * kAtOnce) {
    uint64_t words[Halves][kAtOnce];
    for (bool all = false; !all;) {
      all = true;
#pragma unroll
      for (int half = 0; half < Halves; ++half)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          words[half][i] = 0;
          if (first + 32 * i < grid)
            words[half][i] = *const_cast<const volatile uint64_t*>(rows[half] + first + 32 * i);
        }
#pragma unroll
      for (int half = 0; half < Halves; ++half)
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) all = all && words[half][i] != kNothing;
    }
#pragma unroll
    for (int half = 0; half < Halves; ++half)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        float2 sum;
        memcpy(&sum, &words[half][i], sizeof sum);
        g[half] += sum.x;
        v[half] += sum.y;
      }
  }
#pragma unroll
  for (int half = 0; half < Halves; ++half) {
    const int row = half == 0 ? warp : second;
    const float logit = group_sum<32>(g[half]) + p.beta0, variance = group_sum<32>(v[half]) * p.factor_scale;
    const float u = sqrtf(fmaf(p.amplitude, variance, 1.0f));
    if (lane == 0) {
      p.out[row] = logit;
      p.out[p.rows + row] = variance;
      p.out[2 * p.rows + row] = u;
      p.out[3 * p.rows + row] = logit / u;
    }
  }
}

template <typename T, int Halves>
__global__ void __launch_bounds__(kStreamThreads, 1) stream_kernel(const __grid_constant__ StreamParams p) {
#if __CUDA_ARCH__ >= 900
  constexpr int padded = 8 * Halves, owned = kGroupUnits * padded * kUnitRows / kThreads;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ uint64_t full[kMaxStreamSlots], empty[kMaxStreamSlots];
  __shared__ bool open;
  float* const sums = reinterpret_cast<float*>(memory);
  T* const operand = reinterpret_cast<T*>(memory + sums_bytes(padded));
  const Ring ring{memory + sums_bytes(padded) + operand_bytes(p.rows, p.operand_pitch), full, empty};
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, grid = gridDim.x;
  if (thread == kThreads) {
    for (int i = 0; i < p.slots; ++i) {
      ring_barrier_init(&full[i], 1);
      ring_barrier_init(&empty[i], kWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;\n" ::: "memory");
  }
  if (thread < p.rows) p.partial[thread * grid + blockIdx.x] = kNothing;  // read after the grid barrier at the earliest
  __syncthreads();
  if (warp == kWarps) {
    fetch_all<T>(p, ring);
    return;
  }

  load_rows<Halves>(p, operand);
  multipliers_meet();
  const int units = units_of(p.num_features);
  // Rows of the padding are read as the last one; nothing reads their results.
  const int low = min(lane_group(lane), p.rows - 1), high = min(lane_group(lane) + 8, p.rows - 1);
  const T* const x = operand + low * p.operand_pitch + (lane % 4) * kLaneColumns;
  const int apart = (high - low) * p.operand_pitch;
  const auto slab_of = [&](const RingPlace& place, bool triangular) {
    return ring.memory + place.slot * kSlotBytes + slab_offset(triangular, warp);
  };
  RingPlace place(0);
  const auto release = [&] {
    __syncwarp();
    if (lane == 0) ring_arrive(&empty[place.slot]);
    place.next(p.slots);
  };
  float logit = 0.0f, square = 0.0f;

  for (int first = 0;; first += kGroupUnits) {
    if (dense_unit(first, blockIdx.x, grid, units) < 0) break;
    // Asked for before the products, so that they are here when the products are done.
    float phase[owned], beta[owned];
#pragma unroll
    for (int i = 0; i < owned; ++i) {
      const int value = thread + kThreads * i;
      const int unit = dense_unit(first + value_unit(padded, value), blockIdx.x, grid, units);
      const int row = unit * kUnitRows + value_weight_row(value);
      const bool inside = unit >= 0 && row < p.num_features;
      phase[i] = inside ? __ldg(p.phase + row) : 0.0f;
      beta[i] = inside ? __ldg(p.beta + row) : 0.0f;
    }
    for (int k = 0; k < kGroupUnits && dense_unit(first + k, blockIdx.x, grid, units) >= 0; ++k) {
      float acc[2][4] = {};
      for (int segment = 0; segment < dense_segments(p.hidden_size); ++segment) {
        const int column = segment * kSegmentColumns + warp * kSlabColumns;
        ring_wait(&full[place.slot], place.parity);
        multiply<T, Halves, false>(slab_of(place, false), x + column, apart,
                                   slab_width(column, round_up(p.hidden_size, kLaneColumns)), acc);
        release();
      }
      store_sums<Halves>(sums, k, acc);
    }
    multipliers_meet();
#pragma unroll
    for (int i = 0; i < owned; ++i) {
      const int value = thread + kThreads * i, batch = value_row(padded, value);
      const int unit = dense_unit(first + value_unit(padded, value), blockIdx.x, grid, units);
      if (unit < 0) break;
      const int row = unit * kUnitRows + value_weight_row(value);
      float c = sum_of_warps<Halves>(sums, value) + phase[i];
      if (!p.linear) c = cospif(2.0f * (c - rintf(c)));
      if (row >= p.num_features) c = 0.0f;
      logit = fmaf(beta[i], c, logit);
      if (batch < p.rows) static_cast<T*>(p.features)[batch * p.feature_pitch + row] = round_to<T>(c);
    }
    multipliers_meet();
  }

  GridBarrier barrier(KernelName::kScore, p.board, p.report);
  if (thread == 0) open = barrier.meet_alone();
  multipliers_meet();
  const int longest = triangle_unit(0, blockIdx.x, grid, units);
  if (open && longest >= 0) load_features<Halves>(p, operand, TriangleWalk::slabs(longest) * kTile);
  multipliers_meet();

  TriangleWalk walk(blockIdx.x, grid, units, warp);
  for (int first = 0;; first += kGroupUnits) {
    if (triangle_unit(first, blockIdx.x, grid, units) < 0) break;
    for (int k = 0; k < kGroupUnits && triangle_unit(first + k, blockIdx.x, grid, units) >= 0; ++k) {
      float acc[2][4] = {};
      for (; walk.unit >= 0 && walk.index == first + k; walk.advance()) {
        const int column = walk.tile * kTile;
        ring_wait(&full[place.slot], place.parity);
        multiply<T, Halves, true>(slab_of(place, true), x + column, apart,
                                  slab_width(column, (walk.unit + 1) * kUnitRows), acc);
        release();
      }
      store_sums<Halves>(sums, k, acc);
    }
    multipliers_meet();
#pragma unroll
    for (int i = 0; i < owned; ++i) {
      const int value = thread + kThreads * i;
      if (triangle_unit(first + value_unit(padded, value), blockIdx.x, grid, units) < 0) break;
      const float y = sum_of_warps<Halves>(sums, value);
      square = fmaf(y, y, square);
    }
    multipliers_meet();
  }
  hand_over<Halves>(p, sums, logit, square, open);
  if (open && blockIdx.x == 0) {
    conclude_stream<Halves>(p);
  } else if (!open) {
    // This block's barrier did not open: no result may pass for one. All it asked for has come by now.
    for (int i = thread; i < 4 * p.rows; i += kThreads) p.out[i] = __int_as_float(0x7fffffff);
  }
#endif
}

template <typename T>
const void* stream_kernel_of(int padded) {
  return padded == 8 ? reinterpret_cast<const void*>(&stream_kernel<T, 1>)
                     : reinterpret_cast<const void*>(&stream_kernel<T, 2>);
}

}  // namespace rmcore::cuda
