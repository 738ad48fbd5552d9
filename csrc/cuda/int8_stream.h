// The streamed score of an int8 head, B ≤ 16: stream.h for bytes. Index arithmetic without CUDA, which the kernel
// (int8_stream.cuh) and the host emulation (emulate_int8.cpp) share.
//
//   t_d = w_d f Σ_k W_dk x'_k + outliers + phase_d     c = cos(2πt)    c' = round(127 c)    g = β₀ + Σ_d β_d c_d
//   y_i = r_i/127 Σ_{j<i} U_ij c'_j + U_ii c'_i/127    v = factor_scale Σ_i y_i²            u = √(1 + a v)    p = g / u
//
// A lane's 16 bytes hold 16 whole numbers, and mma.m16n8k32.s8 lays its words out as m16n8k16 does those of 16-bit
// values: two whole numbers are handled as one 16-bit value of the projection, and units, segments, slabs and slots are
// those of stream.h. A row of a packed tile of U is 128 bytes, so its slabs are half as large: 1 KB, two steps of 64
// columns.
#pragma once

#include <cstdint>

#include "stream.h"

namespace rmcore::cuda {

constexpr int kByteStep = 64;                      // columns of a step: 16 bytes of each of four lanes
constexpr int kByteLane = 16;                      // columns of a lane
constexpr int kByteSlabBytes = kUnitRows * kTile;  // of the factor
constexpr int kMostOutliers = 32;                  // of a row

// h in 16-bit values: rows of the projection are zero up to the next multiple of 16 columns.
RMCORE_HD int pairs_of(int columns) { return round_up(columns, kByteLane) / 2; }

RMCORE_HD constexpr int byte_steps(bool triangular) { return triangular ? kTile / kByteStep : 4; }
RMCORE_HD int byte_slab_offset(bool triangular, int warp) {
  return triangular ? warp * kByteSlabBytes : slab_offset(false, warp);
}
// As slab_lane_offset: lanes of an odd row take the second step of a pair first.
RMCORE_HD int byte_lane_offset(bool triangular, int lane, int pair, int turn) {
  const int step = 2 * pair + (turn ^ lane_odd(lane));
  return lane_group(lane) * (triangular ? kTile : slab_pitch(false)) + step * kByteStep + (lane % 4) * kByteLane;
}

// The operand in shared memory, bytes: rows of x' up to whole steps, then their second terms; later c'.
RMCORE_HD int second_term(int hidden_size) { return round_up(hidden_size, kByteStep); }
RMCORE_HD int byte_pitch(int hidden_size, int num_features, bool two_terms) {
  const int rows = (two_terms ? 2 : 1) * second_term(hidden_size);
  return round_up(rows > num_features ? rows : num_features, 256) + 64;
}
RMCORE_HD int byte_operand_bytes(int rows, int pitch) { return round_up(rows * pitch, 128); }
// A row's factor, outliers' count, columns and values.
RMCORE_HD int notes_bytes() { return kStreamRows * (8 + 8 * kMostOutliers); }

// A frozen int8 head; device pointers.
struct Int8Head {
  int hidden_size;
  int num_features;
  const int8_t* projection;  // (D, pitch), zeros from h up to the next multiple of 16
  int64_t projection_pitch;  // bytes, a multiple of 16
  const float* projection_scale;
  const float* phase;
  const float* beta;
  const int8_t* factor;         // packed lower tiles without the diagonal
  const float* factor_scales;   // (D) of its rows
  const float* diagonal;        // (D)
  const float* hidden_shift;    // (h) or null
  const float* hidden_balance;  // (h), with hidden_shift
  float input_scale;
  float beta0;
  float factor_scale;
  float amplitude;
};

struct Int8Params : StreamParams {
  const float* scales;
  const float* factor_scales;
  const float* diagonal;
  const float* shift;
  const float* balance;
  int two_terms;
};

// Lays out a launch; `slots` is 0 where the batch is too large, or the shared memory too small.
StreamPlan plan_int8(const Int8Head& head, int rows, int multiprocessors, int64_t shared_bytes);
int int8_slots(const StreamPlan& plan, int rows);
Int8Params int8_params(const Int8Head& head, const StreamPlan& plan, const void* hidden, Scalar hidden_dtype,
                       int64_t hidden_stride, int rows, float* out, void* workspace);
RMCORE_HD bool two_terms(int hidden_size, int num_features) { return 2 * hidden_size <= num_features; }

// The plan for a device, and the launch. Throw CudaError and std::invalid_argument.
StreamPlan plan_int8_on(const Int8Head& head, int rows, int device);
void launch_int8(const Int8Head& head, const StreamPlan& plan, const void* hidden, Scalar hidden_dtype,
                 int64_t hidden_stride, int rows, float* out, void* workspace, int64_t workspace_bytes, int device,
                 uintptr_t stream);
const void* int8_kernel(int padded, bool two_terms);

}  // namespace rmcore::cuda
