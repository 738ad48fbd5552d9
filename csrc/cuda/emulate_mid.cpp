// The score of 65 to 512 rows on the host (mid.h, mid.cuh): the numbers, who fetches and multiplies what, where the
// copy engine puts it and where the descriptors look for it, and whether thread blocks can wait for each other for
// ever. See emulate.cpp.
//
// Shared memory is an array of values, two bytes each; nothing of it is known before it is written (NaN). What hardware
// does is written down here from PTX's description, apart from the kernel's own functions: boxes of a tensor map with
// zeros beyond the matrix and a swizzle of 128 bytes, matrix descriptors, and the registers of m64nNk16.
#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "emulate.h"
#include "mid.h"

namespace rmcore::cuda {
namespace {

// 16-byte pieces of a 128-byte row change places by the row's number, modulo eight; of absolute addresses.
uint32_t swizzled(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

// Shared memory of a ring, `memory[byte / 2]`.
using Memory = std::vector<float>;

struct Matrix {
  const float* data;
  int rows, columns;
  int64_t pitch;
};

// A box of 64 columns, as the copy engine puts it down.
void fetch(Memory& memory, uint32_t target, const Matrix& from, int row, int column, int box_rows) {
  expect(target % 1024 == 0, "a box does not begin where the swizzle does");
  for (int r = 0; r < box_rows; ++r) {
    for (int c = 0; c < kMidDepth; ++c) {
      const bool inside = row + r < from.rows && column + c < from.columns;
      const uint32_t at = swizzled(target + static_cast<uint32_t>(r * kMidRowBytes + 2 * c));
      memory.at(at / 2) = inside ? from.data[(row + r) * from.pitch + column + c] : 0.0f;
    }
  }
}

// Rows of 16 values of what a descriptor describes.
std::vector<float> described(const Memory& memory, uint64_t descriptor, int rows) {
  expect(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0, "not a descriptor of the 128-byte swizzle");
  const auto start = static_cast<uint32_t>((descriptor & 0x3fff) << 4);
  const auto stride = static_cast<uint32_t>((descriptor >> 32 & 0x3fff) << 4);
  std::vector<float> out(static_cast<size_t>(rows) * kMidStep);
  for (int row = 0; row < rows; ++row) {
    for (int k = 0; k < kMidStep; ++k) {
      const uint32_t at =
          start + static_cast<uint32_t>(row / 8) * stride + static_cast<uint32_t>(row % 8 * 128 + 2 * k);
      out[static_cast<size_t>(row) * kMidStep + k] = memory.at(swizzled(at) / 2);
    }
  }
  return out;
}

// wgmma.m64nNk16 of one warpgroup: acc[thread of 256][N / 2].
using Accumulators = std::vector<std::vector<float>>;
void multiply(Accumulators& acc, int warpgroup, const std::vector<float>& a, const std::vector<float>& b, int columns) {
  for (int thread = 0; thread < 128; ++thread) {
    for (int i = 0; i < columns / 2; ++i) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + (i & 2 ? 8 : 0);
      const int column = i / 4 * 8 + thread % 4 * 2 + (i & 1);
      float sum = 0.0f;
      for (int k = 0; k < kMidStep; ++k) {
        sum += a[static_cast<size_t>(row) * kMidStep + k] * b[static_cast<size_t>(column) * kMidStep + k];
      }
      acc[static_cast<size_t>(128 * warpgroup + thread)][static_cast<size_t>(i)] += sum;
    }
  }
}

// What a stage multiplies, and how often each (tile, k-block, rows of the batch) was.
struct Stage {
  bool triangular;
  int columns;  // of the batch at once
  Matrix weights, operand;
  std::vector<int> used;
  int blocks() const { return 2 * divide_up(operand.columns, kTile) + 1; }  // and one that none should take
};

// One thread block: its ring, and how far it has fetched and multiplied.
struct Block {
  int cluster, rank, slots, slot_bytes;
  Memory memory;
  std::vector<int> held;  // of a slot: nothing, weights, or both
  int64_t weights = 0, operands = 0, taken = 0;

  Block(const MidPlan& plan, int c, int r)
      : cluster(c),
        rank(r),
        slots(plan.slots),
        slot_bytes(mid_slot_bytes(plan.shape.columns)),
        memory(static_cast<size_t>(plan.slots) * mid_slot_bytes(plan.shape.columns) / 2, kPoison),
        held(static_cast<size_t>(plan.slots), 0) {}

  uint32_t slot(int64_t count) const { return static_cast<uint32_t>(count % slots * slot_bytes); }
  void fetch_weights(const Stage& stage, const MidWalk& walk) {
    int& state = held[static_cast<size_t>(weights % slots)];
    expect(state == 0, "a slot is filled before it is given back");
    state = 1;
    fetch(memory, slot(weights++), stage.weights, walk.weight_row(), walk.weight_column(), kMidTileRows);
  }
  void fetch_operand(const Stage& stage, const MidWalk& walk) {
    int& state = held[static_cast<size_t>(operands % slots)];
    expect(state == 1, "the batch's rows come to a slot without weights");
    state = 2;
    const uint32_t at = slot(operands++) + mid_operand_at();
    fetch(memory, at, stage.operand, walk.operand_row(), walk.operand_column(), stage.columns);
  }
  void take(Stage& stage, const MidWalk& walk, Accumulators& acc) {
    int& state = held[static_cast<size_t>(taken % slots)];
    expect(state == 2, "a slot is read before it is filled");
    const uint32_t base = slot(taken++);
    for (int warpgroup = 0; warpgroup < 2; ++warpgroup) {
      const uint32_t a = base + static_cast<uint32_t>(mid_weights_at(warpgroup)), b = base + mid_operand_at();
      for (int step = 0; step < kMidDepth / kMidStep; ++step) {
        multiply(acc, warpgroup, described(memory, mid_descriptor(a + mid_step_bytes(step)), 64),
                 described(memory, mid_descriptor(b + mid_step_bytes(step)), stage.columns), stage.columns);
      }
    }
    state = 0;
    std::fill_n(memory.begin() + base / 2, slot_bytes / 2, kPoison);
    const int blocks = stage.blocks();
    const int parts = divide_up(stage.operand.rows, stage.columns);
    ++stage.used.at(
        static_cast<size_t>((walk.job.tile * blocks + walk.block) * parts + walk.job.column / stage.columns));
  }
};

// The sums of the four blocks of a cluster, added up as they pass them on; what a block does not keep is spoilt.
void exchange(std::vector<Accumulators>& acc, int columns) {
  const int values = columns / 2, quarter = values / 4;
  for (int turn = 0; turn < 3; ++turn) {
    const std::vector<Accumulators> before = acc;
    for (int rank = 0; rank < kMidCluster; ++rank) {
      const int from = mid_partner(rank, turn);
      expect(mid_partner(from, turn) == rank, "partners disagree");
      for (size_t thread = 0; thread < kThreads; ++thread) {
        for (int i = 0; i < quarter; ++i) {
          const int sent = mid_sent(from, turn, values, i), kept = mid_kept(rank, turn, values, i);
          expect(sent == kept, "a sum is added to another place");
          acc[rank][thread][kept] = before[rank][thread][kept] + before[from][thread][sent];
          acc[from][thread][sent] = kPoison;
        }
      }
    }
  }
}

struct Emulation {
  const Head& head;
  const MidPlan& plan;
  const float* hidden;
  int64_t stride;
  std::vector<float> rows, features, logits, squares;
  std::vector<int> tickets;

  Emulation(const Head& h, const MidPlan& p, const float* x, int64_t pitch)
      : head(h), plan(p), hidden(x), stride(pitch), tickets(kMidTickets, 0) {
    const MidShape& s = plan.shape;
    for (int row = 0; row < s.rows; ++row)
      for (int k = 0; k < s.hidden_size; ++k) rows.push_back(rounded(hidden[row * stride + k], head.dtype));
    features.assign(static_cast<size_t>(s.rows) * plan.feature_pitch, kPoison);
    logits.assign(static_cast<size_t>(s.tiles) * plan.sum_pitch, kPoison);
    squares = logits;
  }

  Stage stage(bool triangular) const {
    const MidShape& s = plan.shape;
    Stage out{triangular, triangular ? s.columns / 2 : s.columns, {}, {}, {}};
    if (triangular) {
      out.weights = {static_cast<const float*>(head.factor), s.tiles * (s.tiles + 1) / 2 * kTile, kTile, kTile};
      out.operand = {features.data(), s.rows, s.num_features, plan.feature_pitch};
    } else {
      out.weights = {static_cast<const float*>(head.projection), s.num_features, s.hidden_size, head.projection_pitch};
      out.operand = {rows.data(), s.rows, s.hidden_size, s.hidden_size};
    }
    out.used.assign(static_cast<size_t>(s.tiles) * out.blocks() * divide_up(s.rows, out.columns), 0);
    return out;
  }

  // The end of a job in one block: what it has the sums of goes to c and β · c, or to Σ y².
  void finish(bool triangular, const MidJob& job, int rank, int columns, const Accumulators& acc) {
    const MidShape& s = plan.shape;
    const int values = columns / 2, first = job.column + mid_owned_column(rank, columns);
    std::vector<float> total(static_cast<size_t>(columns / 4), 0.0f);
    for (int thread = 0; thread < kThreads; ++thread) {
      for (int i = 0; i < values / 4; ++i) {
        const int kept = mid_kept(rank, 2, values, i), row = job.tile * kTile + mid_fragment_row(thread, i);
        const int column = first + mid_fragment_column(thread, i);
        expect(job.column + mid_fragment_column(thread, kept) == column, "a block has the sums of other columns");
        expect(mid_fragment_row(thread, kept) == mid_fragment_row(thread, i), "and rows");
        const float value = acc[static_cast<size_t>(thread)][static_cast<size_t>(kept)];
        float& sum = total.at(static_cast<size_t>(column - first));
        if (triangular) {
          sum += value * value;
        } else if (row < s.num_features) {
          float c = value + head.phase[row];
          if (!head.linear) c = static_cast<float>(std::cos(2.0 * M_PI * (c - std::nearbyint(c))));
          sum += head.beta[row] * c;
          if (column < s.rows) features.at(column * plan.feature_pitch + row) = rounded(c, head.dtype);
        }
      }
    }
    for (int k = 0; k < columns / 4; ++k)
      (triangular ? squares : logits).at(static_cast<size_t>(job.tile * plan.sum_pitch + first + k)) = total[k];
  }

  void write(int first, int count, float* out) const {
    const int n = plan.shape.rows;
    for (int column = first; column < std::min(first + count, n); ++column) {
      float g = head.beta0, v = 0.0f;
      for (int tile = 0; tile < plan.shape.tiles; ++tile) {
        g += logits[static_cast<size_t>(tile * plan.sum_pitch + column)];
        v += squares[static_cast<size_t>(tile * plan.sum_pitch + column)];
      }
      out[column] = g, out[n + column] = v * head.factor_scale;
      out[2 * n + column] = std::sqrt(1 + head.amplitude * out[n + column]);
      out[3 * n + column] = out[column] / out[2 * n + column];
    }
  }

  void run(bool triangular, std::vector<Block>& blocks, float* out) {
    const MidShape& s = plan.shape;
    Stage work = stage(triangular);
    for (int cluster = 0; cluster < s.clusters; ++cluster) {
      Block* const four = &blocks[static_cast<size_t>(cluster * kMidCluster)];
      std::vector<MidWalk> lead, follow, multiplied;
      for (int rank = 0; rank < kMidCluster; ++rank) {
        const MidWalk start(s, triangular, cluster, rank);
        lead.push_back(start), follow.push_back(start), multiplied.push_back(start);
        // Of U as many slots as there are come ahead of the grid barrier, the batch's rows after it.
        for (int k = 0; triangular && k < plan.slots && lead[rank].valid; ++k, lead[rank].advance())
          four[rank].fetch_weights(work, lead[rank]);
      }
      MidJob job{};
      for (int index = 0; mid_job(s, triangular, cluster, index, job); ++index) {
        std::vector<Accumulators> acc(kMidCluster, Accumulators(kThreads, std::vector<float>(work.columns / 2, 0.0f)));
        for (int rank = 0; rank < kMidCluster; ++rank) {
          MidWalk& walk = multiplied[rank];
          const int begin = mid_share_begin(job.blocks, rank), end = mid_share_begin(job.blocks, rank + 1);
          for (int k = begin; k < end; ++k, walk.advance()) {
            while (lead[rank].valid && four[rank].weights - four[rank].taken < plan.slots) {
              four[rank].fetch_weights(work, lead[rank]);
              lead[rank].advance();
            }
            while (follow[rank].valid && four[rank].operands < four[rank].weights) {
              four[rank].fetch_operand(work, follow[rank]);
              follow[rank].advance();
            }
            expect(walk.valid && walk.index == index && walk.block == k, "the ring holds another job's columns");
            four[rank].take(work, walk, acc[rank]);
          }
        }
        exchange(acc, work.columns);
        for (int rank = 0; rank < kMidCluster; ++rank) {
          finish(triangular, job, rank, work.columns, acc[rank]);
          if (!triangular) continue;
          int& count = tickets.at(static_cast<size_t>(mid_ticket(s, job.column, rank)));
          if (++count == s.tiles) write(job.column + mid_owned_column(rank, work.columns), work.columns / 4, out);
        }
      }
      for (int rank = 0; rank < kMidCluster; ++rank)
        expect(!multiplied[rank].valid && four[rank].taken == four[rank].weights, "something fetched is left over");
    }
    check_used(work);
  }

  void check_used(const Stage& work) const {
    const MidShape& s = plan.shape;
    const int blocks = work.blocks();
    const int parts = divide_up(s.rows, work.columns);
    for (int tile = 0; tile < s.tiles; ++tile)
      for (int block = 0; block < blocks; ++block)
        for (int part = 0; part < parts; ++part) {
          const int times = work.used[static_cast<size_t>((tile * blocks + block) * parts + part)];
          const int end = work.triangular ? (tile + 1) * (kTile / kMidDepth) : divide_up(s.hidden_size, kMidDepth);
          expect(times == (block < end ? 1 : 0), "a k-block was not multiplied exactly once");
        }
  }
};

// -- waiting --------------------------------------------------------------------------------------------------------

// An mbarrier: a phase ends when all have arrived.
class Barrier {
 public:
  explicit Barrier(int arrivals) : count_(arrivals), left_(arrivals) {}
  void arrive() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--left_ == 0) {
      left_ = count_;
      phase_ ^= 1;
      changed_.notify_all();
    }
  }
  // Waits for the end of the phase of this parity; at first that before the first has parity 1.
  void wait(unsigned parity) {
    std::unique_lock<std::mutex> lock(mutex_);
    const bool came = changed_.wait_for(lock, std::chrono::seconds(60), [&] { return phase_ != parity; });
    expect(came, "thread blocks wait for each other");
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int count_, left_;
  unsigned phase_ = 0;
};

constexpr int kTestWarps = 3;
struct Inbox {
  Barrier signals[kMidSignals] = {Barrier(kTestWarps), Barrier(kTestWarps), Barrier(kTestWarps), Barrier(kTestWarps)};
  int note[kTestWarps] = {};  // who sent what, 0 where it has been read
  std::mutex mutex;
};

struct WarpOps {
  Inbox* inboxes;
  int rank, warp, job;
  unsigned random;
  void dawdle() {
    random = random * 1664525u + 1013904223u;
    for (unsigned k = random >> 28; k > 0; --k) std::this_thread::yield();
  }
  int tag(int from, int turn) const { return 1 + (job * 3 + turn) * kMidCluster + from; }
  void wait(MidSignal signal, unsigned parity) {
    dawdle();
    inboxes[rank].signals[signal].wait(parity);
  }
  void arrive(int to, MidSignal signal) {
    dawdle();
    inboxes[to].signals[signal].arrive();
  }
  void send(int to, int turn) {
    dawdle();
    const std::lock_guard<std::mutex> lock(inboxes[to].mutex);
    expect(inboxes[to].note[warp] == 0, "sums are written over others that nobody has read");
    inboxes[to].note[warp] = tag(rank, turn);
  }
  void receive(int turn) {
    dawdle();
    const std::lock_guard<std::mutex> lock(inboxes[rank].mutex);
    expect(inboxes[rank].note[warp] == tag(mid_partner(rank, turn), turn),
           "the sums are not those that were waited for");
    inboxes[rank].note[warp] = 0;
  }
};

}  // namespace
}  // namespace rmcore::cuda

using namespace rmcore::cuda;

extern "C" {

const char* emulate_mid_message() { return message.c_str(); }

// `columns` 0 takes those that the plan chooses.
int emulate_mid(int dtype, int h, int d, const float* projection, int64_t projection_pitch, const float* phase,
                const float* beta, const float* factor, int linear, float beta0, float factor_scale, float amplitude,
                const float* hidden, int64_t stride, int rows, int clusters, int columns, int slots, float* out) {
  try {
    Head head{};
    head.dtype = static_cast<Scalar>(dtype);
    head.hidden_size = h, head.num_features = d;
    head.projection = projection, head.projection_pitch = projection_pitch, head.phase = phase;
    head.beta = beta, head.factor = factor, head.linear = linear, head.beta0 = beta0;
    head.factor_scale = factor_scale, head.amplitude = amplitude;
    MidPlan plan = plan_mid(head, rows, clusters, 232448);
    expect(plan.shape.columns > 0, "the head is not served");
    MidShape& s = plan.shape;
    if (columns > 0) {
      s.columns = columns, s.groups = divide_up(rows, columns), s.halves = divide_up(rows, columns / 2);
      s.clusters = std::min(clusters, s.tiles * s.groups);
      plan.sum_pitch = s.groups * columns;
    }
    plan.slots = slots;
    Emulation emulation(head, plan, hidden, stride);
    std::vector<Block> blocks;
    for (int block = 0; block < s.clusters * kMidCluster; ++block)
      blocks.emplace_back(plan, block / kMidCluster, block % kMidCluster);
    emulation.run(false, blocks, out);
    emulation.run(true, blocks, out);
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}

// Of a full-size head: columns (0: not served), groups, halves, clusters, slots, shared bytes, workspace bytes, and the
// most and fewest k-blocks of a thread block, in stage 1 and then in stage 2.
void emulate_mid_plan(int dtype, int h, int d, int m, int rows, int clusters, int64_t shared_bytes, int64_t* out) {
  Head head{};
  head.dtype = static_cast<Scalar>(dtype);
  head.hidden_size = h, head.num_features = d, head.layer_size = m;
  const MidPlan plan = plan_mid(head, rows, clusters, shared_bytes);
  const MidShape& s = plan.shape;
  const int64_t facts[] = {s.columns, s.groups, s.halves, s.clusters, plan.slots, plan.shared_bytes, plan.bytes};
  std::copy(std::begin(facts), std::end(facts), out);
  if (s.columns == 0) return;
  for (int stage = 0; stage < 2; ++stage) {
    int64_t& most = out[7 + 2 * stage] = 0;
    int64_t& fewest = out[8 + 2 * stage] = INT64_MAX;
    for (int block = 0; block < s.clusters * kMidCluster; ++block) {
      int64_t count = 0;
      for (MidWalk walk(s, stage == 1, block / kMidCluster, block % kMidCluster); walk.valid; walk.advance()) ++count;
      most = std::max(most, count), fewest = std::min(fewest, count);
    }
  }
}

// Four thread blocks of three warps pass on the sums of `jobs` jobs, late at random; 0 where everything came as it was
// waited for.
int emulate_mid_exchange(int jobs, unsigned seed) {
  Inbox inboxes[kMidCluster];
  std::mutex mutex;
  bool failed = false;
  std::vector<std::thread> threads;
  for (int agent = 0; agent < kMidCluster * kTestWarps; ++agent) {
    threads.emplace_back([&, agent] {
      try {
        WarpOps ops{inboxes, agent / kTestWarps, agent % kTestWarps, 0, seed * 977u + static_cast<unsigned>(agent)};
        for (; ops.job < jobs; ++ops.job) mid_exchange(ops, ops.rank, ops.job);
      } catch (const std::exception& error) {
        const std::lock_guard<std::mutex> lock(mutex);
        message = error.what();
        failed = true;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return failed ? 1 : 0;
}
}
