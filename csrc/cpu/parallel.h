// A team of threads that walks through stages of tasks together.
//
// A stage is over when its tasks are done, not when every thread has come by: a thread the system has put aside holds
// the others up only if it holds a task, and finds nothing left to do when it wakes. Who does which task varies; no
// result may depend on it.
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

  // Which thread this is, for temporaries of its own.
  int rank() const { return rank_; }
  // How many threads there are.
  int size() const { return size_; }

  // One stage: body(task) for tasks 0 .. count − 1, shared out; returns when all are done.
  template <class Body>
  void each(int64_t count, Body&& body) {
    if (count <= 0) return;
    for (int64_t task; (task = claim()) < count;) {
      body(task);
      finish(count);
    }
    wait();
  }

  // The same with body(task, following): `following` is this thread's next task, or ≥ count.
  template <class Body>
  void each_ahead(int64_t count, Body&& body) {
    if (count <= 0) return;
    for (int64_t task = claim(); task < count;) {
      const int64_t following = claim();
      body(task, following);
      finish(count);
      task = following;
    }
    wait();
  }

 private:
  int64_t claim();
  void finish(int64_t count);
  void wait();

  TeamState& state_;
  int rank_, size_;
  int64_t stage_ = 0;
};

using TeamBody = void (*)(Team& team, void* context);

// Runs `body` on `threads` threads. In a forked child, whose parent's pool is gone, on one.
void run_team(int threads, TeamBody body, void* context);

template <class Body>
inline void parallel(int threads, Body&& body) {
  run_team(threads, [](Team& team, void* context) { (*static_cast<decltype(&body)>(context))(team); }, &body);
}

}  // namespace rmcore::cpu
