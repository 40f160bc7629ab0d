// What the operators on KV caches share: how a row is found, and the checks of their arguments, the same and in the
// same order as pyops/_kv_cache.py. Caches are [B, Hkv, S_cap, D], or paged [n_blocks, block, Hkv, D] with block_table
// [B, max_blocks]: row `position` of sequence b is slot position % block of page block_table[b, position / block].
#pragma once

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"

namespace fastops::kv {

// What a pair of caches holds; `capacity` is rows a sequence: S_cap, or max_blocks block.
struct CacheShape {
  int64_t batch, heads, capacity, dim;
};

// From one to the next page (or sequence, where there are no pages), head and row of a cache; in elements.
struct RowStrides {
  int64_t outer, head, row;
};

// Where a position lies: in page table[b, position / block], or without a table in sequence b itself.
struct Pages {
  const int32_t* table;  // null for contiguous caches
  int64_t table_row, table_column;
  int64_t n_blocks, block, capacity;
};

// POD view of an int32 [B] or [B, T] tensor of any strides; null where an optional one is absent.
struct Ints {
  const int32_t* data = nullptr;
  int64_t row = 0, column = 0;
  constexpr int32_t at(int64_t b, int64_t i = 0) const { return data[b * row + i * column]; }
};

inline void check_last_dim(const char* op, const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  FO_CHECK(t.size(last) <= 1 || t.stride(last) == 1, op, name, " must have a contiguous last dim, got strides ",
           shape_string(t.strides()));
}

inline CacheShape check_caches(const char* op, const Tensor& k_cache, const Tensor& v_cache,
                               const std::optional<Tensor>& block_table) {
  check_float_type(op, "k_cache", k_cache.scalar_type());
  check_same_device(op, "v_cache", v_cache, "k_cache", k_cache);
  check_dtype(op, "v_cache", v_cache, k_cache.scalar_type());
  const auto sizes = k_cache.sizes();
  FO_CHECK(sizes.size() == 4 && sizes[3] >= 1, op, "k_cache must be ",
           block_table ? "[n_blocks, block, Hkv, D]" : "[B, Hkv, S_cap, D]", ", got ", shape_string(sizes));
  FO_CHECK(v_cache.sizes() == sizes, op, "v_cache must have the shape of k_cache, ", shape_string(sizes), ", got ",
           shape_string(v_cache.sizes()));
  check_last_dim(op, "k_cache", k_cache);
  check_last_dim(op, "v_cache", v_cache);
  if (!block_table) return {sizes[0], sizes[1], sizes[2], sizes[3]};
  check_same_device(op, "block_table", *block_table, "k_cache", k_cache);
  check_dtype(op, "block_table", *block_table, ScalarType::Int);
  FO_CHECK(block_table->dim() == 2, op, "block_table must be [B, max_blocks], got ",
           shape_string(block_table->sizes()));
  return {block_table->size(0), sizes[2], block_table->size(1) * sizes[1], sizes[3]};
}

// No element of a 4-dimensional tensor that is written lies where another one does: an expanded cache is refused.
inline void check_writable(const char* op, const char* name, const Tensor& t) {
  const auto sizes = t.sizes(), strides = t.strides();
  std::array<std::pair<int64_t, int64_t>, 4> dims;  // stride, size
  size_t n = 0;
  for (size_t i = 0; i < 4; ++i) {
    if (sizes[i] == 0) return;
    if (sizes[i] == 1) continue;
    size_t at = n++;  // kept in ascending order of strides
    for (; at > 0 && dims[at - 1].first > strides[i]; --at) dims[at] = dims[at - 1];
    dims[at] = {strides[i], sizes[i]};
  }
  int64_t reach = 0;  // the farthest that the dims with smaller strides go
  for (size_t i = 0; i < n; ++i) {
    FO_CHECK(dims[i].first > reach, op, name, " must not overlap itself, got shape ", shape_string(sizes),
             " with strides ", shape_string(strides));
    reach += dims[i].first * (dims[i].second - 1);
  }
}

inline CacheShape check_writable_caches(const char* op, const Tensor& k_cache, const Tensor& v_cache,
                                        const std::optional<Tensor>& block_table) {
  const CacheShape shape = check_caches(op, k_cache, v_cache, block_table);
  check_writable(op, "k_cache", k_cache);
  check_writable(op, "v_cache", v_cache);
  return shape;
}

// New rows k and v [B, Hkv, T, D] for the caches; `letter` is what the op calls T, the result is its value.
inline int64_t check_rows(const char* op, const Tensor& k_cache, const Tensor& k, const Tensor& v,
                          const CacheShape& caches, const char* letter) {
  for (const Tensor* t : {&k, &v}) {
    const char* name = t == &k ? "k" : "v";
    check_same_device(op, name, *t, "k_cache", k_cache);
    check_dtype(op, name, *t, k_cache.scalar_type());
    const auto s = t->sizes();
    FO_CHECK(s.size() == 4 && s[0] == caches.batch && s[1] == caches.heads && s[3] == caches.dim, op, name,
             " must be [B, Hkv, ", letter, ", D] = [", caches.batch, ", ", caches.heads, ", ", letter, ", ", caches.dim,
             "], got ", shape_string(s));
    FO_CHECK(s[2] == k.size(2), op, "v must have the shape of k, ", shape_string(k.sizes()), ", got ", shape_string(s));
    check_last_dim(op, name, *t);
  }
  FO_CHECK(k.numel() / caches.dim <= INT32_MAX, op, "k must have fewer than 2^31 rows in all, got ",
           shape_string(k.sizes()));
  return k.size(2);
}

// An int32 tensor of `sizes`, which messages call `form`.
inline Ints check_ints(const char* op, const char* name, const Tensor& t, const Tensor& k_cache, const char* form,
                       std::initializer_list<int64_t> sizes) {
  check_same_device(op, name, t, "k_cache", k_cache);
  check_dtype(op, name, t, ScalarType::Int);
  const auto got = t.sizes();
  FO_CHECK(std::equal(got.begin(), got.end(), sizes.begin(), sizes.end()), op, name, " must be ", form, " = ",
           shape_string(std::vector<int64_t>(sizes)), ", got ", shape_string(got));
  return {static_cast<const int32_t*>(t.const_data_ptr()), t.stride(0), sizes.size() > 1 ? t.stride(1) : 0};
}

// The angles and what belongs to them: one row for each position, or one for each of `rows` new rows.
inline void check_rotary(const char* op, const Tensor& k_cache, int64_t dim, const std::optional<Tensor>& cos,
                         const std::optional<Tensor>& sin, bool interleaved,
                         const std::optional<Tensor>& positions = std::nullopt,
                         std::optional<int64_t> rows = std::nullopt) {
  if (!cos || !sin) {
    FO_CHECK(!cos && !sin, op, "cos and sin must be given together, got only ", cos ? "cos" : "sin");
    FO_CHECK(!interleaved, op, "rope_interleaved must be False without cos and sin, got True");
    FO_CHECK(!positions, op, "positions must be None without cos and sin, got ", shape_string(positions->sizes()));
    return;
  }
  check_same_device(op, "cos", *cos, "k_cache", k_cache);
  const ScalarType angles = cos->scalar_type(), data = k_cache.scalar_type();
  FO_CHECK(angles == ScalarType::Float || angles == data, op, "cos must be float32",
           data == ScalarType::Float ? "" : " or ", data == ScalarType::Float ? "" : dtype_name(data), ", got ",
           dtype_name(angles));
  const bool fits = cos->dim() == 2 && 2 * cos->size(1) <= dim && (!rows || cos->size(0) == *rows);
  FO_CHECK(fits, op, "cos must be ",
           rows ? "[L, R / 2] = [" + std::to_string(*rows) + ", R / 2]" : std::string("[max_positions, R / 2]"),
           " with R at most D = ", dim, ", got ", shape_string(cos->sizes()));
  check_same_device(op, "sin", *sin, "k_cache", k_cache);
  check_dtype(op, "sin", *sin, angles);
  FO_CHECK(sin->sizes() == cos->sizes(), op, "sin must have the shape of cos, ", shape_string(cos->sizes()), ", got ",
           shape_string(sin->sizes()));
  check_last_dim(op, "cos", *cos);
  check_last_dim(op, "sin", *sin);
}

inline RowStrides row_strides(const Tensor& cache, bool paged) {
  return paged ? RowStrides{cache.stride(0), cache.stride(2), cache.stride(1)}
               : RowStrides{cache.stride(0), cache.stride(1), cache.stride(2)};
}

inline Pages pages(const Tensor& k_cache, const std::optional<Tensor>& block_table, const CacheShape& shape) {
  if (!block_table) return {nullptr, 0, 0, shape.batch, std::max<int64_t>(shape.capacity, 1), shape.capacity};
  return {static_cast<const int32_t*>(block_table->const_data_ptr()),
          block_table->stride(0),
          block_table->stride(1),
          k_cache.size(0),
          std::max<int64_t>(k_cache.size(1), 1),
          shape.capacity};
}

// On a CPU: the page that a row needs exists.
inline void check_page(const char* op, const Pages& p, int64_t b, int64_t column) {
  const int64_t page = p.table[b * p.table_row + column * p.table_column];
  FO_CHECK(page >= 0 && page < p.n_blocks, op, "block_table must hold pages from 0 to n_blocks - 1 = ", p.n_blocks - 1,
           " where rows are, got ", page, " at [", b, ", ", column, "]");
}

}  // namespace fastops::kv
