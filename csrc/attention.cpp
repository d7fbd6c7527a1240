// The op omnigrpo::shared_prefix_attention_backward_amx on CPU tensors: checks, blocks, buffers, threads.
//
// The blocks of query rows, in order, are cut into as many pieces of similar cost as asked for. A piece's part of one
// group and key/value head is a chunk, which adds up key gradients on its own; chunks are added up in their order. So
// results depend on the number of pieces, and on nothing else.
#include "attention.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "head.h"

namespace omnigrpo {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

// At most so many query rows in a block, if its heads allow: their operands stay in L2 while the keys go by.
constexpr int64_t kBlockRows = 896;
constexpr int64_t kBlockTokensMultiple = 32;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Memory at the start of a cache line.
template <typename T>
struct Free {
  void operator()(T* data) const { std::free(data); }
};
template <typename T>
std::unique_ptr<T, Free<T>> aligned(int64_t bytes) {
  constexpr int64_t kCacheLine = 64;
  void* data = std::aligned_alloc(kCacheLine, (ceil_div(bytes, kCacheLine) + 1) * kCacheLine);
  if (data == nullptr) throw std::bad_alloc();
  return std::unique_ptr<T, Free<T>>(static_cast<T*>(data));
}

struct Lengths {
  std::vector<int64_t> prefixes;
  std::vector<int64_t> counts;  // of completions
  std::vector<int64_t> completions;
  bool prefix_queries;
};

// Who sees what, group by group; the same for every key/value head.
struct Groups {
  std::vector<KeySegment> segments;
  std::vector<int64_t> segment_of_strip;
  std::vector<int64_t> group_of_segment;
  std::vector<std::vector<QueryBlock>> blocks;
  std::vector<KeySegment> prefixes;
  int64_t num_keys = 0;
  int64_t num_queries = 0;

  Groups(const Lengths& lengths, int64_t block_tokens) {
    size_t completion = 0;
    for (size_t group = 0; group < lengths.prefixes.size(); ++group) {
      blocks.emplace_back();
      prefixes.push_back(add_segment(lengths.prefixes[group]));
      if (lengths.prefix_queries) add_blocks({}, prefixes.back(), block_tokens);
      for (int64_t i = 0; i < lengths.counts[group]; ++i, ++completion) {
        if (lengths.completions[completion] == 0) continue;
        add_blocks(prefixes.back(), add_segment(lengths.completions[completion]), block_tokens);
      }
    }
  }

  int64_t num_strips() const { return static_cast<int64_t>(segment_of_strip.size()); }

 private:
  KeySegment add_segment(int64_t length) {
    const KeySegment segment{num_keys, length, num_strips()};
    num_keys += length;
    segment_of_strip.insert(segment_of_strip.end(), ceil_div(length, kStripKeys), static_cast<int64_t>(segments.size()));
    segments.push_back(segment);
    group_of_segment.push_back(static_cast<int64_t>(blocks.size()) - 1);
    return segment;
  }

  void add_blocks(const KeySegment& prefix, const KeySegment& own, int64_t block_tokens) {
    const int64_t tokens = ceil_div(own.length, ceil_div(own.length, block_tokens));
    for (int64_t offset = 0; offset < own.length; offset += tokens) {
      const int64_t count = std::min(tokens, own.length - offset);
      blocks.back().push_back({num_queries + offset, count, offset, prefix, own});
    }
    num_queries += own.length;
  }
};

int64_t cost_of(const QueryBlock& block) {
  return block.num_tokens * (block.prefix.length + block.offset + block.num_tokens + kStripKeys);
}

struct Chunk {
  int64_t piece;
  int64_t group;
  AttentionChunk task;
};

// All chunks, by key/value head, group and piece; their sums are missing.
std::vector<Chunk> cut(const Groups& groups, int64_t num_kv_heads, int64_t pieces) {
  int64_t total = 0, before = 0;
  for (const auto& blocks : groups.blocks)
    for (const QueryBlock& block : blocks) total += num_kv_heads * cost_of(block);
  std::vector<Chunk> chunks;
  for (int64_t head = 0; head < num_kv_heads; ++head) {
    for (int64_t group = 0; group < static_cast<int64_t>(groups.blocks.size()); ++group) {
      const KeySegment& prefix = groups.prefixes[group];
      const int64_t prefix_end = prefix.begin + ceil_div(prefix.length, kStripKeys);
      for (const QueryBlock& block : groups.blocks[group]) {
        const int64_t cost = cost_of(block);
        const int64_t piece = static_cast<int64_t>((before + 0.5 * cost) / total * pieces);
        before += cost;
        if (chunks.empty() || chunks.back().piece != piece || chunks.back().group != group ||
            chunks.back().task.kv_head != head) {
          chunks.push_back(
              {piece, group, {head, &block, 0, prefix.begin, prefix_end, prefix_end, prefix_end, nullptr}});
        }
        AttentionChunk& chunk = chunks.back().task;
        ++chunk.num_blocks;
        if (block.own.begin < prefix_end) continue;
        if (chunk.own_begin == chunk.own_end) chunk.own_begin = block.own.begin;
        chunk.own_end = block.own.begin + ceil_div(block.offset + block.num_tokens, kStripKeys);
      }
    }
  }
  return chunks;
}

HeadRows head_rows(const char* name, const Tensor& x, int64_t tokens, int64_t heads, int64_t width) {
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 && x.dim() == 3 && x.size(0) == tokens &&
                      x.size(1) == heads && x.size(2) == width && x.strides()[2] == 1,
                  "omnigrpo: ", name, " must be bfloat16 [", tokens, ", ", heads, ", ", width,
                  "] with heads' elements next to each other");
  return {static_cast<const uint16_t*>(x.const_data_ptr()), x.strides()[0], x.strides()[1]};
}

// The part of a chunk's sums that belongs to a strip, or null.
const float* sums_of(const AttentionChunk& chunk, int64_t strip, int64_t sum_floats) {
  if (strip >= chunk.prefix_begin && strip < chunk.prefix_end)
    return chunk.sums + (strip - chunk.prefix_begin) * sum_floats;
  if (strip >= chunk.own_begin && strip < chunk.own_end)
    return chunk.sums + (chunk.prefix_end - chunk.prefix_begin + strip - chunk.own_begin) * sum_floats;
  return nullptr;
}

void run(const AttentionKernels& kernels, AttentionBackward& task, const Groups& groups, int64_t pieces) {
  const int64_t strips = groups.num_strips(), heads = task.num_kv_heads;
  const auto packed = aligned<char>(heads * strips * kernels.strip_bytes);
  task.num_strips = strips;
  task.packed = packed.get();
  std::vector<Chunk> chunks = cut(groups, heads, pieces);
  const auto num_strips_of = [](const AttentionChunk& chunk) {
    return chunk.prefix_end - chunk.prefix_begin + chunk.own_end - chunk.own_begin;
  };
  int64_t num_sums = 0;
  for (const Chunk& chunk : chunks) num_sums += num_strips_of(chunk.task);
  const auto sums = aligned<float>(num_sums * kernels.sum_floats * sizeof(float));
  std::vector<AttentionChunk> tasks;
  std::vector<int64_t> first_of_piece(pieces + 1, 0), first_of_group(heads * groups.blocks.size() + 1, 0);
  num_sums = 0;
  for (Chunk& chunk : chunks) {
    chunk.task.sums = sums.get() + num_sums * kernels.sum_floats;
    num_sums += num_strips_of(chunk.task);
    tasks.push_back(chunk.task);
    ++first_of_piece[chunk.piece + 1];
    ++first_of_group[chunk.task.kv_head * groups.blocks.size() + chunk.group + 1];
  }
  for (size_t i = 1; i < first_of_piece.size(); ++i) first_of_piece[i] += first_of_piece[i - 1];
  for (size_t i = 1; i < first_of_group.size(); ++i) first_of_group[i] += first_of_group[i - 1];

  parallel_for(0, heads * strips, 8, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernels.pack_keys(task, groups.segments[groups.segment_of_strip[i % strips]], i / strips, i % strips);
  });
  parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    kernels.run(task, tasks.data() + first_of_piece[begin], first_of_piece[end] - first_of_piece[begin]);
  });
  parallel_for(0, heads * strips, 8, [&](int64_t begin, int64_t end) {
    std::vector<const float*> parts;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t head = i / strips, strip = i % strips, segment = groups.segment_of_strip[strip];
      const int64_t place = head * groups.blocks.size() + groups.group_of_segment[segment];
      parts.clear();
      for (int64_t c = first_of_group[place]; c < first_of_group[place + 1]; ++c)
        if (const float* part = sums_of(tasks[c], strip, kernels.sum_floats)) parts.push_back(part);
      kernels.finish_keys(task, groups.segments[segment], head, strip, parts.data(),
                          static_cast<int64_t>(parts.size()));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& grad_out, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const Tensor& out, const Tensor& lse,
                                                      std::vector<int64_t> prefix_lengths,
                                                      std::vector<int64_t> completion_counts,
                                                      std::vector<int64_t> completion_lengths, bool prefix_queries,
                                                      double scale, int64_t pieces) {
  STD_TORCH_CHECK(std::strcmp(head_kernels().isa, "amx_bf16") == 0, "omnigrpo: AMX is not the active instruction set");
  STD_TORCH_CHECK(q.dim() == 3 && k.dim() == 3 && k.size(1) > 0 && q.size(1) % k.size(1) == 0 && pieces > 0,
                  "omnigrpo: q [T, N, H] and k [T, K, H] must have N a multiple of K, and pieces be positive");
  const int64_t heads = q.size(1), kv_heads = k.size(1), width = q.size(2);
  const AttentionKernels* kernels = attention_amx(width);
  STD_TORCH_CHECK(kernels != nullptr, "omnigrpo: no kernel for a head width of ", width);
  int64_t num_completions = 0;
  for (const int64_t count : completion_counts) num_completions += count;
  STD_TORCH_CHECK(prefix_lengths.size() == completion_counts.size() &&
                      num_completions == static_cast<int64_t>(completion_lengths.size()),
                  "omnigrpo: lengths and counts of the layout disagree");
  const int64_t folded = heads / kv_heads;
  const int64_t tokens = std::max<int64_t>(1, kBlockRows / folded / kBlockTokensMultiple) * kBlockTokensMultiple;
  const Groups groups({prefix_lengths, completion_counts, completion_lengths, prefix_queries}, tokens);
  STD_TORCH_CHECK(lse.scalar_type() == ScalarType::Float && lse.dim() == 2 && lse.size(0) == heads &&
                      lse.size(1) == groups.num_queries,
                  "omnigrpo: lse must be float32 [N, T]");
  const Tensor grad_q = torch::stable::new_empty(q, {groups.num_queries, heads, width});
  const Tensor grad_k = torch::stable::new_empty(k, {groups.num_keys, kv_heads, width});
  const Tensor grad_v = torch::stable::new_empty(k, {groups.num_keys, kv_heads, width});
  AttentionBackward task{head_rows("grad_out", grad_out, groups.num_queries, heads, width),
                         head_rows("q", q, groups.num_queries, heads, width),
                         head_rows("k", k, groups.num_keys, kv_heads, width),
                         head_rows("v", v, groups.num_keys, kv_heads, width),
                         head_rows("out", out, groups.num_queries, heads, width),
                         static_cast<const float*>(lse.const_data_ptr()),
                         lse.strides()[0],
                         lse.strides()[1],
                         heads,
                         kv_heads,
                         static_cast<float>(scale),
                         0,
                         nullptr,
                         static_cast<uint16_t*>(grad_q.mutable_data_ptr()),
                         static_cast<uint16_t*>(grad_k.mutable_data_ptr()),
                         static_cast<uint16_t*>(grad_v.mutable_data_ptr())};
  run(*kernels, task, groups, pieces);
  return {grad_q, grad_k, grad_v};
}

}  // namespace
}  // namespace omnigrpo

STABLE_TORCH_LIBRARY_IMPL(omnigrpo, CPU, m) {
  m.impl("shared_prefix_attention_backward_amx", TORCH_BOX(&omnigrpo::attention_backward));
}
