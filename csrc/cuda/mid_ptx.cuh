// What mid.cuh needs of Hopper: mbarriers of its own and of the cluster's other thread blocks, distributed shared
// memory, tensor maps. Addresses are of shared memory, 32 bits. With mid_wgmma.cuh it has all that is assembly: the
// host runs mid.cuh itself with other definitions of these functions (emulate_mid_device.h).
#pragma once

#include <cstdint>

#include "barrier.h"
#include "mid.h"

namespace rmcore::cuda {

__device__ __forceinline__ unsigned char* mid_dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char mid_shared[];
  return mid_shared;
}
__device__ __forceinline__ uint32_t mid_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// -- the cluster ----------------------------------------------------------------------------------------------------

// All threads of all its blocks, whole warps; what they wrote before is visible after.
__device__ __forceinline__ void mid_cluster_meet() {
  __syncwarp();
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;\n" ::: "memory");
}
// The same place in another block's shared memory.
__device__ __forceinline__ uint32_t mid_remote(uint32_t address, int rank) {
  uint32_t there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;\n" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}
__device__ __forceinline__ void mid_store_remote(uint32_t there, float4 x) {
  asm volatile("st.shared::cluster.v4.f32 [%0], {%1, %2, %3, %4};\n" ::"r"(there), "f"(x.x), "f"(x.y), "f"(x.z),
               "f"(x.w)
               : "memory");
}
__device__ __forceinline__ void mid_store_remote(uint32_t there, uint32_t x) {
  asm volatile("st.shared::cluster.u32 [%0], %1;\n" ::"r"(there), "r"(x) : "memory");
}

// The warps that multiply; the one that fetches goes its own way.
__device__ __forceinline__ void mid_multipliers_meet() { asm volatile("bar.sync 1, 256;\n" ::: "memory"); }

// -- mbarriers ------------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mid_init(uint32_t barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;\n" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void mid_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];\n" ::"r"(barrier) : "memory");
}
// After those of init, for the cluster's other blocks and for the copy engine.
__device__ __forceinline__ void mid_fence_init() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async;\n" ::: "memory");
}
// One arrival, and so many bytes to come.
__device__ __forceinline__ void mid_arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;\n" ::"r"(barrier), "r"(bytes) : "memory");
}
// At another block's barrier (or the own one, by its address in the cluster).
__device__ __forceinline__ void mid_arrive_remote(uint32_t there) {
  asm volatile("mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%0];\n" ::"r"(there) : "memory");
}
// Waits for the end of the phase of this parity. `Cluster`: what other blocks wrote before they arrived is visible
// after. Not for ever: past twice the grid barrier's limit something is wrong that no other block can report, and the
// launch ends with an error rather than never. The loop is one piece of assembly: where the compiler sees its branches,
// it puts the matrix instructions after it one after the other (ptxas C7518).
#define MID_WAIT(scope)                                    \
  asm volatile(                                            \
      "{\n.reg .pred done, late;\n.reg .u64 since, now;\n" \
      "mbarrier.try_wait.parity.acquire." scope            \
      ".shared::cta.b64 done, [%0], %1;\n"                 \
      "@done bra come%=;\n"                                \
      "mov.u64 since, %%globaltimer;\n"                    \
      "again%=:\n"                                         \
      "mbarrier.try_wait.parity.acquire." scope            \
      ".shared::cta.b64 done, [%0], %1;\n"                 \
      "@done bra come%=;\n"                                \
      "mov.u64 now, %%globaltimer;\n"                      \
      "sub.u64 now, now, since;\n"                         \
      "setp.gt.u64 late, now, %2;\n"                       \
      "@late trap;\n"                                      \
      "bra again%=;\n"                                     \
      "come%=:\n}\n" ::"r"(barrier),                       \
      "r"(parity), "l"(2 * kBarrierLimitNs)                \
      : "memory")
template <bool Cluster>
__device__ __forceinline__ void mid_wait(uint32_t barrier, uint32_t parity) {
  if constexpr (Cluster) {
    MID_WAIT("cluster");
  } else {
    MID_WAIT("cta");
  }
}
#undef MID_WAIT

// -- tensor maps ----------------------------------------------------------------------------------------------------

__device__ __forceinline__ void mid_expect_map(const MidMap& map) {
  asm volatile("prefetch.tensormap [%0];\n" ::"l"(&map) : "memory");
}
// A box into shared memory, its bytes (all of them, those beyond the matrix are zeros) counted by the barrier.
__device__ __forceinline__ void mid_fetch(uint32_t target, const MidMap& map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], "
      "[%4];\n" ::"r"(target),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// Between what threads write or read and what the copy engine does.
__device__ __forceinline__ void mid_proxy_fence() { asm volatile("fence.proxy.async;\n" ::: "memory"); }

}  // namespace rmcore::cuda
