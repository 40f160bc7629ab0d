// The kernel of kv_recompute (csrc/cpu/kv_recompute.cpp), in terms of cpu_simd.h. No include guard:
// common/cpu_each_isa.h includes this once for each instruction set, with
//   FO_VECTOR  the struct of cpu_simd.h to use
//   FO_KERNEL  the target attribute of its functions
//
// A dense product, whose output is a strip of columns at a time: some whole heads of K or of V, kWidth columns in a
// panel, against a block of rows of x. Lanes run along the columns, so a row of a head lies side by side when its sums
// are done, and bias, norm, rotation and the rounded store into the cache happen on it there, in the L2 cache.
//
// Both operands are laid out by transposing vectors of units (common/cpu_tiles.h): x once for all strips, a panel of
// weights for all rows of x.

namespace {

using V = FO_VECTOR;
#include "common/cpu_tiles.h"

constexpr int64_t kTile = kDepth * kWidth;  // units of a panel's tile

// Group `group` of the rows m0 … of x: for each step along H a tile [unit][kLanes], of which kTall rows are used.
template <class T>
FO_KERNEL void pack_x(const Job& job, int64_t m0, const RowGroups& groups, int64_t group, float* packed) {
  const int64_t first = m0 + groups.start(group), count = m0 + groups.start(group + 1) - first;
  const int64_t all = ceil_div(job.hidden, int64_t{kPerUnit<T>});
  const T* rows[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    const int64_t m = first + std::min(i, count - 1);
    rows[i] = static_cast<const T*>(job.x) + m / job.rows * job.x_batch + m % job.rows * job.x_row;
  }
  for (int64_t u0 = 0; u0 < all; u0 += job.depth) {
    const int64_t units = std::min(job.depth, all - u0), k0 = u0 * kPerUnit<T>;
    transpose_units(rows, job.hidden - k0, units, packed + (u0 * groups.count + group * units) * kLanes, kLanes);
    for (int i = 0; i < kLanes; ++i) rows[i] += units * kPerUnit<T>;
  }
}

FO_KERNEL FO_INLINE void normalise(const Job& job, float* y) {
  V::F squares = V::zero();
  int64_t d = 0;
  for (; d + kLanes <= job.dim; d += kLanes) squares = V::fma(V::load(y + d), V::load(y + d), squares);
  float sum = V::sum(squares);
  for (; d < job.dim; ++d) sum += y[d] * y[d];
  const float r = 1.0f / std::sqrt(sum / static_cast<float>(job.dim) + job.eps);
  for (d = 0; d < job.dim; ++d) y[d] *= r * job.norm[d];
}

template <class C>
FO_KERNEL FO_INLINE void rotate(const Job& job, int64_t row, float* y) {
  const C *cos = static_cast<const C*>(job.cos) + row * job.cos_row,
          *sin = static_cast<const C*>(job.sin) + row * job.sin_row;
  const int64_t step = job.interleaved ? 2 : 1, other = job.interleaved ? 1 : job.half;
  for (int64_t i = 0; i < job.half; ++i) {
    const float a = y[i * step], b = y[i * step + other], c = to_float(cos[i]), s = to_float(sin[i]);
    y[i * step] = a * c - b * s;
    y[i * step + other] = b * c + a * s;
  }
}

// A row of a head, whose memory goes on for kLanes floats, to the cache.
template <class T>
FO_KERNEL FO_INLINE void store_row(const float* y, int64_t dim, T* to) {
  int64_t d = 0;
  for (; d + kLanes <= dim; d += kLanes) V::store_as(to + d, V::load(y + d));
  if (d == dim) return;
  T some[kLanes];
  V::store_as(some, V::load(y + d));
  std::memcpy(to + d, some, static_cast<size_t>(dim - d) * sizeof(T));
}

// Sums of row m of all rows, for the heads of a strip, to where they go.
template <class T>
FO_KERNEL void finish_row(const Job& job, const Strip& strip, int64_t m, float* sums) {
  const int64_t b = m / job.rows, row = m % job.rows;
  const int64_t columns = strip.heads * job.dim;
  if (strip.side->bias) {
    const T* bias = static_cast<const T*>(strip.side->bias) + strip.head * job.dim;
    for (int64_t i = 0; i < columns; ++i) sums[i] += to_float(bias[i]);
  }
  T* to = static_cast<T*>(strip.side->cache) + job.row_offset(*strip.side, b, row);
  for (int64_t h = 0; h < strip.heads; ++h, sums += job.dim) {
    if (strip.side == &job.k) {
      if (job.norm) normalise(job, sums);
      if (job.cos) job.fp32_angles ? rotate<float>(job, row, sums) : rotate<T>(job, row, sums);
    }
    store_row(sums, job.dim, to + (strip.head + h) * strip.side->to.head);
  }
}

// Groups g_first … g_last - 1 of the rows m0 … against the columns of a strip. `packed`: as pack_x left it.
template <class T>
FO_KERNEL void product(const Job& job, const Strip& strip, int64_t m0, const RowGroups& groups, int64_t g_first,
                       int64_t g_last, const float* packed, float* scratch) {
  const int64_t all = ceil_div(job.hidden, int64_t{kPerUnit<T>});
  const int64_t columns = strip.heads * job.dim, width = ceil_div(columns, kWidth) * kWidth;
  const int64_t before = groups.start(g_first), count = groups.start(g_last) - before;
  float *tile = scratch, *sums = scratch + kTile;
  if (all == 0) std::memset(sums, 0, static_cast<size_t>(count * width) * sizeof(float));
  const T* w = static_cast<const T*>(strip.side->w) + strip.head * job.dim * strip.side->w_row;
  for (int64_t u0 = 0; u0 < all; u0 += job.depth) {
    const int64_t units = std::min(job.depth, all - u0), k0 = u0 * kPerUnit<T>;
    for (int64_t n0 = 0; n0 < width; n0 += kWidth) {
      for (int half = 0; half < kWidth; half += kLanes) {
        const T* rows[kLanes];  // beyond the last column stands the last one, whose sums nobody reads
        for (int i = 0; i < kLanes; ++i) rows[i] = w + std::min(n0 + half + i, columns - 1) * strip.side->w_row + k0;
        transpose_units(rows, job.hidden - k0, units, tile + half, kWidth);
      }
      const float* x = packed + (u0 * groups.count + g_first * units) * kLanes;
      for (int64_t g = g_first; g < g_last; ++g, x += units * kLanes) {
        const int64_t m = groups.start(g), tall = groups.start(g + 1) - m;
        kMicro<float, kWidth>[tall - 1](tile, x, kLanes, units, sums + (m - before)* width + n0, width, u0 == 0);
      }
    }
  }
  for (int64_t m = 0; m < count; ++m) finish_row<T>(job, strip, m0 + before + m, sums + m * width);
}

template <class T>
constexpr Kernels<T> kernels() {
  return {kLanes, kWidth, kTall, kPerUnit<T>, kTile, &pack_x<T>, &product<T>};
}

}  // namespace
