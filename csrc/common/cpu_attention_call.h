// What the CPU functions of decode_attn and prefill_attn do before the kernels run: checks of values, which come before
// anything is read, and what each row sees.
#pragma once

#include "common/cpu_attention.h"
#include "common/tensor.h"

namespace fastops::attention {

inline void check_range(const char* op, const char* name, int64_t value, int64_t low, int64_t high) {
  FO_CHECK(value >= low && value <= high, op, name, " must be from ", low, " to ", high, ", got ", value);
}

inline const int32_t* ints(const Tensor& t) { return static_cast<const int32_t*>(t.const_data_ptr()); }

// Lengths within the capacity, and pages that exist for all of them; `lengths` and `table` are contiguous.
inline void check_cache_values(const char* op, const Caches& caches, const Tensor& lengths,
                               const std::optional<Tensor>& table) {
  const int64_t batch = lengths.size(0), most = caches.capacity();
  for (int64_t b = 0; b < batch; ++b) check_range(op, "lengths", ints(lengths)[b], 0, most);
  if (!table) return;
  const int64_t page_rows = std::max<int64_t>(caches.k.size(1), 1), per_sequence = table->size(1);
  const int64_t last = std::max<int64_t>(caches.k.size(0) - 1, 0);
  for (int64_t b = 0; b < batch; ++b) {
    const int32_t* pages = ints(*table) + b * per_sequence;
    for (int64_t i = 0; i < ceil_div(ints(lengths)[b], page_rows); ++i) {
      check_range(op, "block_table", pages[i], 0, last);
    }
  }
}

// The sights of a sequence's rows, of which `new_rows` (at most `rows`) are its last ones.
inline void add_causal_sights(std::vector<Sight>& sights, int64_t rows, int64_t new_rows, int64_t place,
                              std::optional<int64_t> window) {
  for (int64_t t = 0; t < rows; ++t) {
    const int64_t end = t < new_rows ? std::max<int64_t>(place + t + 1, 0) : 0;
    sights.push_back({window ? std::max<int64_t>(end - *window, 0) : 0, end, 0});
  }
}

// The same for the nodes of a tree: a node stands after as many new rows as it sees others.
inline void add_tree_sights(std::vector<Sight>& sights, const int64_t* tree_mask, int64_t rows, int64_t new_rows,
                            int64_t place, std::optional<int64_t> window) {
  uint64_t masks[kMaxRows];
  int64_t others[kMaxRows];
  for (int64_t t = 0; t < rows; ++t) {
    masks[t] = static_cast<uint64_t>(tree_mask[t]) | uint64_t{1} << t;
    others[t] = __builtin_popcountll(masks[t]) - 1;
  }
  const int64_t hidden = std::max<int64_t>(-place, 0);  // new rows that stand before the first key
  for (int64_t t = 0; t < rows; ++t) {
    Sight sight{0, 0, 0};
    for (int64_t j = hidden; t < new_rows && j < new_rows; ++j) {
      const bool near = !window || others[j] > others[t] - *window;
      sight.nodes |= near ? masks[t] & uint64_t{1} << j : 0;
    }
    if (t < new_rows) {
      sight.high = std::max<int64_t>(place, 0);
      if (window) sight.low = std::max<int64_t>(place + others[t] - *window + 1, 0);
    }
    sights.push_back(sight);
  }
}

// All but the sequences; `table` is contiguous.
inline Call make_call(const Tensor& q, int64_t heads, const Caches& caches, const std::optional<Tensor>& table,
                      std::optional<double> scale) {
  Call call{};
  call.d = q.size(q.dim() - 1);
  call.kv_heads = caches.kv_heads();
  call.group = heads / call.kv_heads;
  call.q = q.const_data_ptr();
  call.k = caches.k.const_data_ptr();
  call.v = caches.v.const_data_ptr();
  const int64_t head = table ? 2 : 1, row = table ? 1 : 2;
  for (const auto& [i, dim] : {std::pair<int, int64_t>{0, 0}, {1, head}, {2, row}}) {
    call.k_stride[i] = caches.k.stride(dim);
    call.v_stride[i] = caches.v.stride(dim);
  }
  if (table) {
    call.table = ints(*table);
    call.table_row = table->size(1);
    call.page_rows = caches.k.size(1);
  }
  const double by = scale.value_or(1.0 / std::sqrt(static_cast<double>(call.d)));
  const double softcap = caches.softcap.value_or(0.0);
  call.factor = static_cast<float>(softcap > 0 ? by / softcap : by * std::numbers::log2e);
  call.cap = static_cast<float>(softcap * std::numbers::log2e);
  return call;
}

}  // namespace fastops::attention
