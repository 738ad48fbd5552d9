// score of an int8 head for B ≤ 16 on Hopper and later: stream.cuh with products of bytes.
//
// Formulas and layout: int8_stream.h. Bytes: D h + D (D + 128) / 2 of weights, half of what stream.cuh reads: 25.4 MB
// at h = D = 4096, 8.4 µs at 3.04 TB/s. Every thread block rounds the batch's rows itself, a warp a row, while the ring
// fills: as the CPU does (csrc/cpu/activations.h), outliers apart, multiplications not fused and divisions rounded
// correctly. Sums of whole numbers are exact, in any order. It has not run on a GPU.
#pragma once

#include "int8_stream.h"
#include "stream.cuh"

namespace rmcore::cuda {

// d += A (16×32) · B (32×8), bytes, summed in int32.
__device__ __forceinline__ void mma_bytes(int (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0,
                                          uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};\n"
               : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
               : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

__device__ __forceinline__ float largest_of_warp(float x) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, offset));
  return x;
}

// What is known of the batch's rows, in shared memory.
struct Notes {
  float* factor;
  int* count;
  int* columns;
  float* values;
  __device__ __forceinline__ explicit Notes(unsigned char* memory)
      : factor(reinterpret_cast<float*>(memory)),
        count(reinterpret_cast<int*>(memory) + kStreamRows),
        columns(count + kStreamRows),
        values(reinterpret_cast<float*>(columns + kStreamRows * kMostOutliers)) {}
};

// Eight columns of a row, centred and balanced; zeros beyond h.
template <typename S, bool Vectors>
__device__ __forceinline__ void read_eight(const Int8Params& p, int row, int column, float (&x)[kLaneColumns]) {
  const S* const from = static_cast<const S*>(p.hidden) + row * p.hidden_stride + column;
  Eight<S> raw;
  if (Vectors) {
    uint4 words[sizeof raw / 16];
#pragma unroll
    for (unsigned i = 0; i < sizeof raw / 16; ++i) {
      words[i] = column < p.hidden_size ? __ldg(reinterpret_cast<const uint4*>(from) + i) : uint4{0, 0, 0, 0};
    }
    memcpy(&raw, words, sizeof raw);
  } else {
#pragma unroll
    for (int k = 0; k < kLaneColumns; ++k) raw.value[k] = column + k < p.hidden_size ? __ldg(from + k) : S(0.0f);
  }
#pragma unroll
  for (int k = 0; k < kLaneColumns; ++k) {
    const bool inside = column + k < p.hidden_size;
    x[k] = to_float(raw.value[k]);
    if (p.shift != nullptr) {
      const float shift = inside ? __ldg(p.shift + column + k) : 0.0f;
      const float balance = inside ? __ldg(p.balance + column + k) : 0.0f;
      x[k] = __fmul_rn(__fsub_rn(x[k], shift), __fmul_rn(balance, p.input_scale));
    } else {
      x[k] = __fmul_rn(x[k], p.input_scale);
    }
  }
}

// What a warp finds in a row, of values up to `limit`.
struct RowExtent {
  float edge, total;
  int beyond;
};
template <typename S, bool Vectors>
__device__ __noinline__ RowExtent extent_of(const Int8Params& p, int row, float limit, float& spoilt) {
  RowExtent out{0.0f, 0.0f, 0};
#pragma unroll(Vectors ? 4 : 1)
  for (int column = threadIdx.x % 32 * kLaneColumns; column < p.hidden_size; column += 32 * kLaneColumns) {
    float x[kLaneColumns];
    read_eight<S, Vectors>(p, row, column, x);
#pragma unroll
    for (int k = 0; k < kLaneColumns; ++k) {
      const float size = fabsf(x[k]);
      const bool beyond = size > limit;
      spoilt += x[k] - x[k];
      out.beyond += beyond;
      out.edge = beyond ? out.edge : fmaxf(out.edge, size);
      out.total += beyond ? 0.0f : size;
    }
  }
  return {largest_of_warp(out.edge), group_sum<32>(out.total),
          static_cast<int>(__reduce_add_sync(0xffffffffu, static_cast<unsigned>(out.beyond)))};
}

// A warp makes a row whole numbers: `target` has its columns, and from second_term(h) on the second terms. One function
// for all kernels, since it is called once: inlined, it is most of what the compiler has to do.
template <typename S, bool Vectors>
__device__ __noinline__ void whole_row(const Int8Params& p, int row, int8_t* target, const Notes& notes) {
  const int lane = threadIdx.x % 32, end = second_term(p.hidden_size);
  float spoilt = 0.0f, limit = __int_as_float(0x7f800000), ignored = 0.0f;
  RowExtent extent = extent_of<S, Vectors>(p, row, limit, spoilt);
  const float span = static_cast<float>(round_up(p.hidden_size, 64));
  int count = 0;
  while (__fmul_rn(extent.edge, span) > __fmul_rn(12.0f, extent.total)) {  // not where there is a NaN or Inf
    const float nearby = 0.25f * extent.edge;
    const RowExtent rest = extent_of<S, Vectors>(p, row, nearby, ignored);
    if (rest.beyond > kMostOutliers) break;
    extent = rest;
    limit = nearby;
    count = rest.beyond;
  }
  const float factor = extent.edge > 1e-30f ? __fdiv_rn(127.0f, extent.edge) : 0.0f;
  int taken = 0;
  for (int base = 0; base < end; base += 32 * kLaneColumns) {
    const int column = base + lane * kLaneColumns;
    float x[kLaneColumns];
    read_eight<S, Vectors>(p, row, column, x);
    int8_t whole[kLaneColumns], low[kLaneColumns];
#pragma unroll
    for (int k = 0; k < kLaneColumns; ++k) {
      const bool apart = fabsf(x[k]) > limit;
      const float scaled = apart ? 0.0f : __fmul_rn(x[k], factor), near = rintf(scaled);
      whole[k] = static_cast<int8_t>(__float2int_rn(near));  // 0 for a NaN
      low[k] = static_cast<int8_t>(__float2int_rn(__fmul_rn(__fsub_rn(scaled, near), 254.0f)));
      if (count > 0) {  // for all of the warp
        const unsigned others = __ballot_sync(0xffffffffu, apart);
        const int at = row * kMostOutliers + taken + __popc(others & ((1u << lane) - 1));
        if (apart) notes.columns[at] = column + k, notes.values[at] = x[k];
        taken += __popc(others);
      }
    }
    if (column < end) {
      memcpy(__builtin_assume_aligned(target + column, 8), whole, sizeof whole);
      if (p.two_terms) memcpy(__builtin_assume_aligned(target + end + column, 8), low, sizeof low);
    }
  }
  spoilt = group_sum<32>(spoilt);
  if (lane == 0) notes.factor[row] = __fdiv_rn(extent.edge, 127.0f) + spoilt, notes.count[row] = count;
}

__device__ __forceinline__ void whole_rows(const Int8Params& p, int8_t* operand, const Notes& notes) {
  const Scalar dtype = static_cast<Scalar>(p.hidden_dtype);
  for (int row = threadIdx.x / 32; row < p.rows; row += kWarps) {
    int8_t* const target = operand + row * p.operand_pitch;
    if (dtype == Scalar::kFloat32) {
      p.vectors ? whole_row<float, true>(p, row, target, notes) : whole_row<float, false>(p, row, target, notes);
    } else if (dtype == Scalar::kFloat16) {
      p.vectors ? whole_row<__half, true>(p, row, target, notes) : whole_row<__half, false>(p, row, target, notes);
    } else {
      p.vectors ? whole_row<__nv_bfloat16, true>(p, row, target, notes)
                : whole_row<__nv_bfloat16, false>(p, row, target, notes);
    }
  }
}

// The fetching warp, from the first segment to the last: fetch_all of stream.cuh for both sizes of slab.
__device__ __forceinline__ void fetch_bytes(const Int8Params& p, const Ring& ring) {
  const int lane = threadIdx.x % 32, grid = gridDim.x, units = units_of(p.num_features);
  const int pairs = pairs_of(p.hidden_size);
  const uint16_t* const projection = static_cast<const uint16_t*>(p.projection);
  const int8_t* const factor = static_cast<const int8_t*>(p.factor);
  RingPlace place(0), behind(0);
  int under_way = 0, most = p.slots;
  const auto give_way = [&](int left) {
    for (; under_way > left; --under_way) {
      ring_wait(&ring.empty[behind.slot], behind.parity);
      behind.next(p.slots);
    }
  };
  const auto fetch = [&](int copies, int bytes, const void* source, int pitch) {
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
    for (int segment = 0; segment < dense_segments(pairs); ++segment) {
      fetch(kUnitRows, dense_bytes(segment, pairs),
            projection + dense_source(unit, lane % kUnitRows, segment, p.num_features, p.projection_pitch),
            slab_pitch(false));
    }
  }
  give_way(1);  // as in stream.cuh: what is asked for early here is missing in another block, for which all wait
  most = min(p.slots, kTriangleSlots);
  for (TriangleWalk walk(blockIdx.x, grid, units, lane < kWarps ? lane : 1 << 28);; walk.advance()) {
    const int copies = __popc(__ballot_sync(0xffffffffu, walk.unit >= 0));
    if (copies == 0) break;
    fetch(copies, kByteSlabBytes, walk.unit >= 0 ? factor + walk.source() : factor, kByteSlabBytes);
  }
}

// The products of one slab: acc += operand · slabᵀ, and the second terms' likewise; `term` bytes behind the first.
template <int Halves, bool Triangular, bool Two>
__device__ __forceinline__ void multiply_bytes(const unsigned char* slab, const int8_t* x, int apart, int term,
                                               int width, int (&acc)[2][4], int (&low)[2][4]) {
  constexpr int kSteps = byte_steps(Triangular);
  const int lane = threadIdx.x % 32, steps = min(kSteps, divide_up(width, kByteStep));
  const bool odd = lane_odd(lane) != 0;
  uint4 w[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    w[step] = *reinterpret_cast<const uint4*>(slab + byte_lane_offset(Triangular, lane, step / 2, step % 2));
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    if (step >= steps) break;
    const uint4 one = w[step & ~1], two = w[step | 1];
    uint4 mine = odd == (step % 2 == 0) ? two : one;
    // What lies beyond the matrix is whatever the slot held before. The packed factor has zeros there.
    if (!Triangular && step * kByteStep + (lane % 4) * kByteLane >= width) mine = uint4{0, 0, 0, 0};
#pragma unroll
    for (int k = 0; k < (Two ? 2 : 1); ++k) {
      const int8_t* const from = x + k * term + step * kByteStep;
      const uint4 a = *reinterpret_cast<const uint4*>(from);
      uint4 b{0, 0, 0, 0};
      if (Halves == 2) b = *reinterpret_cast<const uint4*>(from + apart);
      int (&sum)[4] = k == 0 ? acc[step % 2] : low[step % 2];
      mma_bytes(sum, a.x, b.x, a.y, b.y, mine.x, mine.y);
      mma_bytes(sum, a.z, b.z, a.w, b.w, mine.z, mine.w);
    }
  }
}

template <int Halves>
__device__ __forceinline__ void store_whole_sums(int* sums, int unit, const int (&acc)[2][4]) {
  constexpr int padded = 8 * Halves;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int half = 0; half < Halves; ++half) {
    const int2 two{acc[0][2 * half] + acc[1][2 * half], acc[0][2 * half + 1] + acc[1][2 * half + 1]};
    *reinterpret_cast<int2*>(sums + sums_index(padded, unit, warp, lane_group(lane) + 8 * half, (lane % 4) * 2)) = two;
  }
}
template <int Halves>
__device__ __forceinline__ float whole_sum_of_warps(const int* sums, int value) {
  constexpr int padded = 8 * Halves;
  int sum = 0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) {
    sum += sums[sums_index(padded, value_unit(padded, value), warp, value_row(padded, value), value_weight_row(value))];
  }
  return static_cast<float>(sum);
}

// Σ over a row's outliers of their columns of one row of the projection.
__device__ __forceinline__ float outliers_of(const Int8Params& p, const Notes& notes, int batch, int row, float scale) {
  float sum = 0.0f;
  const int8_t* const weights =
      reinterpret_cast<const int8_t*>(static_cast<const uint16_t*>(p.projection) + row * p.projection_pitch);
  for (int k = 0; k < notes.count[batch]; ++k) {
    const int at = batch * kMostOutliers + k;
    sum = fmaf(notes.values[at], static_cast<float>(__ldg(weights + notes.columns[at])) * scale, sum);
  }
  return sum;
}

template <int Halves, bool Two>
__global__ void __launch_bounds__(kStreamThreads, 1) int8_stream_kernel(const __grid_constant__ Int8Params p) {
#if __CUDA_ARCH__ >= 900
  constexpr int padded = 8 * Halves, owned = kGroupUnits * padded * kUnitRows / kThreads;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ uint64_t full[kMaxStreamSlots], empty[kMaxStreamSlots];
  __shared__ bool open;
  int* const sums = reinterpret_cast<int*>(memory);
  int* const low_sums = sums + sums_bytes(padded) / 4;
  const Notes notes(memory + 2 * sums_bytes(padded));
  int8_t* const operand = reinterpret_cast<int8_t*>(memory + 2 * sums_bytes(padded) + notes_bytes());
  const Ring ring{reinterpret_cast<unsigned char*>(operand) + byte_operand_bytes(p.rows, p.operand_pitch), full, empty};
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
    fetch_bytes(p, ring);
    return;
  }

  whole_rows(p, operand, notes);
  multipliers_meet();
  const int units = units_of(p.num_features), pairs = pairs_of(p.hidden_size), term = second_term(p.hidden_size);
  // Rows of the padding are read as the last one; nothing reads their results.
  const int first_row = min(lane_group(lane), p.rows - 1), other_row = min(lane_group(lane) + 8, p.rows - 1);
  const int8_t* const x = operand + first_row * p.operand_pitch + (lane % 4) * kByteLane;
  const int apart = (other_row - first_row) * p.operand_pitch;
  RingPlace place(0);
  const auto slab_of = [&](bool triangular) {
    return ring.memory + place.slot * kSlotBytes + byte_slab_offset(triangular, warp);
  };
  const auto release = [&] {
    __syncwarp();
    if (lane == 0) ring_arrive(&empty[place.slot]);
    place.next(p.slots);
  };
  float logit = 0.0f, square = 0.0f;

  for (int first = 0;; first += kGroupUnits) {
    if (dense_unit(first, blockIdx.x, grid, units) < 0) break;
    // Asked for before the products, so that they are here when the products are done.
    float phase[owned], beta[owned], scale[owned];
#pragma unroll
    for (int i = 0; i < owned; ++i) {
      const int value = thread + kThreads * i;
      const int unit = dense_unit(first + value_unit(padded, value), blockIdx.x, grid, units);
      const int row = unit * kUnitRows + value_weight_row(value);
      const bool inside = unit >= 0 && row < p.num_features;
      phase[i] = inside ? __ldg(p.phase + row) : 0.0f;
      beta[i] = inside ? __ldg(p.beta + row) : 0.0f;
      scale[i] = inside ? __ldg(p.scales + row) : 0.0f;
    }
    for (int k = 0; k < kGroupUnits && dense_unit(first + k, blockIdx.x, grid, units) >= 0; ++k) {
      int acc[2][4] = {}, low[2][4] = {};
      for (int segment = 0; segment < dense_segments(pairs); ++segment) {
        const int column = 2 * (segment * kSegmentColumns + warp * kSlabColumns);
        ring_wait(&full[place.slot], place.parity);
        multiply_bytes<Halves, false, Two>(slab_of(false), x + column, apart, term,
                                           slab_width(column, round_up(p.hidden_size, kByteLane)), acc, low);
        release();
      }
      store_whole_sums<Halves>(sums, k, acc);
      if (Two) store_whole_sums<Halves>(low_sums, k, low);
    }
    multipliers_meet();
#pragma unroll
    for (int i = 0; i < owned; ++i) {
      const int value = thread + kThreads * i, batch = value_row(padded, value);
      const int unit = dense_unit(first + value_unit(padded, value), blockIdx.x, grid, units);
      if (unit < 0) break;
      const int row = unit * kUnitRows + value_weight_row(value);
      float c = 0.0f;
      if (batch < p.rows && row < p.num_features) {
        const float factor = notes.factor[batch];
        float t = __fmul_rn(__fmul_rn(whole_sum_of_warps<Halves>(sums, value), scale[i]), factor);
        if (Two) {
          const float low_factor = __fmul_rn(factor, 1.0f / 254.0f);
          t = __fadd_rn(t, __fmul_rn(__fmul_rn(whole_sum_of_warps<Halves>(low_sums, value), scale[i]), low_factor));
        }
        if (notes.count[batch] > 0) t += outliers_of(p, notes, batch, row, scale[i]);
        t += phase[i];
        c = cospif(2.0f * (t - rintf(t)));
      }
      logit = fmaf(beta[i], c, logit);
      if (batch < p.rows) {
        static_cast<int8_t*>(p.features)[batch * p.feature_pitch + row] =
            static_cast<int8_t>(__float2int_rn(127.0f * c));
      }
    }
    multipliers_meet();
  }

  GridBarrier barrier(KernelName::kScore, p.board, p.report);
  if (thread == 0) open = barrier.meet_alone();
  multipliers_meet();
  const int longest = triangle_unit(0, blockIdx.x, grid, units);
  if (open && longest >= 0) {
    for (int at = thread * kByteLane; at < TriangleWalk::slabs(longest) * kTile; at += kThreads * kByteLane) {
      for (int row = 0; row < p.rows; ++row) {
        const int8_t* const from = static_cast<const int8_t*>(p.features) + row * p.feature_pitch + at;
        *reinterpret_cast<uint4*>(operand + row * p.operand_pitch + at) =
            at < p.feature_pitch ? __ldcg(reinterpret_cast<const uint4*>(from)) : uint4{0, 0, 0, 0};
      }
    }
  }
  multipliers_meet();

  TriangleWalk walk(blockIdx.x, grid, units, warp);
  for (int first = 0;; first += kGroupUnits) {
    if (triangle_unit(first, blockIdx.x, grid, units) < 0) break;
    for (int k = 0; k < kGroupUnits && triangle_unit(first + k, blockIdx.x, grid, units) >= 0; ++k) {
      int acc[2][4] = {}, none[2][4] = {};
      for (; walk.unit >= 0 && walk.index == first + k; walk.advance()) {
        const int column = walk.tile * kTile;
        ring_wait(&full[place.slot], place.parity);
        multiply_bytes<Halves, true, false>(slab_of(true), x + column, apart, 0,
                                            slab_width(column, (walk.unit + 1) * kUnitRows), acc, none);
        release();
      }
      store_whole_sums<Halves>(sums, k, acc);
    }
    multipliers_meet();
#pragma unroll
    for (int i = 0; i < owned; ++i) {
      const int value = thread + kThreads * i, batch = value_row(padded, value);
      const int unit = triangle_unit(first + value_unit(padded, value), blockIdx.x, grid, units);
      if (unit < 0) break;
      const int row = unit * kUnitRows + value_weight_row(value);
      if (batch >= p.rows || row >= p.num_features) continue;
      const float own = static_cast<float>(operand[batch * p.operand_pitch + row]);
      float y =
          __fmul_rn(__fmul_rn(whole_sum_of_warps<Halves>(sums, value), __ldg(p.factor_scales + row)), 1.0f / 127.0f);
      y = fmaf(__fmul_rn(__ldg(p.diagonal + row), 1.0f / 127.0f), own, y);
      square = fmaf(y, y, square);
    }
    multipliers_meet();
  }
  square += logit - logit;  // whole numbers know no NaN
  hand_over<Halves>(p, reinterpret_cast<float*>(sums), logit, square, open);
  if (open && blockIdx.x == 0) {
    conclude_stream<Halves>(p);
  } else if (!open) {
    // This block's barrier did not open: no result may pass for one. All it asked for has come by now.
    for (int i = thread; i < 4 * p.rows; i += kThreads) p.out[i] = __int_as_float(0x7fffffff);
  }
#endif
}

}  // namespace rmcore::cuda
