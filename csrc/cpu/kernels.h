// What the kernels take: plain views of memory that Python owns. One declaration of each kernel per instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace rmcore::cpu {

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2, f64 = 3, i8 = 4 };

constexpr int kPanel = 64;  // columns of a weight panel

// Rows x, any strides (in elements).
struct Rows {
  const void* data;
  Dtype dtype;
  int64_t count;
  int64_t row_stride;
  int64_t col_stride;
};

// Two neighbours of a row of int8 weights, k = 2 pair and the next one. A list of them has kFarAhead more behind its
// last one, of some pair that there is: what they meet is asked for before it is known that they do not count.
constexpr int kFarAhead = 8;
struct FarPair {
  int32_t pair;
  int16_t weights[2];
};

// What int8 panels of a matrix come with, padded to whole panels: the factor of each row of the matrix, the sum of its
// whole numbers, and which of its pairs of neighbours, k and k + 1 for even k, have one sign and add up to more than
// 128 in magnitude (saturation.h). nullptr for other weights.
struct Quantized {
  const float* scale;
  const int32_t* sum;
  const int64_t* far_first;  // where each row's begin in far_pairs, and where the last one's end
  const FarPair* far_pairs;
};

// A FeatureMap in packed form. `layer` and `projection` are panels (pack.cpp), nullptr where the map has none; bias
// and phase are padded with zeros to whole panels. int8 maps are a projection without a layer.
struct Map {
  Dtype dtype;
  bool cosine;  // c = cos 2πt, else c = t
  bool tanh;
  bool layernorm;
  int64_t hidden;      // h
  int64_t layer_size;  // m, with a layer
  int64_t features;    // D
  const void* layer;
  const float* layer_bias;
  const void* projection;
  const float* phase;
  float input_scale;
  Quantized projection_int8;
  const float* hidden_shift;  // (h) taken from rows first, or nullptr
  const float* hidden_scale;  // (h) multiplied into rows then, or nullptr; only with hidden_shift
};

// HeadWeights in packed form: β padded with zeros to whole panels, U as triangular panels.
struct Head {
  Map map;
  const float* beta;
  const void* factor;
  float beta0;
  float factor_scale;
  float amplitude;
  Quantized factor_int8;         // U without its diagonal
  const float* factor_diagonal;  // padded with zeros to whole panels; int8 only
};

struct AccumulateTask {
  const float* beta;  // for c, padded
  float beta0;
  bool logistic;
  float feature_scale;
  const float* labels;         // (N)
  const float* sample_weight;  // (N) or nullptr
  const float* features;       // (R, ldf) c of every row, in pairs mode; else nullptr
  int64_t features_stride;
  const int64_t* pairs;  // (N, 2) or nullptr
  int64_t count;         // N
  void* precision;       // (D, D), lower triangle
  bool precision_double;
  void* gradient;  // (D)
  bool gradient_double;
  double* log_likelihood;  // (1)
};

// AttributeWeights in packed form: M heads of A attributes with `per` outputs each. Without a gate `depth` is 0, `last`
// is nullptr and `offset` holds the fixed weights. What is said to be padded is padded with zeros to whole panels.
struct AttributeHead {
  Dtype dtype;
  int64_t hidden;      // h
  int64_t members;     // M
  int64_t attributes;  // A
  int64_t per;         // outputs an attribute
  bool normal;         // mean and log σ, else quantiles
  bool softmax;        // ReLU between the gates' layers and a softmax behind them, else SELU
  float temperature;
  float input_scale;
  const void* value;           // panels of (M · A · per, h)
  int64_t depth;               // hidden layers of a gate
  const int64_t* widths;       // (depth)
  const uint64_t* layers;      // (depth) addresses: panels of (M · padded width, width before)
  const uint64_t* biases;      // (depth) addresses: (M, padded width) float
  const float* last;           // (M, A, padded width)
  const float* offset;         // (M, A)
  const float* softmax_scale;  // (M) or nullptr
};

// What score_attributes writes: (5, N), (N, M · A · per), (N, M · A).
struct AttributeOut {
  float* summary;
  float* outputs;
  float* weights;
};

// Every kernel writes through its pointers and keeps its temporaries in `workspace`; with a null workspace it touches
// nothing. All return the bytes of workspace these arguments need; multiply_all has none, and returns operations.
#define RMCORE_DECLARE_KERNELS                                                                                         \
  void pack_panels(const void* matrix, Dtype dtype, int64_t rows, int64_t cols, void* panels, int threads);            \
  void pack_factor(const void* tiles, Dtype dtype, int64_t size, void* panels, int threads);                           \
  size_t score(const Head& head, const Rows& rows, float* out, int threads, void* workspace);                          \
  size_t features(const Map& map, const Rows& rows, float* out, int64_t out_stride, int threads, void* workspace);     \
  size_t accumulate(const Map& map, const Rows& rows, const AccumulateTask& task, int threads, void* workspace);       \
  size_t pair_variance(const Head& head, const Rows& rows, const int64_t* group_sizes, int64_t groups, float* logits,  \
                       float* variances, int threads, void* workspace);                                                \
  size_t power_iteration(const void* weight, Dtype dtype, int64_t rows, int64_t cols, int64_t row_stride,              \
                         int iterations, float* vector, float* sigma, int threads, void* workspace);                   \
  size_t score_attributes(const AttributeHead& head, const Rows& rows, const Rows& gate_rows, const AttributeOut& out, \
                          int threads, void* workspace);                                                               \
  size_t multiply_all(Dtype dtype, int64_t rounds, int threads);

namespace scalar {
RMCORE_DECLARE_KERNELS
}
namespace avx2 {
RMCORE_DECLARE_KERNELS
}
namespace avx512 {
RMCORE_DECLARE_KERNELS
}
namespace avx512_vnni {
RMCORE_DECLARE_KERNELS
}
namespace avx512_bf16 {
RMCORE_DECLARE_KERNELS
}

// The kernels of one instruction set.
struct Kernels {
  decltype(&scalar::pack_panels) pack_panels;
  decltype(&scalar::pack_factor) pack_factor;
  decltype(&scalar::score) score;
  decltype(&scalar::features) features;
  decltype(&scalar::accumulate) accumulate;
  decltype(&scalar::pair_variance) pair_variance;
  decltype(&scalar::power_iteration) power_iteration;
  decltype(&scalar::score_attributes) score_attributes;
  decltype(&scalar::multiply_all) multiply_all;
};

// Those of active_isa().
const Kernels& kernels();

}  // namespace rmcore::cpu
