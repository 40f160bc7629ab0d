// The kernel of split_attn (csrc/cpu/split_attn.cpp), in terms of cpu_simd.h. No include guard: common/cpu_each_isa.h
// includes this once for each instruction set, with
//   FO_VECTOR  the struct of cpu_simd.h to use
//   FO_KERNEL  the target attribute of its functions
//
// A task is up to kRows queries of a head. Keys come in tiles of up to kKeys that take part, from either set: those
// that the mask leaves out are never touched. Of a tile, keys are transposed, so that lanes run along the keys in the
// scores and along D in the output, and every product is a broadcast times a vector.
//
// A unit, 32 bits in a lane, is a float, or where the CPU multiplies bf16 two of them: of queries and keys two elements
// of D, of probabilities and values two keys. Then the scale is applied to scores, and probabilities are rounded.

namespace {

using V = FO_VECTOR;
constexpr int kLanes = V::kLanes;
constexpr int kKeyVectors = kKeys / kLanes;
constexpr int kAcross = kLanes == 16 ? 4 : 2;  // vectors that a group of kGroup rows is multiplied with at a time

template <class T>
constexpr bool kPairs = V::kUnits == 4 && std::is_same_v<T, BFloat16>;

typedef int32_t Bits __attribute__((vector_size(sizeof(V::F))));

FO_KERNEL FO_INLINE V::F all(float v) { return V::broadcast(&v); }

// 2^x for x <= 0, within 1.4 units of rounding; 0 below the normal numbers, NaN for NaN. The polynomial has the least
// relative error on [-0.5, 0.5] for its degree (2e-9).
FO_KERNEL FO_INLINE V::F exp2_down(V::F x) {
  constexpr float kShift = 0x1.8p23f;  // adding it leaves the nearest integer in the low bits
  const V::F shifted = V::add(x, all(kShift));
  const V::F f = V::fma(V::add(shifted, all(-kShift)), all(-1.0f), x);
  V::F p = all(0.0001534581242594868f);
  p = V::fma(p, f, all(0.0013399930903688073f));
  p = V::fma(p, f, all(0.009618489071726799f));
  p = V::fma(p, f, all(0.05550328642129898f));
  p = V::fma(p, f, all(0.24022646248340607f));
  p = V::fma(p, f, all(0.6931471824645996f));
  p = V::fma(p, f, all(1.0f));
  const Bits power = (reinterpret_cast<Bits>(shifted) + (127 - 0x4b400000)) << 23;
  const V::F value = V::mul(p, reinterpret_cast<V::F>(power));
  const Bits tiny = x < all(-126.0f);
  return reinterpret_cast<V::F>(reinterpret_cast<Bits>(value) & ~tiny);
}

FO_KERNEL FO_INLINE V::F larger(V::F a, V::F b) {
  const Bits first = a > b;
  return reinterpret_cast<V::F>((reinterpret_cast<Bits>(a) & first) | (reinterpret_cast<Bits>(b) & ~first));
}

// A row as floats times `factor`, or as pairs, with zeros up to `units` units.
template <class T>
FO_KERNEL FO_INLINE void lay_out(const T* from, int64_t count, int64_t units, float factor, float* to) {
  if constexpr (kPairs<T>) {
    T* elements = reinterpret_cast<T*>(to);
    std::memcpy(elements, from, static_cast<size_t>(count) * sizeof(T));
    std::memset(elements + count, 0, static_cast<size_t>(2 * units - count) * sizeof(T));
  } else {
    for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]) * factor;
    for (int64_t i = count; i < units; ++i) to[i] = 0.0f;
  }
}

// keys [count] of d elements -> to [units][kKeys]; lanes beyond `count` are 0.
template <class T>
FO_KERNEL void transpose_keys(const T* const* keys, int64_t count, int64_t d, int64_t units, float* rows, float* to) {
  for (int64_t first = 0; first < count; first += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      if (first + i < count) {
        lay_out(keys[first + i], d, units, 1.0f, rows + i * units);
      } else {
        std::memset(rows + i * units, 0, static_cast<size_t>(units) * sizeof(float));
      }
    }
    for (int64_t unit = 0; unit < units; unit += kLanes) {
      typename V::W words[kLanes];
      for (int i = 0; i < kLanes; ++i) words[i] = V::load_words(rows + i * units + unit);
      V::transpose(words);
      for (int i = 0; i < kLanes; ++i) V::store_words(to + (unit + i) * kKeys + first, words[i]);
    }
  }
}

// values [count] of d elements -> to [count or half of it][width].
template <class T>
FO_KERNEL void lay_out_values(const T* const* values, int64_t count, int64_t d, int64_t width, float* to) {
  if constexpr (kPairs<T>) {
    for (int64_t i = 0; i < count; i += 2, to += width) {
      const T *even = values[i], *odd = values[std::min(i + 1, count - 1)];
      const uint32_t there = i + 1 < count ? 0xffffu : 0;  // the last one may be alone
      for (int64_t j = 0; j < d; ++j) to[j] = std::bit_cast<float>(even[j].x | (odd[j].x & there) << 16);
      for (int64_t j = d; j < width; ++j) to[j] = 0.0f;
    }
  } else {
    for (int64_t i = 0; i < count; ++i) lay_out(values[i], d, width, 1.0f, to + i * width);
  }
}

// to[r] = (add ? to[r] * by[r] : 0) + sum_i a[r][i] b[i] for kGroup rows and kWide vectors; strides in floats.
template <int kWide, bool kAdd>
FO_KERNEL FO_INLINE void multiply(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count,
                                  const float* by, float* to, int64_t to_stride) {
  V::F acc[kGroup][kWide];
  for (int r = 0; r < kGroup; ++r) {
    for (int c = 0; c < kWide; ++c) {
      acc[r][c] = kAdd ? V::mul(V::load(to + r * to_stride + c * kLanes), V::broadcast(by + r)) : V::zero();
    }
  }
  for (int64_t i = 0; i < count; ++i) {
    V::F some[kWide];
    for (int c = 0; c < kWide; ++c) some[c] = V::load(b + i * b_stride + c * kLanes);
    for (int r = 0; r < kGroup; ++r) {
      const V::F each = V::broadcast(a + r * a_stride + i);
      for (int c = 0; c < kWide; ++c) acc[r][c] = V::mac(acc[r][c], some[c], each);
    }
  }
  for (int r = 0; r < kGroup; ++r) {
    for (int c = 0; c < kWide; ++c) V::store(to + r * to_stride + c * kLanes, acc[r][c]);
  }
}

template <bool kAdd>
FO_KERNEL FO_INLINE void multiply_all(const float* a, int64_t a_stride, const float* b, int64_t b_stride, int64_t count,
                                      const float* by, float* to, int64_t to_stride, int64_t vectors) {
  int64_t c = 0;
  for (; c + kAcross <= vectors; c += kAcross) {
    multiply<kAcross, kAdd>(a, a_stride, b + c * kLanes, b_stride, count, by, to + c * kLanes, to_stride);
  }
  for (; c < vectors; ++c) {
    multiply<1, kAdd>(a, a_stride, b + c * kLanes, b_stride, count, by, to + c * kLanes, to_stride);
  }
}

// Scores of a row, in units of log 2 once multiplied by `factor`, to probabilities over their running maximum, in place
// and as pairs where those are used; returns what the row's sums shrink by.
template <bool kAsPairs>
FO_KERNEL FO_INLINE float soften(float* scores, int64_t count, float factor, float& highest, float& total) {
  if constexpr (kAsPairs) {
    for (int c = 0; c < kKeyVectors; ++c) {
      V::store(scores + c * kLanes, V::mul(V::load(scores + c * kLanes), all(factor)));
    }
  }
  for (int64_t i = count; i < kKeys; ++i) scores[i] = -std::numeric_limits<float>::infinity();
  V::F most = V::load(scores);
  for (int c = 1; c < kKeyVectors; ++c) most = larger(V::load(scores + c * kLanes), most);
  float lanes[kLanes], before = highest;
  V::store(lanes, most);
  for (int i = 0; i < kLanes; ++i) highest = std::max(highest, lanes[i]);
  const float base = highest == -std::numeric_limits<float>::infinity() ? 0.0f : highest;
  V::F sum = V::zero();
  for (int c = 0; c < kKeyVectors; ++c) {
    const V::F p = exp2_down(V::add(V::load(scores + c * kLanes), all(-base)));
    if constexpr (kAsPairs) {
      V::store_as(reinterpret_cast<BFloat16*>(scores) + c * kLanes, p);
    } else {
      V::store(scores + c * kLanes, p);
    }
    sum = V::add(sum, p);
  }
  const float shrink = std::exp2(before - base);
  total = total * shrink + V::sum(sum);
  return shrink;
}

template <class T>
FO_KERNEL void attend(const Params& p, int64_t task, float* scratch) {
  const Sizes sizes(p.d, kLanes);
  const int64_t width = sizes.width, tile = task % p.tiles, head = task / p.tiles % p.h, batch = task / p.tiles / p.h;
  const int64_t first = tile * kRows, rows = std::min(kRows, p.a - first);
  constexpr int64_t kPer = kPairs<T> ? 2 : 1;  // elements in a unit
  const int64_t units = ceil_div(ceil_div(p.d, kPer), kLanes) * kLanes;
  float *q = scratch, *keys = q + sizes.q, *values = keys + sizes.keys, *scores = values + sizes.values;
  float *out = scores + sizes.scores, *laid_out = out + sizes.out;
  float highest[kRows], total[kRows], shrink[kRows];
  std::fill_n(highest, kRows, -std::numeric_limits<float>::infinity());
  std::fill_n(total, kRows, 0.0f);
  std::memset(out, 0, static_cast<size_t>(sizes.out) * sizeof(float));
  const int64_t padded = ceil_div(rows, kGroup) * kGroup;
  for (int64_t r = 0; r < padded; ++r) {
    lay_out(p.q.row<T>(batch, head, first + std::min(r, rows - 1)), p.d, units, p.factor, q + r * units);
  }
  const T *some_keys[kKeys], *some_values[kKeys];
  for (Walk walk{p, batch, head}; const int64_t count = walk.next(some_keys, some_values);) {
    transpose_keys(some_keys, count, p.d, units, laid_out, keys);
    lay_out_values(some_values, count, p.d, width, values);
    const int64_t vectors = ceil_div(count, kLanes);
    for (int64_t r = 0; r < padded; r += kGroup) {
      float* of = scores + r * kKeys;
      multiply_all<false>(q + r * units, units, keys, kKeys, ceil_div(p.d, kPer), nullptr, of, kKeys, vectors);
      for (int64_t i = 0; i < kGroup; ++i) {
        shrink[r + i] = soften<kPairs<T>>(of + i * kKeys, count, p.factor, highest[r + i], total[r + i]);
      }
      multiply_all<true>(of, kKeys, values, width, ceil_div(count, kPer), shrink + r, out + r * width, width,
                         width / kLanes);
    }
  }
  for (int64_t r = 0; r < rows; ++r) {
    const bool empty = total[r] == 0.0f;
    const float inverse = empty ? 0.0f : 1.0f / total[r];
    p.lse[(batch * p.h + head) * p.a + first + r] =
        empty ? -std::numeric_limits<float>::infinity() : highest[r] * kLn2 + std::log(total[r]);
    T* to = static_cast<T*>(p.out) + ((batch * p.a + first + r) * p.h + head) * p.d;
    int64_t i = 0;
    for (; i + kLanes <= p.d; i += kLanes) V::store_as(to + i, V::mul(V::load(out + r * width + i), all(inverse)));
    for (; i < p.d; ++i) to[i] = static_cast<T>(out[r * width + i] * inverse);
  }
}

template <class T>
constexpr Kernel kernels() {
  return {&attend<T>, kLanes};
}

}  // namespace
