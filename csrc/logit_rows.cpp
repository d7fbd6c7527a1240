// The ops omnigrpo::logit_row_stats and omnigrpo::logit_row_grads_ on CPU tensors.
#include "logit_rows.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <tuple>

namespace omnigrpo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Rows per task: enough logits to be worth waking a thread.
constexpr int64_t kLogitsPerTask = 16384;

bool cpu_runs(const LogitRowKernels& kernels) {
#ifdef OMNIGRPO_X86_VARIANTS
  if (&kernels == &kLogitRowsAvx512) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  }
  if (&kernels == &kLogitRowsAvx2) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  }
#endif
  return &kernels == &kLogitRowsBaseline;
}

const LogitRowKernels* const kVariants[] = {
#ifdef OMNIGRPO_X86_VARIANTS
    &kLogitRowsAvx512,
    &kLogitRowsAvx2,
#endif
    &kLogitRowsBaseline,
};

const LogitRowKernels* widest() {
  for (const LogitRowKernels* variant : kVariants) {
    if (cpu_runs(*variant)) return variant;
  }
  return &kLogitRowsBaseline;
}

const LogitRowKernels*& active() {
  static const LogitRowKernels* kernels = widest();
  return kernels;
}

LogitType logit_type(const Tensor& logits) {
  switch (logits.scalar_type()) {
    case ScalarType::Float: return LogitType::kFloat32;
    case ScalarType::Double: return LogitType::kFloat64;
    case ScalarType::BFloat16: return LogitType::kBFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "omnigrpo: CPU logits must be float32, float64 or bfloat16; cast them first");
}

ScalarType stat_type(LogitType type) {
  return type == LogitType::kFloat64 ? ScalarType::Double : ScalarType::Float;
}

void check_logits(const Tensor& logits, const Tensor& targets, double temperature) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.size(1) > 0,
                  "omnigrpo: logits must be contiguous [rows, vocabulary] with a vocabulary, got ", logits.dim(),
                  " dimensions");
  STD_TORCH_CHECK(targets.dim() == 1 && targets.is_contiguous() && targets.scalar_type() == ScalarType::Long &&
                      targets.size(0) == logits.size(0),
                  "omnigrpo: targets must be contiguous int64 [rows] for ", logits.size(0), " rows");
  STD_TORCH_CHECK(temperature > 0, "omnigrpo: temperature must be above 0, got ", temperature);
  const int64_t* ids = targets.const_data_ptr<int64_t>();
  for (int64_t row = 0; row < targets.size(0); ++row) {
    STD_TORCH_CHECK(ids[row] >= 0 && ids[row] < logits.size(1), "omnigrpo: targets[", row, "] is ", ids[row],
                    "; it must be in [0, ", logits.size(1), ")");
  }
}

void check_stat(const char* name, const Tensor& stat, const Tensor& logits) {
  STD_TORCH_CHECK(stat.dim() == 1 && stat.is_contiguous() && stat.size(0) == logits.size(0) &&
                      stat.scalar_type() == stat_type(logit_type(logits)),
                  "omnigrpo: ", name, " must be contiguous [rows] in float32 (float64 for float64 logits) for ",
                  logits.size(0), " rows");
}

int64_t rows_per_task(int64_t vocabulary) { return std::max<int64_t>(1, kLogitsPerTask / vocabulary); }

std::tuple<Tensor, Tensor, Tensor> logit_row_stats(const Tensor& logits, const Tensor& targets, double temperature) {
  check_logits(logits, targets, temperature);
  const LogitType type = logit_type(logits);
  const int64_t rows = logits.size(0);
  Tensor logprob = torch::stable::new_empty(logits, {rows}, stat_type(type));
  Tensor entropy = torch::stable::new_empty(logits, {rows}, stat_type(type));
  Tensor lse = torch::stable::new_empty(logits, {rows}, stat_type(type));
  const LogitRowStats task{
      type,        logits.const_data_ptr(),    targets.const_data_ptr<int64_t>(), logits.size(1),
      temperature, logprob.mutable_data_ptr(), entropy.mutable_data_ptr(),        lse.mutable_data_ptr()};
  const LogitRowKernels& kernels = logit_row_kernels();
  torch::stable::parallel_for(0, rows, rows_per_task(task.vocabulary),
                              [&](int64_t begin, int64_t end) { kernels.stats(task, begin, end); });
  return {logprob, entropy, lse};
}

void logit_row_grads_(const Tensor& logits, const Tensor& targets, const Tensor& logprob, const Tensor& entropy,
                      const Tensor& lse, const Tensor& grad_logprob, const Tensor& grad_entropy,
                      const Tensor& grad_lse, double temperature) {
  check_logits(logits, targets, temperature);
  check_stat("logprob", logprob, logits);
  check_stat("entropy", entropy, logits);
  check_stat("lse", lse, logits);
  check_stat("grad_logprob", grad_logprob, logits);
  check_stat("grad_entropy", grad_entropy, logits);
  check_stat("grad_lse", grad_lse, logits);
  const LogitRowGrads task{logit_type(logits),
                           logits.mutable_data_ptr(),
                           targets.const_data_ptr<int64_t>(),
                           logits.size(1),
                           temperature,
                           logprob.const_data_ptr(),
                           entropy.const_data_ptr(),
                           lse.const_data_ptr(),
                           grad_logprob.const_data_ptr(),
                           grad_entropy.const_data_ptr(),
                           grad_lse.const_data_ptr()};
  const LogitRowKernels& kernels = logit_row_kernels();
  torch::stable::parallel_for(0, logits.size(0), rows_per_task(task.vocabulary),
                              [&](int64_t begin, int64_t end) { kernels.grads(task, begin, end); });
}

}  // namespace

const LogitRowKernels& logit_row_kernels() { return *active(); }

bool use_isa(const char* isa) {
  for (const LogitRowKernels* variant : kVariants) {
    if (std::strcmp(variant->isa, isa) == 0 && cpu_runs(*variant)) {
      active() = variant;
      return true;
    }
  }
  return false;
}

}  // namespace omnigrpo

STABLE_TORCH_LIBRARY_IMPL(omnigrpo, CPU, m) {
  m.impl("logit_row_stats", TORCH_BOX(&omnigrpo::logit_row_stats));
  m.impl("logit_row_grads_", TORCH_BOX(&omnigrpo::logit_row_grads_));
}
