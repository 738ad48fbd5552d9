// The instances of the int8 score kernel.
#include "int8_stream.cuh"

namespace rmcore::cuda {
const void* int8_kernel(int padded, bool two_terms) {
  if (two_terms) {
    return padded == 8 ? reinterpret_cast<const void*>(&int8_stream_kernel<1, true>)
                       : reinterpret_cast<const void*>(&int8_stream_kernel<2, true>);
  }
  return padded == 8 ? reinterpret_cast<const void*>(&int8_stream_kernel<1, false>)
                     : reinterpret_cast<const void*>(&int8_stream_kernel<2, false>);
}
}  // namespace rmcore::cuda
