// A Hopper GPU on the host, as far as mid.cuh asks for one: in the place of barrier.cuh, device.cuh, mid_ptx.cuh and
// mid_wgmma.cuh, so that the kernel itself runs, every thread of every thread block (emulate_mid_kernel.cpp).
//
// Threads are fibers of one thread of the host, taken in random order, now and then one of them much later than the
// others, and change places only where they wait. What the
// hardware does by itself is done at some random later time: a box that was asked for comes late, and from the moment
// it was asked for nothing is known of where it will lie; matrix products are taken when they are committed or when
// they are waited for. So a slot given back too early, a sum used before it was waited for, a wait for the wrong phase,
// and blocks that wait for each other for ever show in the numbers or as an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "barrier.h"
#include "mid.h"

#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __CUDA_ARCH_FEAT_SM90_ALL

struct float4 {
  float x, y, z, w;
};

namespace rmcore::cuda {

struct Bf16 {
  uint16_t bits;
};
inline float bf16_value(uint16_t bits) {
  const uint32_t word = uint32_t{bits} << 16;
  float x;
  std::memcpy(&x, &word, sizeof x);
  return x;
}
inline uint16_t bf16_bits(float x) {  // to nearest, ties to even; NaN stays NaN
  uint32_t word;
  std::memcpy(&word, &x, sizeof word);
  if (x != x) return 0x7fc0;
  return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

namespace device {

struct Trap : std::runtime_error {
  using std::runtime_error::runtime_error;
};
inline void expect(bool condition, const char* what) {
  if (!condition) throw Trap(what);
}

// All threads of a group have come: a warp, the multiplying warps of a block, a cluster.
struct Meeting {
  int size, came = 0;
  unsigned round = 0;
};

constexpr uint32_t kSharedBase = 1024;  // addresses of shared memory do not begin at 0
constexpr int kSharedBytes = 232448;

struct Block {
  explicit Block(int number) : index(number), memory(kSharedBytes, 0xff), meeting{kThreads} {
    for (int warp = 0; warp < kMidThreads / 32; ++warp) warps.push_back({32});
  }
  int index;
  int left = 0;  // threads that have ended
  std::vector<unsigned char> memory;
  Meeting meeting;
  std::vector<Meeting> warps;
  float lanes[kMidThreads / 32][2][32];
};

// An mbarrier, in its eight bytes.
struct Word {
  uint8_t count, pending, phase, set;
  int32_t bytes;
};
static_assert(sizeof(Word) == 8, "as on the device");

struct Product {
  float* sums;
  uint64_t weights, operand;
  int columns;
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Block* block;
  unsigned thread;
  bool done = false;
  int asleep = 0;         // rounds of all threads that it is late
  bool spinning = false;  // it looks again and again, and gives up by itself
  const std::function<bool()>* waits_for = nullptr;
  unsigned shuffles = 0;
  std::vector<Product> open;
  std::deque<std::vector<Product>> committed;
};

struct Box {
  Block* block;
  uint32_t target, barrier;
  MidMap map;
  int column, row;
};

// What a tensor map is here.
struct Matrix {
  const uint16_t* data;
  int rows, columns;
  int64_t pitch;
  int box_rows;
};
inline Matrix matrix_of(const MidMap& map) {
  Matrix m;
  std::memcpy(&m, map.bytes, sizeof m);
  return m;
}

struct Machine {
  std::mt19937 random;
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Meeting> clusters;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<Box> boxes;
  ucontext_t scheduler;
  Fiber* current = nullptr;
  unsigned grid_counter = 0;
  bool lazy = false;  // boxes come only when nobody can do anything without them
  std::string failure;

  unsigned char* at(uint32_t address) const {
    const int named = static_cast<int>(address >> 24);
    Block* const block =
        named == 0 ? current->block : blocks[current->block->index / kMidCluster * kMidCluster + named - 1].get();
    expect(block->left == 0, "a thread block has left while another one still writes into its memory");
    return in(*block, address & 0xffffff);
  }
  static unsigned char* in(Block& block, uint32_t address) {
    expect(address >= kSharedBase && address < kSharedBase + kSharedBytes, "an address outside shared memory");
    return block.memory.data() + (address - kSharedBase);
  }
  void yield() { swapcontext(&current->context, &scheduler); }
  void wait(const std::function<bool()>& condition) {
    if (condition() && random() % 4 != 0) return;
    current->waits_for = &condition;
    yield();
    current->waits_for = nullptr;
  }
  void meet(Meeting& meeting) {
    const unsigned round = meeting.round;
    if (++meeting.came == meeting.size) {
      meeting.came = 0;
      ++meeting.round;
    }
    wait([&] { return meeting.round != round; });
  }
  static void settle(Word& word) {
    if (word.pending != 0 || word.bytes != 0) return;
    word.phase ^= 1;
    word.pending = word.count;
  }
  void arrive(uint32_t address, int bytes = 0) {
    Word& word = *reinterpret_cast<Word*>(at(address));
    expect(word.set == 1 && word.pending > 0, "an arrival that the barrier does not expect");
    word.bytes += bytes;
    --word.pending;
    settle(word);
  }
  // The copy engine does one of the boxes that it was asked for.
  void deliver() {
    std::swap(boxes[random() % boxes.size()], boxes.back());
    const Box box = boxes.back();
    boxes.pop_back();
    expect(box.block->left == 0, "a thread block left before what it asked for had come");
    const Matrix from = matrix_of(box.map);
    for (int r = 0; r < from.box_rows; ++r) {
      for (int c = 0; c < kMidDepth; ++c) {
        const bool inside = box.row + r < from.rows && box.column + c < from.columns;
        const uint16_t bits = inside ? from.data[(box.row + r) * from.pitch + box.column + c] : 0;
        const uint32_t plain = box.target + static_cast<uint32_t>(r * kMidRowBytes + 2 * c);
        std::memcpy(in(*box.block, plain ^ (plain >> 7 & 7) << 4), &bits, sizeof bits);
      }
    }
    Word& word = *reinterpret_cast<Word*>(in(*box.block, box.barrier));
    word.bytes -= from.box_rows * kMidRowBytes;
    expect(word.bytes >= 0, "more bytes come than the barrier expects");
    settle(word);
  }
  void run();
};
inline Machine* machine = nullptr;

// Sixteen values of row `row` of what a descriptor describes.
inline void described(uint64_t descriptor, int row, float (&out)[kMidStep]) {
  expect(descriptor >> 62 == 1 && (descriptor >> 49 & 7) == 0, "not a descriptor of the 128-byte swizzle");
  const auto start = static_cast<uint32_t>((descriptor & 0x3fff) << 4);
  const auto stride = static_cast<uint32_t>((descriptor >> 32 & 0x3fff) << 4);
  for (int k = 0; k < kMidStep; ++k) {
    const uint32_t plain =
        start + static_cast<uint32_t>(row / 8) * stride + static_cast<uint32_t>(row % 8 * 128 + 2 * k);
    uint16_t bits;
    std::memcpy(&bits, machine->at(plain ^ (plain >> 7 & 7) << 4), sizeof bits);
    out[k] = bf16_value(bits);
  }
}

// A thread's part of m64nNk16: rows lane / 4 and 8 more of its warp's 16, columns 2 (lane % 4) and the next of eight.
inline void multiply(const Product& product) {
  const int thread = static_cast<int>(machine->current->thread % 128);
  float a[2][kMidStep], b[kMidStep];
  for (int half = 0; half < 2; ++half)
    described(product.weights, thread / 32 * 16 + thread % 32 / 4 + 8 * half, a[half]);
  for (int group = 0; group < product.columns / 8; ++group) {
    for (int k = 0; k < 2; ++k) {
      described(product.operand, group * 8 + thread % 4 * 2 + k, b);
      for (int half = 0; half < 2; ++half) {
        float& sum = product.sums[group * 4 + half * 2 + k];
        float added = 0.0f;
        for (int i = 0; i < kMidStep; ++i) added += a[half][i] * b[i];
        sum += added;
      }
    }
  }
}
inline void finish_oldest(Fiber& fiber) {
  for (const Product& product : fiber.committed.front()) multiply(product);
  fiber.committed.pop_front();
}

}  // namespace device

struct Index {
  unsigned x;
};
inline Index threadIdx, blockIdx;

inline void device::Machine::run() {
  std::vector<Fiber*> order;
  for (const auto& fiber : fibers) order.push_back(fiber.get());
  while (!order.empty()) {
    bool moved = false, spins = false;
    std::shuffle(order.begin(), order.end(), random);
    for (Fiber* const fiber : order) {
      current = fiber;
      if (fiber->asleep > 0) {
        moved = --fiber->asleep >= 0;
        continue;
      }
      if (fiber->waits_for != nullptr && !(*fiber->waits_for)()) continue;
      if (random() % 256 == 0) fiber->asleep = static_cast<int>(random() % 64);
      threadIdx.x = fiber->thread;
      blockIdx.x = static_cast<unsigned>(fiber->block->index);
      (fiber->spinning ? spins : moved) = true;
      swapcontext(&scheduler, &fiber->context);
      if (!failure.empty()) throw Trap(failure);
      if (!lazy && !boxes.empty() && random() % 400 == 0) deliver();
    }
    order.erase(std::remove_if(order.begin(), order.end(), [](const Fiber* f) { return f->done; }), order.end());
    if (!boxes.empty() && (!moved || (!lazy && random() % 2 == 0))) {
      deliver();
    } else if (!moved && !spins && !order.empty()) {
      throw Trap("all threads wait");
    }
  }
  device::expect(boxes.empty(), "the launch ended before what was asked for had come");
}

// -- device.cuh -----------------------------------------------------------------------------------------------------

template <typename T>
T round_to(float x);
template <>
inline Bf16 round_to<Bf16>(float x) {
  return {bf16_bits(x)};
}
inline float cospif(float x) { return static_cast<float>(std::cos(M_PI * static_cast<double>(x))); }
inline float __int_as_float(int bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
template <typename T>
T __ldg(const T* p) {
  return *p;
}
template <typename T>
T __ldcg(const T* p) {
  return *p;
}
inline unsigned atomicAdd(unsigned* p, unsigned n) {
  const unsigned before = *p;
  *p += n;
  return before;
}
inline void __threadfence() {}
inline void __trap() { throw device::Trap("the kernel trapped"); }
inline void __syncwarp() {
  device::Fiber& fiber = *device::machine->current;
  device::machine->meet(fiber.block->warps[fiber.thread / 32]);
}
inline float __shfl_xor_sync(unsigned, float x, int offset) {
  device::Fiber& fiber = *device::machine->current;
  float (&lanes)[32] = fiber.block->lanes[fiber.thread / 32][fiber.shuffles++ % 2];
  lanes[fiber.thread % 32] = x;
  __syncwarp();
  return lanes[fiber.thread % 32 ^ static_cast<unsigned>(offset)];
}

// -- barrier.cuh ----------------------------------------------------------------------------------------------------

class GridBarrier {
 public:
  GridBarrier(KernelName, unsigned* board, uint64_t* report) : board_(board), report_(report) {}
  void note(int block, int phase) const { board_[block] = static_cast<unsigned>(phase); }
  unsigned noted(int block) const { return board_[block]; }
  unsigned add(unsigned n) const { return atomicAdd(&device::machine->grid_counter, n); }
  unsigned load() const {
    device::Fiber& fiber = *device::machine->current;
    fiber.spinning = true;
    device::machine->yield();
    fiber.spinning = false;
    return device::machine->grid_counter;
  }
  uint64_t now() const { return ++time_; }
  uint64_t limit() const { return 2; }
  void report(uint64_t word) const { *report_ = word; }

 private:
  unsigned* board_;
  uint64_t* report_;
  mutable uint64_t time_ = 0;
};

// -- mid_ptx.cuh ----------------------------------------------------------------------------------------------------

inline unsigned char* mid_dynamic_shared() { return device::machine->current->block->memory.data(); }
inline uint32_t mid_address(const void* p) {
  const auto& memory = device::machine->current->block->memory;
  const auto* const byte = static_cast<const unsigned char*>(p);
  device::expect(byte >= memory.data() && byte < memory.data() + memory.size(), "not in the block's shared memory");
  return static_cast<uint32_t>(byte - memory.data()) + device::kSharedBase;
}
inline void mid_cluster_meet() {
  __syncwarp();
  device::machine->meet(device::machine->clusters[blockIdx.x / kMidCluster]);
}
inline uint32_t mid_remote(uint32_t address, int rank) {
  device::expect(address >> 24 == 0, "an address of another block is mapped again");
  return address | static_cast<uint32_t>(rank + 1) << 24;
}
inline void mid_store_remote(uint32_t there, float4 x) { std::memcpy(device::machine->at(there), &x, sizeof x); }
inline void mid_store_remote(uint32_t there, uint32_t x) { std::memcpy(device::machine->at(there), &x, sizeof x); }
inline void mid_multipliers_meet() { device::machine->meet(device::machine->current->block->meeting); }
inline void mid_init(uint32_t barrier, int arrivals) {
  const device::Word word{static_cast<uint8_t>(arrivals), static_cast<uint8_t>(arrivals), 0, 1, 0};
  std::memcpy(device::machine->at(barrier), &word, sizeof word);
}
inline void mid_fence_init() {}
inline void mid_arrive(uint32_t barrier) { device::machine->arrive(barrier); }
inline void mid_arrive_expecting(uint32_t barrier, int bytes) { device::machine->arrive(barrier, bytes); }
inline void mid_arrive_remote(uint32_t there) { device::machine->arrive(there); }
template <bool Cluster>
void mid_wait(uint32_t barrier, uint32_t parity) {
  const auto* const word = reinterpret_cast<const device::Word*>(device::machine->at(barrier));
  device::expect(word->set == 1, "a wait at a barrier that is none yet");
  device::machine->wait([&] { return word->phase != parity; });
}
inline void mid_expect_map(const MidMap&) {}
inline void mid_fetch(uint32_t target, const MidMap& map, int column, int row, uint32_t barrier) {
  device::Machine& m = *device::machine;
  device::expect(target % 1024 == 0, "a box does not begin where the swizzle does");
  const size_t bytes = static_cast<size_t>(device::matrix_of(map).box_rows) * kMidRowBytes;
  m.at(target + static_cast<uint32_t>(bytes) - 1);
  std::memset(m.at(target), 0xff, bytes);
  m.boxes.push_back({m.current->block, target, barrier, map, column, row});
}
inline void mid_proxy_fence() {}

// -- mid_wgmma.cuh --------------------------------------------------------------------------------------------------

inline void wgmma_fence() {}
inline void wgmma_commit() {
  device::Fiber& fiber = *device::machine->current;
  fiber.committed.push_back(std::move(fiber.open));
  fiber.open.clear();
  // Some are done at once. What one warp of a warpgroup may read, the others may too.
  if (device::machine->random() % 2 == 0) {
    while (!fiber.committed.empty()) device::finish_oldest(fiber);
  }
}
template <int Pending>
void wgmma_wait() {
  device::Fiber& fiber = *device::machine->current;
  while (fiber.committed.size() > Pending) device::finish_oldest(fiber);
}
template <int Count>
void wgmma_pin(float (&)[Count]) {}
template <typename T, int N>
struct Wgmma {
  static void add(float (&sums)[N / 2], uint64_t weights, uint64_t operand) {
    device::machine->current->open.push_back({sums, weights, operand, N});
  }
};

}  // namespace rmcore::cuda
