// The ops of one decode step on CPU tensors: checks, buffers, threads.
//
// skinny_linear     x weight^T + bias for few rows: the weight is read once, as nn.Linear keeps it.
// decode_attention  one new token per row, appended to paged keys and values, attends to its prefix and its own tokens.
// draw_tokens       inverse CDF of softmax(logits / temperature), and the log-prob of what it gives.
#include "decode.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstring>
#include <optional>
#include <tuple>

namespace omnigrpo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// Outputs of a product that are worth a thread; a multiple of the kernels' tiles.
constexpr int64_t kOutputsPerThread = 96;

const DecodeKernels& decode_kernels() {
#ifdef OMNIGRPO_X86_VARIANTS
  const HeadKernels& head = head_kernels();
  if (&head == &kHeadAmx || &head == &kHeadAvx512Bf16) return kDecodeAvx512Bf16;
  if (&head == &kHeadAvx512) return kDecodeAvx512;
  if (&head == &kHeadAvx2) return kDecodeAvx2;
#endif
  return kDecodeBaseline;
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

HeadType type_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return HeadType::kFloat32;
    case ScalarType::Double: return HeadType::kFloat64;
    case ScalarType::BFloat16: return HeadType::kBFloat16;
    default: break;
  }
  STD_TORCH_CHECK(false, "omnigrpo: ", name, " must be float32, float64 or bfloat16");
}

ScalarType wide_type(HeadType type) { return type == HeadType::kFloat64 ? ScalarType::Double : ScalarType::Float; }

int64_t bytes_of(HeadType type) {
  return type == HeadType::kFloat64 ? 8 : type == HeadType::kFloat32 ? 4 : 2;
}

Tensor skinny_linear(const Tensor& rows, const Tensor& weight, const std::optional<Tensor>& bias, bool wide) {
  const HeadType type = type_of("rows", rows);
  STD_TORCH_CHECK(rows.dim() == 2 && weight.dim() == 2 && rows.size(1) == weight.size(1) && rows.is_contiguous() &&
                      weight.is_contiguous() && rows.scalar_type() == weight.scalar_type(),
                  "skinny_linear: rows [M, K] and weight [N, K] must be contiguous and of one dtype");
  const int64_t num_rows = rows.size(0), width = rows.size(1), num_outputs = weight.size(0);
  STD_TORCH_CHECK(!bias.has_value() || (bias->dim() == 1 && bias->size(0) == num_outputs && bias->is_contiguous() &&
                                        bias->scalar_type() == rows.scalar_type()),
                  "skinny_linear: bias must be contiguous, [N], of the rows' dtype");
  const DecodeKernels& kernels = decode_kernels();
  const Tensor out = torch::stable::new_empty(rows, {num_rows, num_outputs},
                                              wide ? wide_type(type) : rows.scalar_type());
  const Tensor packed =
      torch::stable::new_empty(rows, {num_rows * kernels.packed_bytes(type, width)}, ScalarType::Byte);
  const SkinnyLinear task{type,
                          rows.const_data_ptr(),
                          num_rows,
                          width,
                          weight.const_data_ptr(),
                          bias.has_value() ? bias->const_data_ptr() : nullptr,
                          num_outputs,
                          packed.mutable_data_ptr(),
                          out.mutable_data_ptr(),
                          wide};
  kernels.pack(task, 0, num_rows);
  parallel_for(0, ceil_div(num_outputs, kOutputsPerThread), 1, [&](int64_t begin, int64_t end) {
    kernels.multiply(task, begin * kOutputsPerThread, std::min(end * kOutputsPerThread, num_outputs));
  });
  return out;
}

// Checked: contiguous int64 of this shape.
const int64_t* table(const char* name, const Tensor& tensor, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Long && tensor.is_contiguous() && tensor.size(0) == rows &&
                      tensor.dim() == (columns < 0 ? 1 : 2) && (columns < 0 || tensor.size(1) == columns),
                  "decode_attention: ", name, " must be contiguous int64 with ", rows, " rows");
  return tensor.const_data_ptr<int64_t>();
}

// Blocks that the first `length` tokens of a row of a table lie in must be blocks of the pool.
void check_blocks(const char* name, const int64_t* blocks, int64_t stride, int64_t length, int64_t num_blocks) {
  STD_TORCH_CHECK(length >= 0 && length <= stride * kCacheBlock, "decode_attention: ", name, " has room for ",
                  stride * kCacheBlock, " tokens, but a length is ", length);
  for (int64_t i = 0; i < ceil_div(length, kCacheBlock); ++i) {
    STD_TORCH_CHECK(blocks[i] >= 0 && blocks[i] < num_blocks, "decode_attention: ", name, " names block ", blocks[i],
                    " of a pool of ", num_blocks);
  }
}

// Writes the new token of every row.
void append(const DecodeAttention& task, const Tensor& k, const Tensor& v, void* keys, void* values) {
  const int64_t width = task.head_width, bytes = bytes_of(task.type), block_size = width * kCacheBlock;
  for (int64_t row = 0; row < task.num_rows; ++row) {
    const int64_t at = task.own_lengths[row] - 1, slot = at % kCacheBlock;
    const int64_t block = task.own_blocks[row * task.own_stride + at / kCacheBlock];
    for (int64_t head = 0; head < task.num_kv_heads; ++head) {
      const int64_t from = (row * task.num_kv_heads + head) * width * bytes;
      const int64_t to = (block * task.num_kv_heads + head) * block_size * bytes;
      const char* key = static_cast<const char*>(k.const_data_ptr()) + from;
      char* column = static_cast<char*>(keys) + to + slot * bytes;
      for (int64_t h = 0; h < width; ++h) std::memcpy(column + h * kCacheBlock * bytes, key + h * bytes, bytes);
      std::memcpy(static_cast<char*>(values) + to + slot * width * bytes,
                  static_cast<const char*>(v.const_data_ptr()) + from, width * bytes);
    }
  }
}

Tensor decode_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& keys, const Tensor& values,
                        const Tensor& groups, const Tensor& prefix_blocks, const Tensor& prefix_lengths,
                        const Tensor& own_blocks, const Tensor& own_lengths, double scale) {
  const HeadType type = type_of("q", q);
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && keys.dim() == 4 && values.dim() == 4 && own_blocks.dim() == 2 &&
                      prefix_blocks.dim() == 2,
                  "decode_attention: q [S, N, H], k and v [S, K, H], pools of four dimensions and tables of two");
  const int64_t rows = q.size(0), heads = q.size(1), width = q.size(2), kv_heads = k.size(1), num_blocks = keys.size(0);
  const auto fits = [&](const Tensor& tensor, std::initializer_list<int64_t> sizes) {
    int64_t dim = 0;
    for (const int64_t size : sizes) {
      if (tensor.size(dim++) != size) return false;
    }
    return tensor.is_contiguous() && tensor.scalar_type() == q.scalar_type();
  };
  STD_TORCH_CHECK(fits(q, {rows, heads, width}) && fits(k, {rows, kv_heads, width}) && v.dim() == 3 &&
                      fits(v, {rows, kv_heads, width}) && heads % kv_heads == 0 &&
                      fits(keys, {num_blocks, kv_heads, width, kCacheBlock}) &&
                      fits(values, {num_blocks, kv_heads, kCacheBlock, width}),
                  "decode_attention: q [S, N, H], k and v [S, K, H], key pool [blocks, K, H, ", kCacheBlock,
                  "] and value pool [blocks, K, ", kCacheBlock, ", H] must be contiguous and of one dtype");
  const int64_t num_groups = prefix_blocks.size(0), threads = torch::stable::get_num_threads();
  const int64_t rows_per_task = std::max<int64_t>(1, rows * kv_heads / threads);
  const Tensor out = torch::stable::new_empty(q, {rows, heads, width});
  const DecodeAttention task{type,
                             q.const_data_ptr(),
                             out.mutable_data_ptr(),
                             rows,
                             heads,
                             kv_heads,
                             width,
                             keys.const_data_ptr(),
                             values.const_data_ptr(),
                             table("groups", groups, rows, -1),
                             table("prefix_blocks", prefix_blocks, num_groups, prefix_blocks.size(1)),
                             prefix_blocks.size(1),
                             table("prefix_lengths", prefix_lengths, num_groups, -1),
                             table("own_blocks", own_blocks, rows, own_blocks.size(1)),
                             own_blocks.size(1),
                             table("own_lengths", own_lengths, rows, -1),
                             scale,
                             rows_per_task};
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(task.groups[row] >= 0 && task.groups[row] < num_groups && task.own_lengths[row] > 0,
                    "decode_attention: row ", row, " has group ", task.groups[row], " of ", num_groups, " and ",
                    task.own_lengths[row], " own tokens; it must have a group, and its new token");
    check_blocks("own_blocks", task.own_blocks + row * task.own_stride, task.own_stride, task.own_lengths[row],
                 num_blocks);
  }
  for (int64_t group = 0; group < num_groups; ++group) {
    check_blocks("prefix_blocks", task.prefix_blocks + group * task.prefix_stride, task.prefix_stride,
                 task.prefix_lengths[group], num_blocks);
  }
  append(task, k, v, keys.mutable_data_ptr(), values.mutable_data_ptr());
  const DecodeKernels& kernels = decode_kernels();
  parallel_for(0, kv_heads * ceil_div(rows, rows_per_task), 1,
               [&](int64_t begin, int64_t end) { kernels.attend(task, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> draw_tokens(const Tensor& logits, const Tensor& uniform, double temperature) {
  STD_TORCH_CHECK(logits.dim() == 2 && logits.is_contiguous() && logits.scalar_type() == ScalarType::Float &&
                      logits.size(1) > 0 && uniform.dim() == 1 && uniform.is_contiguous() &&
                      uniform.scalar_type() == ScalarType::Double && uniform.size(0) == logits.size(0) && temperature > 0,
                  "draw_tokens: logits must be contiguous float32 [S, V], uniform contiguous float64 [S], and the "
                  "temperature above 0");
  const int64_t rows = logits.size(0);
  const Tensor token = torch::stable::new_empty(uniform, {rows}, ScalarType::Long);
  const Tensor logprob = torch::stable::new_empty(logits, {rows});
  const DrawTokens task{static_cast<const float*>(logits.const_data_ptr()),
                        logits.size(1),
                        temperature,
                        static_cast<const double*>(uniform.const_data_ptr()),
                        static_cast<int64_t*>(token.mutable_data_ptr()),
                        static_cast<float*>(logprob.mutable_data_ptr())};
  const DecodeKernels& kernels = decode_kernels();
  parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) { kernels.draw(task, begin, end); });
  return {token, logprob};
}

}  // namespace
}  // namespace omnigrpo

STABLE_TORCH_LIBRARY_IMPL(omnigrpo, CPU, m) {
  m.impl("skinny_linear", TORCH_BOX(&omnigrpo::skinny_linear));
  m.impl("decode_attention", TORCH_BOX(&omnigrpo::decode_attention));
  m.impl("draw_tokens", TORCH_BOX(&omnigrpo::draw_tokens));
}
