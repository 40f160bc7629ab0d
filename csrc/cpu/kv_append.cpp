// kv_append: cache[b, h, lengths[b] + t] = new[b, h, t], with kv_compact and kv_scatter, its kin; in place.
// Floor at B 64, Hkv 8, T 16, D 128, bf16: 33.6 MB read and 33.6 MB written, 2.4 ms at 28 GB/s (copy, 2 threads); no
// flops without a rotation. Rows are copied by memcpy, those of all heads at once where they lie side by side. A decode
// step is a few hundred rows of 256 bytes: there the call itself counts, so threads start only for megabytes.
// Every value is checked before the first byte is written.
// Reached: bench/results/cpu/kv_append.json.
#include <cstring>

#include "common/cpu_convert.h"
#include "common/cpu_isa.h"
#include "common/kv_cache.h"
#include "common/register.h"
#include "common/tensor.h"

#if defined(FASTOPS_X86)
#include <immintrin.h>
#endif

namespace fastops::kv_append {
namespace {

using kv::CacheShape;
using kv::check_page;
using kv::Ints;
using kv::Pages;
using kv::RowStrides;

constexpr int64_t kGrainBytes = 1 << 19;  // what a thread should copy at least, so that starting it pays

// One of the two caches and, where there are any, its new rows; strides in bytes.
struct Side {
  char* cache;
  RowStrides to;
  const char* rows = nullptr;
  int64_t from_batch = 0, from_head = 0, from_row = 0;
};

// Heads that lie side by side everywhere are one long row.
struct Copy {
  Side k, v;
  Pages pages;
  int64_t heads, row_bytes;

  void join_heads() {
    for (const Side* s : {&k, &v}) {
      if (s->to.head != row_bytes || (s->rows && s->from_head != row_bytes)) return;
    }
    row_bytes *= heads;
    heads = 1;
  }
};

Side side(const Tensor& cache, bool paged, const Tensor* rows = nullptr) {
  const int64_t item = cache.scalar_type() == ScalarType::Float ? 4 : 2;
  const RowStrides s = kv::row_strides(cache, paged);
  Side out{static_cast<char*>(cache.mutable_data_ptr()), {s.outer * item, s.head * item, s.row * item}};
  if (rows) {
    out.rows = static_cast<const char*>(rows->const_data_ptr());
    out.from_batch = rows->stride(0) * item;
    out.from_head = rows->stride(1) * item;
    out.from_row = rows->stride(2) * item;
  }
  return out;
}

// Where a position that has been checked lies.
struct Place {
  int64_t outer, slot;
  char* in(const Side& s, int64_t head) const {
    return s.cache + outer * s.to.outer + slot * s.to.row + head * s.to.head;
  }
};

Place place(const Pages& p, int64_t b, int64_t position) {
  if (!p.table) return {b, position};
  return {p.table[b * p.table_row + position / p.block * p.table_column], position % p.block};
}

// Calls f(begin, end) over `units` of `bytes` each, on as many threads as pay.
template <class F>
void run(int64_t units, int64_t bytes, const F& f) {
  const int64_t grain = std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(bytes, 1));
  if (units <= grain) return f(int64_t{0}, units);
  torch::stable::parallel_for(0, units, grain, f);
}

void check_count(const char* op, const char* name, int64_t count, int64_t most, int64_t b) {
  FO_CHECK(count >= 0 && count <= most, op, name, " must be from 0 to T = ", most, ", got ", count, " at [", b, "]");
}

void check_length(const char* op, int64_t length, int64_t rows, int64_t capacity, int64_t b) {
  FO_CHECK(length >= 0 && length + rows <= capacity, op, "lengths must be from 0 to ", capacity - rows, " (capacity ",
           capacity, ", ", rows, " new rows), got ", length, " at [", b, "]");
}

// Rotary embedding.

struct Rotary {
  const void *cos = nullptr, *sin = nullptr;
  int64_t cos_row = 0, sin_row = 0, half = 0, positions = 0;  // rows in elements; half is R / 2
  bool interleaved = false, fp32 = true;
  Ints at;  // where not lengths + t
  Isa isa = active_isa;
};

// Pairs (x[i], other[i]), `step` elements apart, turned: products and their sum in fp32, each rounded as the reference
// does.
template <class T, class C, class Out>
FO_INLINE void turn(const T* x, const T* other, int64_t step, const C* cos, const C* sin, int64_t n, Out* first,
                    Out* second) {
  for (int64_t i = 0; i < n; ++i) {
    const float a = to_float(x[i * step]), b = to_float(other[i * step]), c = to_float(cos[i]), s = to_float(sin[i]);
    first[i * step] = static_cast<Out>(a * c - b * s);
    second[i * step] = static_cast<Out>(b * c + a * s);
  }
}

// One head's row.
template <class T, class C>
void rotate(const T* x, const C* cos, const C* sin, int64_t half, bool interleaved, T* y, Isa) {
  if (interleaved) return turn(x, x + 1, 2, cos, sin, half, y, y + 1);
  turn(x, x + half, 1, cos, sin, half, y, y + half);
}

#if defined(FASTOPS_X86)
FO_TARGET_AVX2 inline void narrow_f16c(const float* from, int64_t n, Half* to) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    const __m128i rounded = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), rounded);
  }
  for (; i < n; ++i) to[i] = static_cast<Half>(from[i]);
}

// Without the instruction that rounds to it a Half costs ten times a BFloat16.
template <class C>
void rotate(const Half* x, const C* cos, const C* sin, int64_t half, bool interleaved, Half* y, Isa isa) {
  if (isa < Isa::kAvx2) return rotate<Half, C>(x, cos, sin, half, interleaved, y, isa);
  constexpr int64_t kPairs = 128;
  float turned[2 * kPairs];
  for (int64_t i = 0; i < half; i += kPairs) {
    const int64_t n = std::min(kPairs, half - i);
    if (interleaved) {
      turn(x + 2 * i, x + 2 * i + 1, 2, cos + i, sin + i, n, turned, turned + 1);
      narrow_f16c(turned, 2 * n, y + 2 * i);
    } else {
      turn(x + i, x + half + i, 1, cos + i, sin + i, n, turned, turned + kPairs);
      narrow_f16c(turned, n, y + i);
      narrow_f16c(turned + kPairs, n, y + half + i);
    }
  }
}
#endif

template <class T>
void write_rotated(const Copy& c, const Rotary& r, const char* from, const Place& to, int64_t position) {
  const int64_t turned = 2 * r.half * static_cast<int64_t>(sizeof(T));
  for (int64_t h = 0; h < c.heads; ++h) {
    const char* row = from + h * c.k.from_head;
    char* out = to.in(c.k, h);
    const auto with_angles = [&](auto zero) {
      using C = decltype(zero);
      rotate(reinterpret_cast<const T*>(row), static_cast<const C*>(r.cos) + position * r.cos_row,
             static_cast<const C*>(r.sin) + position * r.sin_row, r.half, r.interleaved, reinterpret_cast<T*>(out),
             r.isa);
    };
    r.fp32 ? with_angles(float{}) : with_angles(T{});
    std::memcpy(out + turned, row + turned, c.row_bytes - turned);
  }
}

void write_rows(const Side& s, const char* from, const Place& to, int64_t heads, int64_t bytes) {
  for (int64_t h = 0; h < heads; ++h) std::memcpy(to.in(s, h), from + h * s.from_head, bytes);
}

// A sequence's new rows of one head, which lie one behind the other in a contiguous cache.
void write_run(const Side& s, const char* from, const Place& to, int64_t head, int64_t rows, int64_t bytes) {
  char* out = to.in(s, head);
  if (s.to.row == bytes && s.from_row == bytes) {
    std::memcpy(out, from, rows * bytes);
    return;
  }
  for (int64_t t = 0; t < rows; ++t) std::memcpy(out + t * s.to.row, from + t * s.from_row, bytes);
}

// The operators.

void kv_append(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor lengths, std::optional<Tensor> block_table,
               std::optional<Tensor> q_lens, std::optional<Tensor> cos, std::optional<Tensor> sin,
               bool rope_interleaved, std::optional<Tensor> positions) {
  constexpr char kOp[] = "kv_append";
  const CacheShape shape = kv::check_writable_caches(kOp, k_cache, v_cache, block_table);
  const int64_t most = kv::check_rows(kOp, k_cache, k, v, shape, "T");
  const Ints length = kv::check_ints(kOp, "lengths", lengths, k_cache, "[B]", {shape.batch});
  const Ints wanted = q_lens ? kv::check_ints(kOp, "q_lens", *q_lens, k_cache, "[B]", {shape.batch}) : Ints{};
  kv::check_rotary(kOp, k_cache, shape.dim, cos, sin, rope_interleaved, positions);
  Rotary rotary;
  if (positions) rotary.at = kv::check_ints(kOp, "positions", *positions, k_cache, "[B, T]", {shape.batch, most});
  if (cos) {
    rotary.cos = cos->const_data_ptr();
    rotary.sin = sin->const_data_ptr();
    rotary.cos_row = cos->stride(0);
    rotary.sin_row = sin->stride(0);
    rotary.half = cos->size(1);
    rotary.positions = cos->size(0);
    rotary.interleaved = rope_interleaved;
    rotary.fp32 = cos->scalar_type() == ScalarType::Float;
  }

  const Pages pages = kv::pages(k_cache, block_table, shape);
  const auto count = [&](int64_t b) -> int64_t { return wanted.data ? wanted.at(b) : most; };
  const auto angle = [&](int64_t b, int64_t t) -> int64_t {
    return rotary.at.data ? rotary.at.at(b, t) : length.at(b) + t;
  };
  for (int64_t b = 0; b < shape.batch; ++b) check_count(kOp, "q_lens", count(b), most, b);
  for (int64_t b = 0; b < shape.batch; ++b) check_length(kOp, length.at(b), count(b), pages.capacity, b);
  for (int64_t b = 0; pages.table && b < shape.batch; ++b) {
    if (count(b) == 0) continue;
    const int64_t last = (length.at(b) + count(b) - 1) / pages.block;
    for (int64_t column = length.at(b) / pages.block; column <= last; ++column) check_page(kOp, pages, b, column);
  }
  for (int64_t b = 0; rotary.cos && b < shape.batch; ++b) {
    for (int64_t t = 0; t < count(b); ++t) {
      FO_CHECK(angle(b, t) >= 0 && angle(b, t) < rotary.positions, kOp, positions ? "positions" : "lengths + t",
               " must be from 0 to max_positions - 1 = ", rotary.positions - 1, ", got ", angle(b, t), " at [", b, ", ",
               t, "]");
    }
  }

  Copy copy{side(k_cache, pages.table, &k), side(v_cache, pages.table, &v), pages, shape.heads,
            shape.dim * (k.scalar_type() == ScalarType::Float ? 4 : 2)};
  if (!rotary.cos) copy.join_heads();
  if (!rotary.cos && !pages.table) {
    return run(shape.batch * copy.heads, 2 * most * copy.row_bytes, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const int64_t b = i / copy.heads, h = i % copy.heads;
        for (const Side* s : {&copy.k, &copy.v}) {
          const char* from = s->rows + b * s->from_batch + h * s->from_head;
          write_run(*s, from, {b, length.at(b)}, h, count(b), copy.row_bytes);
        }
      }
    });
  }
  dispatch_float(k.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    run(shape.batch * most, 2 * copy.heads * copy.row_bytes, [&](int64_t begin, int64_t end) {
      int64_t b = most ? begin / most : 0, t = begin - b * most;
      for (int64_t i = begin; i < end; ++i, ++t) {
        if (t == most) t = 0, ++b;
        if (t >= count(b)) continue;
        const Place to = place(copy.pages, b, int64_t{length.at(b)} + t);
        const char* from = copy.k.rows + b * copy.k.from_batch + t * copy.k.from_row;
        if (rotary.cos) {
          write_rotated<T>(copy, rotary, from, to, angle(b, t));
        } else {
          write_rows(copy.k, from, to, copy.heads, copy.row_bytes);
        }
        from = copy.v.rows + b * copy.v.from_batch + t * copy.v.from_row;
        write_rows(copy.v, from, to, copy.heads, copy.row_bytes);
      }
    });
  });
}

void kv_compact(Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor accept_index, Tensor accept_len,
                std::optional<Tensor> block_table) {
  constexpr char kOp[] = "kv_compact";
  const CacheShape shape = kv::check_writable_caches(kOp, k_cache, v_cache, block_table);
  const Ints length = kv::check_ints(kOp, "lengths", lengths, k_cache, "[B]", {shape.batch});
  const int64_t tree = accept_index.dim() ? accept_index.size(accept_index.dim() - 1) : 0;
  const Ints index = kv::check_ints(kOp, "accept_index", accept_index, k_cache, "[B, T]", {shape.batch, tree});
  const Ints count = kv::check_ints(kOp, "accept_len", accept_len, k_cache, "[B]", {shape.batch});

  const Pages pages = kv::pages(k_cache, block_table, shape);
  for (int64_t b = 0; b < shape.batch; ++b) check_count(kOp, "accept_len", count.at(b), tree, b);
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t i = 0, last = -1; i < count.at(b); last = index.at(b, i++)) {
      FO_CHECK(index.at(b, i) > last && index.at(b, i) < tree, kOp,
               "accept_index must ascend from 0 to T - 1 = ", tree - 1, ", got ", index.at(b, i), " at [", b, ", ", i,
               "]");
    }
  }
  int64_t accepted = 0;
  for (int64_t b = 0; b < shape.batch; ++b) {
    const int64_t n = count.at(b);
    check_length(kOp, length.at(b), n ? int64_t{index.at(b, n - 1)} + 1 : 0, pages.capacity, b);
    accepted += n;
  }
  for (int64_t b = 0; pages.table && b < shape.batch; ++b) {
    int64_t first = INT64_MAX;  // the lowest column with a bad page, as the Python check reports it
    for (int64_t i = 0; i < count.at(b); ++i) {
      if (index.at(b, i) == i) continue;
      for (const int64_t row : {i, int64_t{index.at(b, i)}}) {
        const int64_t column = (length.at(b) + row) / pages.block;
        const int64_t page = pages.table[b * pages.table_row + column * pages.table_column];
        if (page < 0 || page >= pages.n_blocks) first = std::min(first, column);
      }
    }
    if (first != INT64_MAX) check_page(kOp, pages, b, first);
  }

  Copy copy{side(k_cache, pages.table), side(v_cache, pages.table), pages, shape.heads,
            shape.dim * (k_cache.scalar_type() == ScalarType::Float ? 4 : 2)};
  copy.join_heads();
  const int64_t bytes = 2 * copy.heads * copy.row_bytes * accepted / std::max<int64_t>(shape.batch, 1);
  run(shape.batch, bytes, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) {
      for (int64_t i = 0; i < count.at(b); ++i) {  // in order: a row is read before another takes its place
        if (index.at(b, i) == i) continue;
        const Place from = place(copy.pages, b, int64_t{length.at(b)} + index.at(b, i));
        const Place to = place(copy.pages, b, int64_t{length.at(b)} + i);
        for (const Side* s : {&copy.k, &copy.v}) {
          for (int64_t h = 0; h < copy.heads; ++h) std::memcpy(to.in(*s, h), from.in(*s, h), copy.row_bytes);
        }
      }
    }
  });
}

void kv_scatter(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor index) {
  constexpr char kOp[] = "kv_scatter";
  const CacheShape shape = kv::check_writable_caches(kOp, k_cache, v_cache, std::nullopt);
  const int64_t rows = kv::check_rows(kOp, k_cache, k, v, shape, "A");
  const Ints where = kv::check_ints(kOp, "index", index, k_cache, "[B, A]", {shape.batch, rows});
  for (int64_t b = 0; b < shape.batch; ++b) {
    for (int64_t a = 0; a < rows; ++a) {
      FO_CHECK(where.at(b, a) >= -1 && where.at(b, a) < shape.capacity, kOp,
               "index must be from -1 to S_cap - 1 = ", shape.capacity - 1, ", got ", where.at(b, a), " at [", b, ", ",
               a, "]");
    }
  }

  Copy copy{side(k_cache, false, &k), side(v_cache, false, &v), kv::pages(k_cache, std::nullopt, shape), shape.heads,
            shape.dim * (k.scalar_type() == ScalarType::Float ? 4 : 2)};
  copy.join_heads();
  // A thread has whole heads, and takes their rows in order: of equal positions the last one stays.
  run(shape.batch * copy.heads, 2 * rows * copy.row_bytes, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t b = i / copy.heads, h = i % copy.heads;
      for (int64_t a = 0; a < rows; ++a) {
        if (where.at(b, a) < 0) continue;
        const Place to{b, where.at(b, a)};
        for (const Side* s : {&copy.k, &copy.v}) {
          std::memcpy(to.in(*s, h), s->rows + b * s->from_batch + h * s->from_head + a * s->from_row, copy.row_bytes);
        }
      }
    }
  });
}

}  // namespace
}  // namespace fastops::kv_append

FO_IMPL(CPU, "kv_append", &fastops::kv_append::kv_append)
FO_IMPL(CPU, "kv_compact", &fastops::kv_append::kv_compact)
FO_IMPL(CPU, "kv_scatter", &fastops::kv_append::kv_scatter)
