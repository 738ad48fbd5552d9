// The bf16 instances of the score kernel.
#include "score.cuh"

namespace rmcore::cuda {
const void* score_kernel_bf16(int tiles) { return score_kernel_of<__nv_bfloat16>(tiles); }
}  // namespace rmcore::cuda
