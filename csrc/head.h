// The vocabulary head on CPU: what the op wrappers (head.cpp) and the kernels of each instruction set agree on.
//
// Legend: T rows of hidden states, D width, V vocabulary. All matrix products run as blocks of `rows` by `lanes`
// accumulators, which stay in registers; `lanes` is the panel width of packed operands.
//
// This header is included before `#pragma GCC target`, so it holds declarations only: an inline function shared by
// two ISAs could otherwise be linked from the wrong one and fault on an older CPU.
#pragma once

#include <cstdint>

namespace omnigrpo {

enum class HeadType { kFloat32, kFloat64, kBFloat16 };

// `Stat` is float for float32 and bfloat16 inputs, double for float64. A packed element is one Stat, or a pair of
// bfloat16 that lie next to each other along the summed dimension (depth 2).
struct HeadTile {
  int64_t rows;
  int64_t lanes;
  int64_t depth;
  int64_t step_multiple;  // a packed operand has that many elements along the summed dimension, or a multiple of it
  int64_t element_bytes;
};

// Panels of a matrix whose summed dimension is contiguous: [T / lanes][steps][lanes] elements, where `steps` is D / depth
// rounded up to whole ones and to the tile's multiple; what is beyond D is 0.
struct PackHidden {
  HeadType type;
  const void* hidden;  // [T, D]
  int64_t num_rows;    // T
  int64_t width;       // D
  void* panels;
};

// exps[v][t] = 2^(z_tv log2(e) - offset[t]) with z = hidden weight^T / temperature, 0 where v is a target of t.
// Stored in the input's dtype as [padded / lanes][ceil(V / depth)][lanes][depth]: a panel of it is a packed operand of
// the hidden gradient as it stands. Whatever the tile, that fits kRowMultiple-fold T times kColumnMultiple-fold V.
constexpr int64_t kRowMultiple = 32;
constexpr int64_t kColumnMultiple = 2;
struct HeadExps {
  HeadType type;
  const void* panels;  // hidden, packed by PackHidden
  const void* weight;  // [V, D]
  int64_t width;       // D
  int64_t vocabulary;  // V
  int64_t padded;      // T rounded up to whole panels
  const void* offset;  // Stat [padded]
  double temperature;
  const int64_t* pair_rows;     // [pairs], sorted by target
  const int64_t* pair_targets;  // [pairs], ascending
  int64_t num_pairs;
  void* pair_logits;   // Stat [pairs]: z of the target, in nats
  void* exps;          // stored, see below, or null
  int64_t run;         // columns of the vocabulary that share one set of partial sums
  void* partials;      // Stat [ceil(V / run)][3][padded]: sum E, sum E log2(E), max log2(E), targets left out
};

// exps *= alpha + beta * log2(exps), row by row of t.
struct HeadReweight {
  HeadType type;
  void* exps;
  int64_t steps;      // ceil(V / depth)
  int64_t padded;
  const void* alpha;  // Stat [padded]
  const void* beta;
};

// exps[v][to[i]] = exps[v][from[i]], in order.
struct HeadCompact {
  HeadType type;
  void* exps;
  int64_t steps;
  const int64_t* from;
  const int64_t* to;
  int64_t num_moved;
};

// tiles += (exps weight)^T.
struct HiddenGrad {
  HeadType type;
  const void* exps;
  const void* weight;   // [V, D]
  int64_t vocabulary;
  int64_t width;        // D
  int64_t num_lanes;    // live rows, rounded up to whole panels; at most padded
  void* tiles;          // Stat [ceil(D / rows)][num_lanes / lanes][rows][lanes]
};

// grad[t] = row_scale[t] * what HiddenGrad summed for it.
struct HiddenGradFinish {
  HeadType type;
  const void* tiles;       // of HiddenGrad
  int64_t num_lanes;
  int64_t num_rows;        // live rows
  int64_t width;
  const void* row_scale;   // Stat [live rows]
  void* grad;              // Stat [live rows, D]
};

// scaled[t] = row_scale[t] * matrix[t], rounded to the input's dtype.
struct ScaleRows {
  HeadType type;
  const void* matrix;  // [live rows, width]
  int64_t width;
  const void* row_scale;
  void* scaled;
};

// grad_weight[v] = sum_t exps[v][t] scaled[t], or += it.
struct WeightGrad {
  HeadType type;
  const void* exps;
  int64_t vocabulary;
  int64_t num_live;    // T or fewer
  const void* panels;  // row_scale * hidden, packed by PackScaled
  int64_t width;       // D
  void* grad;          // Stat [V, D]
  bool accumulate;
};

// Panels of a matrix whose rows are summed over: [ceil(width / lanes)][steps][lanes], with the steps of its rows as in
// PackHidden, 0 beyond its ends.
struct PackScaled {
  HeadType type;
  const void* matrix;  // [num_rows, width]
  int64_t num_rows;
  int64_t width;
  void* panels;
};

// Ranges are tasks of any split: [begin, end) panels, runs, rows of the vocabulary, as the comment says.
struct HeadKernels {
  const char* isa;
  HeadTile (*tile)(HeadType);
  void (*pack_hidden)(const PackHidden&, int64_t begin, int64_t end);                   // panels of T
  void (*exps)(const HeadExps&, int64_t begin, int64_t end);                            // runs
  void (*reweight)(const HeadReweight&, int64_t begin, int64_t end);                    // steps of the vocabulary
  void (*compact)(const HeadCompact&, int64_t begin, int64_t end);                      // steps of the vocabulary
  void (*hidden_grad)(const HiddenGrad&, int64_t begin, int64_t end);                   // panels of D
  void (*finish_hidden_grad)(const HiddenGradFinish&, int64_t begin, int64_t end);      // panels of T
  void (*scale_rows)(const ScaleRows&, int64_t begin, int64_t end);                     // live rows
  void (*pack_scaled)(const PackScaled&, int64_t begin, int64_t end);                   // panels of D
  void (*weight_grad)(const WeightGrad&, int64_t begin, int64_t end);                   // tiles of the vocabulary
};

extern const HeadKernels kHeadBaseline;
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define OMNIGRPO_X86_VARIANTS 1
extern const HeadKernels kHeadAvx2;
extern const HeadKernels kHeadAvx512;
extern const HeadKernels kHeadAvx512Bf16;
extern const HeadKernels kHeadAmx;
#endif

// The kernels in use: the widest that this CPU runs, unless `use_isa` chose another.
const HeadKernels& head_kernels();
// False when the name is unknown or this CPU cannot run it.
bool use_isa(const char* isa);

}  // namespace omnigrpo
