// The table of kernels per instruction set.
#include "isa.h"
#include "kernels.h"

#define RMCORE_KERNELS_OF(isa)                                                                                        \
  {isa::pack_panels,     isa::pack_factor,      isa::score,       isa::features, isa::accumulate, isa::pair_variance, \
   isa::power_iteration, isa::score_attributes, isa::multiply_all}

namespace rmcore::cpu {

const Kernels& kernels() {
  static const Kernels of_scalar = RMCORE_KERNELS_OF(scalar);
#if defined(__x86_64__)
  static const Kernels of_avx2 = RMCORE_KERNELS_OF(avx2);
  static const Kernels of_avx512 = RMCORE_KERNELS_OF(avx512);
  static const Kernels of_avx512_vnni = RMCORE_KERNELS_OF(avx512_vnni);
  static const Kernels of_avx512_bf16 = RMCORE_KERNELS_OF(avx512_bf16);
  switch (active_isa()) {
    case Isa::avx512_bf16:
      return of_avx512_bf16;
    case Isa::avx512_vnni:
      return of_avx512_vnni;
    case Isa::avx512:
      return of_avx512;
    case Isa::avx2:
      return of_avx2;
    case Isa::scalar:
      break;
  }
#endif
  return of_scalar;
}

}  // namespace rmcore::cpu
