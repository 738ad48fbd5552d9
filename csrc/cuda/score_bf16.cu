// The bf16 instances of the score kernels.
#include "score.cuh"
#include "stream.cuh"

namespace rmcore::cuda {
const void* score_kernel_bf16(int tiles) { return score_kernel_of<__nv_bfloat16>(tiles); }
const void* stream_kernel_bf16(int padded) { return stream_kernel_of<__nv_bfloat16>(padded); }
}  // namespace rmcore::cuda
