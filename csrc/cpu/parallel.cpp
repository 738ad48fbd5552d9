#include "parallel.h"

#include <omp.h>
#include <pthread.h>

#include <atomic>

namespace rmcore::cpu {
namespace {

bool in_forked_child = false;

const int register_fork_handler = pthread_atfork(nullptr, nullptr, [] { in_forked_child = true; });

}  // namespace

// Stages alternate between two counters: while one is claimed from, nobody touches the other, so rank 0 clears it.
struct TeamState {
  struct alignas(64) Counter {
    std::atomic<int64_t> next{0};
  };
  Counter counters[2];
};

int64_t Team::claim() { return state_.counters[stage_].next.fetch_add(1, std::memory_order_relaxed); }

void Team::next_stage() {
  if (rank_ == 0) state_.counters[stage_ ^ 1].next.store(0, std::memory_order_relaxed);
  stage_ ^= 1;
  if (size_ > 1) {
#pragma omp barrier
  }
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
