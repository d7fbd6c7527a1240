// Row statistics of a logits matrix and their gradient: what the op wrappers and the per-ISA kernels agree on.
//
// This header is included before `#pragma GCC target`, so it holds declarations only: an inline function shared by
// two ISAs could otherwise be linked from the wrong one and fault on an older CPU.
#pragma once

#include <cstdint>

namespace omnigrpo {

enum class LogitType { kFloat32, kFloat64, kBFloat16 };

// `Stat` is float for float32 and bfloat16 logits, double for float64.
struct LogitRowStats {
  LogitType type;
  const void* logits;       // [rows, vocabulary], row-major
  const int64_t* targets;   // [rows], each in [0, vocabulary)
  int64_t vocabulary;
  double temperature;
  void* logprob;            // Stat [rows]: natural log-prob of the target under softmax(logits / temperature)
  void* entropy;            // Stat [rows]: nats
  void* lse;                // Stat [rows]: logsumexp(logits / temperature)
};

struct LogitRowGrads {
  LogitType type;
  void* logits;             // [rows, vocabulary]: read, then overwritten with the gradient w.r.t. the logits
  const int64_t* targets;
  int64_t vocabulary;
  double temperature;
  const void* logprob;      // Stat [rows], from LogitRowStats of the same logits
  const void* entropy;
  const void* lse;
  const void* grad_logprob; // Stat [rows], upstream
  const void* grad_entropy;
  const void* grad_lse;
};

struct LogitRowKernels {
  const char* isa;
  void (*stats)(const LogitRowStats&, int64_t row_begin, int64_t row_end);
  void (*grads)(const LogitRowGrads&, int64_t row_begin, int64_t row_end);
};

extern const LogitRowKernels kLogitRowsBaseline;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define OMNIGRPO_X86_VARIANTS 1
extern const LogitRowKernels kLogitRowsAvx2;
extern const LogitRowKernels kLogitRowsAvx512;
#endif

// The kernels in use: the widest that this CPU runs, unless `use_isa` chose another.
const LogitRowKernels& logit_row_kernels();
// False when the name is unknown or this CPU cannot run it.
bool use_isa(const char* isa);

}  // namespace omnigrpo
