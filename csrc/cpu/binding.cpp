// Python binding of rmcore._cpu. Only translates: no maths, no policy, no allocation.
//
// Memory crosses as integers (tensor.data_ptr()) and stays the caller's. A kernel returns the bytes of workspace that
// these arguments need; where it is given fewer, or workspace = 0, it touches nothing.
#include <pybind11/pybind11.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <stdexcept>
#include <string>

#include "isa.h"
#include "kernels.h"
#include "read_rate.h"

namespace py = pybind11;
using namespace rmcore::cpu;

namespace {

void require(bool holds, const char* message) {
  if (!holds) throw std::invalid_argument(message);
}

Dtype parse_dtype(const std::string& name) {
  if (name == "float32") return Dtype::f32;
  if (name == "float16") return Dtype::f16;
  if (name == "bfloat16") return Dtype::bf16;
  if (name == "float64") return Dtype::f64;
  throw std::invalid_argument("dtype: got " + name + ", expected float32, float16, bfloat16 or float64");
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Asks `kernel` for its need, and where the workspace holds that runs it, without the GIL.
template <class Kernel>
size_t run(uintptr_t workspace, size_t workspace_bytes, Kernel&& kernel) {
  const size_t need = kernel(nullptr);
  if (workspace == 0 || workspace_bytes < need) return need;
  require(workspace % 64 == 0, "workspace: expected 64-byte alignment");
  py::gil_scoped_release release;
  return kernel(pointer<void>(workspace));
}

Rows make_rows(uintptr_t data, const std::string& dtype, int64_t count, int64_t row_stride, int64_t col_stride) {
  require(count >= 0, "rows: expected a non-negative count");
  require(data != 0 || count == 0, "rows: null pointer");
  return {pointer<const void>(data), parse_dtype(dtype), count, row_stride, col_stride};
}

Dtype weight_dtype(const std::string& name) {
  if (name == "int8") return Dtype::i8;
  const Dtype dtype = parse_dtype(name);
  require(dtype != Dtype::f64, "dtype: float64 weights have no kernel");
  return dtype;
}

constexpr int64_t kInt8Depth = 65536;  // whole-number sums of more products than this could leave int32

Quantized make_quantized(uintptr_t scale, uintptr_t sum, uintptr_t far_first, uintptr_t far_pairs) {
  return {pointer<const float>(scale), pointer<const int32_t>(sum), pointer<const int64_t>(far_first),
          pointer<const FarPair>(far_pairs)};
}

Map make_map(const std::string& dtype, bool cosine, bool tanh, bool layernorm, int64_t hidden, int64_t layer_size,
             int64_t features, uintptr_t layer, uintptr_t layer_bias, uintptr_t projection, uintptr_t phase,
             float input_scale, uintptr_t projection_scale, uintptr_t projection_sum, uintptr_t projection_far_first,
             uintptr_t projection_far_pairs, uintptr_t hidden_shift, uintptr_t hidden_scale) {
  require(hidden > 0 && features > 0, "map: expected positive sizes");
  require((layer == 0) == (layer_bias == 0) && (projection == 0) == (phase == 0), "map: a matrix needs its bias");
  require(layer == 0 || layer_size > 0, "map: expected a positive layer size");
  require(projection != 0 || !cosine, "map: random Fourier features need a projection");
  require(projection != 0 || features == (layer == 0 ? hidden : layer_size), "map: features differ from their input");
  const Dtype type = weight_dtype(dtype);
  require((hidden_shift == 0) == (hidden_scale == 0), "map: hidden_shift goes with hidden_scale");
  require(type == Dtype::i8 || (projection_scale == 0 && hidden_shift == 0), "map: scales are for int8");
  require(type != Dtype::i8 || (cosine && layer == 0 && projection_scale != 0 && projection_sum != 0 &&
                                projection_far_first != 0 && projection_far_pairs != 0),
          "map: int8 takes random Fourier features of a folded projection, with its scales, sums and far pairs");
  require(type != Dtype::i8 || (hidden <= kInt8Depth && features <= kInt8Depth), "map: too large for int8");
  return {type,
          cosine,
          tanh,
          layernorm,
          hidden,
          layer_size,
          features,
          pointer<const void>(layer),
          pointer<const float>(layer_bias),
          pointer<const void>(projection),
          pointer<const float>(phase),
          input_scale,
          make_quantized(projection_scale, projection_sum, projection_far_first, projection_far_pairs),
          pointer<const float>(hidden_shift),
          pointer<const float>(hidden_scale)};
}

Head make_head(const Map& map, uintptr_t beta, uintptr_t factor, float beta0, float factor_scale, float amplitude,
               uintptr_t factor_row_scale, uintptr_t factor_row_sum, uintptr_t factor_far_first,
               uintptr_t factor_far_pairs, uintptr_t factor_diagonal) {
  require(beta != 0 && factor != 0, "head: null pointer");
  require((map.dtype == Dtype::i8) == (factor_row_scale != 0 && factor_row_sum != 0 && factor_far_first != 0 &&
                                       factor_far_pairs != 0 && factor_diagonal != 0),
          "head: int8 needs row scales, row sums, far pairs and the diagonal");
  return {map,
          pointer<const float>(beta),
          pointer<const void>(factor),
          beta0,
          factor_scale,
          amplitude,
          make_quantized(factor_row_scale, factor_row_sum, factor_far_first, factor_far_pairs),
          pointer<const float>(factor_diagonal)};
}

AttributeHead make_attribute_head(const std::string& dtype, int64_t hidden, int64_t members, int64_t attributes,
                                  int64_t per, bool normal, bool softmax, float temperature, float input_scale,
                                  uintptr_t value, int64_t depth, uintptr_t widths, uintptr_t layers, uintptr_t biases,
                                  uintptr_t last, uintptr_t offset, uintptr_t softmax_scale) {
  require(hidden > 0 && members > 0 && attributes > 0 && per > 0, "attribute head: expected positive sizes");
  require(value != 0 && offset != 0, "attribute head: null pointer");
  require(!normal || per == 2, "attribute head: a normal has a mean and a log σ");
  require(depth >= 0 && (depth > 0) == (last != 0), "attribute head: a gate has hidden layers and a last one");
  require(depth == 0 || (widths != 0 && layers != 0 && biases != 0), "attribute head: null pointer");
  const Dtype type = weight_dtype(dtype);
  require(type != Dtype::i8, "attribute head: no int8 weights");
  return {type,
          hidden,
          members,
          attributes,
          per,
          normal,
          softmax,
          temperature,
          input_scale,
          pointer<const void>(value),
          depth,
          pointer<const int64_t>(widths),
          pointer<const uint64_t>(layers),
          pointer<const uint64_t>(biases),
          pointer<const float>(last),
          pointer<const float>(offset),
          pointer<const float>(softmax_scale)};
}

// Asks for large pages: panels are read in long runs, and small pages stop the hardware's prefetch every 4 KB.
void advise_huge(uintptr_t address, size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t page = 4096;
  const uintptr_t start = (address + page - 1) / page * page, end = (address + bytes) / page * page;
  if (end > start) (void)madvise(pointer<void>(start), end - start, MADV_HUGEPAGE);  // a wish: refusal is no error
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "CPU kernels of rmcore";
  m.attr("PANEL") = kPanel;
  m.attr("FAR_AHEAD") = kFarAhead;

  m.def(
      "isa", [] { return isa_name(active_isa()); },
      "The instruction set in use: scalar, avx2, avx512, avx512_vnni or avx512_bf16.");
  m.def("best_isa", [] { return isa_name(detect_isa()); }, "The best instruction set of this machine.");
  m.def(
      "set_isa",
      [](const std::string& name) {
        require(set_isa(name.c_str()), "isa: expected auto or an instruction set this machine has");
      },
      py::arg("name"), "Use this instruction set from now on; 'auto' for the best.");

  py::class_<Map>(m, "Map", "A feature map in packed form; the caller keeps its tensors alive.")
      .def(py::init(&make_map), py::kw_only(), py::arg("dtype"), py::arg("cosine"), py::arg("tanh"),
           py::arg("layernorm"), py::arg("hidden"), py::arg("layer_size"), py::arg("features"), py::arg("layer"),
           py::arg("layer_bias"), py::arg("projection"), py::arg("phase"), py::arg("input_scale"),
           py::arg("projection_scale") = 0, py::arg("projection_sum") = 0, py::arg("projection_far_first") = 0,
           py::arg("projection_far_pairs") = 0, py::arg("hidden_shift") = 0, py::arg("hidden_scale") = 0);
  py::class_<Head>(m, "Head", "Head weights in packed form; the caller keeps their tensors alive.")
      .def(py::init(&make_head), py::kw_only(), py::arg("map"), py::arg("beta"), py::arg("factor"), py::arg("beta0"),
           py::arg("factor_scale"), py::arg("amplitude"), py::arg("factor_row_scale") = 0,
           py::arg("factor_row_sum") = 0, py::arg("factor_far_first") = 0, py::arg("factor_far_pairs") = 0,
           py::arg("factor_diagonal") = 0);

  py::class_<AttributeHead>(m, "AttributeHead", "Attribute heads in packed form; the caller keeps their tensors alive.")
      .def(py::init(&make_attribute_head), py::kw_only(), py::arg("dtype"), py::arg("hidden"), py::arg("members"),
           py::arg("attributes"), py::arg("per"), py::arg("normal"), py::arg("softmax"), py::arg("temperature"),
           py::arg("input_scale"), py::arg("value"), py::arg("depth"), py::arg("widths"), py::arg("layers"),
           py::arg("biases"), py::arg("last"), py::arg("offset"), py::arg("softmax_scale"));

  m.def("advise_huge", &advise_huge, py::arg("address"), py::arg("bytes"), "Wish for large pages here.");
  m.def(
      "pack_panels",
      [](uintptr_t matrix, const std::string& dtype, int64_t rows, int64_t cols, uintptr_t panels, int threads) {
        require(matrix != 0 && panels != 0, "pack_panels: null pointer");
        py::gil_scoped_release release;
        kernels().pack_panels(pointer<const void>(matrix), weight_dtype(dtype), rows, cols, pointer<void>(panels),
                              threads);
      },
      py::arg("matrix"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("panels"), py::arg("threads"));
  m.def(
      "pack_factor",
      [](uintptr_t tiles, const std::string& dtype, int64_t size, uintptr_t panels, int threads) {
        require(tiles != 0 && panels != 0, "pack_factor: null pointer");
        py::gil_scoped_release release;
        kernels().pack_factor(pointer<const void>(tiles), weight_dtype(dtype), size, pointer<void>(panels), threads);
      },
      py::arg("tiles"), py::arg("dtype"), py::arg("size"), py::arg("panels"), py::arg("threads"));

  m.def(
      "score",
      [](const Head& head, uintptr_t data, const std::string& dtype, int64_t count, int64_t row_stride,
         int64_t col_stride, uintptr_t out, int threads, uintptr_t workspace, size_t workspace_bytes) {
        const Rows rows = make_rows(data, dtype, count, row_stride, col_stride);
        return run(workspace, workspace_bytes,
                   [&](void* memory) { return kernels().score(head, rows, pointer<float>(out), threads, memory); });
      },
      py::arg("head"), py::arg("data"), py::arg("dtype"), py::arg("count"), py::arg("row_stride"),
      py::arg("col_stride"), py::arg("out"), py::arg("threads"), py::arg("workspace"), py::arg("workspace_bytes"));
  m.def(
      "features",
      [](const Map& map, uintptr_t data, const std::string& dtype, int64_t count, int64_t row_stride,
         int64_t col_stride, uintptr_t out, int64_t out_stride, int threads, uintptr_t workspace,
         size_t workspace_bytes) {
        const Rows rows = make_rows(data, dtype, count, row_stride, col_stride);
        require(out_stride % kPanel == 0 && out_stride >= map.features, "out_stride: expected whole panels");
        require(map.dtype != Dtype::i8, "features: int8 maps go dequantized");
        return run(workspace, workspace_bytes, [&](void* memory) {
          return kernels().features(map, rows, pointer<float>(out), out_stride, threads, memory);
        });
      },
      py::arg("map"), py::arg("data"), py::arg("dtype"), py::arg("count"), py::arg("row_stride"), py::arg("col_stride"),
      py::arg("out"), py::arg("out_stride"), py::arg("threads"), py::arg("workspace"), py::arg("workspace_bytes"));
  m.def(
      "accumulate",
      [](const Map& map, uintptr_t data, const std::string& dtype, int64_t count, int64_t row_stride,
         int64_t col_stride, uintptr_t beta, float beta0, bool logistic, float feature_scale, uintptr_t labels,
         uintptr_t sample_weight, uintptr_t features, int64_t features_stride, uintptr_t pairs, int64_t pair_count,
         uintptr_t precision, bool precision_double, uintptr_t gradient, bool gradient_double, uintptr_t log_likelihood,
         int threads, uintptr_t workspace, size_t workspace_bytes) {
        const Rows rows = make_rows(data, dtype, count, row_stride, col_stride);
        require(map.dtype != Dtype::i8, "accumulate: int8 maps go dequantized");
        require((pairs == 0) == (features == 0), "pairs: go with the features of all rows");
        require(features == 0 || (features_stride % kPanel == 0 && features_stride >= map.features),
                "features_stride: expected whole panels");
        const AccumulateTask task{pointer<const float>(beta),
                                  beta0,
                                  logistic,
                                  feature_scale,
                                  pointer<const float>(labels),
                                  pointer<const float>(sample_weight),
                                  pointer<const float>(features),
                                  features_stride,
                                  pointer<const int64_t>(pairs),
                                  pairs == 0 ? count : pair_count,
                                  pointer<void>(precision),
                                  precision_double,
                                  pointer<void>(gradient),
                                  gradient_double,
                                  pointer<double>(log_likelihood)};
        return run(workspace, workspace_bytes,
                   [&](void* memory) { return kernels().accumulate(map, rows, task, threads, memory); });
      },
      py::arg("map"), py::arg("data"), py::arg("dtype"), py::arg("count"), py::arg("row_stride"), py::arg("col_stride"),
      py::kw_only(), py::arg("beta"), py::arg("beta0"), py::arg("logistic"), py::arg("feature_scale"),
      py::arg("labels"), py::arg("sample_weight"), py::arg("features"), py::arg("features_stride"), py::arg("pairs"),
      py::arg("pair_count"), py::arg("precision"), py::arg("precision_double"), py::arg("gradient"),
      py::arg("gradient_double"), py::arg("log_likelihood"), py::arg("threads"), py::arg("workspace"),
      py::arg("workspace_bytes"));
  m.def(
      "pair_variance",
      [](const Head& head, uintptr_t data, const std::string& dtype, int64_t count, int64_t row_stride,
         int64_t col_stride, uintptr_t group_sizes, int64_t groups, uintptr_t logits, uintptr_t variances, int threads,
         uintptr_t workspace, size_t workspace_bytes) {
        const Rows rows = make_rows(data, dtype, count, row_stride, col_stride);
        return run(workspace, workspace_bytes, [&](void* memory) {
          return kernels().pair_variance(head, rows, pointer<const int64_t>(group_sizes), groups,
                                         pointer<float>(logits), pointer<float>(variances), threads, memory);
        });
      },
      py::arg("head"), py::arg("data"), py::arg("dtype"), py::arg("count"), py::arg("row_stride"),
      py::arg("col_stride"), py::arg("group_sizes"), py::arg("groups"), py::arg("logits"), py::arg("variances"),
      py::arg("threads"), py::arg("workspace"), py::arg("workspace_bytes"));
  m.def(
      "power_iteration",
      [](uintptr_t weight, const std::string& dtype, int64_t rows, int64_t cols, int64_t row_stride, int iterations,
         uintptr_t vector, uintptr_t sigma, int threads, uintptr_t workspace, size_t workspace_bytes) {
        require(weight != 0 && vector != 0 && sigma != 0, "power_iteration: null pointer");
        require(rows > 0 && cols > 0 && iterations > 0, "power_iteration: expected positive sizes");
        const Dtype type = weight_dtype(dtype);
        return run(workspace, workspace_bytes, [&](void* memory) {
          return kernels().power_iteration(pointer<const void>(weight), type, rows, cols, row_stride, iterations,
                                           pointer<float>(vector), pointer<float>(sigma), threads, memory);
        });
      },
      py::arg("weight"), py::arg("dtype"), py::arg("rows"), py::arg("cols"), py::arg("row_stride"),
      py::arg("iterations"), py::arg("vector"), py::arg("sigma"), py::arg("threads"), py::arg("workspace"),
      py::arg("workspace_bytes"));
  m.def(
      "score_attributes",
      [](const AttributeHead& head, uintptr_t data, const std::string& dtype, int64_t count, int64_t row_stride,
         int64_t col_stride, uintptr_t gate_data, int64_t gate_row_stride, int64_t gate_col_stride, uintptr_t summary,
         uintptr_t outputs, uintptr_t weights, int threads, uintptr_t workspace, size_t workspace_bytes) {
        const Rows rows = make_rows(data, dtype, count, row_stride, col_stride);
        const Rows gate_rows{pointer<const void>(gate_data), rows.dtype, count, gate_row_stride, gate_col_stride};
        const AttributeOut out{pointer<float>(summary), pointer<float>(outputs), pointer<float>(weights)};
        return run(workspace, workspace_bytes, [&](void* memory) {
          return kernels().score_attributes(head, rows, gate_rows, out, threads, memory);
        });
      },
      py::arg("head"), py::arg("data"), py::arg("dtype"), py::arg("count"), py::arg("row_stride"),
      py::arg("col_stride"), py::kw_only(), py::arg("gate_data"), py::arg("gate_row_stride"),
      py::arg("gate_col_stride"), py::arg("summary"), py::arg("outputs"), py::arg("weights"), py::arg("threads"),
      py::arg("workspace"), py::arg("workspace_bytes"));
  m.def(
      "read_all",
      [](uintptr_t data, int64_t bytes, int threads, int streams, int64_t ahead) {
        require(data != 0 && bytes > 0 && bytes % 64 == 0 && data % 64 == 0, "read_all: expected whole aligned lines");
        require(threads > 0 && ahead >= 0, "read_all: expected at least one thread, and to ask ahead");
        require(streams == 1 || streams == 2 || streams == 4, "read_all: expected 1, 2 or 4 streams");
        py::gil_scoped_release release;
        return read_all(pointer<const void>(data), bytes, threads, streams, ahead);
      },
      py::arg("data"), py::arg("bytes"), py::arg("threads"), py::arg("streams"), py::arg("ahead"));
  m.def(
      "multiply_all",
      [](const std::string& dtype, int64_t rounds, int threads) {
        const Dtype type = weight_dtype(dtype);
        require(rounds > 0 && threads > 0, "multiply_all: expected at least one round and one thread");
        py::gil_scoped_release release;
        return kernels().multiply_all(type, rounds, threads);
      },
      py::arg("dtype"), py::arg("rounds"), py::arg("threads"),
      "Multiply-adds on registers alone, as products with such weights take them; returns how many operations.");
}
