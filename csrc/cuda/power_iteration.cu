// power_iteration: σ(W) and the right singular direction, `iterations` steps in one cooperative launch.
//
//   y = W v, σ = ‖y‖, w = Wᵀ y, v ← w / ‖w‖        (v normalised first; a zero w leaves v)
//
//   weight (m, h) fp16 / bf16 / fp32, vector (h,) fp32 → sigma () fp32, result (h,) fp32
//
// Bytes: W once for each iteration (m h · element size; 33.5 MB at 4096² in 16 bits, 7.8 µs at 4.3 TB/s). FLOP: 4 m h.
// Both products in one read: y_i = w_i · v needs one row, and so does its contribution y_i w_i to Wᵀy, so a row is used
// twice while it lies in shared memory.
//
// A thread block owns consecutive rows; a thread owns the same columns of all of them, in v and in Wᵀy (registers), and
// fetches exactly those with cp.async into a ring that no other thread reads. Thread blocks' shares of Wᵀy go through
// the workspace and are added in the order of the blocks. The first rows of the next iteration are fetched before the
// barriers.
#include <stdexcept>
#include <string>

#include "barrier.cuh"
#include "device.cuh"
#include "device.h"
#include "power_iteration.h"

namespace rmcore::cuda {
namespace {

constexpr int64_t kStaticSharedBytes = 2048;

// Rows first … first + Rows − 1 of this thread's columns into a slot; rows past `end` read as zero.
template <typename T, int Rows, int Chunks>
__device__ __forceinline__ void fetch_rows(const PowerParams& p, uint4* slot, int first, int end) {
  constexpr int kValues = 16 / sizeof(T);
  const T* base = static_cast<const T*>(p.weight);
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
#pragma unroll
    for (int c = 0; c < Chunks; ++c) {
      if (c < p.chunks) {
        const int column = chunk_column(c, threadIdx.x, kValues);
        const bool valid = first + r < end && column < p.columns;
        fetch_weights(&slot[(r * p.chunks + c) * kThreads + threadIdx.x],
                      valid ? base + dense_offset(first + r, column, p.pitch) : base, valid);
      }
    }
  }
}

// Adds the thread blocks' shares of Wᵀy, 32 columns a thread block at a time: warp w takes blocks w, w + 8, …, and the
// warps' sums are added in order. Writes the product and this block's part of its squared norm.
__device__ __forceinline__ void add_partials(const PowerParams& p, float (&sums)[kWarps][32]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  float squares = 0.0f;
  for (int first = blockIdx.x * 32; first < p.columns; first += gridDim.x * 32) {
    float sum = 0.0f;
#pragma unroll 8
    for (int block = warp; block < static_cast<int>(gridDim.x); block += kWarps) {
      sum += __ldcg(p.partial + block * p.partial_pitch + first + lane);
    }
    sums[warp][lane] = sum;
    __syncthreads();
    if (warp == 0) {
      float total = 0.0f;
#pragma unroll
      for (int from = 0; from < kWarps; ++from) total += sums[from][lane];
      if (first + lane < p.columns) {
        p.product[first + lane] = total;
        squares = fmaf(total, total, squares);
      }
    }
    __syncthreads();
  }
  if (warp == 0) {
    squares = group_sum<32>(squares);
    if (lane == 0) p.norms[blockIdx.x] = squares;
  }
}

// Σ values[0 … count), the same in every thread of every thread block.
__device__ __forceinline__ float sum_over_blocks(const float* values, int count, float* scratch) {
  float sum = 0.0f;
  for (int i = threadIdx.x; i < count; i += kThreads) sum += __ldcg(values + i);
  return block_sum(sum, scratch);
}

// The end of a thread block whose barrier did not open: no result may pass for one.
__device__ __forceinline__ void give_up(const PowerParams& p) {
  fetch_wait(0);
  const float none = __int_as_float(0x7fffffff);
  for (int i = threadIdx.x; i < p.columns; i += kThreads) p.result[i] = none;
  if (threadIdx.x == 0) *p.sigma = none;
}

template <typename T, int Values, int Rows>
__global__ void __launch_bounds__(kThreads, 1) power_kernel(const __grid_constant__ PowerParams p) {
  constexpr int kChunk = 16 / sizeof(T), kChunks = Values / kChunk;
  extern __shared__ __align__(128) unsigned char memory[];
  __shared__ float scratch[kWarps], dots[2][Rows][kWarps], sums[kWarps][32];
  uint4* ring = reinterpret_cast<uint4*>(memory);
  GridBarrier barrier(KernelName::kPowerIteration, p.board, p.report);
  const int thread = threadIdx.x, warp = thread / 32, lane = thread % 32;
  const int begin = share_of_rows(p.rows, blockIdx.x, gridDim.x),
            end = share_of_rows(p.rows, blockIdx.x + 1, gridDim.x);
  const int groups = divide_up(end - begin, Rows), slot_chunks = Rows * p.chunks * kThreads;
  int tail = 0, tail_iteration = 0, head_slot = 0;  // next group to fetch; next slot to consume
  const auto fetch_next = [&](int slot) {
    if (tail_iteration < p.iterations) {
      fetch_rows<T, Rows, kChunks>(p, ring + slot * slot_chunks, begin + tail * Rows, end);
      if (++tail == groups) {
        tail = 0;
        ++tail_iteration;
      }
    }
    fetch_commit();
  };
  for (int slot = 0; slot < p.slots; ++slot) fetch_next(slot);

  float v[kChunks][kChunk];
  float squares = 0.0f;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int column = chunk_column(c, thread, kChunk) + i;
      v[c][i] = column < p.columns ? __ldg(p.vector + column) : 0.0f;
      squares = fmaf(v[c][i], v[c][i], squares);
    }
  }
  const float scale = 1.0f / sqrtf(block_sum(squares, scratch));
#pragma unroll
  for (int c = 0; c < kChunks; ++c)
#pragma unroll
    for (int i = 0; i < kChunk; ++i) v[c][i] *= scale;

  for (int iteration = 0; iteration < p.iterations; ++iteration) {
    float w[kChunks][kChunk], square = 0.0f;
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int i = 0; i < kChunk; ++i) w[c][i] = 0.0f;
    for (int group = 0; group < groups; ++group) {
      fetch_wait(p.slots - 1);
      const uint4* slot = ring + head_slot * slot_chunks + thread;
      float values[kChunk];
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        float dot = 0.0f;
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          if (c < p.chunks) {
            unpack<T>(slot[(r * p.chunks + c) * kThreads], values);
#pragma unroll
            for (int i = 0; i < kChunk; ++i) dot = fmaf(values[i], v[c][i], dot);
          }
        }
        dot = group_sum<32>(dot);
        if (lane == 0) dots[group % 2][r][warp] = dot;
      }
      __syncthreads();  // two buffers: the one written next was last read before this barrier
#pragma unroll
      for (int r = 0; r < Rows; ++r) {
        float y = 0.0f;
#pragma unroll
        for (int from = 0; from < kWarps; ++from) y += dots[group % 2][r][from];
        square = fmaf(y, y, square);
#pragma unroll
        for (int c = 0; c < kChunks; ++c) {
          if (c < p.chunks) {
            unpack<T>(slot[(r * p.chunks + c) * kThreads], values);
#pragma unroll
            for (int i = 0; i < kChunk; ++i) w[c][i] = fmaf(y, values[i], w[c][i]);
          }
        }
      }
      fetch_next(head_slot);
      head_slot = head_slot + 1 == p.slots ? 0 : head_slot + 1;
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      if (c < p.chunks) {
        float4* out =
            reinterpret_cast<float4*>(p.partial + blockIdx.x * p.partial_pitch + chunk_column(c, thread, kChunk));
#pragma unroll
        for (int i = 0; i < kChunk / 4; ++i) {
          out[i] = make_float4(w[c][4 * i], w[c][4 * i + 1], w[c][4 * i + 2], w[c][4 * i + 3]);
        }
      }
    }
    if (thread == 0) p.squares[blockIdx.x] = square;
    if (!barrier.sync()) return give_up(p);
    add_partials(p, sums);
    if (!barrier.sync()) return give_up(p);
    const float norm = sqrtf(sum_over_blocks(p.norms, gridDim.x, scratch));
    if (norm > 0.0f) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int i = 0; i < kChunk; ++i) {
          const int column = chunk_column(c, thread, kChunk) + i;
          v[c][i] = column < p.columns ? __ldcg(p.product + column) / norm : 0.0f;
        }
      }
    }
  }
  if (blockIdx.x != 0) return;
  const float sigma = sqrtf(sum_over_blocks(p.squares, gridDim.x, scratch));
  if (thread == 0) *p.sigma = sigma;
#pragma unroll
  for (int c = 0; c < kChunks; ++c) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) {
      const int column = chunk_column(c, thread, kChunk) + i;
      if (column < p.columns) p.result[column] = v[c][i];
    }
  }
}

template <typename T>
const void* power_kernel_of(bool wide) {
  return wide ? reinterpret_cast<const void*>(&power_kernel<T, max_power_columns(sizeof(T)) / kThreads, 1>)
              : reinterpret_cast<const void*>(&power_kernel<T, 16, 4>);
}

}  // namespace

PowerPlan plan_power_on(int rows, int columns, int element_bytes, int device) {
  const Properties& machine = properties(device);
  return plan_power(rows, columns, element_bytes, machine.multiprocessors, machine.shared_bytes - kStaticSharedBytes);
}

void launch_power(const PowerPlan& plan, Scalar dtype, const void* weight, int64_t pitch, int rows, int columns,
                  const float* vector, int iterations, float* sigma, float* result, void* workspace,
                  int64_t workspace_bytes, int device, uintptr_t stream) {
  const int element_bytes = dtype == Scalar::kFloat32 ? 4 : 2;
  if (workspace_bytes < plan.bytes || reinterpret_cast<uintptr_t>(workspace) % 256 != 0) {
    throw std::invalid_argument("workspace: got " + std::to_string(workspace_bytes) + " bytes, expected " +
                                std::to_string(plan.bytes) + ", aligned to 256");
  }
  if (reinterpret_cast<uintptr_t>(weight) % 16 != 0 || pitch * element_bytes % 16 != 0 || pitch < columns) {
    throw std::invalid_argument("weight: got a row pitch of " + std::to_string(pitch) +
                                " elements, expected rows that begin at multiples of 16 bytes");
  }
  if (iterations < 1)
    throw std::invalid_argument("iterations: got " + std::to_string(iterations) + ", expected at least 1");
  auto* const base = static_cast<unsigned char*>(workspace);
  PowerParams params{};
  params.weight = weight;
  params.pitch = pitch;
  params.rows = rows;
  params.columns = columns;
  params.iterations = iterations;
  params.chunks = plan.chunks;
  params.slots = plan.slots;
  params.vector = vector;
  params.partial = reinterpret_cast<float*>(base + plan.partial);
  params.partial_pitch = plan.partial_pitch;
  params.product = reinterpret_cast<float*>(base + plan.product);
  params.norms = reinterpret_cast<float*>(base + plan.norms);
  params.squares = reinterpret_cast<float*>(base + plan.squares);
  params.board = reinterpret_cast<unsigned*>(base + plan.board);
  params.report = hang_word();
  params.sigma = sigma;
  params.result = result;
  const void* kernel = dtype == Scalar::kFloat16    ? power_kernel_of<__half>(plan.wide)
                       : dtype == Scalar::kBFloat16 ? power_kernel_of<__nv_bfloat16>(plan.wide)
                                                    : power_kernel_of<float>(plan.wide);
  launch_cooperative(kernel, plan.grid, kThreads, plan.shared_bytes, &params, device, stream);
}

}  // namespace rmcore::cuda
