// The fp16 instances of the score kernels.
#include "score.cuh"
#include "stream.cuh"

namespace rmcore::cuda {
const void* score_kernel_fp16(int tiles) { return score_kernel_of<__half>(tiles); }
const void* stream_kernel_fp16(int padded) { return stream_kernel_of<__half>(padded); }
}  // namespace rmcore::cuda
