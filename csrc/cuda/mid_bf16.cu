// The bf16 instances of the score of 65 to 512 rows.
#include "mid.cuh"

namespace rmcore::cuda {
const void* mid_kernel_bf16(int columns) { return mid_kernel_of<__nv_bfloat16>(columns); }
}  // namespace rmcore::cuda
