// The argument checks of attention over a KV cache: what pyops/ops/_attention.py checks, in the same order and words.
#pragma once

#include <charconv>
#include <cmath>
#include <optional>

#include "common/check.h"

namespace fastops::attention {

constexpr int64_t kMaxHead = 256;  // of D
constexpr int64_t kMaxRows = 64;   // of T: the bits of a tree mask

// As Python prints a float.
inline std::string float_string(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value < 0 ? "-inf" : "inf";
  const double size = std::fabs(value);
  const bool fixed = size == 0 || (size >= 1e-4 && size < 1e16);
  char text[64];
  const auto end =
      std::to_chars(text, text + sizeof(text), value, fixed ? std::chars_format::fixed : std::chars_format::scientific);
  std::string out(text, end.ptr);
  if (fixed && out.find('.') == std::string::npos) out += ".0";
  return out;
}

inline void check_sizes(const char* op, const char* name, const Tensor& t, const char* wanted, int64_t dims) {
  FO_CHECK(t.dim() == dims, op, name, " must be ", wanted, ", got ", shape_string(t.sizes()));
}

// Rows are read in whole vectors.
inline void check_last_dim(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  FO_CHECK(t.size(last) <= 1 || t.stride(last) == 1, op, name,
           " must be contiguous in its last dimension, got strides ", shape_string(t.strides()));
}

// [B] int32.
inline void check_per_sequence(const char* op, const char* name, const std::optional<Tensor>& t, const Tensor& q,
                               int64_t batch) {
  if (!t) return;
  check_same_device(op, name, *t, "q", q);
  check_dtype(op, name, *t, ScalarType::Int);
  FO_CHECK(t->dim() == 1 && t->size(0) == batch, op, name, " must be [B] = [", batch, "], got ",
           shape_string(t->sizes()));
}

// A float tensor of `dims` dimensions whose heads are not too wide.
inline void check_query(const char* op, const Tensor& q, const char* wanted, int64_t dims) {
  check_float_type(op, "q", q.scalar_type());
  check_sizes(op, "q", q, wanted, dims);
  const int64_t d = q.size(dims - 1);
  FO_CHECK(d >= 1 && d <= kMaxHead, op, "q must have a head size from 1 to ", kMaxHead, ", got ", d);
}

// The caches of `batch` sequences, contiguous or in pages, and the options that both ops have.
struct Caches {
  const Tensor &k, &v;
  const std::optional<Tensor>& block_table;
  std::optional<double> softcap;
  std::optional<int64_t> window;

  int64_t kv_heads() const { return k.size(block_table ? 2 : 1); }
  // Rows that a sequence can have.
  int64_t capacity() const { return block_table ? block_table->size(1) * k.size(1) : k.size(2); }
};

inline void check_table(const char* op, const Tensor& q, const Tensor& table, int64_t batch) {
  check_same_device(op, "block_table", table, "q", q);
  check_dtype(op, "block_table", table, ScalarType::Int);
  FO_CHECK(table.dim() == 2 && table.size(0) == batch, op, "block_table must be [B, max_blocks] = [", batch,
           ", max_blocks], got ", shape_string(table.sizes()));
}

// q ([..., D], `heads` of them) against the caches; reads no values.
inline void check_attention(const char* op, const Tensor& q, int64_t heads, const Caches& c, int64_t batch) {
  check_last_dim(op, "q", q);
  const char* wanted = c.block_table ? "[n_blocks, block, Hkv, D]" : "[B, Hkv, S_cap, D]";
  for (const auto& [name, cache] : {std::pair<const char*, const Tensor&>{"k_cache", c.k}, {"v_cache", c.v}}) {
    check_same_device(op, name, cache, "q", q);
    FO_CHECK(cache.scalar_type() == q.scalar_type(), op, name, " must be ", dtype_name(q.scalar_type()),
             " like q, got ", dtype_name(cache.scalar_type()));
    check_sizes(op, name, cache, wanted, 4);
    check_last_dim(op, name, cache);
  }
  for (int64_t i = 0; i < 4; ++i) {
    FO_CHECK(c.v.size(i) == c.k.size(i), op, "v_cache must be ", shape_string(c.k.sizes()), " like k_cache, got ",
             shape_string(c.v.sizes()));
  }
  const int64_t d = q.size(q.dim() - 1);
  FO_CHECK(c.k.size(3) == d, op, "k_cache must have the head size of q, ", d, ", got ", c.k.size(3));
  const int64_t kv_heads = c.kv_heads();
  FO_CHECK(kv_heads == 0 ? heads == 0 : heads % kv_heads == 0, op, "q must have a multiple of k_cache's ", kv_heads,
           " heads, got ", heads);
  if (c.block_table) {
    check_table(op, q, *c.block_table, batch);
  } else {
    FO_CHECK(c.k.size(0) == batch, op, "k_cache must have B = ", batch, " sequences, got ", c.k.size(0));
  }
  FO_CHECK(!c.softcap || *c.softcap > 0, op, "softcap must be greater than 0, got ", float_string(*c.softcap));
  FO_CHECK(!c.window || *c.window >= 1, op, "window must be at least 1, got ", *c.window);
}

inline void check_tree_mask(const char* op, const Tensor& tree_mask, const Tensor& q, int64_t batch, int64_t rows) {
  check_same_device(op, "tree_mask", tree_mask, "q", q);
  check_dtype(op, "tree_mask", tree_mask, ScalarType::Long);
  FO_CHECK(tree_mask.dim() == 2 && tree_mask.size(0) == batch && tree_mask.size(1) == rows, op,
           "tree_mask must be [B, T] = [", batch, ", ", rows, "], got ", shape_string(tree_mask.sizes()));
}

}  // namespace fastops::attention
