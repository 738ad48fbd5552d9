// score_attributes: hidden rows → rewards of M multi-attribute heads, their spread and their disagreement.
//
//   o = V x                  z ← act(W_l z + b_l), l = 1 … L, z = x          w = last z + offset      (each of M heads)
//   normal: μ_k, log σ_k     act = SELU, or ReLU before w = softmax(w / temperature) · scale
//   r = Σ_k w_k μ_k          s = Σ_k w_k² σ_k²  (quantiles: variance of Σ_k w_k q_kj over j)
//   mean r, mean s, variance of r, max r − min r, max √(Σ_k σ_k⁴) over the heads
//
//   in   hidden (N, h), and rows that gates read where they are others; V (M · A · per, h), W_l (M, n_l, n_{l−1}) as
//        panels (pack.cpp); last (M, A, n_L), biases float32
//   out  (5, N) float32; o (N, M, A · per); w (N, M, A)
//
// Bytes: one read of the weights, e M (A · per · h + Σ n_l n_{l−1}), per chunk of rows, and of the rows; two layers as
// wide as h = 4096 in 16 bits are 67 MB a head. FLOP: twice as many products a row. Memory-bound up to B ≈ 12 in bf16
// on two AVX-512 cores, like `score`.
//
// Rows go in chunks whose activations stay in the outer cache. Stage 1 multiplies them with the panels of all value
// heads and of all gates' first layers; each further layer is a stage; threads claim panels. A panel of a gate's last
// hidden layer is never stored: its 64 activations meet `last` in float32 on the spot. The last stage adds those sums
// in a fixed order and finishes a row, so results depend neither on the number of threads nor on which rows share a
// call. A non-finite row spoils its own results only.
//
// Operands as in score.cpp: bf16 weights with AVX-512 bf16 dot products take rows and activations rounded to bf16, rows
// that hold more in two terms where they meet the value heads; every other combination multiplies in float32 with
// activations unrounded.
#include <cmath>

#include "kernels.h"
#include "stages.h"

namespace rmcore::cpu::RMCORE_ISA {
namespace {

constexpr int64_t kChunkRows = 384;     // of one head, as in score.cpp
constexpr int64_t kLeastChunk = 96;     // where many heads share the outer cache
constexpr float kSelu = 1.05070099f;    // λ
constexpr float kSeluLow = 1.7580993f;  // λ α

// What is infinite must not become a confident answer: both activations saturate below.
inline Vec selu(Vec x) {
  const Vec below = sub(zero(), larger(sub(zero(), x), zero()));
  return add(fma(splat(kSelu), larger(x, zero()), mul(splat(kSeluLow), exp_less_one(below))), sub(x, x));
}
inline Vec relu(Vec x) { return add(larger(x, zero()), sub(x, x)); }

template <class W>
class Attributes {
 public:
  using Act = typename W::Act;
  using Store = typename W::Store;

  Attributes(const AttributeHead& head, const Rows& rows, const Rows& gate_rows, const AttributeOut& out, int threads,
             Workspace& workspace)
      : head_(head), rows_(rows), gate_rows_(gate_rows), out_(out) {
    columns_ = head.members * head.attributes * head.per;
    value_panels_ = panels_of(columns_);
    const int64_t wanted = maximum(kChunkRows / head.members, kLeastChunk);
    chunk_ = ceil_div(rows.count, ceil_div(rows.count, wanted));
    task_rows_ = choose_task_rows(chunk_, value_panels_ + (head.depth > 0 ? gate_panels(0) : 0), threads);
    stride_ = act_stride<Act>(head.hidden);
    // Rows that hold more than bf16 meet the value heads, a thousandth of the work, in two terms.
    low_ = !Same<Act, float>::value && rows.dtype != Dtype::bf16 ? chunk_ * stride_ : 0;
    hidden_ = workspace.take<Act>(chunk_ * stride_ * (low_ != 0 ? 2 : 1));
    gate_hidden_ = gate_rows.data == nullptr ? hidden_ : workspace.take<Act>(chunk_ * stride_);
    int64_t widest = 0;
    for (int64_t l = 0; l + 1 < head.depth; ++l) widest = maximum(widest, head.widths[l]);
    layer_stride_ = act_stride<Act>(widest);
    for (int64_t l = 0; l < 2; ++l) {
      if (l + 1 < head.depth) layers_[l] = workspace.take<Act>(chunk_ * head.members * layer_stride_);
    }
    const int64_t parts = head.depth > 0 ? gate_panels(head.depth - 1) : 0;
    partial_ = workspace.take<float>(parts * chunk_ * head.attributes);
    acc_ = workspace.take_each<float>(threads, task_rows_ * kPanel);
    scratch_ = workspace.take_each<typename Wide<W>::Store>(threads, kConvertDepth * kPanel);
  }

  void run(Team& team) {
    for (int64_t start = 0; start < rows_.count; start += chunk_) {
      const int64_t count = minimum(chunk_, rows_.count - start);
      team.each(count, [&](int64_t r) {
        load_row(values_of(rows_, start + r), head_.hidden, hidden_ + r * stride_, low_, nullptr);
        if (gate_hidden_ != hidden_) {
          load_row(values_of(gate_rows_, start + r), head_.hidden, gate_hidden_ + r * stride_, 0, nullptr);
        }
      });
      first_stage(team, start, count);
      for (int64_t l = 1; l < head_.depth; ++l) layer_stage(team, l, count);
      team.each(count, [&](int64_t r) { finish(start, r); });
    }
  }

 private:
  RowValues values_of(const Rows& rows, int64_t row) const { return {rows, row, head_.hidden, head_.input_scale}; }

  // Panels of a layer of all gates, each gate's own.
  int64_t gate_panels(int64_t l) const { return head_.members * panels_of(head_.widths[l]); }
  int depth_of(int64_t columns) const { return static_cast<int>(round_up(columns, W::kStep)); }
  const Store* layer(int64_t l) const { return reinterpret_cast<const Store*>(head_.layers[l]); }

  // Value heads and first layers, whose operands are the rows.
  void first_stage(Team& team, int64_t start, int64_t count) {
    const int64_t groups = ceil_div(count, task_rows_), gates = head_.depth > 0 ? gate_panels(0) : 0;
    const int64_t tasks = (value_panels_ + gates) * groups;
    const int k = depth_of(head_.hidden);
    const auto weights_of = [&](int64_t panel) -> const Store* {
      if (panel < value_panels_) return static_cast<const Store*>(head_.value) + panel * k * kPanel;
      return layer(0) + (panel - value_panels_) * k * kPanel;
    };
    team.each_ahead(tasks, [&](int64_t task, int64_t following) {
      const int64_t panel = task / groups, first = task % groups * task_rows_;
      const int n = static_cast<int>(minimum(task_rows_, count - first));
      const bool value = panel < value_panels_;
      const auto* next = following < tasks ? weights_of(following / groups) : nullptr;
      float* acc = acc_[team.rank()];
      panel_product<W>(n, (value ? hidden_ : gate_hidden_) + first * stride_, stride_, value ? low_ : 0,
                       weights_of(panel), k, {}, acc, scratch_[team.rank()], next);
      if (value) {
        store_outputs(acc, panel, start + first, n);
      } else {
        finish_panel(acc, 0, panel - value_panels_, first, n);
      }
    });
  }

  void layer_stage(Team& team, int64_t l, int64_t count) {
    const int64_t groups = ceil_div(count, task_rows_), tasks = gate_panels(l) * groups;
    const int64_t panels = panels_of(head_.widths[l]), lda = head_.members * layer_stride_;
    const int k = depth_of(head_.widths[l - 1]);
    const Act* input = layers_[(l - 1) % 2];
    team.each_ahead(tasks, [&](int64_t task, int64_t following) {
      const int64_t panel = task / groups, first = task % groups * task_rows_;
      const int n = static_cast<int>(minimum(task_rows_, count - first));
      const auto* next = following < tasks ? layer(l) + following / groups * k * kPanel : nullptr;
      float* acc = acc_[team.rank()];
      panel_product<W>(n, input + first * lda + panel / panels * layer_stride_, lda, 0, layer(l) + panel * k * kPanel,
                       k, {}, acc, scratch_[team.rank()], next);
      finish_panel(acc, l, panel, first, n);
    });
  }

  void store_outputs(const float* acc, int64_t panel, int64_t row, int n) {
    const int64_t wide = minimum(kPanel, columns_ - panel * kPanel);
    for (int r = 0; r < n; ++r) {
      std::memcpy(out_.outputs + (row + r) * columns_ + panel * kPanel, acc + r * kPanel, sizeof(float) * wide);
    }
  }

  // 64 columns of layer l: bias and activation, then kept for the next layer, or what they add to the A weights.
  void finish_panel(float* acc, int64_t l, int64_t panel, int64_t first, int n) {
    const float* bias = reinterpret_cast<const float*>(head_.biases[l]) + panel * kPanel;
    for (int c = 0; c < kPanel; c += kWidth) {
      const Vec offset = load(bias + c);
      for (int r = 0; r < n; ++r) {
        float* z = acc + r * kPanel + c;
        const Vec x = add(load(z), offset);
        store(z, head_.softmax ? relu(x) : selu(x));
      }
    }
    const int64_t panels = panels_of(head_.widths[l]), member = panel / panels, column = panel % panels * kPanel;
    if (l + 1 < head_.depth) {
      for (int r = 0; r < n; ++r) {
        Act* to = layers_[l % 2] + ((first + r) * head_.members + member) * layer_stride_ + column;
        for (int c = 0; c < kPanel; c += kWidth) store_act(to + c, load(acc + r * kPanel + c));
      }
      return;
    }
    const float* last = head_.last + member * head_.attributes * panels * kPanel + column;
    float* partial = partial_ + (panel * chunk_ + first) * head_.attributes;
    for (int64_t a = 0; a < head_.attributes; ++a, last += panels * kPanel) {
      for (int r = 0; r < n; ++r) {
        Vec total = zero();
        for (int c = 0; c < kPanel; c += kWidth) total = fma(load(acc + r * kPanel + c), load(last + c), total);
        partial[r * head_.attributes + a] = sum(total);
      }
    }
  }

  // The A weights of head m for row r of the chunk.
  void attribute_weights(int64_t m, int64_t r, float* w) const {
    const int64_t count = head_.attributes;
    for (int64_t a = 0; a < count; ++a) w[a] = head_.offset[m * count + a];
    if (head_.depth == 0) return;
    const int64_t panels = panels_of(head_.widths[head_.depth - 1]);
    for (int64_t p = 0; p < panels; ++p) {
      const float* partial = partial_ + ((m * panels + p) * chunk_ + r) * count;
      for (int64_t a = 0; a < count; ++a) w[a] += partial[a];
    }
    if (!head_.softmax) return;
    float most = w[0], total = 0.0f;
    for (int64_t a = 1; a < count; ++a) most = w[a] > most ? w[a] : most;
    for (int64_t a = 0; a < count; ++a) total += w[a] = std::exp((w[a] - most) / head_.temperature);
    const float scale = (head_.softmax_scale == nullptr ? 1.0f : head_.softmax_scale[m]) / total;
    for (int64_t a = 0; a < count; ++a) w[a] *= scale;
  }

  struct Moments {
    float reward, variance, norm;
  };

  // Of normals o (A, 2).
  Moments normals(const float* o, const float* w) const {
    Moments found{0.0f, 0.0f, 0.0f};
    for (int64_t a = 0; a < head_.attributes; ++a) {
      const float sigma = std::exp(o[2 * a + 1]), square = sigma * sigma;
      found.reward += w[a] * o[2 * a];
      found.variance += w[a] * w[a] * square;
      found.norm += square * square;
    }
    found.norm = std::sqrt(found.norm);
    return found;
  }

  // Of quantiles o (A, per), which have no covariance.
  Moments quantiles(const float* o, const float* w) const {
    const auto score = [&](int64_t j) {
      float total = 0.0f;
      for (int64_t a = 0; a < head_.attributes; ++a) total += w[a] * o[a * head_.per + j];
      return total;
    };
    const float count = static_cast<float>(head_.per);
    Moments found{0.0f, 0.0f, NAN};
    for (int64_t j = 0; j < head_.per; ++j) found.reward += score(j);
    found.reward /= count;
    for (int64_t j = 0; j < head_.per; ++j) found.variance += (score(j) - found.reward) * (score(j) - found.reward);
    found.variance /= count;
    return found;
  }

  void finish(int64_t start, int64_t r) {
    const int64_t n = start + r, members = head_.members, total = rows_.count;
    const float* outputs = out_.outputs + n * columns_;
    float* weights = out_.weights + n * members * head_.attributes;
    float mean = 0.0f, variance = 0.0f, norm = 0.0f, low = INFINITY, high = -INFINITY, spoilt = 0.0f;
    float centre = 0.0f, sum = 0.0f, squares = 0.0f;  // of rewards less the first, which keeps their differences exact
    for (int64_t m = 0; m < members; ++m) {
      const float* o = outputs + m * head_.attributes * head_.per;
      float* w = weights + m * head_.attributes;
      attribute_weights(m, r, w);
      const Moments found = head_.normal ? normals(o, w) : quantiles(o, w);
      if (m == 0) centre = found.reward;
      const float apart = found.reward - centre;
      sum += apart;
      squares += apart * apart;
      mean += found.reward;
      variance += found.variance;
      norm = found.norm > norm || std::isnan(found.norm) ? found.norm : norm;
      low = found.reward < low ? found.reward : low;
      high = found.reward > high ? found.reward : high;
      spoilt += found.reward - found.reward;
    }
    const float count = static_cast<float>(members);
    const float spread = squares - sum * sum / count;
    out_.summary[n] = mean / count;
    out_.summary[total + n] = variance / count;
    out_.summary[2 * total + n] = members == 1 ? spoilt : (spread > 0 ? spread : 0.0f) / (count - 1) + spoilt;
    out_.summary[3 * total + n] = high - low + spoilt;
    out_.summary[4 * total + n] = norm;
  }

  const AttributeHead& head_;
  const Rows& rows_;
  const Rows& gate_rows_;
  const AttributeOut& out_;
  int64_t columns_, value_panels_, chunk_, task_rows_, stride_, low_, layer_stride_;
  Act* hidden_;
  Act* gate_hidden_;
  Act* layers_[2] = {};  // (chunk, M, width) activations of one layer and of the next, in turn
  float* partial_;       // (M · panels, chunk, A)
  Workspace::PerThread<float> acc_;
  Workspace::PerThread<typename Wide<W>::Store> scratch_;
};

}  // namespace

size_t score_attributes(const AttributeHead& head, const Rows& rows, const Rows& gate_rows, const AttributeOut& out,
                        int threads, void* memory) {
  if (rows.count == 0) return 0;
  return with_weight_type(head.dtype, [&](auto weight) {
    Workspace workspace(memory);
    Attributes<decltype(weight)> attributes(head, rows, gate_rows, out, threads, workspace);
    if (!workspace.counting()) parallel(threads, [&](Team& team) { attributes.run(team); });
    return workspace.used();
  });
}

}  // namespace rmcore::cpu::RMCORE_ISA
