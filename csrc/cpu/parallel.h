// A team of threads that walks through stages together: claim tasks, meet, go on.
//
// The threads are OpenMP's. Where torch's wheels and this module end up on one libgomp (they do: torch loads its own
// into the global scope first) the pool is torch's, so nobody's idle threads spin against ours.
#pragma once

#include <cstdint>

namespace rmcore::cpu {

struct TeamState;

class Team {
 public:
  Team(TeamState& state, int rank, int size) : state_(state), rank_(rank), size_(size) {}

  int rank() const { return rank_; }
  int size() const { return size_; }

  // The next task of this stage, 0, 1, 2, ... Who gets which varies; results never depend on it.
  int64_t claim();

  // Waits for all, then starts the next stage. Every thread must have stopped claiming.
  void next_stage();

 private:
  TeamState& state_;
  int rank_;
  int size_;
  int stage_ = 0;
};

using TeamBody = void (*)(Team& team, void* context);

// Runs `body` on `threads` threads. In a forked child, whose parent's pool is gone, on one.
void run_team(int threads, TeamBody body, void* context);

template <class Body>
inline void parallel(int threads, Body&& body) {
  run_team(
      threads, [](Team& team, void* context) { (*static_cast<decltype(&body)>(context))(team); }, &body);
}

}  // namespace rmcore::cpu
