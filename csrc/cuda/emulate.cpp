// The score and power-iteration algorithms on the host, to check their index arithmetic without a GPU. Not part of any
// module: tests/kernels compile it with score_plan.cpp and power_plan.cpp.
//
// Thread blocks, warps and lanes run one after another, stage by stage, through the functions of schedule.h and in the
// kernels' order; memory starts as NaN. Values are floats that the caller has rounded to the serving dtype. What is
// checked besides the numbers: that a slot of the ring holds the step which is read from it, and how often each 16-byte
// chunk of the weights is fetched.
#include "emulate.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <thread>
#include <vector>

#include "barrier.h"
#include "power_iteration.h"
#include "score.h"

namespace rmcore::cuda {
namespace {

struct Chunk {
  float value[kLaneColumns];
  int stage, block, step, row;  // what it was fetched for; row counts pieces, or n-tiles for the operand
};

// One thread block of the score kernel; the members follow Stream in score.cuh.
struct Block {
  const ScoreParams& p;
  int id, tiles, pieces, weight_pieces;
  std::vector<Chunk> ring;
  Work work[kMaxStages];
  Cursor tail[kWarps];
  int tail_slot[kWarps] = {}, head_slot[kWarps] = {};
  std::vector<float> reduction, logit, square;
  std::vector<int>* fetched;  // per stage: how often each chunk of weights was fetched

  Block(const ScoreParams& params, int number, int t, std::vector<int>* counts)
      : p(params), id(number), tiles(t), pieces(ring_pieces(t)), weight_pieces(ring_pieces(t) - t), fetched(counts) {
    ring.resize(static_cast<size_t>(p.slots) * pieces * kThreads);
    for (Chunk& c : ring) {
      for (float& x : c.value) x = kPoison;
      c.stage = -1;
    }
    for (int i = 0; i < p.stages; ++i) work[i] = p.stage[i].work;
    reduction.assign(reduction_bytes(t) / 4, kPoison);
    logit.assign(kThreads * owned_columns(t), 0.0f);
    square.assign(kThreads * owned_columns(t), 0.0f);
    for (int w = 0; w < kWarps; ++w) tail[w].start(work, p.stages, id, w);
  }

  int next(int slot) const { return slot + 1 == p.slots ? 0 : slot + 1; }

  void fetch(Chunk& to, const void* matrix, int64_t offset, bool valid) {
    for (int i = 0; i < kLaneColumns; ++i) to.value[i] = valid ? static_cast<const float*>(matrix)[offset + i] : 0.0f;
  }

  void issue_weights(int warp, const Cursor& c, int slot) {
    const StageParams& s = p.stage[c.stage];
    const Work& w = work[c.stage];
    for (int lane = 0; lane < 32; ++lane) {
      const int column = lane_column(c.step(warp), lane), row = piece_row(w, c.at.block, 0, lane);
      const int64_t first = w.triangular ? tile_offset(row, column) : dense_offset(row, column, s.pitch);
      const int64_t stride = 8 * (w.triangular ? static_cast<int64_t>(kTile) : s.pitch);
      for (int piece = 0; piece < 2 * w.strips_per_block; ++piece) {
        const bool valid = row + 8 * piece < s.weight_rows && column < s.weight_columns;
        expect(row + 8 * piece == piece_row(w, c.at.block, piece, lane), "piece_row and the stride disagree");
        if (w.triangular) {
          expect(first + piece * stride == tile_offset(row + 8 * piece, column), "a block leaves its tile");
          expect(column / kTile <= row / kTile, "a step right of the diagonal tile");
        }
        Chunk& to = ring[ring_index(slot, pieces, piece, warp * 32 + lane)];
        fetch(to, s.weights, first + piece * stride, valid);
        to.stage = c.stage, to.block = c.at.block, to.step = c.step(warp), to.row = piece;
        if (valid) ++fetched[c.stage][(first + piece * stride) / kLaneColumns];
      }
    }
  }

  void issue_operand(int warp, const Cursor& c, int slot) {
    const StageParams& s = p.stage[c.stage];
    for (int lane = 0; lane < 32; ++lane) {
      const int column = lane_column(c.step(warp), lane);
      for (int tile = 0; tile < tiles; ++tile) {
        const int row = tile * 8 + lane_group(lane);
        const bool valid = row < s.operand_rows && column < s.operand_columns;
        Chunk& to = ring[ring_index(slot, pieces, weight_pieces + tile, warp * 32 + lane)];
        fetch(to, s.operand, dense_offset(row, column, s.operand_pitch), valid);
        to.stage = c.stage, to.block = c.at.block, to.step = c.step(warp), to.row = tile;
      }
    }
  }

  void prefetch(int warp) {
    for (int i = 0; i < p.slots; ++i) {
      if (!tail[warp].done(p.stages)) {
        issue_weights(warp, tail[warp], tail_slot[warp]);
        tail[warp].advance(work, p.stages, id, warp);
      }
      tail_slot[warp] = next(tail_slot[warp]);
    }
  }

  void enter(int warp, int stage) {
    Cursor c;
    c.stage = stage;
    c.segment = c.index = c.steps = 0;
    c.settle(work, p.stages, id, warp);
    int slot = head_slot[warp];
    for (int i = 0; i < p.slots; ++i) {
      if (!c.done(p.stages) && c.stage == stage) {
        issue_operand(warp, c, slot);
        c.advance(work, p.stages, id, warp);
      }
      slot = next(slot);
    }
  }

  // acc[strip][tile][lane][element]
  void consume(int warp, int stage, const Segment& segment, std::vector<float>& acc) {
    const Work& w = work[stage];
    const int strips = w.strips_per_block;
    for (int i = 0; i < warp_steps(segment, warp); ++i) {
      const int slot = head_slot[warp];
      const auto at = [&](int piece, int lane) -> const Chunk& {
        const Chunk& c = ring[ring_index(slot, pieces, piece, warp * 32 + lane)];
        expect(c.stage == stage && c.block == segment.block && c.step == warp_step(segment, warp, i),
               "the ring holds another step");
        return c;
      };
      for (int r = 0; r < strips; ++r) {
        for (int tile = 0; tile < tiles; ++tile) {
          float d[32][4], a[32][4][2], b[32][2][2];
          std::memcpy(d, &acc[(static_cast<size_t>(r) * tiles + tile) * 128], sizeof d);
          for (int half = 0; half < 2; ++half) {
            for (int lane = 0; lane < 32; ++lane) {
              for (int e = 0; e < 2; ++e) {
                for (int word = 0; word < 2; ++word) {
                  const int k = 4 * half + 2 * word + e;  // words x, y for the first product, z, w for the second
                  a[lane][2 * word][e] = at(2 * r, lane).value[k];
                  a[lane][2 * word + 1][e] = at(2 * r + 1, lane).value[k];
                  b[lane][word][e] = at(weight_pieces + tile, lane).value[k];
                }
              }
            }
            mma(d, a, b);
          }
          std::memcpy(&acc[(static_cast<size_t>(r) * tiles + tile) * 128], d, sizeof d);
        }
      }
      if (!tail[warp].done(p.stages)) {
        issue_weights(warp, tail[warp], slot);
        if (tail[warp].stage == stage) issue_operand(warp, tail[warp], slot);
        tail[warp].advance(work, p.stages, id, warp);
      }
      head_slot[warp] = next(slot);
    }
  }

  void finish(const StageParams& s, int row, int column, float value, float bias, float beta, float& g, float& v,
              Scalar dtype) {
    if (s.kind == kFactor) {
      v += value * value;
      return;
    }
    const bool inside = row < s.valid;
    value += bias;
    if (s.kind == kProjection) {
      if (!p.linear) value = static_cast<float>(std::cos(2.0 * M_PI * (value - std::nearbyint(value))));
      if (inside) g = std::fma(beta, value, g);
    } else {
      if (p.tanh) value = std::tanh(value) + (value - value);
      if (s.unnormalised != nullptr) {
        if (inside) s.unnormalised[column * s.result_pitch + row] = value;
        return;
      }
    }
    if (row < s.result_pitch) {
      static_cast<float*>(s.result)[column * s.result_pitch + row] = rounded(inside ? value : 0.0f, dtype);
    }
  }

  void run_stage(int stage, Scalar dtype) {
    const StageParams& s = p.stage[stage];
    const Work& w = work[stage];
    Segment segment;
    for (int index = 0; segment_of(w, id, index, segment); ++index) {
      const int row0 = segment.block * w.strips_per_block * kStripRows;
      const size_t size = static_cast<size_t>(w.strips_per_block) * tiles * 128;
      std::vector<std::vector<float>> acc(kWarps, std::vector<float>(size, 0.0f));
      for (int warp = 0; warp < kWarps; ++warp) consume(warp, stage, segment, acc[warp]);
      for (int r = 0; r < w.strips_per_block; ++r) {
        std::fill(reduction.begin(), reduction.end(), kPoison);
        for (int warp = 0; warp < kWarps; ++warp)
          for (int tile = 0; tile < tiles; ++tile)
            for (int lane = 0; lane < 32; ++lane)
              for (int e = 0; e < 4; ++e)
                reduction.at(
                    reduction_index(tiles, warp, tile * 8 + accumulator_column(lane, e), accumulator_row(lane, e))) =
                    acc[warp][(static_cast<size_t>(r) * tiles + tile) * 128 + lane * 4 + e];
        for (int thread = 0; thread < kThreads; ++thread) {
          for (int i = 0; i < owned_columns(tiles); ++i) {
            const int row = owned_row(thread), column = owned_column(thread, i);
            if (column >= 8 * tiles) continue;
            float value = 0.0f;
            for (int from = 0; from < kWarps; ++from) value += reduction.at(reduction_index(tiles, from, column, row));
            if (w.split) {
              s.partial[partial_index(w, tiles, partial_slot(id, segment.block), r, column, row)] = value;
            } else {
              const int at = row0 + r * kStripRows + row;
              const float bias = s.bias != nullptr && at < s.valid ? s.bias[at] : 0.0f;
              const float beta = s.kind == kProjection && at < s.valid ? p.beta[at] : 0.0f;
              const int mine = thread * owned_columns(tiles) + i;
              finish(s, at, column, value, bias, beta, logit[mine], square[mine], dtype);
            }
          }
        }
      }
    }
  }

  void finish_split(int stage, int grid, Scalar dtype) {
    const StageParams& s = p.stage[stage];
    const Work& w = work[stage];
    for (int strip = id; strip < w.strips; strip += grid) {
      const int block = strip / w.strips_per_block, r = strip % w.strips_per_block;
      for (int thread = 0; thread < kThreads; ++thread) {
        const int row = strip * kStripRows + owned_row(thread);
        for (int i = 0; i < owned_columns(tiles); ++i) {
          const int column = owned_column(thread, i);
          if (column >= 8 * tiles) continue;
          float value = 0.0f;
          for (int from = first_contributor(w, block); from <= last_contributor(w, block); ++from) {
            value += s.partial[partial_index(w, tiles, partial_slot(from, block), r, column, owned_row(thread))];
          }
          const float bias = s.bias != nullptr && row < s.valid ? s.bias[row] : 0.0f;
          const float beta = s.kind == kProjection && row < s.valid ? p.beta[row] : 0.0f;
          const int mine = thread * owned_columns(tiles) + i;
          finish(s, row, column, value, bias, beta, logit[mine], square[mine], dtype);
        }
      }
    }
  }
};

// Largest element offset + 1 that a stage's weights have, to size the fetch counts.
int64_t weight_elements(const StageParams& s) {
  if (!s.work.triangular) return static_cast<int64_t>(s.weight_rows) * s.pitch;
  const int64_t n = divide_up(s.valid, kTile);
  return n * (n + 1) / 2 * kTile * kTile;
}

// Every chunk that holds weights is fetched exactly once: all columns of a dense row, columns up to the diagonal of U.
void check_fetched(const StageParams& s, const std::vector<int>& counts) {
  for (int row = 0; row < s.valid; ++row) {
    const int columns = s.work.triangular ? row + 1 : s.weight_columns;
    for (int column = 0; column < columns; column += kLaneColumns) {
      const int64_t at = s.work.triangular ? tile_offset(row, column) : dense_offset(row, column, s.pitch);
      expect(counts[at / kLaneColumns] == 1, "a chunk of weights was not fetched exactly once");
    }
  }
  for (const int count : counts) expect(count <= 1, "a chunk of weights was fetched twice");
}

void emulate(Head head, const float* hidden, int64_t stride, int rows, int in_place, int grid, int slots, int split,
             float* out) {
  ScorePlan plan = plan_score(head, rows, grid, 1 << 30, split);
  plan.slots = slots;
  // Elements are twice as wide here as in the serving dtype; offsets stay in order and apart.
  std::vector<float> memory(plan.bytes / 2 + 64, kPoison);
  const auto scaled = [&](int64_t& offset) { offset *= 2; };
  scaled(plan.converted), scaled(plan.unnormalised), scaled(plan.layer), scaled(plan.features), scaled(plan.partial);
  scaled(plan.logit), scaled(plan.variance), scaled(plan.ticket), scaled(plan.board);
  const Scalar dtype = head.dtype, other = in_place ? dtype : Scalar::kFloat32;
  const int columns = 8 * plan.tiles;
  ScoreParams p = score_params(head, plan, hidden, other, stride, rows, out, memory.data());
  if (in_place) expect(p.converted == nullptr, "rows were to be read in place");

  std::vector<int> fetched[kMaxStages];
  for (int i = 0; i < p.stages; ++i) fetched[i].assign(weight_elements(p.stage[i]) / kLaneColumns + 1, 0);
  std::vector<Block> blocks;
  blocks.reserve(plan.grid);
  for (int id = 0; id < plan.grid; ++id) {
    blocks.emplace_back(p, id, plan.tiles, fetched);
    for (int warp = 0; warp < kWarps; ++warp) blocks.back().prefetch(warp);
  }
  if (p.converted != nullptr) {
    for (int i = 0; i < columns * p.converted_pitch; ++i) {
      const int row = i / static_cast<int>(p.converted_pitch), column = i % static_cast<int>(p.converted_pitch);
      const bool inside = row < rows && column < p.hidden_size;
      static_cast<float*>(p.converted)[i] =
          inside ? rounded(hidden[row * stride + column] * p.input_scale, dtype) : 0.0f;
    }
  }
  for (int stage = 0; stage < p.stages; ++stage) {
    const StageParams& s = p.stage[stage];
    for (Block& block : blocks) {
      for (int warp = 0; warp < kWarps; ++warp) block.enter(warp, stage);
      block.run_stage(stage, dtype);
    }
    if (s.work.split) {
      for (Block& block : blocks) block.finish_split(stage, plan.grid, dtype);
    }
    if (s.kind == kLayer && p.layernorm) {
      for (int row = 0; row < columns; ++row) {
        const float* x = s.unnormalised + row * s.result_pitch;
        double sum = 0, squares = 0;
        for (int i = 0; i < s.valid; ++i) sum += x[i];
        const double mean = sum / s.valid;
        for (int i = 0; i < s.valid; ++i) squares += (x[i] - mean) * (x[i] - mean);
        const double scale = 1 / std::sqrt(squares / s.valid + 1e-5);
        for (int i = 0; i < s.result_pitch; ++i) {
          static_cast<float*>(s.result)[row * s.result_pitch + i] =
              rounded(i < s.valid ? static_cast<float>((x[i] - mean) * scale) : 0.0f, dtype);
        }
      }
    }
  }
  for (int i = 0; i < p.stages; ++i) check_fetched(p.stage[i], fetched[i]);
  for (int column = 0; column < rows; ++column) {
    float g = 0.0f, v = 0.0f;
    for (Block& block : blocks) {
      for (int thread = 0; thread < kThreads; ++thread) {
        for (int i = 0; i < owned_columns(plan.tiles); ++i) {
          if (owned_column(thread, i) != column) continue;
          g += block.logit[thread * owned_columns(plan.tiles) + i];
          v += block.square[thread * owned_columns(plan.tiles) + i];
        }
      }
    }
    g += p.beta0;
    v *= p.factor_scale;
    out[column] = g;
    out[rows + column] = v;
    out[2 * rows + column] = std::sqrt(1 + p.amplitude * v);
    out[3 * rows + column] = g / out[2 * rows + column];
  }
}

// The barrier of barrier.h between threads of the host, each standing for a thread block. Its clock goes on only while
// every block that has not ended waits: how the host schedules its threads is no reason to give up.
struct HostBarrier {
  std::atomic<unsigned>*counter, *board;
  std::atomic<uint64_t>* word;
  std::atomic<int>*waiting, *alive, *looks;  // blocks that wait, that have not ended; looks at the clock
  std::atomic<uint64_t>* time;
  uint64_t patience;

  void note(int block, int phase) const { board[block].store(phase, std::memory_order_relaxed); }
  unsigned noted(int block) const { return board[block].load(std::memory_order_relaxed); }
  unsigned add(unsigned n) const {
    const unsigned before = counter->fetch_add(n, std::memory_order_release);
    ++*waiting;  // after it: where all wait, all have come that ever will
    return before;
  }
  unsigned load() const {
    std::this_thread::yield();
    return counter->load(std::memory_order_acquire);
  }
  uint64_t now() const {
    ++*looks;
    return *waiting == *alive ? ++*time : time->load();
  }
  uint64_t limit() const { return patience; }
  void report(uint64_t r) const { word->store(r); }
};

}  // namespace
}  // namespace rmcore::cuda

using namespace rmcore::cuda;

extern "C" {

const char* emulate_message() { return message.c_str(); }

// Returns 0, or 1 with emulate_message() set. Matrices hold floats; `dtype` 0 is fp16, 1 is bf16; `split` as
// plan_stage.
int emulate_score(int dtype, int h, int d, int m, const float* projection, int64_t projection_pitch, const float* phase,
                  const float* layer, int64_t layer_pitch, const float* layer_bias, const float* beta,
                  const float* factor, int tanh, int layernorm, int linear, float input_scale, float beta0,
                  float factor_scale, float amplitude, const float* hidden, int64_t stride, int rows, int in_place,
                  int grid, int slots, int split, float* out) {
  try {
    emulate(Head{static_cast<Scalar>(dtype), h, d, m, projection, projection_pitch, phase, layer, layer_pitch,
                 layer_bias, beta, factor, tanh, layernorm, linear, input_scale, beta0, factor_scale, amplitude},
            hidden, stride, rows, in_place, grid, slots, split, out);
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}

// `blocks` thread blocks meet `phases` times over a board that holds anything; block `missing` (-1: none) ends before
// phase `from`. Fills came[blocks] with the barriers each passed, word with the report, total with what the counter
// holds and the sum of what the others had written before each barrier that a block passed. Returns looks at the clock.
int emulate_barrier(int blocks, int phases, int missing, int from, int64_t patience, int* came, uint64_t* word,
                    int64_t* total) {
  std::atomic<unsigned> counter{0};
  std::vector<std::atomic<unsigned>> board(blocks), written(blocks);
  std::atomic<uint64_t> report{0};
  std::atomic<int> looks{0}, waiting{0}, alive{blocks};
  std::atomic<uint64_t> time{1};
  std::atomic<int64_t> seen{0};
  for (int i = 0; i < blocks; ++i) board[i] = 0xffffffffu, written[i] = 0;
  const HostBarrier ops{&counter, board.data(), &report, &waiting,
                        &alive,   &looks,       &time,   static_cast<uint64_t>(patience)};
  std::vector<std::thread> threads;
  for (int block = 0; block < blocks; ++block) {
    threads.emplace_back([&, block] {
      came[block] = 0;
      for (int phase = 1; phase <= phases; ++phase) {
        if (block == missing && phase == from) {
          --alive;
          return;
        }
        written[block].store(phase, std::memory_order_relaxed);
        // One that gave up is still counted as waiting: those it leaves behind go on by the same clock.
        if (!meet(ops, KernelName::kScore, block, blocks, phase)) return;
        --waiting;
        ++came[block];
        for (int other = 0; other < blocks; ++other) {
          seen += written[other].load(std::memory_order_relaxed) >= static_cast<unsigned>(phase);
        }
      }
    });
  }
  for (std::thread& t : threads) t.join();
  *word = report;
  total[0] = counter, total[1] = seen;
  message = report == 0 ? "" : hang_message(report);
  return looks;
}

// The share of each worker in a stage of a full-size problem: fills steps[grid], returns whether K is split.
int emulate_shares(int rows, int columns, int triangular, int strips, int grid, int split, int64_t* steps) {
  const Work w = plan_stage(rows, columns, triangular != 0, strips, grid, split);
  for (int worker = 0; worker < grid; ++worker) {
    steps[worker] = 0;
    Segment s;
    for (int i = 0; segment_of(w, worker, i, s); ++i) steps[worker] += s.end - s.begin;
  }
  return w.split;
}

// Bytes and layout of a launch: tiles, grid, slots, shared bytes, workspace bytes.
int emulate_plan(int dtype, int h, int d, int m, int layernorm, int rows, int multiprocessors, int64_t shared_bytes,
                 int64_t* out) {
  try {
    Head head{};
    head.dtype = static_cast<Scalar>(dtype);
    head.hidden_size = h, head.num_features = d, head.layer_size = m, head.layernorm = layernorm;
    const ScorePlan plan = plan_score(head, rows, multiprocessors, shared_bytes);
    out[0] = plan.tiles, out[1] = plan.grid, out[2] = plan.slots, out[3] = plan.shared_bytes, out[4] = plan.bytes;
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}

int emulate_power(const float* weight, int64_t pitch, int rows, int columns, int element_bytes, const float* vector,
                  int iterations, int grid, int64_t shared_bytes, float* sigma, float* result) {
  try {
    const PowerPlan plan = plan_power(rows, columns, element_bytes, grid, shared_bytes);
    const int values = 16 / element_bytes;
    std::vector<float> v(plan.partial_pitch, 0.0f);
    double norm = 0;
    for (int i = 0; i < columns; ++i) norm += double(vector[i]) * vector[i];
    for (int i = 0; i < columns; ++i) v[i] = static_cast<float>(vector[i] / std::sqrt(norm));
    for (int iteration = 0; iteration < iterations; ++iteration) {
      std::vector<float> partial(plan.partial_pitch * plan.grid, kPoison);
      std::vector<int> seen(rows, 0);
      double square = 0;
      for (int block = 0; block < plan.grid; ++block) {
        const int begin = share_of_rows(rows, block, plan.grid), end = share_of_rows(rows, block + 1, plan.grid);
        expect(begin < end, "a thread block without rows");
        std::vector<float> w(plan.partial_pitch, 0.0f);
        for (int group = 0; group < divide_up(end - begin, plan.group_rows); ++group) {
          for (int r = 0; r < plan.group_rows; ++r) {
            const int row = begin + group * plan.group_rows + r;
            if (row >= end) continue;
            ++seen[row];
            double y = 0;
            for (int pass = 0; pass < 2; ++pass) {
              for (int thread = 0; thread < kThreads; ++thread) {
                for (int c = 0; c < plan.chunks; ++c) {
                  const int first = chunk_column(c, thread, values);
                  for (int i = first; i < first + values && first < columns; ++i) {
                    const float x = weight[dense_offset(row, i, pitch)];
                    if (pass == 0) {
                      y += double(x) * v[i];
                    } else {
                      w[i] += static_cast<float>(y * x);
                    }
                  }
                }
              }
            }
            square += y * y;
          }
        }
        std::memcpy(&partial[block * plan.partial_pitch], w.data(), w.size() * sizeof(float));
      }
      for (const int count : seen) expect(count == 1, "a row was not taken exactly once");
      *sigma = static_cast<float>(std::sqrt(square));
      std::vector<double> product(columns, 0.0);
      double total = 0;
      for (int i = 0; i < columns; ++i) {
        for (int block = 0; block < plan.grid; ++block) product[i] += partial[block * plan.partial_pitch + i];
        total += product[i] * product[i];
      }
      if (total > 0) {
        for (int i = 0; i < columns; ++i) v[i] = static_cast<float>(product[i] / std::sqrt(total));
      }
    }
    std::memcpy(result, v.data(), columns * sizeof(float));
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}
}
