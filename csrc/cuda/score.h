// What the score kernel is told, and the host functions that launch it. No CUDA headers: the binding includes this too.
#pragma once

#include <cstdint>

#include "schedule.h"

namespace rmcore::cuda {

enum class Scalar : int { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2 };

// A frozen head, as rmcore/weights.py lays it out. All pointers are device pointers; 16-bit matrices are row-major with
// a pitch that is a multiple of 8 elements and zeros between a row's end and the next multiple of 8.
struct Head {
  Scalar dtype;
  int hidden_size;         // h
  int num_features;        // D
  int layer_size;          // m, or 0 for a folded head
  const void* projection;  // (D, h) or (D, m)
  int64_t projection_pitch;
  const float* phase;  // (D,)
  const void* layer;   // (m, h) or null
  int64_t layer_pitch;
  const float* layer_bias;  // (m,) or null
  const float* beta;        // (D,)
  const void* factor;       // packed lower tiles
  int tanh;
  int layernorm;
  int linear;  // c = t instead of cos 2πt
  float input_scale;
  float beta0;
  float factor_scale;
  float amplitude;
};

struct StageParams {
  Work work;
  int kind;
  const void* weights;
  int64_t pitch;    // elements
  int weight_rows;  // rows and columns past these read as zero
  int weight_columns;
  const void* operand;  // (rows, columns) of the serving dtype
  int64_t operand_pitch;
  int operand_rows;
  int operand_columns;
  float* partial;     // split mode: partial sums
  const float* bias;  // layer bias, phase, or null
  void* result;       // (N, result_pitch) serving dtype: the next stage's operand, null after the last
  int64_t result_pitch;
  float* unnormalised;  // (N, result_pitch) float32, where a layer norm follows
  int valid;            // rows of this stage's weights: m or D
};

struct ScoreParams {
  StageParams stage[kMaxStages];
  int stages;
  int slots;
  int rows;  // B
  // Conversion of hidden rows, where they cannot be read as they are.
  const void* hidden;
  int hidden_dtype;
  int64_t hidden_stride;  // elements
  int hidden_size;
  void* converted;  // (N, converted_pitch), or null: rows are read in place
  int64_t converted_pitch;
  float input_scale;
  int tanh;
  int layernorm;
  int linear;
  const float* beta;
  float beta0;
  float factor_scale;
  float amplitude;
  float* logit_partial;     // (N, grid)
  float* variance_partial;  // (N, grid)
  unsigned* ticket;
  unsigned* board;   // (grid,): how many grid barriers each thread block has come to
  uint64_t* report;  // host memory: a barrier that a thread block did not come to (barrier.h)
  float* out;        // (4, B)
};

// The same for the streamed kernel (stream.h), which serves small batches of folded heads; slots is 0 where it does
// not.
struct StreamPlan {
  int slots;
  int padded;  // rows of the batch, padded to 8 or 16
  int grid;
  int shared_bytes;
  int operand_pitch;
  int64_t feature_pitch;
  // Offsets into the workspace, bytes.
  int64_t board, features, partial, bytes;
};

// Everything about a launch that depends on the head, the padded batch and the device only.
struct ScorePlan {
  int tiles;
  int grid;
  int slots;
  int shared_bytes;
  int stages;
  Work work[kMaxStages];
  int64_t converted_pitch;
  int64_t layer_pitch;
  int64_t feature_pitch;
  // Offsets into the workspace, bytes.
  int64_t converted, unnormalised, layer, features, partial, logit, variance, ticket, board, bytes;
  StreamPlan stream;
};

// Whether rows can be read 16 bytes at a time, without conversion.
bool readable_in_place(const Head& head, const void* hidden, Scalar dtype, int64_t stride);

// Lays out a launch for `rows` rows on `multiprocessors` SMs with `shared_bytes` of shared memory for a thread block.
ScorePlan plan_score(const Head& head, int rows, int multiprocessors, int64_t shared_bytes, int force_split = -1);

// Fills in the pointers of one launch.
ScoreParams score_params(const Head& head, const ScorePlan& plan, const void* hidden, Scalar hidden_dtype,
                         int64_t hidden_stride, int rows, float* out, void* workspace);

// The plan for a device, and the launch; `streamed` is whether the streamed kernel may take it. Throw CudaError and
// std::invalid_argument.
ScorePlan plan_score_on(const Head& head, int rows, int device, bool streamed);
void launch_score(const Head& head, const ScorePlan& plan, const void* hidden, Scalar hidden_dtype,
                  int64_t hidden_stride, int rows, float* out, void* workspace, int64_t workspace_bytes, int device,
                  uintptr_t stream);

// The kernel of a dtype and a padded batch, for cudaLaunchCooperativeKernel.
const void* score_kernel_fp16(int tiles);
const void* score_kernel_bf16(int tiles);
const void* stream_kernel_fp16(int padded);
const void* stream_kernel_bf16(int padded);

}  // namespace rmcore::cuda
