// What the power-iteration kernel is told, and its launch. No CUDA headers: the binding includes this too.
#pragma once

#include <cstdint>

#include "score.h"

namespace rmcore::cuda {

// Columns of v and of Wᵀy that fit a thread block's registers, by element size: 64 values a thread, 32 in fp32, whose
// rows take as many registers again.
constexpr int max_power_columns(int element_bytes) { return (element_bytes == 4 ? 32 : 64) * kThreads; }

struct PowerParams {
  const void* weight;  // (rows, columns), row-major, zeros between `columns` and the next multiple of 16 bytes
  int64_t pitch;       // elements
  int rows;
  int columns;
  int iterations;
  int chunks;           // 16-byte chunks of a row that one thread owns
  int slots;            // ring depth, in groups of rows
  const float* vector;  // (columns,)
  float* partial;       // (grid, partial_pitch): each thread block's share of Wᵀy
  int64_t partial_pitch;
  float* product;    // (columns,): Wᵀy
  float* norms;      // (grid,): ‖Wᵀy‖² by thread block
  float* squares;    // (grid,): ‖y‖² by thread block
  unsigned* board;   // (grid,): how many grid barriers each thread block has come to
  uint64_t* report;  // host memory: a barrier that a thread block did not come to (barrier.h)
  float* sigma;      // ()
  float* result;     // (columns,)
};

struct PowerPlan {
  int wide;        // the instance: more than 16 values a thread
  int group_rows;  // rows fetched and reduced together
  int chunks;
  int slots;
  int grid;
  int shared_bytes;
  int64_t partial_pitch;
  int64_t partial, product, norms, squares, board, bytes;  // offsets into the workspace
};

// The layout for a matrix; throws std::invalid_argument where it has more columns than the registers hold.
PowerPlan plan_power(int rows, int columns, int element_bytes, int multiprocessors, int64_t shared_bytes);
PowerPlan plan_power_on(int rows, int columns, int element_bytes, int device);

void launch_power(const PowerPlan& plan, Scalar dtype, const void* weight, int64_t pitch, int rows, int columns,
                  const float* vector, int iterations, float* sigma, float* result, void* workspace,
                  int64_t workspace_bytes, int device, uintptr_t stream);

}  // namespace rmcore::cuda
