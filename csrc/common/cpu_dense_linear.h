// The kernel of dense_linear (csrc/cpu/dense_linear.cpp), in terms of cpu_simd.h. No include guard:
// common/cpu_each_isa.h includes this once for each instruction set, with
//   FO_VECTOR  the struct of cpu_simd.h to use
//   FO_KERNEL  the target attribute of its functions
//
// Lanes run along the outputs. A panel of weights is read once, from its first byte to its last, as one stream, and
// each vector of it is multiplied with all rows of x; those lie in the caches as fp32, their rows side by side.

namespace {

using V = FO_VECTOR;
#include "common/cpu_tiles.h"

static_assert(kPanel % kWidth == 0);

// Floats from one step along K to the next in a group of x: a single group lies tight.
int64_t step_of(const RowGroups& groups) { return groups.count == 1 ? groups.size : kLanes; }

// Group `group` of the rows m0 … of x, as tiles of job.depth units along K; `step` floats from one to the next.
template <class T>
FO_KERNEL void pack_x(const Job& job, int64_t m0, const RowGroups& groups, int64_t group, float* packed) {
  const int64_t first = m0 + groups.start(group), count = m0 + groups.start(group + 1) - first;
  const int64_t step = step_of(groups), all = ceil_div(job.k, int64_t{kPerUnit<T>});
  const T* rows[kLanes];
  for (int64_t i = 0; i < kLanes; ++i) {
    rows[i] = static_cast<const T*>(job.x) + (first + std::min(i, count - 1)) * job.k;
  }
  if (!kPairs<T> && step == 1) {
    for (int64_t i = 0; i < job.k; ++i) packed[i] = to_float(rows[0][i]);
    return;
  }
  for (int64_t u0 = 0; u0 < all; u0 += job.depth) {
    const int64_t units = std::min(job.depth, all - u0);
    transpose_units(rows, job.k - u0 * kPerUnit<T>, units, packed + (u0 * groups.count + group * units) * step, step);
    for (int i = 0; i < kLanes; ++i) rows[i] += units * kPerUnit<T>;
  }
}

// kWidth outputs of a row, of which there are `count`, with the bias, rounded.
template <class T>
FO_KERNEL FO_INLINE void finish(const float* sums, const T* bias, int64_t count, T* to) {
  T some[kWidth] = {};
  if (bias) std::memcpy(some, bias, static_cast<size_t>(count) * sizeof(T));
  const V::F low = V::add(V::load(sums), V::load(static_cast<const T*>(some)));
  const V::F high = V::add(V::load(sums + kLanes), V::load(static_cast<const T*>(some) + kLanes));
  T* const at = count == kWidth ? to : some;
  V::store_as(at, low);
  V::store_as(at + kLanes, high);
  if (count != kWidth) std::memcpy(to, some, static_cast<size_t>(count) * sizeof(T));
}

// `units` of a tile of a panel, as micro() reads them: an odd last row with zeros for its other half.
template <class T>
FO_KERNEL void lay_out(const T* from, int64_t rows, int64_t units, float* to) {
  V::F low, high;
  for (int64_t u = 0; u < units; ++u, from += kPanel * kPerUnit<T>, to += kWidth) {
    T half[2 * kPanel] = {};
    const bool odd = (u + 1) * kPerUnit<T> > rows;
    if (odd) std::memcpy(half, from, kWidth * sizeof(T));
    load_columns<T, kPanel>(odd ? half : from, low, high);
    V::store(to, low);
    V::store(to + kLanes, high);
  }
}

// A panel's outputs for groups g_first … g_last - 1 of the rows m0 …; `packed`: as pack_x left it.
template <class T>
FO_KERNEL void multiply(const Job& job, int64_t panel, int64_t m0, const RowGroups& groups, int64_t g_first,
                        int64_t g_last, const float* packed, float* scratch) {
  const int64_t step = step_of(groups), before = groups.start(g_first), count = groups.start(g_last) - before;
  const int64_t all = ceil_div(job.k, int64_t{kPerUnit<T>});
  float *laid_out = scratch, *sums = scratch + kDepth * kWidth;
  for (int64_t n0 = panel * kPanel; n0 < std::min(job.n, (panel + 1) * kPanel); n0 += kWidth) {
    const T* w = static_cast<const T*>(job.panels) + panel * kPanel * job.k + n0 % kPanel;
    if (all == 0) std::memset(sums, 0, static_cast<size_t>(count * kWidth) * sizeof(float));
    for (int64_t u0 = 0; u0 < all; u0 += job.depth) {
      const int64_t units = std::min(job.depth, all - u0), k0 = u0 * kPerUnit<T>;
      const T* tile = w + k0 * kPanel;
      const float* x = packed + (u0 * groups.count + g_first * units) * step;
      // Pairs are joined on the way where few groups read them; for many, or an odd end, they are laid out once.
      const bool once = kPairs<T> && (g_last - g_first > 2 || k0 + units * kPerUnit<T> > job.k);
      if (once) lay_out(tile, job.k - k0, units, laid_out);
      for (int64_t g = g_first; g < g_last; ++g, x += units * step) {
        const int64_t m = groups.start(g);
        const auto tall = static_cast<size_t>(groups.start(g + 1) - m);
        float* to = sums + (m - before) * kWidth;
        if (once) {
          kMicro<float, kWidth>[tall - 1](laid_out, x, step, units, to, kWidth, u0 == 0);
        } else if (g == g_first) {
          kMicro<T, kPanel, true>[tall - 1](tile, x, step, units, to, kWidth, u0 == 0);
        } else {
          kMicro<T, kPanel>[tall - 1](tile, x, step, units, to, kWidth, u0 == 0);
        }
      }
    }
    const T* bias = job.bias ? static_cast<const T*>(job.bias) + n0 : nullptr;
    T* to = static_cast<T*>(job.out) + (m0 + before) * job.n + n0;
    for (int64_t m = 0; m < count; ++m, to += job.n) {
      finish(sums + m * kWidth, bias, std::min<int64_t>(kWidth, job.n - n0), to);
    }
  }
}

template <class T>
constexpr Kernels kernels() {
  return {kLanes, kWidth, kTall, kPerUnit<T>, &pack_x<T>, &multiply<T>};
}

}  // namespace
