// What dense products on a CPU are made of: operands laid out by units, and the sums of a few rows of x with a panel of
// columns, which stay in registers. No include guard: a header of kernels (common/cpu_each_isa.h) includes this after
// `using V = FO_VECTOR`.
//
// A unit, 32 bits in a lane, is a float, or where the CPU multiplies bf16 two of them, neighbours in a row.

constexpr int kLanes = V::kLanes;
constexpr int kWidth = 2 * kLanes;                              // columns of a panel
constexpr int kTall = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 4;  // rows of a group: sums fill the registers

template <class T>
constexpr bool kPairs = V::kUnits == 4 && std::is_same_v<T, BFloat16>;
template <class T>
constexpr int kPerUnit = kPairs<T> ? 2 : 1;

// kLanes units of a row, of which it has `count` elements left; zeros beyond.
template <class T>
FO_KERNEL FO_INLINE V::W load_units(const T* from, int64_t count) {
  T some[kLanes * kPerUnit<T>] = {};
  if (count < kLanes * kPerUnit<T>) {
    std::memcpy(some, from, static_cast<size_t>(count) * sizeof(T));
    from = some;
  }
  if constexpr (kPairs<T>) {
    return V::load_words(reinterpret_cast<const uint8_t*>(from));
  } else {
    return V::as_words(V::load(from));
  }
}

// to[u * stride + i] = unit u of row i, for kLanes rows and `units` units; rows[i] has `count` elements left.
template <class T>
FO_KERNEL FO_INLINE void transpose_units(const T* const* rows, int64_t count, int64_t units, float* to,
                                         int64_t stride) {
  for (int64_t u = 0; u < units; u += kLanes) {
    const int64_t at = u * kPerUnit<T>;
    V::W words[kLanes];
    for (int i = 0; i < kLanes; ++i) words[i] = load_units(rows[i] + at, count - at);
    V::transpose(words);
    const int some = static_cast<int>(std::min<int64_t>(kLanes, units - u));
    for (int i = 0; i < some; ++i) V::store_words(to + (u + i) * stride, words[i]);
  }
}

template <class T>
using PairsOf = std::conditional_t<sizeof(T) != 0, V, T>;  // V, looked into only where there are pairs

// A unit of each of kWidth columns that lie side by side; of pairs, the second halves come kStep elements later.
template <class T, int kStep>
FO_KERNEL FO_INLINE void load_columns(const T* from, V::F& low, V::F& high) {
  if constexpr (kPairs<T>) {
    const auto* bytes = reinterpret_cast<const uint8_t*>(from);
    PairsOf<T>::interleave(V::load_words(bytes), V::load_words(bytes + kStep * sizeof(T)), low, high);
  } else {
    low = V::load(from), high = V::load(from + kLanes);
  }
}

// sums[m][kWidth] = or += sum over units of tile[unit] * x[unit][m], for kM rows m of sums, `stride` apart. Units of x
// are `x_step` floats apart, rows of the tile kStep elements. kStream: the tile is part of a stream, which is fetched
// kDepth units ahead; the hardware loses it at every end of a page, and where other rows of x come in between.
template <class T, int kStep, bool kStream, int kM>
FO_KERNEL void micro(const T* tile, const float* x, int64_t x_step, int64_t units, float* sums, int64_t stride,
                     bool first) {
  constexpr int kUnit = kStep * kPerUnit<T>, kLine = 64 / sizeof(T);
  V::F acc[kM][2];
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) acc[m][0] = acc[m][1] = V::zero();
  for (int64_t u = 0; u < units; ++u, tile += kUnit, x += x_step) {
    if constexpr (kStream) {
#pragma GCC unroll 4
      for (int i = 0; i < kUnit; i += kLine) __builtin_prefetch(tile + kDepth * kUnit + i, 0, 2);
    }
    V::F w0, w1;
    load_columns<T, kStep>(tile, w0, w1);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
      const V::F xm = V::broadcast(x + m);
      acc[m][0] = V::mac(acc[m][0], w0, xm);
      acc[m][1] = V::mac(acc[m][1], w1, xm);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m, sums += stride) {
    V::store(sums, first ? acc[m][0] : V::add(V::load(sums), acc[m][0]));
    V::store(sums + kLanes, first ? acc[m][1] : V::add(V::load(sums + kLanes), acc[m][1]));
  }
}

template <class T>
using Micro = void (*)(const T*, const float*, int64_t, int64_t, float*, int64_t, bool);

template <class T, int kStep, bool kStream, int... kM>
constexpr std::array<Micro<T>, sizeof...(kM)> micros(std::integer_sequence<int, kM...>) {
  return {&micro<T, kStep, kStream, kM + 1>...};
}
template <class T, int kStep, bool kStream = false>
constexpr auto kMicro = micros<T, kStep, kStream>(std::make_integer_sequence<int, kTall>());  // [rows - 1]
