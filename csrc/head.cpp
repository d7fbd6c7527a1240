// The ops omnigrpo::head_exps and omnigrpo::head_gradients on CPU tensors: checks, buffers, threads.
//
// head_exps      exps[v][t] = 2^(z_tv log2(e) - offset[t]) with z = hidden weight^T / temperature, one GEMM whose
//                epilogue makes the exponentials in registers; logits never reach memory.
// head_gradients grad_hidden = row_scale * (exps^T weight) and grad_weight = exps (row_scale * hidden): two GEMMs.
#include "head.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <optional>
#include <tuple>
#include <vector>

namespace omnigrpo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::parallel_for;

// Columns of the vocabulary that share one set of partial sums, up to a whole tile: float32 sums of more lose digits.
constexpr int64_t kColumnsPerRun = 448;
// A logit that exceeds its row's offset by more binades than this has the pass done again with a better offset.
constexpr double kHeadroom = 60;
// Of the largest vector, which streaming stores need.
constexpr uintptr_t kVectorAlignment = 64;
constexpr double kLog2E = 1.4426950408889634;

#ifdef OMNIGRPO_X86_VARIANTS
// Whether the CPU has AMX-BF16 and the kernel saves its registers; a process must ask for that once.
bool amx_bf16_permitted() {
#ifdef __linux__
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

bool cpu_runs(const HeadKernels& kernels) {
#ifdef OMNIGRPO_X86_VARIANTS
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("fma");
  const bool avx512_bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  if (&kernels == &kHeadAmx) return avx512_bf16 && amx_bf16_permitted();
  if (&kernels == &kHeadAvx512Bf16) return avx512_bf16;
  if (&kernels == &kHeadAvx512) return avx512;
  if (&kernels == &kHeadAvx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return &kernels == &kHeadBaseline;
}

const HeadKernels* const kVariants[] = {
#ifdef OMNIGRPO_X86_VARIANTS
    &kHeadAmx,
    &kHeadAvx512Bf16,
    &kHeadAvx512,
    &kHeadAvx2,
#endif
    &kHeadBaseline,
};

const HeadKernels* widest() {
  for (const HeadKernels* variant : kVariants) {
    if (cpu_runs(*variant)) return variant;
  }
  return &kHeadBaseline;
}

const HeadKernels*& active() {
  static const HeadKernels* kernels = widest();
  return kernels;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

HeadType head_type(const Tensor& hidden) {
  switch (hidden.scalar_type()) {
    case ScalarType::Float: return HeadType::kFloat32;
    case ScalarType::Double: return HeadType::kFloat64;
    case ScalarType::BFloat16: return HeadType::kBFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "omnigrpo: on the CPU hidden must be float32, float64 or bfloat16; cast it first");
}

ScalarType stat_type(HeadType type) { return type == HeadType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

// Of a packed operand that is summed over `count` numbers.
int64_t steps_of(const HeadTile& tile, int64_t count) { return round_up(ceil_div(count, tile.depth), tile.step_multiple); }

Tensor bytes(const Tensor& like, int64_t count) { return torch::stable::new_empty(like, {count}, ScalarType::Byte); }

// A vector of Stat that is read and written as double.
class Stats {
 public:
  Stats(const Tensor& like, HeadType type, int64_t size)
      : tensor_(torch::stable::new_empty(like, {size}, stat_type(type))), type_(type) {}
  const Tensor& tensor() const { return tensor_; }
  void* data() const { return tensor_.mutable_data_ptr(); }
  double operator[](int64_t i) const {
    return type_ == HeadType::kFloat64 ? static_cast<const double*>(data())[i] : static_cast<const float*>(data())[i];
  }
  void set(int64_t i, double value) const {
    if (type_ == HeadType::kFloat64) static_cast<double*>(data())[i] = value;
    else static_cast<float*>(data())[i] = static_cast<float>(value);
  }

 private:
  Tensor tensor_;
  HeadType type_;
};

double number(HeadType type, const void* data, int64_t i) {
  if (type == HeadType::kFloat64) return static_cast<const double*>(data)[i];
  if (type == HeadType::kFloat32) return static_cast<const float*>(data)[i];
  const uint32_t bits = static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i]) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

double stat(HeadType type, const void* data, int64_t i) {
  return number(type == HeadType::kFloat64 ? type : HeadType::kFloat32, data, i);
}

void check_matrices(const Tensor& hidden, const Tensor& weight) {
  STD_TORCH_CHECK(hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && weight.size(0) > 0 &&
                      weight.size(1) > 0 && hidden.is_contiguous() && weight.is_contiguous() &&
                      hidden.scalar_type() == weight.scalar_type(),
                  "omnigrpo: hidden [T, D] and weight [V, D] must be contiguous and of one dtype");
}

void check_index(const char* name, const Tensor& index, int64_t size) {
  STD_TORCH_CHECK(index.dim() == 1 && index.is_contiguous() && index.scalar_type() == ScalarType::Long,
                  "omnigrpo: ", name, " must be contiguous int64, one-dimensional");
  const int64_t* data = index.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < index.size(0); ++i) {
    STD_TORCH_CHECK(data[i] >= 0 && data[i] < size, "omnigrpo: ", name, "[", i, "] is ", data[i],
                    "; it must be in [0, ", size, ")");
  }
}

// log2(e) times the largest logit among each row's targets, rounded: an offset that keeps the row's exponentials in
// range unless all of its targets are next to impossible. Rows are ascending.
void target_offsets(const Tensor& hidden, const Tensor& weight, const int64_t* rows, const int64_t* targets,
                    int64_t num_pairs, double temperature, const Stats& offset) {
  const HeadType type = head_type(hidden);
  const int64_t width = hidden.size(1);
  const void* h = hidden.const_data_ptr();
  const void* w = weight.const_data_ptr();
  std::vector<double> logits(num_pairs);
  parallel_for(0, num_pairs, 16, [&](int64_t begin, int64_t end) {
    for (int64_t pair = begin; pair < end; ++pair) {
      double logit = 0;
      for (int64_t d = 0; d < width; ++d) {
        logit += number(type, h, rows[pair] * width + d) * number(type, w, targets[pair] * width + d);
      }
      logits[pair] = std::nearbyint(logit * kLog2E / temperature);
    }
  });
  for (int64_t pair = 0; pair < num_pairs; ++pair) {
    const bool first = pair == 0 || rows[pair - 1] != rows[pair];
    offset.set(rows[pair], first ? logits[pair] : std::max(offset[rows[pair]], logits[pair]));
  }
}

// Totals over the runs, in their order.
void merge(const HeadExps& task, int64_t num_rows, const Stats& others, const Stats& weighted, const Stats& maxima) {
  const int64_t runs = ceil_div(task.vocabulary, task.run);
  parallel_for(0, num_rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      double sum = 0, weighted_sum = 0, maximum = -HUGE_VAL;
      for (int64_t run = 0; run < runs; ++run) {
        const int64_t at = run * 3 * task.padded + t;
        sum += stat(task.type, task.partials, at);
        weighted_sum += stat(task.type, task.partials, at + task.padded);
        maximum = std::max(maximum, stat(task.type, task.partials, at + 2 * task.padded));
      }
      others.set(t, sum);
      weighted.set(t, weighted_sum);
      maxima.set(t, maximum);
    }
  });
}

// Moves the offset of every row that has too little room for its maximum; true when there is one.
bool make_room(int64_t num_rows, const Stats& maxima, const Stats& offset) {
  bool moved = false;
  for (int64_t t = 0; t < num_rows; ++t) {
    if (!(maxima[t] > kHeadroom) || !std::isfinite(maxima[t])) continue;
    offset.set(t, offset[t] + std::nearbyint(maxima[t]));
    moved = true;
  }
  return moved;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> head_exps(const Tensor& hidden, const Tensor& weight,
                                                             const Tensor& pair_rows, const Tensor& pair_targets,
                                                             double temperature, bool store) {
  check_matrices(hidden, weight);
  check_index("pair_rows", pair_rows, hidden.size(0));
  check_index("pair_targets", pair_targets, weight.size(0));
  STD_TORCH_CHECK(pair_rows.size(0) == pair_targets.size(0), "omnigrpo: one row for each target");
  STD_TORCH_CHECK(temperature > 0, "omnigrpo: temperature must be above 0, got ", temperature);
  const HeadType type = head_type(hidden);
  const HeadKernels& kernels = head_kernels();
  const HeadTile tile = kernels.tile(type);
  const int64_t num_rows = hidden.size(0), width = hidden.size(1), vocabulary = weight.size(0);
  const int64_t padded = round_up(num_rows, kRowMultiple), num_pairs = pair_rows.size(0);
  const int64_t* rows = pair_rows.const_data_ptr<int64_t>();
  const int64_t* targets = pair_targets.const_data_ptr<int64_t>();

  std::vector<int64_t> order(num_pairs);
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return std::tie(targets[a], rows[a]) < std::tie(targets[b], rows[b]);
  });
  std::vector<int64_t> sorted_rows(num_pairs), sorted_targets(num_pairs);
  for (int64_t i = 0; i < num_pairs; ++i) {
    sorted_rows[i] = rows[order[i]];
    sorted_targets[i] = targets[order[i]];
  }

  const int64_t run = round_up(kColumnsPerRun, tile.rows), runs = ceil_div(vocabulary, run);
  const Tensor panels = bytes(hidden, padded * steps_of(tile, width) * tile.element_bytes);
  const Stats offset(hidden, type, padded), others(hidden, type, num_rows), weighted(hidden, type, num_rows);
  const Stats maxima(hidden, type, num_rows);
  const Stats sorted_logits(hidden, type, num_pairs), logits(hidden, type, num_pairs);
  const Stats partials(hidden, type, runs * 3 * padded);
  const Tensor exps = torch::stable::new_empty(hidden, {padded, store ? round_up(vocabulary, kColumnMultiple) : 0});
  for (int64_t t = 0; t < padded; ++t) offset.set(t, 0);
  target_offsets(hidden, weight, rows, targets, num_pairs, temperature, offset);

  const PackHidden pack{type, hidden.const_data_ptr(), num_rows, width, panels.mutable_data_ptr()};
  parallel_for(0, padded / tile.lanes, 1, [&](int64_t begin, int64_t end) { kernels.pack_hidden(pack, begin, end); });
  const HeadExps task{type,
                      panels.const_data_ptr(),
                      weight.const_data_ptr(),
                      width,
                      vocabulary,
                      padded,
                      offset.data(),
                      temperature,
                      sorted_rows.data(),
                      sorted_targets.data(),
                      num_pairs,
                      sorted_logits.data(),
                      store ? exps.mutable_data_ptr() : nullptr,
                      run,
                      partials.data()};
  const auto pass = [&] {
    parallel_for(0, runs, 1, [&](int64_t begin, int64_t end) { kernels.exps(task, begin, end); });
    merge(task, num_rows, others, weighted, maxima);
  };
  if (num_rows > 0) pass();
  if (make_room(num_rows, maxima, offset)) pass();  // Now every row's own maximum is its offset.
  for (int64_t i = 0; i < num_pairs; ++i) logits.set(order[i], sorted_logits[i]);
  Tensor padded_offset = offset.tensor();
  return {exps, torch::stable::narrow(padded_offset, 0, 0, num_rows), others.tensor(), weighted.tensor(),
          logits.tensor()};
}

void check_stats(const char* name, const Tensor& stats, HeadType type, int64_t size) {
  STD_TORCH_CHECK(stats.dim() == 1 && stats.is_contiguous() && stats.size(0) == size &&
                      stats.scalar_type() == stat_type(type),
                  "omnigrpo: ", name, " must be contiguous float32 (float64 for float64), one for each of the ", size,
                  " live rows");
}

void reweight(const HeadKernels& kernels, HeadType type, const Tensor& exps, int64_t steps, const Tensor& alpha,
              const Tensor& beta) {
  const int64_t live = alpha.size(0), padded = round_up(live, kRowMultiple);
  const Stats alpha_padded(exps, type, padded), beta_padded(exps, type, padded);
  for (int64_t t = 0; t < padded; ++t) {
    alpha_padded.set(t, t < live ? stat(type, alpha.const_data_ptr(), t) : 0);
    beta_padded.set(t, t < live ? stat(type, beta.const_data_ptr(), t) : 0);
  }
  const HeadReweight task{type, exps.mutable_data_ptr(), steps, padded, alpha_padded.data(), beta_padded.data()};
  parallel_for(0, steps, 64, [&](int64_t begin, int64_t end) { kernels.reweight(task, begin, end); });
}

Tensor hidden_gradient(const HeadKernels& kernels, HeadType type, const Tensor& exps, const Tensor& weight,
                       const Tensor& row_scale) {
  const HeadTile tile = kernels.tile(type);
  const int64_t live = row_scale.size(0), width = weight.size(1);
  const int64_t lanes = round_up(live, tile.lanes), panels = ceil_div(width, tile.rows);
  const Tensor tiles = torch::stable::new_zeros(exps, {panels * tile.rows, lanes}, stat_type(type));
  const HiddenGrad task{type,  exps.const_data_ptr(), weight.const_data_ptr(), weight.size(0),
                        width, lanes,                 tiles.mutable_data_ptr()};
  parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) { kernels.hidden_grad(task, begin, end); });
  const Tensor grad = torch::stable::new_empty(exps, {live, width}, stat_type(type));
  const HiddenGradFinish finish{type,  tiles.const_data_ptr(),     lanes, live,
                                width, row_scale.const_data_ptr(), grad.mutable_data_ptr()};
  parallel_for(0, lanes / tile.lanes, 1, [&](int64_t begin, int64_t end) { kernels.finish_hidden_grad(finish, begin, end); });
  return grad;
}

void weight_gradient(const HeadKernels& kernels, HeadType type, const Tensor& exps, const Tensor& hidden,
                     const Tensor& row_scale, const Tensor& grad_weight, bool accumulate) {
  const HeadTile tile = kernels.tile(type);
  const int64_t live = hidden.size(0), width = hidden.size(1), panels = ceil_div(width, tile.lanes);
  const Tensor scaled = torch::stable::new_empty(hidden, {live, width});
  const ScaleRows scale{type, hidden.const_data_ptr(), width, row_scale.const_data_ptr(), scaled.mutable_data_ptr()};
  parallel_for(0, live, 16, [&](int64_t begin, int64_t end) { kernels.scale_rows(scale, begin, end); });
  const Tensor packed = bytes(hidden, panels * tile.lanes * steps_of(tile, live) * tile.element_bytes);
  const PackScaled pack{type, scaled.const_data_ptr(), live, width, packed.mutable_data_ptr()};
  parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) { kernels.pack_scaled(pack, begin, end); });
  const WeightGrad task{type,  exps.const_data_ptr(), grad_weight.size(0),
                        live,  packed.const_data_ptr(), width,
                        grad_weight.mutable_data_ptr(), accumulate};
  parallel_for(0, ceil_div(grad_weight.size(0), tile.rows), 8,
               [&](int64_t begin, int64_t end) { kernels.weight_grad(task, begin, end); });
}

Tensor head_gradients(const Tensor& exps, const Tensor& hidden, const Tensor& weight, const Tensor& live,
                      const Tensor& row_scale, const std::optional<Tensor>& alpha, const std::optional<Tensor>& beta,
                      const std::optional<Tensor>& grad_weight, bool accumulate, bool want_hidden) {
  check_matrices(hidden, weight);
  const HeadType type = head_type(hidden);
  const int64_t num_live = hidden.size(0);
  check_index("live", live, exps.dim() == 2 ? exps.size(0) : 0);
  check_stats("row_scale", row_scale, type, num_live);
  STD_TORCH_CHECK(exps.dim() == 2 && exps.is_contiguous() &&
                      exps.size(0) % kRowMultiple == 0 &&
                      exps.size(1) == round_up(weight.size(0), kColumnMultiple) &&
                      reinterpret_cast<uintptr_t>(exps.const_data_ptr()) % kVectorAlignment == 0 &&
                      exps.scalar_type() == hidden.scalar_type() && live.size(0) == num_live,
                  "omnigrpo: exps must come from head_exps with the same weight, and hidden hold its live rows");
  STD_TORCH_CHECK(alpha.has_value() == beta.has_value(), "omnigrpo: give alpha and beta, or neither");
  const HeadKernels& kernels = head_kernels();
  const int64_t steps = ceil_div(weight.size(0), kernels.tile(type).depth);
  std::vector<int64_t> from, to;
  for (int64_t i = 0; i < num_live; ++i) {
    const int64_t t = live.const_data_ptr<int64_t>()[i];
    STD_TORCH_CHECK(t >= i, "omnigrpo: live[", i, "] is ", t, "; a row can only move up");
    if (t == i) continue;
    from.push_back(t);
    to.push_back(i);
  }
  if (!from.empty()) {
    const HeadCompact task{type,        exps.mutable_data_ptr(), steps, from.data(), to.data(),
                           static_cast<int64_t>(from.size())};
    parallel_for(0, steps, 64, [&](int64_t begin, int64_t end) { kernels.compact(task, begin, end); });
  }
  if (alpha.has_value()) {
    check_stats("alpha", *alpha, type, num_live);
    check_stats("beta", *beta, type, num_live);
    reweight(kernels, type, exps, steps, *alpha, *beta);
  }
  if (grad_weight.has_value()) {
    STD_TORCH_CHECK(grad_weight->dim() == 2 && grad_weight->is_contiguous() && grad_weight->size(0) == weight.size(0) &&
                        grad_weight->size(1) == weight.size(1) && grad_weight->scalar_type() == stat_type(type),
                    "omnigrpo: grad_weight must be contiguous float32 (float64 for float64) of weight's shape");
    weight_gradient(kernels, type, exps, hidden, row_scale, *grad_weight, accumulate);
  }
  if (!want_hidden) return torch::stable::new_empty(hidden, {0, hidden.size(1)}, stat_type(type));
  return hidden_gradient(kernels, type, exps, weight, row_scale);
}

}  // namespace

const HeadKernels& head_kernels() { return *active(); }

bool use_isa(const char* isa) {
  for (const HeadKernels* variant : kVariants) {
    if (std::strcmp(variant->isa, isa) == 0 && cpu_runs(*variant)) {
      active() = variant;
      return true;
    }
  }
  return false;
}

}  // namespace omnigrpo

STABLE_TORCH_LIBRARY_IMPL(omnigrpo, CPU, m) {
  m.impl("head_exps", TORCH_BOX(&omnigrpo::head_exps));
  m.impl("head_gradients", TORCH_BOX(&omnigrpo::head_gradients));
}
