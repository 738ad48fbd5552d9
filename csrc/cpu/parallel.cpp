#include "parallel.h"

#include <omp.h>
#include <pthread.h>
#include <sched.h>

#include <atomic>

namespace rmcore::cpu {
namespace {

constexpr int kTaskBits = 40;  // of the position: stage above, next task below
constexpr int64_t kTaskMask = (int64_t{1} << kTaskBits) - 1;
constexpr int64_t kNoTask = INT64_MAX;
constexpr int kSpins = 4000;  // some 50 µs of waiting before others may have the processor

bool in_forked_child = false;

const int register_fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

inline void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace

// Stage and next task in one word, so that a thread that is stages behind cannot claim from the present one.
struct TeamState {
  alignas(64) std::atomic<int64_t> position{0};
  alignas(64) std::atomic<int64_t> done{0};
};

int64_t Team::claim() {
  int64_t seen = state_.position.load(std::memory_order_acquire);
  while (seen >> kTaskBits == stage_) {
    if (state_.position.compare_exchange_weak(seen, seen + 1, std::memory_order_acq_rel)) return seen & kTaskMask;
  }
  return kNoTask;
}

// The one who finishes the last task opens the next stage.
void Team::finish(int64_t count) {
  if (state_.done.fetch_add(1, std::memory_order_acq_rel) + 1 < count) return;
  state_.done.store(0, std::memory_order_relaxed);
  state_.position.store((stage_ + 1) << kTaskBits, std::memory_order_release);
}

void Team::wait() {
  for (int spins = 0; state_.position.load(std::memory_order_acquire) >> kTaskBits == stage_; ++spins) {
    if (spins < kSpins) {
      relax();
    } else {
      sched_yield();
    }
  }
  ++stage_;
}

void run_team(int threads, TeamBody body, void* context) {
  (void)register_fork_handler;
  TeamState state;
  if (threads <= 1 || in_forked_child) {
    Team team(state, 0, 1);
    body(team, context);
    return;
  }
#pragma omp parallel num_threads(threads)
  {
    Team team(state, omp_get_thread_num(), omp_get_num_threads());
    body(team, context);
  }
}

}  // namespace rmcore::cpu
