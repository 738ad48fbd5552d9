// The kernel for 65 to 512 rows itself, on the host: mid.cuh compiled with emulate_mid_device.h in the place of what is
// the GPU's. <mid.cuh> is a copy that lies apart from the real barrier.cuh, device.cuh, mid_ptx.cuh and mid_wgmma.cuh,
// beside files of these names which include emulate_mid_device.h (tests/kernels/test_cuda_mid_kernel.py).
#include <mid.cuh>

using namespace rmcore::cuda;

namespace {

std::string message;

MidMap map_of(const uint16_t* data, int64_t rows, int columns, int64_t pitch, int box_rows) {
  MidMap map{};
  const device::Matrix matrix{data, static_cast<int>(rows), columns, pitch, box_rows};
  static_assert(sizeof matrix <= sizeof map.bytes, "room for it");
  std::memcpy(map.bytes, &matrix, sizeof matrix);
  return map;
}

const MidParams* params;
const MidMaps* maps;

template <int N>
void thread_main() {
  device::Fiber& fiber = *device::machine->current;
  try {
    mid_kernel<Bf16, N>(*params, *maps);
  } catch (const std::exception& error) {
    device::machine->failure = error.what();
  }
  fiber.done = true;
  ++fiber.block->left;
  device::machine->yield();
}

void (*main_of(int columns))() {
  return columns == 64    ? thread_main<64>
         : columns == 128 ? thread_main<128>
         : columns == 192 ? thread_main<192>
                          : thread_main<256>;
}

std::unique_ptr<device::Fiber> fiber_of(device::Block* block, unsigned thread, void (*start)()) {
  constexpr size_t kStack = 96 << 10;
  auto fiber = std::make_unique<device::Fiber>();
  fiber->stack.reset(new char[kStack]);
  fiber->block = block;
  fiber->thread = thread;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStack;
  fiber->context.uc_link = nullptr;
  makecontext(&fiber->context, start, 0);
  return fiber;
}

void launch(const MidPlan& plan, unsigned seed, int missing) {
  device::Machine m;
  device::machine = &m;
  m.random.seed(seed);
  m.lazy = seed % 2 == 1;
  for (int cluster = 0; cluster < plan.shape.clusters; ++cluster) m.clusters.push_back({kMidCluster * kMidThreads});
  for (int block = 0; block < plan.shape.clusters * kMidCluster; ++block) {
    m.blocks.push_back(std::make_unique<device::Block>(block));
    if (block / kMidCluster == missing) continue;
    for (unsigned thread = 0; thread < kMidThreads; ++thread)
      m.fibers.push_back(fiber_of(m.blocks.back().get(), thread, main_of(plan.shape.columns)));
  }
  m.run();
}

}  // namespace

extern "C" {

const char* emulate_mid_kernel_message() { return message.c_str(); }

// bf16 everywhere: projection (D, pitch), factor in packed tiles, hidden (B, stride). `missing` is a cluster that does
// not come, −1 for none; `report` then receives what the host is told. 0 unless something was wrong.
int emulate_mid_kernel(int h, int d, const uint16_t* projection, int64_t projection_pitch, const float* phase,
                       const float* beta, const uint16_t* factor, int linear, float beta0, float factor_scale,
                       float amplitude, const uint16_t* hidden, int64_t stride, int rows, int clusters, int columns,
                       unsigned seed, int missing, float* out, uint64_t* report) {
  try {
    Head head{};
    head.dtype = Scalar::kBFloat16;
    head.hidden_size = h, head.num_features = d;
    head.phase = phase, head.beta = beta, head.linear = linear, head.beta0 = beta0;
    head.factor_scale = factor_scale, head.amplitude = amplitude;
    const MidPlan plan = plan_mid(head, rows, clusters, device::kSharedBytes);
    device::expect(plan.shape.columns == columns, "the plan takes another number of rows at once");
    std::vector<unsigned char> workspace(static_cast<size_t>(plan.bytes) + 256, 0xff);
    const auto start = reinterpret_cast<uintptr_t>(workspace.data());
    MidParams p = mid_params(head, plan, out, workspace.data() + (256 - start % 256) % 256);
    p.report = report;
    const MidShape& s = plan.shape;
    MidMaps m{};
    m.projection = map_of(projection, d, h, projection_pitch, kMidTileRows);
    m.factor = map_of(factor, int64_t{s.tiles} * (s.tiles + 1) / 2 * kTile, kTile, kTile, kMidTileRows);
    m.hidden = map_of(hidden, rows, h, stride, columns);
    m.features = map_of(static_cast<const uint16_t*>(p.features), rows, d, plan.feature_pitch, columns / 2);
    params = &p, maps = &m;
    launch(plan, seed, missing);
    return 0;
  } catch (const std::exception& error) {
    message = error.what();
    return 1;
  }
}

// The report as a person reads it.
const char* emulate_mid_report(uint64_t report) {
  message = hang_message(report);
  return message.c_str();
}
}
