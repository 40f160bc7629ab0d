// The kernel of split_attn (csrc/cpu/split_attn.cpp), in terms of cpu_simd.h. No include guard: the kernel file
// includes this once for each instruction set, inside a namespace, with
//   FO_VECTOR  the struct of cpu_simd.h to use
//   FO_KERNEL  the target attribute of its functions
//
// A task is up to kRows queries of a head. Keys come in tiles of up to kKeys that take part, from either set: those
// that the mask leaves out are never touched. Of a tile, keys are transposed, so that lanes run along the keys in the
// scores and along D in the output, and every product is a broadcast times a vector.

namespace {

using V = FO_VECTOR;
constexpr int kLanes = V::kLanes;
constexpr int kKeyVectors = kKeys / kLanes;
constexpr int kAcross = kLanes == 16 ? 4 : 2;  // vectors that a group of kGroup rows is multiplied with at a time

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

// A row as floats, with zeros up to `width`.
template <class T>
FO_KERNEL FO_INLINE void widen(const T* from, int64_t count, int64_t width, float factor, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = to_float(from[i]) * factor;
  for (int64_t i = count; i < width; ++i) to[i] = 0.0f;
}

// keys [count] of width D -> to [width][kKeys]; lanes beyond `count` are 0.
template <class T>
FO_KERNEL void transpose_keys(const T* const* keys, int64_t count, int64_t d, int64_t width, float* rows, float* to) {
  for (int64_t first = 0; first < count; first += kLanes) {
    for (int64_t i = 0; i < kLanes; ++i) {
      if (first + i < count) {
        widen(keys[first + i], d, width, 1.0f, rows + i * width);
      } else {
        std::memset(rows + i * width, 0, static_cast<size_t>(width) * sizeof(float));
      }
    }
    for (int64_t column = 0; column < width; column += kLanes) {
      typename V::W words[kLanes];
      for (int i = 0; i < kLanes; ++i) words[i] = V::load_words(rows + i * width + column);
      V::transpose(words);
      for (int i = 0; i < kLanes; ++i) V::store_words(to + (column + i) * kKeys + first, words[i]);
    }
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
      for (int c = 0; c < kWide; ++c) acc[r][c] = V::fma(each, some[c], acc[r][c]);
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

// Scores of a row, in units of log 2, to probabilities over their running maximum; returns what the row's sums shrink
// by.
FO_KERNEL FO_INLINE float soften(float* scores, int64_t count, float& highest, float& total) {
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
    V::store(scores + c * kLanes, p);
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
  float *q = scratch, *keys = q + sizes.q, *values = keys + sizes.keys, *scores = values + sizes.values;
  float *out = scores + sizes.scores, *widened = out + sizes.out;
  float highest[kRows], total[kRows], shrink[kRows];
  std::fill_n(highest, kRows, -std::numeric_limits<float>::infinity());
  std::fill_n(total, kRows, 0.0f);
  std::memset(out, 0, static_cast<size_t>(sizes.out) * sizeof(float));
  const int64_t padded = (rows + kGroup - 1) / kGroup * kGroup;
  for (int64_t r = 0; r < padded; ++r) {
    widen(p.q.row<T>(batch, head, first + std::min(r, rows - 1)), p.d, width, p.factor, q + r * width);
  }
  const T *some_keys[kKeys], *some_values[kKeys];
  for (Walk walk{p, batch, head}; const int64_t count = walk.next(some_keys, some_values);) {
    transpose_keys(some_keys, count, p.d, width, widened, keys);
    for (int64_t i = 0; i < count; ++i) widen(some_values[i], p.d, width, 1.0f, values + i * width);
    const int64_t vectors = (count + kLanes - 1) / kLanes;
    for (int64_t r = 0; r < padded; r += kGroup) {
      multiply_all<false>(q + r * width, width, keys, kKeys, p.d, nullptr, scores + r * kKeys, kKeys, vectors);
      for (int64_t i = r; i < r + kGroup; ++i) shrink[i] = soften(scores + i * kKeys, count, highest[i], total[i]);
      multiply_all<true>(scores + r * kKeys, kKeys, values, width, count, shrink + r, out + r * width, width,
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

}  // namespace
