// The fp16 instances of the score of 65 to 512 rows.
#include "mid.cuh"

namespace rmcore::cuda {
const void* mid_kernel_fp16(int columns) { return mid_kernel_of<__half>(columns); }
}  // namespace rmcore::cuda
