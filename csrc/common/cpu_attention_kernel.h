// The kernels of attention (common/cpu_attention.h), in terms of cpu_simd.h. No include guard: common/cpu_each_isa.h
// includes this once for each instruction set, with
//   FO_VECTOR  the struct of cpu_simd.h to use
//   FO_KERNEL  the target attribute of its functions
//
// A tile is some rows of one sequence times the query heads of one KV head; it goes through its keys a block at a time.
// Both products are the same: a few rows of broadcast units times kColumns vectors of units. For the scores, the keys
// of a block are transposed to [panel][unit][key]; for the sums, rows of V are used where they lie or, where they are
// not whole vectors of units, as copies that are. Units are floats, or pairs of bf16 (Avx512Bf16): of neighbouring
// columns in q and k, of neighbouring keys in p and v.

using V = FO_VECTOR;
inline constexpr int kLanes = V::kLanes;
inline constexpr bool kPairs = V::kUnits == 4;                                      // of bf16
inline constexpr int kUnit = kPairs ? 2 : 1;                                        // elements
inline constexpr int kRows = kLanes == 4 ? 4 : 6, kColumns = kLanes == 16 ? 4 : 2;  // of a product in registers
inline constexpr int kFewRows = kLanes == 16 ? 6 : 3;  // that use keys and values where they lie
inline constexpr int kPanel = kColumns * kLanes;       // keys

// Units that are added up one after the other before their sum joins the others: rounding errors of a long chain of
// like terms all have one sign. Sums that are rounded to 16 bits hide them, scores (`float`) do not.
template <class T>
inline constexpr int64_t kChain = std::is_same_v<T, float> ? 32 : kBlock;

// V, but looked into only where T is known: not every V has what pairs need.
template <class T>
using PairsOf = std::conditional_t<sizeof(T) != 0, V, T>;

// 2^f for f from -1/2 to 1/2, relative error 2e-9 before rounding: a least-maximum fit.
inline constexpr float kExp2[] = {1.0f,         0.6931472f,    0.24022646f,   0.055503286f,
                                  0.009618489f, 0.0013399931f, 0.00015345812f};
inline constexpr float kLeastExponent = -127.0f;  // 2^it counts as 0
// tanh(y) = y + y z P(z), z = y^2, for |y| below 1/2, relative error 2e-8.
inline constexpr float kTanh[] = {-0.3333333f, 0.13333225f, -0.05393348f, 0.021470739f, -0.0069430512f};

FO_KERNEL FO_INLINE V::F exp2(V::F x) {
  x = V::max(V::set(kLeastExponent), x);  // a NaN stays
  const V::F shifted = V::add(x, V::set(simd::kToInteger)), f = V::sub(x, V::sub(shifted, V::set(simd::kToInteger)));
  V::F sum = V::set(kExp2[6]);
#pragma GCC unroll 6
  for (int i = 5; i >= 0; --i) sum = V::fma(sum, f, V::set(kExp2[i]));
  return V::mul(sum, V::power_of_two(shifted));
}

FO_KERNEL FO_INLINE V::F tanh(V::F y) {
  const V::F size = V::abs(y), one = V::set(1.0f);
  const V::F e = exp2(V::mul(size, V::set(-2.8853900818f)));  // e^(-2 |y|)
  const V::F large = V::with_sign(V::div(V::sub(one, e), V::add(one, e)), y);
  const V::F z = V::mul(y, y);
  V::F sum = V::set(kTanh[4]);
#pragma GCC unroll 4
  for (int i = 3; i >= 0; --i) sum = V::fma(sum, z, V::set(kTanh[i]));
  return V::below(size, 0.5f, V::fma(V::mul(y, z), sum, y), large);
}

// A vector of units.
template <class T>
FO_KERNEL FO_INLINE V::W load_units(const T* from) {
  if constexpr (kPairs) return V::load_words(reinterpret_cast<const uint8_t*>(from));
  return V::as_words(V::load(from));
}

// The same, zeros beyond `count` elements.
template <class T>
FO_KERNEL FO_INLINE V::W load_units(const T* from, int64_t count) {
  if (count >= kUnit * kLanes) return load_units(from);
  if (sizeof(T) * kUnit == sizeof(float) && count % kUnit == 0) {
    return V::load_words(reinterpret_cast<const uint8_t*>(from), static_cast<int>(count / kUnit));
  }
  T some[kUnit * kLanes] = {};
  std::memcpy(some, from, static_cast<size_t>(count) * sizeof(T));
  return load_units(some);
}

// q [row][unit], whole vectors; row r is row r / group of head r % group.
template <class T>
FO_KERNEL void pack_query(const Tile<T>& tile, float* to) {
  for (int64_t r = 0; r < tile.rows * tile.group; ++r) {
    const T* from = tile.q + r / tile.group * tile.q_stride.row + r % tile.group * tile.q_stride.head;
    for (int64_t c = 0; c < tile.d; c += kUnit * kLanes, to += kLanes) {
      V::store_words(to, load_units(from + c, tile.d - c));
    }
  }
}

// The keys of a block as [panel][unit][key], zeros beyond the last; the next block is fetched.
template <class T>
FO_KERNEL void pack_keys(const Block<T>& block, const Block<T>& next, int64_t d, int64_t units, float* to) {
  const int64_t bytes = d * static_cast<int64_t>(sizeof(T));
  for (int64_t j0 = 0; j0 < round_up(block.count, kPanel); j0 += kLanes) {
    const int64_t there = std::min<int64_t>(block.count - j0, kLanes);
    for (int64_t j = j0; j < j0 + kLanes; ++j) {
      for (int64_t at = 0; at < bytes; at += 64) {
        __builtin_prefetch(reinterpret_cast<const char*>(next.k[j]) + at, 0, 2);
        __builtin_prefetch(reinterpret_cast<const char*>(next.v[j]) + at, 0, 2);
      }
    }
    float* panel = to + j0 / kPanel * kPanel * units + j0 % kPanel;
    for (int64_t u = 0; u < units; u += kLanes, panel += kLanes * kPanel) {
      V::W words[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        words[i] = i < there ? load_units(block.k[j0 + i] + u * kUnit, d - u * kUnit) : V::as_words(V::zero());
      }
      V::transpose(words);
      const int some = static_cast<int>(std::min<int64_t>(units - u, kLanes));
      for (int i = 0; i < some; ++i) V::store_words(panel + i * kPanel, words[i]);
    }
  }
}

// Pointers to the rows of units of V, one for each unit of p; copies in `to` where need be.
template <class T>
FO_KERNEL void pack_values(const Block<T>& block, int64_t d, float* to, const float** rows) {
  const int64_t width = round_up(d, kUnit * kLanes);
  if constexpr (kPairs) {
    using P = PairsOf<T>;
    for (int64_t j = 0; j < block.count; j += 2, to += width) {
      rows[j / 2] = to;
      for (int64_t c = 0; c < d; c += 2 * kLanes) {
        const V::W even = load_units(block.v[j] + c, d - c);
        const V::W odd = j + 1 < block.count ? load_units(block.v[j + 1] + c, d - c) : V::as_words(V::zero());
        typename P::F low, high;
        P::interleave(even, odd, low, high);
        V::store(to + c, low);
        V::store(to + c + kLanes, high);
      }
    }
  } else {
    for (int64_t j = 0; j < block.count; ++j, to += width) {
      if constexpr (std::is_same_v<T, float>) {
        if (width == d) {
          rows[j] = block.v[j];
          continue;
        }
      }
      rows[j] = to;
      for (int64_t c = 0; c < d; c += kLanes) V::store_words(to + c, load_units(block.v[j] + c, d - c));
    }
  }
}

// s[m][key] = q[m] . k[key] over a panel and some units; added to what stands there where `more`.
template <int kM>
FO_KERNEL void score(const float* q, int64_t q_stride, int64_t units, const float* panel, bool more, float* s,
                     int64_t s_stride) {
  V::F sums[kM][kColumns];
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) sums[m][n] = V::zero();
  }
  for (int64_t u = 0; u < units; ++u, panel += kPanel) {
    V::F keys[kColumns];
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) keys[n] = V::load(panel + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const V::F x = V::broadcast(q + m * q_stride + u);
#pragma GCC unroll 4
      for (int n = 0; n < kColumns; ++n) sums[m][n] = V::mac(sums[m][n], keys[n], x);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kColumns; ++n) {
      float* to = s + m * s_stride + n * kLanes;
      V::store(to, more ? V::add(V::load(to), sums[m][n]) : sums[m][n]);
    }
  }
}

// to[m] = sum over units of p[m][unit] * rows[unit], for kN vectors of columns, plus more[m] and to[m] * alpha[m] where
// they are given.
template <int kM, int kN>
FO_KERNEL void weigh(const float* p, int64_t p_stride, const float* const* rows, int64_t column, int64_t units,
                     const float* more, const float* alpha, float* to, int64_t width) {
  V::F sums[kM][kN];
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) sums[m][n] = V::zero();
  }
  for (int64_t u = 0; u < units; ++u) {
    const float* row = rows[u] + column;
    V::F values[kN];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) values[n] = V::load(row + n * kLanes);
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const V::F x = V::broadcast(p + m * p_stride + u);
#pragma GCC unroll 4
      for (int n = 0; n < kN; ++n) sums[m][n] = V::mac(sums[m][n], values[n], x);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      const int64_t at = m * width + column + n * kLanes;
      V::F sum = sums[m][n];
      if (more) sum = V::add(sum, V::load(more + at));
      if (alpha) sum = V::fma(V::load(to + at), V::broadcast(alpha + m), sum);
      V::store(to + at, sum);
    }
  }
}

// The scores of one row become its probabilities, as units, and its largest score and sum go on; returns the factor of
// what was summed before.
template <class T>
FO_KERNEL float softmax(const Tile<T>& tile, const Sight& sight, int64_t k0, int64_t count, float* s, float* top,
                        float* sum) {
  const int64_t padded = round_up(count, kUnit * kLanes);
  const bool all = padded == count && sight.low <= k0 && sight.high >= k0 + count;
  const V::F factor = V::set(tile.factor), nothing = V::set(-INFINITY);
  V::F most = nothing;
  uint64_t seen = 0;
  for (int64_t j = 0; j < padded; j += kLanes) {
    V::F z = V::mul(V::load(s + j), factor);
    if (tile.cap != 0) z = V::mul(tanh(z), V::set(tile.cap));
    if (!all) {
      if (j % 64 == 0) seen = seen_keys(sight, tile.node0, k0 + j, count - j);
      z = V::select(static_cast<uint32_t>(seen >> j % 64), z, nothing);
    }
    V::store(s + j, z);
    most = V::max(most, z);
  }
  const float before = *top, now = std::max(before, V::max_of(most));
  const float base = now == -INFINITY ? 0.0f : now;
  V::F total = V::zero();
  for (int64_t j = 0; j < padded; j += kUnit * kLanes) {
    const V::F p = exp2(V::sub(V::load(s + j), V::set(base)));
    total = V::add(total, p);
    if constexpr (kPairs) {
      const V::F odd = exp2(V::sub(V::load(s + j + kLanes), V::set(base)));
      total = V::add(total, odd);
      PairsOf<T>::store_units(s + j / 2, p, odd);
    } else {
      V::store(s + j, p);
    }
  }
  *top = now;
  float alpha = 1.0f;
  if (before != now) {
    float lanes[kLanes];
    V::store(lanes, exp2(V::set(before - base)));
    alpha = lanes[0];
  }
  *sum = *sum * alpha + V::sum(total);
  return alpha;
}

// Few rows: s[m][key] straight from where the keys lie, four at a time, lanes along the columns. The next block is
// fetched into L2 on the way.
template <class T, int kM>
FO_KERNEL void score_direct(const Block<T>& block, const Block<T>& next, const float* q, int64_t d, float* s,
                            int64_t s_stride) {
  const int64_t vectors = ceil_div(d, kUnit * kLanes);
  for (int64_t j0 = 0; j0 < block.count; j0 += kLanes) {
    V::F quads[kM][kLanes / 4];
#pragma GCC unroll 4
    for (int g = 0; g < kLanes / 4; ++g) {
      const T* const* keys = block.k + j0 + 4 * g;
      const T* const* ahead = next.k + j0 + 4 * g;
      V::F sums[kM][4];
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) sums[m][i] = V::zero();
      }
      for (int64_t c = 0; c < vectors; ++c) {
        const int64_t at = c * kUnit * kLanes;
        V::F key[4];
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
          __builtin_prefetch(ahead[i] + at, 0, 2);
          key[i] = V::as_floats(load_units(keys[i] + at, d - at));
        }
#pragma GCC unroll 8
        for (int m = 0; m < kM; ++m) {
          const V::F x = V::load(q + (m * vectors + c) * kLanes);
#pragma GCC unroll 4
          for (int i = 0; i < 4; ++i) sums[m][i] = V::mac(sums[m][i], key[i], x);
        }
      }
#pragma GCC unroll 8
      for (int m = 0; m < kM; ++m) quads[m][g] = V::quad(sums[m][0], sums[m][1], sums[m][2], sums[m][3]);
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) V::store(s + m * s_stride + j0, V::join(quads[m]));
  }
}

// Few rows: acc[m] = acc[m] * alpha[m] + sum over units first ... last - 1, straight from where the values lie.
template <class T, int kM, int kN>
FO_KERNEL void weigh_direct(const Block<T>& block, const Block<T>& next, int64_t first, int64_t last, const float* p,
                            int64_t p_stride, int64_t column, int64_t d, const float* alpha, float* acc,
                            int64_t width) {
  constexpr int kVectors = kN * kUnit;
  V::F sums[kM][kVectors];
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) sums[m][n] = V::zero();
  }
  for (int64_t u = first; u < last; ++u) {
    V::F values[kVectors];
#pragma GCC unroll 4
    for (int n = 0; n < kN; ++n) {
      const int64_t c = column + n * kUnit * kLanes;
      __builtin_prefetch(next.v[u * kUnit] + c, 0, 2);
      const V::W some = load_units(block.v[u * kUnit] + c, d - c);
      if constexpr (kPairs) {
        __builtin_prefetch(next.v[2 * u + 1] + c, 0, 2);
        PairsOf<T>::interleave(some, load_units(block.v[2 * u + 1] + c, d - c), values[2 * n], values[2 * n + 1]);
      } else {
        values[n] = V::as_floats(some);
      }
    }
#pragma GCC unroll 8
    for (int m = 0; m < kM; ++m) {
      const V::F x = V::broadcast(p + m * p_stride + u);
#pragma GCC unroll 4
      for (int n = 0; n < kVectors; ++n) sums[m][n] = V::mac(sums[m][n], values[n], x);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < kM; ++m) {
    const V::F factor = V::broadcast(alpha + m);
#pragma GCC unroll 4
    for (int n = 0; n < kVectors; ++n) {
      float* to = acc + m * width + column + n * kLanes;
      V::store(to, V::fma(V::load(to), factor, sums[m][n]));
    }
  }
}

// A block for kM rows, which are all there are.
template <class T, int kM>
FO_KERNEL void attend_these(const Tile<T>& tile, const Scratch& at, const Block<T>& block, const Block<T>& next,
                            int64_t k0) {
  const int64_t width = round_up(tile.d, kUnit * kLanes);
  score_direct<T, kM>(block, next, at.q, tile.d, at.scores, tile.block);
  float alpha[kM];
  for (int m = 0; m < kM; ++m) {
    alpha[m] = softmax(tile, tile.sights[m / tile.group], k0, block.count, at.scores + m * tile.block,
                       tile.sums.top + m, tile.sums.sum + m);
  }
  float ones[kM];
  std::fill_n(ones, kM, 1.0f);
  const int64_t units = ceil_div(block.count, kUnit);
  constexpr int kMost = kColumns / kUnit;
  for (int64_t c = 0; c < width; c += kMost * kUnit * kLanes) {
    const int64_t vectors = std::min<int64_t>((width - c) / (kUnit * kLanes), kMost);
    const auto weigh_some = vectors == 4   ? &weigh_direct<T, kM, std::min(4, kMost)>
                            : vectors == 3 ? &weigh_direct<T, kM, std::min(3, kMost)>
                            : vectors == 2 ? &weigh_direct<T, kM, 2>
                                           : &weigh_direct<T, kM, 1>;
    for (int64_t u = 0; u < units; u += kChain<T>) {
      weigh_some(block, next, u, std::min(u + kChain<T>, units), at.scores, tile.block, c, tile.d, u ? ones : alpha,
                 tile.sums.acc, width);
    }
  }
}

// A block for a tile of at most kM rows.
template <class T, int kM>
FO_KERNEL FO_INLINE void attend_few(const Tile<T>& tile, const Scratch& at, const Block<T>& block, const Block<T>& next,
                                    int64_t k0) {
  if constexpr (kM > 1) {
    if (tile.rows * tile.group < kM) return attend_few<T, kM - 1>(tile, at, block, next, k0);
  }
  attend_these<T, kM>(tile, at, block, next, k0);
}

using Score = void (*)(const float*, int64_t, int64_t, const float*, bool, float*, int64_t);
using Weigh = void (*)(const float*, int64_t, const float* const*, int64_t, int64_t, const float*, const float*, float*,
                       int64_t);

template <int... kM>
constexpr std::array<Score, sizeof...(kM)> scores(std::integer_sequence<int, kM...>) {
  return {&score<kM + 1>...};
}
inline constexpr auto kScore = scores(std::make_integer_sequence<int, kRows>());  // [rows - 1]

template <int... kI>
constexpr std::array<Weigh, sizeof...(kI)> weighs(std::integer_sequence<int, kI...>) {
  return {&weigh<kI / kColumns + 1, kI % kColumns + 1>...};
}
inline constexpr auto kWeigh =
    weighs(std::make_integer_sequence<int, kRows * kColumns>());  // [(rows - 1) kColumns + n - 1]

// Rows r0 ... r0 + count - 1 against a block.
template <class T>
FO_KERNEL void attend_rows(const Tile<T>& tile, const Scratch& at, int64_t r0, int count, int64_t k0, int64_t keys,
                           const float* const* values) {
  const int64_t units = ceil_div(tile.d, kUnit), q_stride = round_up(units, kLanes);
  const int64_t width = round_up(tile.d, kUnit * kLanes);
  for (int64_t j = 0; j < keys; j += kPanel) {
    for (int64_t u = 0; u < units; u += kChain<float>) {
      kScore[count - 1](at.q + r0 * q_stride + u, q_stride, std::min(kChain<float>, units - u),
                        at.keys + j * units + u * kPanel, u > 0, at.scores + j, tile.block);
    }
  }
  float alpha[kRows];
  for (int m = 0; m < count; ++m) {
    const int64_t r = r0 + m;
    alpha[m] = softmax(tile, tile.sights[r / tile.group], k0, keys, at.scores + m * tile.block, tile.sums.top + r,
                       tile.sums.sum + r);
  }
  const int64_t p_units = ceil_div(keys, kUnit);
  const RowGroups columns(ceil_div(tile.d, kLanes), kColumns);
  for (int64_t c = 0; c < columns.count; ++c) {
    const int64_t first = columns.start(c), some = columns.start(c + 1) - first;
    const Weigh weigh_some = kWeigh[(count - 1) * kColumns + some - 1];
    for (int64_t u = 0; u < p_units; u += kChain<T>) {
      const bool last = u + kChain<T> >= p_units;
      weigh_some(at.scores + u, tile.block, values + u, first * kLanes, std::min(kChain<T>, p_units - u),
                 u ? at.part : nullptr, last ? alpha : nullptr, last ? tile.sums.acc + r0 * width : at.part, width);
    }
  }
}

// A block for all rows of a tile.
template <class T>
FO_KERNEL void attend_block(const Tile<T>& tile, const Scratch& at, const Block<T>& block, const Block<T>& next,
                            int64_t k0) {
  const int64_t rows = tile.rows * tile.group;
  if (rows <= kFewRows) return attend_few<T, kFewRows>(tile, at, block, next, k0);
  const float* values[kBlock];
  pack_keys(block, next, tile.d, ceil_div(tile.d, kUnit), at.keys);
  pack_values(block, tile.d, at.values, values);
  const RowGroups groups(rows, kRows);
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t r0 = groups.start(g), count = groups.start(g + 1) - r0;
    if (!any_seen(tile, r0 / tile.group, (r0 + count - 1) / tile.group, k0, k0 + block.count)) continue;
    attend_rows(tile, at, r0, static_cast<int>(count), k0, block.count, values);
  }
}

// All keys of a tile, block by block; each is fetched ahead, the first by whoever comes before.
template <class T>
FO_KERNEL void attend(const Tile<T>& tile, const Ahead<T>& ahead, float* scratch) {
  const int64_t rows = tile.rows * tile.group, width = round_up(tile.d, kUnit * kLanes);
  std::fill_n(tile.sums.acc, rows * width, 0.0f);
  std::fill_n(tile.sums.top, rows, -INFINITY);
  std::fill_n(tile.sums.sum, rows, 0.0f);
  if (tile.first >= tile.last) return;
  const Scratch at(scratch, rows, width, tile.block, kRows);
  pack_query(tile, at.q);
  Block<T> blocks[2];
  blocks[0].point(tile.keys, tile.first, std::min(tile.block, tile.last - tile.first), tile.block);
  for (int64_t k0 = tile.first, i = 0; k0 < tile.last; k0 += tile.block, ++i) {
    const int64_t end = k0 + blocks[i % 2].count;
    Block<T>& next = blocks[(i + 1) % 2];
    if (end < tile.last) {
      next.point(tile.keys, end, std::min(tile.last - end, tile.block), tile.block);
    } else {
      next.point(ahead.keys, ahead.first, std::min(ahead.count, tile.block), tile.block);
    }
    attend_block(tile, at, blocks[i % 2], next, k0);
  }
}

// out and lse of a tile from the sums of its parts, in order.
template <class T>
FO_KERNEL void finish(const Output<T>& to, const Sums& sums, int64_t parts, int64_t part_stride) {
  const int64_t width = round_up(to.d, kUnit * kLanes);
  for (int64_t r = 0; r < to.rows * to.group; ++r) {
    float top = -INFINITY;
    for (int64_t i = 0; i < parts; ++i) top = std::max(top, sums.top[i * part_stride + r]);
    const float base = top == -INFINITY ? 0.0f : top;
    float sum = 0.0f;
    V::F row[kMaxHead / kLanes];
    for (int64_t i = 0; i < parts; ++i) {
      const V::F weight = exp2(V::set(sums.top[i * part_stride + r] - base));
      float lanes[kLanes];
      V::store(lanes, weight);
      sum += lanes[0] * sums.sum[i * part_stride + r];
      const float* acc = sums.acc + i * part_stride + r * width;
      for (int64_t c = 0; c < width / kLanes; ++c) {
        const V::F some = V::mul(V::load(acc + c * kLanes), weight);
        row[c] = i ? V::add(row[c], some) : some;
      }
    }
    const V::F factor = V::set(1.0f / sum);
    T* out = to.out + r / to.group * to.stride.row + r % to.group * to.stride.head;
    for (int64_t c = 0; c < to.d; c += kLanes) {
      const V::F v = sum == 0.0f ? V::zero() : V::mul(row[c / kLanes], factor);
      if (c + kLanes <= to.d) {
        V::store_as(out + c, v);
      } else {
        T some[kLanes];
        V::store_as(some, v);
        std::memcpy(out + c, some, static_cast<size_t>(to.d - c) * sizeof(T));
      }
    }
    to.lse[r / to.group * to.lse_stride.row + r % to.group * to.lse_stride.head] =
        static_cast<float>(static_cast<double>(base) * std::numbers::ln2 + std::log(static_cast<double>(sum)));
  }
}

template <class T>
Kernels<T> kernels() {
  return {kUnit * kLanes, kRows, &attend<T>, &finish<T>};
}
