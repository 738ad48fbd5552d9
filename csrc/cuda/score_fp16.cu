// The fp16 instances of the score kernel.
#include "score.cuh"

namespace rmcore::cuda {
const void* score_kernel_fp16(int tiles) { return score_kernel_of<__half>(tiles); }
}  // namespace rmcore::cuda
