// A grid barrier that gives up: how thread blocks meet, and what is known when one of them does not come.
//
// The counter is cooperative_groups' own (a launch's, zeroed by the driver) and so is the algorithm: block 0 adds
// 2^31 − (blocks − 1), the others 1 each, so the top bit flips when all have come and the count is zero again. What is
// ours is the wait: after `kSpinsBetweenLooks` looks at the counter a block begins to look at the clock as well, and
// past the limit it reports and returns false. A barrier that opens in time, which takes a microsecond or two, never
// reads the clock. Integer arithmetic without CUDA: the kernels and the host emulation run this same loop.
#pragma once

#include <cstdint>
#include <string>

#include "schedule.h"

namespace rmcore::cuda {

// Nothing in a launch takes a thousandth of it; a time slice of another process does not take it either.
constexpr uint64_t kBarrierLimitNs = 4'000'000'000;
constexpr unsigned kSpinsBetweenLooks = 1024;
constexpr unsigned kBarrierTop = 0x80000000u;

enum class KernelName : int { kScore = 1, kPowerIteration = 2 };

RMCORE_HD unsigned barrier_increment(int block, int blocks) {
  return block == 0 ? kBarrierTop - static_cast<unsigned>(blocks - 1) : 1u;
}
RMCORE_HD bool barrier_open(unsigned before, unsigned now) { return ((before ^ now) & kBarrierTop) != 0; }

// What a block that gave up tells the host, in one 64-bit word, which is written whole: never 0, missing + 1 (0 where
// every block had noted its arrival), who waited, the how-manieth barrier of the launch, the kernel.
RMCORE_HD uint64_t hang_report(KernelName kernel, int phase, int waiting, int missing) {
  return static_cast<uint64_t>(kernel) << 56 | static_cast<uint64_t>(phase & 0xffff) << 40 |
         static_cast<uint64_t>(waiting & 0xfffff) << 20 | static_cast<uint64_t>((missing + 1) & 0xfffff);
}
RMCORE_HD int hang_kernel(uint64_t report) { return static_cast<int>(report >> 56); }
RMCORE_HD int hang_phase(uint64_t report) { return static_cast<int>(report >> 40 & 0xffff); }
RMCORE_HD int hang_waiting(uint64_t report) { return static_cast<int>(report >> 20 & 0xfffff); }
RMCORE_HD int hang_missing(uint64_t report) { return static_cast<int>(report & 0xfffff) - 1; }

// The report as a person reads it.
inline std::string hang_message(uint64_t report) {
  const std::string name = hang_kernel(report) == static_cast<int>(KernelName::kScore) ? "score" : "power_iteration";
  const int missing = hang_missing(report);
  const std::string who = missing < 0 ? "a thread block" : "thread block " + std::to_string(missing);
  return who + " did not come to grid barrier " + std::to_string(hang_phase(report)) + " of an earlier " + name +
         " within " + std::to_string(kBarrierLimitNs / 1'000'000'000) + " s (thread block " +
         std::to_string(hang_waiting(report)) + " waited); its results are NaN";
}

// One block's arrival at barrier `phase` (1, 2, …) of its launch, by one of its threads; false past the limit.
//
// `Ops`: note(block, phase) and noted(block), a word for each block that says how far it came; add(n), which releases,
// and load(), which acquires, on the counter; now() and limit() in nanoseconds; report(word).
template <typename Ops>
RMCORE_HD bool meet(const Ops& ops, KernelName kernel, int block, int blocks, int phase) {
  ops.note(block, phase);
  const unsigned before = ops.add(barrier_increment(block, blocks));
  uint64_t since = 0;
  for (unsigned spin = 1; !barrier_open(before, ops.load()); ++spin) {
    if (spin % kSpinsBetweenLooks != 0) continue;
    const uint64_t now = ops.now();
    if (since == 0) {
      since = now;
    } else if (now - since > ops.limit()) {
      int missing = -1;
      for (int other = 0; other < blocks && missing < 0; ++other) {
        if (ops.noted(other) != static_cast<unsigned>(phase)) missing = other;
      }
      ops.report(hang_report(kernel, phase, block, missing));
      return false;
    }
  }
  return true;
}

}  // namespace rmcore::cuda
