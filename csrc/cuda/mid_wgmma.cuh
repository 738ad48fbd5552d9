// wgmma for mid.cuh: sums of 64 rows of the weights by N rows of the batch, both from shared memory, in registers.
//
// The instruction names its N / 2 sums one by one, so its text is put together from lists of places: tens and ones.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace rmcore::cuda {

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;\n" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;\n" ::: "memory"); }
// Until at most `Pending` of the groups committed last are unfinished.
template <int Pending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;\n" ::"n"(Pending) : "memory");
}
// The compiler may not move what it does with the sums across this.
template <int Count>
__device__ __forceinline__ void wgmma_pin(float (&sums)[Count]) {
#pragma unroll
  for (int i = 0; i < Count; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

template <typename T, int N>
struct Wgmma;

// clang-format off
#define MID_P2(t) "%" #t "0,%" #t "1"
#define MID_P4(t) MID_P2(t) ",%" #t "2,%" #t "3"
#define MID_P6(t) MID_P4(t) ",%" #t "4,%" #t "5"
#define MID_P8(t) MID_P6(t) ",%" #t "6,%" #t "7"
#define MID_P10(t) MID_P8(t) ",%" #t "8,%" #t "9"
#define MID_PLACES_16 MID_P10() "," MID_P6(1)
#define MID_PLACES_32 MID_P10() "," MID_P10(1) "," MID_P10(2) "," MID_P2(3)
#define MID_PLACES_48 MID_P10() "," MID_P10(1) "," MID_P10(2) "," MID_P10(3) "," MID_P8(4)
#define MID_PLACES_64 MID_P10() "," MID_P10(1) "," MID_P10(2) "," MID_P10(3) "," MID_P10(4) "," MID_P10(5) "," MID_P4(6)
#define MID_PLACES_96 MID_P10() "," MID_P10(1) "," MID_P10(2) "," MID_P10(3) "," MID_P10(4) "," MID_P10(5) "," \
                      MID_P10(6) "," MID_P10(7) "," MID_P10(8) "," MID_P6(9)
#define MID_PLACES_128 MID_P10() "," MID_P10(1) "," MID_P10(2) "," MID_P10(3) "," MID_P10(4) "," MID_P10(5) "," \
                       MID_P10(6) "," MID_P10(7) "," MID_P10(8) "," MID_P10(9) "," MID_P10(10) "," MID_P10(11) "," \
                       MID_P8(12)
#define MID_F4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define MID_F16(i) MID_F4(i), MID_F4(i + 4), MID_F4(i + 8), MID_F4(i + 12)
#define MID_SUMS_16 MID_F16(0)
#define MID_SUMS_32 MID_SUMS_16, MID_F16(16)
#define MID_SUMS_48 MID_SUMS_32, MID_F16(32)
#define MID_SUMS_64 MID_SUMS_48, MID_F16(48)
#define MID_SUMS_96 MID_SUMS_64, MID_F16(64), MID_F16(80)
#define MID_SUMS_128 MID_SUMS_96, MID_F16(96), MID_F16(112)

// `count` is N / 2, `next` the number after it. Scale-d and both signs are 1; both operands are K-major.
#define MID_WGMMA(type, name, n, count, next)                                                                         \
  template <>                                                                                                         \
  struct Wgmma<type, n> {                                                                                             \
    __device__ __forceinline__ static void add(float (&d)[count], uint64_t weights, uint64_t operand) {               \
      asm volatile("wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." name "." name " {" MID_PLACES_##count            \
                   "}, %" #count ", %" #next ", 1, 1, 1, 0, 0;\n"                                                     \
                   : MID_SUMS_##count                                                                                 \
                   : "l"(weights), "l"(operand));                                                                     \
    }                                                                                                                 \
  }
#define MID_WGMMAS(type, name)           \
  MID_WGMMA(type, name, 32, 16, 17);     \
  MID_WGMMA(type, name, 64, 32, 33);     \
  MID_WGMMA(type, name, 96, 48, 49);     \
  MID_WGMMA(type, name, 128, 64, 65);    \
  MID_WGMMA(type, name, 192, 96, 97);    \
  MID_WGMMA(type, name, 256, 128, 129)

MID_WGMMAS(__half, "f16");
MID_WGMMAS(__nv_bfloat16, "bf16");
// clang-format on

}  // namespace rmcore::cuda
