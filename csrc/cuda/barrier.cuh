// The grid barrier on the device; barrier.h has the algorithm.
#pragma once

#include <cooperative_groups.h>

#include "barrier.h"

namespace rmcore::cuda {

class GridBarrier {
 public:
  // `board`: a word for each thread block, contents arbitrary; `report`: a word of host memory that the device can
  // write. Only for cooperative launches.
  __device__ __forceinline__ GridBarrier(KernelName kernel, unsigned* board, uint64_t* report)
      : kernel_(kernel),
        phase_(0),
        counter_(&cooperative_groups::details::get_grid_workspace()->barrier),
        board_(board),
        report_(report) {}

  // What any thread of any block wrote before is visible to all threads after. False, in all threads of the block,
  // where the others did not come: then nothing is known of what they have written, and the block must end.
  __device__ __forceinline__ bool sync() {
    ++phase_;
    __syncthreads();
    const bool open = threadIdx.x != 0 || meet(*this, kernel_, blockIdx.x, gridDim.x, phase_);
    return __syncthreads_and(open) != 0;
  }

  // The same for a block of which only some threads multiply: one of them calls this, after they have met, and tells
  // the others, who meet again.
  __device__ __forceinline__ bool meet_alone() { return meet(*this, kernel_, blockIdx.x, gridDim.x, ++phase_); }

  __device__ __forceinline__ void note(int block, int phase) const { board_[block] = static_cast<unsigned>(phase); }
  __device__ __forceinline__ unsigned noted(int block) const {
    return *const_cast<const volatile unsigned*>(board_ + block);
  }
  __device__ __forceinline__ unsigned add(unsigned n) const {
    unsigned before;
    asm volatile("atom.add.release.gpu.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter_), "r"(n) : "memory");
    return before;
  }
  __device__ __forceinline__ unsigned load() const {
    unsigned value;
    asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(value) : "l"(counter_) : "memory");
    return value;
  }
  __device__ __forceinline__ uint64_t now() const {
    uint64_t value;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(value));
    return value;
  }
  __device__ __forceinline__ uint64_t limit() const { return kBarrierLimitNs; }
  __device__ __forceinline__ void report(uint64_t word) const {
    *const_cast<volatile uint64_t*>(report_) = word;
    __threadfence_system();
  }

 private:
  KernelName kernel_;
  int phase_;
  unsigned* counter_;
  unsigned* board_;
  uint64_t* report_;
};

}  // namespace rmcore::cuda
