// The kernels of the products with NF4 weights (csrc/cpu/nf4_gemv.cpp), in terms of cpu_simd.h. No include guard:
// common/cpu_each_isa.h includes this once for each instruction set, with
//   FO_VECTOR  the struct of cpu_simd.h to use
//   FO_KERNEL  the target attribute of its functions
//
// Ways through the weight, all of which decode a weight once for several rows of x:
// - dot_rows (few rows of x, K a multiple of 8): lanes run along k. A vector of packed words, 8 weights a lane, gives
//   kUnits vectors of weights by shifts and look-ups in a register; x was laid out in the order in which they come.
// - stream_strip (more rows): lanes run along n, so that a lane sees one block of scales for `segment` columns and the
//   scale is applied to sums and not to weights. Words of kWidth rows of W are transposed in registers and decoded
//   there; the look-ups hide behind the multiplications of up to kStream rows of x.
// - linear_strip (many rows, and matrices whose rows start anywhere): the same, but through a tile of decoded weights
//   that the L1 cache holds and every row of x uses.
// - dx_strip: lanes run along k again, W's rows are the sum; a weight is scaled when it is decoded.

namespace {

using V = FO_VECTOR;
constexpr int kLanes = V::kLanes, kUnits = V::kUnits;
constexpr int kWidth = 2 * kLanes;                // of a tile and of the micro-kernel, in floats
constexpr int kGroup = 8 * kLanes;                // weights in a vector of words
constexpr int64_t kPair = kDxRows * kWidth + 32;  // floats of one, and some that keep them in different cache sets
constexpr int64_t kAhead = 32;                    // rows of W ahead that dx fetches
constexpr int64_t kOnes = kDxRows / kMinChain * kWidth;  // scales of the segments of a tile of dx
constexpr int kPairs = 8;                                // tiles side by side in a strip of dx: two vectors of words
constexpr int kPrefetch = 1024;                          // floats of x ahead
constexpr int kTile = kWidth * kLanes * kUnits;          // floats of a tile of linear

FO_KERNEL FO_INLINE float block_scale(const nf4::ScalesView& s, float factor, int64_t block) {
  if (!s.absmax_code) return static_cast<const float*>(s.absmax)[block] * factor;
  const float scaled =
      s.absmax_code[static_cast<const uint8_t*>(s.absmax)[block]] * s.absmax_scale[block >> s.absmax_shift];
  return (s.absmax_offset ? scaled + *s.absmax_offset : scaled) * factor;
}

// to[i * stride] = scale of the block that the weight `first` + i * step lies in.
FO_KERNEL void decode_scales(const Job& job, int64_t first, int64_t step, int64_t count, float* to, int64_t stride) {
  const nf4::ScalesView s = job.scales;
  const float factor = job.scale_factor;
  if (s.absmax_code || step != int64_t{1} << s.block_shift) {
    for (int64_t i = 0; i < count; ++i) to[i * stride] = block_scale(s, factor, (first + i * step) >> s.block_shift);
    return;
  }
  const float* absmax = static_cast<const float*>(s.absmax) + (first >> s.block_shift);
  if (stride == 1) {
    for (int64_t i = 0; i < count; ++i) to[i] = absmax[i] * factor;
  } else {
    for (int64_t i = 0; i < count; ++i) to[i * stride] = absmax[i] * factor;
  }
}

// The unit `i` of a word's 8 activations.
template <class T>
FO_KERNEL FO_INLINE float unit(const T* x, int i) {
  if constexpr (kUnits == 8) {
    return to_float(x[i ^ 1]);
  } else {
    uint32_t bits = 0;
    if constexpr (std::is_same_v<T, BFloat16>) bits = x[i ^ 1].x | static_cast<uint32_t>(x[(i ^ 1) + 4].x) << 16;
    return std::bit_cast<float>(bits);
  }
}

// Units of `count` activations, `stride` apart, with zeros up to a whole word.
template <class T>
FO_KERNEL void pack_units(const T* x, int64_t count, float* to, int64_t stride) {
  for (; count >= 8; count -= 8, x += 8) {
    for (int i = 0; i < kUnits; ++i, to += stride) *to = unit(x, i);
  }
  if (!count) return;
  T rest[8] = {};
  std::memcpy(rest, x, static_cast<size_t>(count) * sizeof(T));
  for (int i = 0; i < kUnits; ++i, to += stride) *to = unit(rest, i);
}

// x [rows, K] as dot_rows wants it: [row][group][unit][lane], with zeros up to a whole group.
template <class T>
FO_KERNEL void pack_dot(const Job& job, const T* x, float* to) {
  const int64_t groups = ceil_div(job.k, kGroup), per_row = groups * kUnits * kLanes;
  std::memset(to, 0, static_cast<size_t>(job.rows * per_row) * sizeof(float));
  for (int64_t m = 0; m < job.rows; ++m) {
    for (int64_t q = 0; q < job.k / 8; ++q) {
      float* at = to + m * per_row + q / kLanes * kUnits * kLanes + q % kLanes;
      for (int i = 0; i < kUnits; ++i) at[i * kLanes] = unit(x + m * job.k + 8 * q, i);
    }
  }
}

// One vector of words of kR rows of W against kM rows of x.
template <int kM, int kR, int kUnit = 0>
FO_KERNEL FO_INLINE void dot_units(const V::Table& table, const V::W (&words)[kR], const float* x, int64_t x_stride,
                                   V::F (&sums)[kM][kR]) {
  V::F w[kR];
  for (int r = 0; r < kR; ++r) w[r] = V::template look_up<kUnit>(table, words[r]);
  for (int m = 0; m < kM; ++m) {
    const V::F xm = V::load(x + m * x_stride + kUnit * kLanes);
    for (int r = 0; r < kR; ++r) sums[m][r] = V::mac(kUnit ? sums[m][r] : V::zero(), w[r], xm);
  }
  if constexpr (kUnit + 1 < kUnits) dot_units<kM, kR, kUnit + 1>(table, words, x, x_stride, sums);
}

// What dot_block keeps beside its sums.
template <int kR>
struct DotRows {
  const uint8_t* words;  // of the first row
  int64_t row_bytes, x_stride, scales_stride;
  const float* scales;  // [kR] rows of them
  int shift;
  int64_t rest[kR];  // weights of the row's first block that lie before the row
  V::W blocks[kR];   // the blocks that the lanes of a vector of words lie in
};

// kSteady: `blocks` is the same everywhere in a row. `valid`: words of the vector that the row has; not kFull.
template <int kM, int kR, bool kSteady, bool kFull>
FO_KERNEL FO_INLINE void dot_group(const V::Table& table, const DotRows<kR>& d, const float* x, int64_t group,
                                   int valid, V::F (&acc)[kM][kR]) {
  const uint8_t* from = d.words + group * (kGroup / 2);
  V::W words[kR];
  for (int r = 0; r < kR; ++r) {
    __builtin_prefetch(from + (8 + r) * d.row_bytes, 0, 2);  // the rows after the next, into L2
    words[r] = kFull ? V::load_words(from + r * d.row_bytes) : V::load_words(from + r * d.row_bytes, valid);
  }
  V::F sums[kM][kR];
  dot_units<kM, kR>(table, words, x + group * kUnits * kLanes, d.x_stride, sums);
  for (int r = 0; r < kR; ++r) {
    const int64_t at = group * kGroup + (kSteady ? 0 : d.rest[r]), in_block = (int64_t{1} << d.shift) - 1;
    const V::W blocks = kSteady ? d.blocks[r] : V::word_blocks(at & in_block, d.shift);
    const V::F scale = V::pick(d.scales + r * d.scales_stride + (at >> d.shift), blocks);
    for (int m = 0; m < kM; ++m) {
      // Words beyond the row are code 0, and 0 times an infinite code is no zero.
      acc[m][r] = V::fma(kFull ? sums[m][r] : V::first(sums[m][r], valid), scale, acc[m][r]);
    }
  }
}

// out[m][n0 ... n0 + kR - 1]. `scratch` holds the scales of kR rows.
template <class T, int kM, int kR, bool kSteady>
FO_KERNEL void dot_block(const Job& job, int64_t n0, float* scratch) {
  const V::Table table = V::table(job.code);
  const int shift = job.scales.block_shift;
  const int64_t full = job.k / kGroup, padded = ceil_div(job.k, kGroup), blocksize = int64_t{1} << shift;
  DotRows<kR> d{job.packed + n0 * job.k / 2,
                job.k / 2,
                padded * kUnits * kLanes,
                dot_scales(job, kLanes),
                scratch,
                shift,
                {},
                {}};
  V::F acc[kM][kR];
  for (int r = 0; r < kR; ++r) {
    const int64_t start = (n0 + r) * job.k, count = ((start + job.k - 1) >> shift) - (start >> shift) + 1;
    float* scales = scratch + r * d.scales_stride;
    decode_scales(job, start, blocksize, count, scales, 1);
    std::memset(scales + count, 0, kLanes * sizeof(float));
    d.rest[r] = start & (blocksize - 1);
    d.blocks[r] = V::word_blocks(d.rest[r], shift);
    for (int m = 0; m < kM; ++m) acc[m][r] = V::zero();
  }
  for (int64_t g = 0; g < full; ++g) dot_group<kM, kR, kSteady, true>(table, d, job.x, g, kLanes, acc);
  const int valid = static_cast<int>(job.k / 8 - full * kLanes);
  if (valid) dot_group<kM, kR, kSteady, false>(table, d, job.x, full, valid, acc);
  for (int m = 0; m < kM; ++m) {
    T* to = static_cast<T*>(job.out) + m * job.n + n0;
    for (int r = 0; r < kR; ++r) to[r] = static_cast<T>(V::sum(acc[m][r]) + job.bias[n0 + r]);
  }
}

template <class T, int kM>
FO_KERNEL void dot_some(const Job& job, int64_t begin, int64_t end, float* scratch) {
  const int64_t in_block = (int64_t{1} << job.scales.block_shift) - 1;
  const bool steady = (job.k & in_block) == 0 || (kGroup & in_block) == 0;
  for (; begin + 4 <= end; begin += 4) {
    steady ? dot_block<T, kM, 4, true>(job, begin, scratch) : dot_block<T, kM, 4, false>(job, begin, scratch);
  }
  for (; begin < end; ++begin) dot_block<T, kM, 1, false>(job, begin, scratch);
}

// Outputs `begin` ... `end` - 1 of every row.
template <class T>
FO_KERNEL void dot_rows(const Job& job, int64_t begin, int64_t end, float* scratch) {
  static_assert(kDotRows == 4, "one line for each number of rows");
  if (job.rows == 1) dot_some<T, 1>(job, begin, end, scratch);
  if (job.rows == 2) dot_some<T, 2>(job, begin, end, scratch);
  if (job.rows == 3) dot_some<T, 3>(job, begin, end, scratch);
  if (job.rows == 4) dot_some<T, 4>(job, begin, end, scratch);
}

// x [rows, size] as stream and the micro-kernel want it, one group of rows: [chunk][group][unit][row]. A chunk is
// `chunk` elements of the sum. `plain`: a unit is one element (dx); else they come in the order of words.
template <class T>
FO_KERNEL void pack_block(const Job& job, const T* x, int64_t size, int64_t chunk, bool plain, int64_t group,
                          float* packed) {
  const RowGroups groups(job.rows, job.most);
  const int64_t m0 = groups.start(group), count = groups.start(group + 1) - m0;
  for (int64_t k0 = 0, before = 0; k0 < size; k0 += chunk) {
    const int64_t some = std::min(chunk, size - k0), units = plain ? some : ceil_div(some, 8) * kUnits;
    float* to = packed + before * job.rows + m0 * units;
    before += units;
    for (int64_t m = 0; m < count; ++m) {
      const T* from = x + (m0 + m) * size + k0;
      if (!plain) {
        pack_units(from, some, to + m, count);
      } else {
        for (int64_t i = 0; i < some; ++i) to[i * count + m] = to_float(from[i]);
      }
    }
  }
}

// c[m][kWidth] += sum over segments of scale[segment] * sum over its units of tile[unit] * x[unit][m], for kM
// rows m. The outer sums stay in registers where kM is at most V::kRows.
template <int kM>
FO_KERNEL void micro(const float* tile, const float* x, int64_t units, int64_t segment, const float* scale, float* c) {
  V::F out[kM][2];
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) {
    out[m][0] = V::load(c + m * kWidth);
    out[m][1] = V::load(c + m * kWidth + kLanes);
  }
  for (; units > 0; units -= segment, scale += kWidth) {
    V::F sums[kM][2];
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) sums[m][0] = sums[m][1] = V::zero();
    for (int64_t u = std::min(units, segment); u > 0; --u, tile += kWidth, x += kM) {
      const V::F w0 = V::load(tile), w1 = V::load(tile + kLanes);
      __builtin_prefetch(x + kPrefetch);
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
        const V::F xm = V::broadcast(x + m);
        sums[m][0] = V::mac(sums[m][0], w0, xm);
        sums[m][1] = V::mac(sums[m][1], w1, xm);
      }
    }
    const V::F s0 = V::load(scale), s1 = V::load(scale + kLanes);
#pragma GCC unroll 16
    for (int m = 0; m < kM; ++m) {
      out[m][0] = V::fma(sums[m][0], s0, out[m][0]);
      out[m][1] = V::fma(sums[m][1], s1, out[m][1]);
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) {
    V::store(c + m * kWidth, out[m][0]);
    V::store(c + m * kWidth + kLanes, out[m][1]);
  }
}

using Micro = void (*)(const float*, const float*, int64_t, int64_t, const float*, float*);

template <int... kM>
constexpr std::array<Micro, sizeof...(kM)> micros(std::integer_sequence<int, kM...>) {
  return {&micro<kM + 1>...};
}
constexpr auto kMicro = micros(std::make_integer_sequence<int, V::kRows>());  // [rows - 1]

template <int kUnit = 0>
FO_KERNEL FO_INLINE void decode_words(const V::Table& table, V::W words, float* tile) {
  V::store(tile + kUnit * kWidth, V::template look_up<kUnit>(table, words));
  if constexpr (kUnit + 1 < kUnits) decode_words<kUnit + 1>(table, words, tile);
}

// words[i]: word i, from column k0 on, of kLanes rows. A row has `count` of them.
FO_KERNEL FO_INLINE void load_columns(const uint8_t* const* rows, int64_t k0, int count, V::W (&words)[kLanes]) {
  if (count == kLanes) {
    for (int i = 0; i < kLanes; ++i) words[i] = V::load_words(rows[i] + k0 / 2);
  } else {
    for (int i = 0; i < kLanes; ++i) words[i] = V::load_words(rows[i] + k0 / 2, count);
  }
  V::transpose(words);
}

// `count` words of the kWidth rows of W: tile[unit][row].
FO_KERNEL void expand_columns(const Job& job, const uint8_t* const* rows, int64_t k0, int count, float* tile) {
  const V::Table table = V::table(job.code);
  for (int half = 0; half < kWidth; half += kLanes) {
    V::W words[kLanes];
    load_columns(rows + half, k0, count, words);
    for (int i = 0; i < count; ++i) decode_words(table, words[i], tile + i * kUnits * kWidth + half);
  }
}

// A pointer to the scales of the block of weight `first` and of those after it, kLanes in all, of which `count` weights
// need some: where they lie, or else copies in `scratch`.
FO_KERNEL FO_INLINE const float* some_scales(const Job& job, int64_t first, int64_t count, float (&scratch)[kLanes]) {
  const int shift = job.scales.block_shift;
  const int64_t block = first >> shift;
  if (!job.scales.absmax_code && block + kLanes <= job.n_blocks && job.scale_factor == 1.0f) {
    return static_cast<const float*>(job.scales.absmax) + block;
  }
  decode_scales(job, first, int64_t{1} << shift, ((first + count - 1) >> shift) - block + 1, scratch, 1);
  return scratch;
}

// The words of `count` weights, at most kGroup, from any flat index on; zeros beyond.
FO_KERNEL FO_INLINE V::W any_words(const Job& job, int64_t first, int64_t count) {
  const uint8_t* from = job.packed + first / 2;
  uint8_t some[kGroup / 2 + 1] = {};
  if (count < kGroup) {
    std::memcpy(some, from, static_cast<size_t>((count + (first & 1) + 1) / 2));
    from = some;
  }
  const V::W words = V::load_words(from);
  return first & 1 ? V::skip_code(words, V::load_words(from + 1)) : words;
}

// Scaled weights: unit i of the words to to[(i / 2) * pair + i % 2 * kLanes]. `rest`: of the weights of the first
// block, those before the first word. kWhole: no word lies in two blocks. Units beyond `count` weights are zeros.
template <bool kWhole, int kUnit = 0>
FO_KERNEL FO_INLINE void decode_scaled(const V::Table& table, V::W words, const float* scales, int64_t rest, int shift,
                                       int64_t count, float* to, int64_t pair) {
  const V::F scale = V::pick(scales, V::word_blocks(kWhole ? rest : rest + (kUnit ^ 1), shift));
  V::F w = V::mul(V::template look_up<kUnit>(table, words), scale);
  if (count < kGroup) w = V::first(w, static_cast<int>((count + 7 - (kUnit ^ 1)) / 8));
  V::store(to + kUnit / 2 * pair + kUnit % 2 * kLanes, w);
  if constexpr (kUnit + 1 < kUnits) {
    decode_scaled<kWhole, kUnit + 1>(table, words, scales, rest, shift, count, to, pair);
  }
}

// expand_columns for a matrix whose rows start anywhere: of `columns` weights of each row, and they are scaled.
FO_KERNEL void expand_any_columns(const Job& job, int64_t n0, int64_t k0, int64_t columns, float* tile) {
  const V::Table table = V::table(job.code);
  const int shift = job.scales.block_shift;
  for (int half = 0; half < kWidth; half += kLanes) {
    float scaled[kLanes][kUnits * kLanes];  // [row][unit][word]
    for (int row = 0; row < kLanes; ++row) {
      const int64_t first = std::min(n0 + half + row, job.n - 1) * job.k + k0;
      float scratch[kLanes] = {};
      decode_scaled<false>(table, any_words(job, first, columns), some_scales(job, first, columns, scratch),
                           first & ((int64_t{1} << shift) - 1), shift, columns, scaled[row], 2 * kLanes);
    }
    for (int unit = 0; unit < kUnits; ++unit) {
      V::W by_word[kLanes];
      for (int row = 0; row < kLanes; ++row) by_word[row] = V::load_words(&scaled[row][unit * kLanes]);
      V::transpose(by_word);
      for (int word = 0; word < ceil_div(columns, 8); ++word) {
        V::store_words(tile + (word * kUnits + unit) * kWidth + half, by_word[word]);
      }
    }
  }
}

template <class T>
FO_KERNEL FO_INLINE void store_some(T* to, V::F v, int64_t count) {
  if (count >= kLanes) {
    V::store_as(to, v);
  } else if (count > 0) {
    T some[kLanes];
    V::store_as(some, v);
    std::memcpy(to, some, static_cast<size_t>(count) * sizeof(T));
  }
}

// Where the kWidth rows of W from n0 on start. Beyond the last one stands the last one, whose results nobody stores.
FO_KERNEL void strip_rows(const Job& job, int64_t n0, const uint8_t* (&rows)[kWidth]) {
  for (int i = 0; i < kWidth; ++i) rows[i] = job.packed + std::min(n0 + i, job.n - 1) * job.k / 2;
}

// scales[segment][row] of the same rows.
FO_KERNEL void strip_scales(const Job& job, int64_t n0, float* scales) {
  const int shift = job.scales.block_shift;
  for (int i = 0; i < kWidth; ++i) {
    const int64_t start = std::min(n0 + i, job.n - 1) * job.k, next = start + kWidth * job.k;
    if (!job.scales.absmax_code) {
      const float* absmax = static_cast<const float*>(job.scales.absmax);
      for (int64_t b = next >> shift; b < (next + job.k) >> shift; b += 16) __builtin_prefetch(absmax + b, 0, 2);
    }
    decode_scales(job, start, job.segment, job.k / job.segment, scales + i, kWidth);
  }
}

// out[m_first ... m_last - 1][n0 ... n0 + kWidth - 1] = sums + bias.
template <class T>
FO_KERNEL void store_strip(const Job& job, int64_t n0, int64_t m_first, int64_t m_last, const float* sums) {
  for (int64_t m = m_first; m < m_last; ++m) {
    for (int half = 0; half < kWidth; half += kLanes, sums += kLanes) {
      store_some(static_cast<T*>(job.out) + m * job.n + n0 + half, V::add(V::load(sums), V::load(job.bias + n0 + half)),
                 job.n - n0 - half);
    }
  }
}

// One word of each of kWidth rows of W against kM rows of x.
template <int kM, int kUnit = 0>
FO_KERNEL FO_INLINE void stream_word(const V::Table& table, V::W low, V::W high, const float* x, V::F (&sums)[kM][2]) {
  const V::F w0 = V::template look_up<kUnit>(table, low), w1 = V::template look_up<kUnit>(table, high);
#pragma GCC unroll 16
  for (int m = 0; m < kM; ++m) {
    const V::F xm = V::broadcast(x + kUnit * kM + m);
    sums[m][0] = V::mac(sums[m][0], w0, xm);
    sums[m][1] = V::mac(sums[m][1], w1, xm);
  }
  if constexpr (kUnit + 1 < kUnits) stream_word<kM, kUnit + 1>(table, low, high, x, sums);
}

// out[m][kWidth] for kM rows x of [unit][m].
template <int kM>
FO_KERNEL void stream(const Job& job, const uint8_t* const* rows, const float* x, const float* scales, float* out) {
  const V::Table table = V::table(job.code);
  const int64_t next_strip = kWidth * job.k / 2;
  const int segment_words = static_cast<int>(job.segment / 8);
  std::memset(out, 0, sizeof(float) * kM * kWidth);
  for (int64_t k0 = 0; k0 < job.k; k0 += kGroup) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, (job.k - k0) / 8));
    V::W low[kLanes], high[kLanes];
    load_columns(rows, k0, count, low);
    load_columns(rows + kLanes, k0, count, high);
    for (int i = 0; i < kWidth; ++i) __builtin_prefetch(rows[i] + k0 / 2 + next_strip, 0, 2);
    for (int first = 0; first < count; first += segment_words, scales += kWidth) {
      V::F sums[kM][2];
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) sums[m][0] = sums[m][1] = V::zero();
      for (int i = first; i < first + segment_words; ++i, x += kUnits * kM) {
        stream_word<kM>(table, low[i], high[i], x, sums);
      }
      const V::F s0 = V::load(scales), s1 = V::load(scales + kLanes);
#pragma GCC unroll 16
      for (int m = 0; m < kM; ++m) {
        V::store(out + m * kWidth, V::fma(sums[m][0], s0, V::load(out + m * kWidth)));
        V::store(out + m * kWidth + kLanes, V::fma(sums[m][1], s1, V::load(out + m * kWidth + kLanes)));
      }
    }
  }
}

using Stream = void (*)(const Job&, const uint8_t* const*, const float*, const float*, float*);

template <int... kM>
constexpr std::array<Stream, sizeof...(kM)> streams(std::integer_sequence<int, kM...>) {
  return {&stream<kM + 1>...};
}
constexpr auto kStreams = streams(std::make_integer_sequence<int, V::kStream>());  // [rows - 1]

// out[groups first ... last - 1][n0 ... n0 + kWidth - 1].
template <class T>
FO_KERNEL void stream_strip(const Job& job, int64_t n0, int64_t first, int64_t last, float* scratch) {
  const RowGroups groups(job.rows, job.most);
  const uint8_t* rows[kWidth];
  strip_rows(job, n0, rows);
  float *sums = scratch, *scales = scratch + job.most * kWidth;
  strip_scales(job, n0, scales);
  for (int64_t g = first; g < last; ++g) {
    const int64_t m = groups.start(g), end = groups.start(g + 1);
    kStreams[end - m - 1](job, rows, job.x + m * (job.k / 8 * kUnits), scales, sums);
    store_strip<T>(job, n0, m, end, sums);
  }
}

// The same through tiles.
template <class T>
FO_KERNEL void linear_strip(const Job& job, int64_t n0, int64_t first, int64_t last, float* scratch) {
  const RowGroups groups(job.rows, job.most);
  const int64_t m_first = groups.start(first), m_last = groups.start(last);
  float *tile = scratch, *sums = tile + kTile, *scales = sums + (m_last - m_first) * kWidth;
  std::memset(sums, 0, sizeof(float) * static_cast<size_t>((m_last - m_first) * kWidth));
  const uint8_t* rows[kWidth];
  if (job.segment) {
    strip_rows(job, n0, rows);
    strip_scales(job, n0, scales);
  } else {
    std::fill_n(scales, kGroup / kMinChain * kWidth, 1.0f);
  }
  const int64_t segment = job.segment ? job.segment / 8 * kUnits : chain(job.k);
  const float* x = job.x;
  for (int64_t k0 = 0; k0 < job.k; k0 += kGroup) {
    const int64_t columns = std::min<int64_t>(kGroup, job.k - k0), units = ceil_div(columns, 8) * kUnits;
    if (job.segment) {
      for (int i = 0; i < kWidth; ++i) __builtin_prefetch(rows[i] + (k0 + kWidth * job.k) / 2, 0, 2);
      expand_columns(job, rows, k0, static_cast<int>(columns / 8), tile);
    } else {
      expand_any_columns(job, n0, k0, columns, tile);
    }
    const float* chunk_scales = job.segment ? scales + k0 / job.segment * kWidth : scales;
    for (int64_t g = first; g < last; ++g) {
      const int64_t m = groups.start(g), count = groups.start(g + 1) - m;
      kMicro[count - 1](tile, x + m * units, units, segment, chunk_scales, sums + (m - m_first) * kWidth);
    }
    x += units * job.rows;
  }
  store_strip<T>(job, n0, m_first, m_last, sums);
}

// `columns` (at most kGroup) columns from k0 on of `rows` rows of W, scaled: units 2 p and 2 p + 1 to the tile p.
template <bool kWhole>
FO_KERNEL void expand_rows(const Job& job, int64_t n0, int64_t rows, int64_t k0, int64_t columns, float* tile) {
  const V::Table table = V::table(job.code);
  const int shift = job.scales.block_shift;
  for (int64_t row = 0; row < rows; ++row, tile += kWidth) {
    const int64_t first = (n0 + row) * job.k + k0, ahead = first + kAhead * job.k;
    float scratch[kLanes] = {};
    decode_scaled<kWhole>(table, any_words(job, first, columns), some_scales(job, first, columns, scratch),
                          first & ((int64_t{1} << shift) - 1), shift, columns, tile, kPair);
    __builtin_prefetch(job.packed + ahead / 2, 0, 2);
    const int64_t scale_bytes = job.scales.absmax_code ? 1 : 4;
    __builtin_prefetch(static_cast<const uint8_t*>(job.scales.absmax) + (ahead >> shift) * scale_bytes, 0, 2);
  }
}

// out[first ... last - 1][k0 ... k0 + 2 * kGroup - 1].
template <class T>
FO_KERNEL void dx_strip(const Job& job, int64_t k0, int64_t first, int64_t last, float* scratch) {
  const RowGroups groups(job.rows, job.most);
  const int64_t m_first = groups.start(first), m_last = groups.start(last);
  const int64_t columns = std::min<int64_t>(2 * kGroup, job.k - k0);
  float *tile = scratch, *ones = tile + kPairs * kPair, *sums = ones + kOnes;
  if (columns < 2 * kGroup) std::memset(tile, 0, sizeof(float) * static_cast<size_t>(kPairs * kPair));
  std::memset(sums, 0, sizeof(float) * static_cast<size_t>((m_last - m_first) * kPairs * kWidth));
  std::fill_n(ones, kOnes, 1.0f);
  for (int64_t n0 = 0; n0 < job.n; n0 += kDxRows) {
    const int64_t rows = std::min<int64_t>(kDxRows, job.n - n0);
    for (int64_t k = 0; k < columns; k += kGroup) {
      const int64_t some = std::min<int64_t>(kGroup, columns - k);
      float* to = tile + k / kGroup * (kPairs / 2) * kPair;
      job.segment ? expand_rows<true>(job, n0, rows, k0 + k, some, to)
                  : expand_rows<false>(job, n0, rows, k0 + k, some, to);
    }
    for (int pair = 0; pair < kPairs; ++pair) {
      for (int64_t g = first; g < last; ++g) {
        const int64_t m = groups.start(g), count = groups.start(g + 1) - m;
        kMicro[count - 1](tile + pair * kPair, job.x + n0 * job.rows + m * rows, rows, chain(job.n), ones,
                          sums + (pair * (m_last - m_first) + m - m_first) * kWidth);
      }
    }
  }
  for (int64_t m = m_first; m < m_last; ++m) {
    T* to = static_cast<T*>(job.out) + m * job.k + k0;
    for (int64_t k = 0; k < columns; ++k) {
      const int64_t vector = k / kGroup * 8 + ((k % 8) ^ 1);
      to[k] = static_cast<T>(
          sums[(vector / 2 * (m_last - m_first) + m - m_first) * kWidth + vector % 2 * kLanes + k % kGroup / 8]);
    }
  }
}

template <class T>
constexpr Kernels<T> kernels() {
  Kernels<T> all{kLanes, kUnits, V::kRows, V::kStream, kTile, kPairs * kPair + kOnes};
  all.pack_dot = &pack_dot<T>;
  all.dot_rows = &dot_rows<T>;
  all.pack_block = &pack_block<T>;
  all.stream_strip = &stream_strip<T>;
  all.linear_strip = &linear_strip<T>;
  if constexpr (kUnits == 8) all.dx_strip = &dx_strip<T>;
  return all;
}

}  // namespace
