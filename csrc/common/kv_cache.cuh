// Rows of KV caches on the device. Nothing here trusts a value: what lies outside the caches is not found.
#pragma once

#include "common/kv_cache.h"

namespace fastops::kv {

// Offset (elements) of row `position` of sequence b, head h; or -1 where there is none.
__device__ inline int64_t find_row(const Pages& p, const RowStrides& s, int64_t b, int64_t h, int64_t position) {
  if (position < 0 || position >= p.capacity) return -1;
  if (!p.table) return b * s.outer + h * s.head + position * s.row;
  // Lengths are int32, so a position has 32 bits, and so has whatever part of a page it can reach.
  const uint32_t block = static_cast<uint32_t>(p.block < UINT32_MAX ? p.block : UINT32_MAX);
  const uint32_t column = static_cast<uint32_t>(position) / block, slot = static_cast<uint32_t>(position) % block;
  const int64_t page = __ldg(p.table + b * p.table_row + column * p.table_column);
  return page < 0 || page >= p.n_blocks ? -1 : page * s.outer + h * s.head + slot * s.row;
}

}  // namespace fastops::kv
