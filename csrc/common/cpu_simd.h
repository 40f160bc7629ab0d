// The vector operations that the CPU products and attention are written in, once for each instruction set. F holds
// kLanes floats and W as many 32-bit words, of packed codes say. What a product multiplies is a *unit*: 32 bits that
// lie in a lane of an F, one float, or (Avx512Bf16) two bf16 that a single instruction multiplies and adds. A word of 8
// codes makes kUnits units. Code i of a word stands in its bits 4i: in memory order that is weight i ^ 1, since the
// high nibble comes first. Every function is inlined into kernels of the same target; see cpu_nf4_product.h and
// cpu_attention_kernel.h.
#pragma once

#include <algorithm>
#include <cstring>

#include "common/cpu_convert.h"
#include "common/cpu_isa.h"

#if defined(FASTOPS_X86)
#include <immintrin.h>
#endif

namespace fastops {

// `rows` in as few groups of at most `most` as they fill, of sizes that differ by at most one.
struct RowGroups {
  int64_t count, size, longer;
  RowGroups(int64_t rows, int64_t most)
      : count(ceil_div(rows, most)), size(count ? rows / count : 0), longer(count ? rows % count : 0) {}
  int64_t start(int64_t group) const { return group * size + std::min(group, longer); }
};

}  // namespace fastops

namespace fastops::simd {

constexpr float kToInteger = 0x1.8p23f;  // added and taken away again, it rounds to an integer

// Vectors of the compiler's own, 128 bits wide: what every machine has.
struct Scalar {
  static constexpr int kLanes = 4, kUnits = 8, kRows = 4, kStream = 0;
  typedef float F __attribute__((vector_size(16)));
  typedef uint32_t W __attribute__((vector_size(16)));
  struct Table {
    float value[16];
  };

  FO_INLINE static F zero() { return F{}; }
  FO_INLINE static F broadcast(const float* p) { return F{*p, *p, *p, *p}; }
  FO_INLINE static F load(const float* p) {
    F v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  FO_INLINE static void store(float* p, F v) { std::memcpy(p, &v, sizeof(v)); }
  FO_INLINE static F mul(F a, F b) { return a * b; }
  FO_INLINE static F add(F a, F b) { return a + b; }
  FO_INLINE static F fma(F a, F b, F c) { return a * b + c; }
  FO_INLINE static F mac(F acc, F w, F x) { return acc + w * x; }
  FO_INLINE static float sum(F v) { return (v[0] + v[2]) + (v[1] + v[3]); }
  FO_INLINE static F first(F v, int count) {
    for (int i = 0; i < kLanes; ++i) v[i] = i < count ? v[i] : 0.0f;
    return v;
  }

  FO_INLINE static W load_words(const uint8_t* p, int count = kLanes) {
    W v{};
    std::memcpy(&v, p, 4 * static_cast<size_t>(count));
    return v;
  }
  FO_INLINE static W load_words(const float* p) { return load_words(reinterpret_cast<const uint8_t*>(p)); }
  FO_INLINE static void store_words(float* p, W v) { std::memcpy(p, &v, sizeof(v)); }
  // kLanes rows of words: afterwards words[i] holds word i of each row.
  FO_INLINE static void transpose(W (&words)[kLanes]) {
    for (int i = 0; i < kLanes; ++i) {
      for (int j = 0; j < i; ++j) {
        const uint32_t swapped = words[i][j];
        words[i][j] = words[j][i];
        words[j][i] = swapped;
      }
    }
  }

  // Codes that start one later: the second code of `words` on, up to the first of `next`, which starts a byte later.
  FO_INLINE static W skip_code(W words, W next) { return (words & 0x0f0f0f0f) << 4 | (next >> 4 & 0x0f0f0f0f); }

  FO_INLINE static Table table(const float* code) {
    Table t;
    std::memcpy(t.value, code, sizeof(t.value));
    return t;
  }
  template <int kUnit>
  FO_INLINE static F look_up(const Table& t, W words) {
    F v;
    for (int i = 0; i < kLanes; ++i) v[i] = t.value[words[i] >> 4 * kUnit & 15];
    return v;
  }
  // The block, counted from the first word's, of each of kLanes words that start `rest` weights into a block.
  FO_INLINE static W word_blocks(int64_t rest, int shift) {
    W v;
    for (int i = 0; i < kLanes; ++i) v[i] = static_cast<uint32_t>((rest + 8 * i) >> shift);
    return v;
  }
  FO_INLINE static F pick(const float* from, W index) {
    return F{from[index[0]], from[index[1]], from[index[2]], from[index[3]]};
  }

  template <class T>
  FO_INLINE static void store_as(T* p, F v) {
    for (int i = 0; i < kLanes; ++i) p[i] = static_cast<T>(v[i]);
  }
  template <class T>
  FO_INLINE static F load(const T* p) {
    return F{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
  }
  FO_INLINE static W as_words(F v) { return reinterpret_cast<W>(v); }
  FO_INLINE static F as_floats(W v) { return reinterpret_cast<F>(v); }

  FO_INLINE static F set(float v) { return F{v, v, v, v}; }
  FO_INLINE static F sub(F a, F b) { return a - b; }
  FO_INLINE static F div(F a, F b) { return a / b; }
  FO_INLINE static F max(F a, F b) { return a > b ? a : b; }
  FO_INLINE static float max_of(F v) {
    const float a = v[0] > v[1] ? v[0] : v[1], b = v[2] > v[3] ? v[2] : v[3];
    return a > b ? a : b;
  }
  // Sums of each of four vectors, in parts, of which join() makes kLanes whole ones.
  FO_INLINE static F quad(F a, F b, F c, F d) {
    return F{a[0], b[0], c[0], d[0]} + F{a[1], b[1], c[1], d[1]} + F{a[2], b[2], c[2], d[2]} +
           F{a[3], b[3], c[3], d[3]};
  }
  FO_INLINE static F join(const F (&quads)[kLanes / 4]) { return quads[0]; }
  FO_INLINE static F select(uint32_t bits, F a, F b) {
    return (W{bits, bits, bits, bits} & W{1, 2, 4, 8}) != 0 ? a : b;
  }
  FO_INLINE static F abs(F v) { return reinterpret_cast<F>(reinterpret_cast<W>(v) & 0x7fffffffu); }
  FO_INLINE static F with_sign(F v, F of) {
    return reinterpret_cast<F>(reinterpret_cast<W>(v) | (reinterpret_cast<W>(of) & 0x80000000u));
  }
  FO_INLINE static F below(F v, float limit, F a, F b) { return v < set(limit) ? a : b; }
  // 2^n for n + kToInteger, n from -127 (which gives 0) to 127.
  FO_INLINE static F power_of_two(F shifted) { return reinterpret_cast<F>((reinterpret_cast<W>(shifted) + 127) << 23); }
};

#if defined(FASTOPS_X86)

struct Avx2 {
  static constexpr int kLanes = 8, kUnits = 8, kRows = 6, kStream = 0;
  using F = __m256;
  using W = __m256i;
  struct Table {
    __m256 low, high;
  };

#define FO_SIMD FO_TARGET_AVX2 FO_INLINE static
  FO_SIMD F zero() { return _mm256_setzero_ps(); }
  FO_SIMD F broadcast(const float* p) { return _mm256_broadcast_ss(p); }
  FO_SIMD F load(const float* p) { return _mm256_loadu_ps(p); }
  FO_SIMD void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  FO_SIMD F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  FO_SIMD F add(F a, F b) { return _mm256_add_ps(a, b); }
  FO_SIMD F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  FO_SIMD F mac(F acc, F w, F x) { return _mm256_fmadd_ps(w, x, acc); }
  FO_SIMD float sum(F v) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }
  FO_SIMD __m256i first_mask(int count) {
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
  }
  FO_SIMD F first(F v, int count) { return _mm256_and_ps(v, _mm256_castsi256_ps(first_mask(count))); }

  FO_SIMD W load_words(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  FO_SIMD W load_words(const uint8_t* p, int count) {
    return _mm256_maskload_epi32(reinterpret_cast<const int*>(p), first_mask(count));
  }
  FO_SIMD W load_words(const float* p) { return _mm256_castps_si256(load(p)); }
  FO_SIMD void store_words(float* p, W v) { store(p, _mm256_castsi256_ps(v)); }
  FO_SIMD void transpose(W (&words)[kLanes]) {
    __m256i fours[8];  // [4 b + c]: lane l has column 4 l + c of rows 4 b ... 4 b + 3
    for (int b = 0; b < 8; b += 4) {
      const __m256i a0 = _mm256_unpacklo_epi32(words[b], words[b + 1]);
      const __m256i a1 = _mm256_unpackhi_epi32(words[b], words[b + 1]);
      const __m256i a2 = _mm256_unpacklo_epi32(words[b + 2], words[b + 3]);
      const __m256i a3 = _mm256_unpackhi_epi32(words[b + 2], words[b + 3]);
      fours[b] = _mm256_unpacklo_epi64(a0, a2);
      fours[b + 1] = _mm256_unpackhi_epi64(a0, a2);
      fours[b + 2] = _mm256_unpacklo_epi64(a1, a3);
      fours[b + 3] = _mm256_unpackhi_epi64(a1, a3);
    }
    for (int c = 0; c < 4; ++c) {
      words[c] = _mm256_permute2x128_si256(fours[c], fours[4 + c], 0x20);
      words[4 + c] = _mm256_permute2x128_si256(fours[c], fours[4 + c], 0x31);
    }
  }

  FO_SIMD W skip_code(W words, W next) {
    const __m256i low = _mm256_set1_epi8(15);
    return _mm256_or_si256(_mm256_slli_epi32(_mm256_and_si256(words, low), 4),
                           _mm256_and_si256(_mm256_srli_epi32(next, 4), low));
  }

  FO_SIMD Table table(const float* code) { return {load(code), load(code + 8)}; }
  // vpermps reads 3 bits of an index; the fourth, moved to the sign, chooses between the halves of the table.
  template <int kUnit>
  FO_SIMD F look_up(const Table& t, W words) {
    const __m256i index = _mm256_srli_epi32(words, 4 * kUnit);
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(words, 28 - 4 * kUnit));
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(t.low, index), _mm256_permutevar8x32_ps(t.high, index), upper);
  }
  FO_SIMD W word_blocks(int64_t rest, int shift) {
    const __m256i start =
        _mm256_add_epi32(_mm256_set1_epi32(static_cast<int>(rest)), _mm256_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56));
    return _mm256_srl_epi32(start, _mm_cvtsi32_si128(shift));
  }
  FO_SIMD F pick(const float* from, W index) { return _mm256_permutevar8x32_ps(load(from), index); }

  FO_SIMD void store_as(float* p, F v) { store(p, v); }
  FO_SIMD void store_as(Half* p, F v) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  FO_SIMD void store_as(BFloat16* p, F v) {
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256 quiet_nan = _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000));
    const __m256 kept = _mm256_blendv_ps(_mm256_castsi256_ps(rounded), quiet_nan, _mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                     _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1)));
  }
  FO_SIMD F load(const Half* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  FO_SIMD F load(const BFloat16* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  FO_SIMD W as_words(F v) { return _mm256_castps_si256(v); }
  FO_SIMD F as_floats(W v) { return _mm256_castsi256_ps(v); }

  FO_SIMD F set(float v) { return _mm256_set1_ps(v); }
  FO_SIMD F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  FO_SIMD F div(F a, F b) { return _mm256_div_ps(a, b); }
  FO_SIMD F max(F a, F b) { return _mm256_max_ps(a, b); }
  FO_SIMD float max_of(F v) {
    const __m128 four = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
  }
  FO_SIMD F quad(F a, F b, F c, F d) { return _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d)); }
  FO_SIMD F join(const F (&quads)[kLanes / 4]) {
    return add(_mm256_permute2f128_ps(quads[0], quads[1], 0x20), _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
  }
  FO_SIMD F select(uint32_t bits, F a, F b) {
    const __m256i lane = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i on = _mm256_cmpeq_epi32(_mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), lane), lane);
    return _mm256_blendv_ps(b, a, _mm256_castsi256_ps(on));
  }
  FO_SIMD F abs(F v) { return _mm256_andnot_ps(set(-0.0f), v); }
  FO_SIMD F with_sign(F v, F of) { return _mm256_or_ps(v, _mm256_and_ps(set(-0.0f), of)); }
  FO_SIMD F below(F v, float limit, F a, F b) {
    return _mm256_blendv_ps(b, a, _mm256_cmp_ps(v, set(limit), _CMP_LT_OQ));
  }
  FO_SIMD F power_of_two(F shifted) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(as_words(shifted), _mm256_set1_epi32(127)), 23));
  }
#undef FO_SIMD
};

struct Avx512 {
  static constexpr int kLanes = 16, kUnits = 8, kRows = 7, kStream = 8;
  using F = __m512;
  using W = __m512i;
  using Table = __m512;

#define FO_SIMD FO_TARGET_AVX512 FO_INLINE static
  FO_SIMD F zero() { return _mm512_setzero_ps(); }
  FO_SIMD F broadcast(const float* p) { return _mm512_set1_ps(*p); }
  FO_SIMD F load(const float* p) { return _mm512_loadu_ps(p); }
  FO_SIMD void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  FO_SIMD F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  FO_SIMD F add(F a, F b) { return _mm512_add_ps(a, b); }
  FO_SIMD F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  FO_SIMD F mac(F acc, F w, F x) { return _mm512_fmadd_ps(w, x, acc); }
  FO_SIMD float sum(F v) { return _mm512_reduce_add_ps(v); }
  FO_SIMD __mmask16 first_mask(int count) { return static_cast<__mmask16>((1u << count) - 1); }
  FO_SIMD F first(F v, int count) { return _mm512_maskz_mov_ps(first_mask(count), v); }

  FO_SIMD W load_words(const uint8_t* p) { return _mm512_loadu_si512(p); }
  FO_SIMD W load_words(const uint8_t* p, int count) { return _mm512_maskz_loadu_epi32(first_mask(count), p); }
  FO_SIMD W load_words(const float* p) { return _mm512_castps_si512(load(p)); }
  FO_SIMD void store_words(float* p, W v) { store(p, _mm512_castsi512_ps(v)); }
  FO_SIMD void transpose(W (&words)[kLanes]) {
    __m512i fours[16];  // [4 b + c]: lane l has column 4 l + c of rows 4 b ... 4 b + 3
#pragma GCC unroll 4
    for (int b = 0; b < 16; b += 4) {
      const __m512i a0 = _mm512_unpacklo_epi32(words[b], words[b + 1]);
      const __m512i a1 = _mm512_unpackhi_epi32(words[b], words[b + 1]);
      const __m512i a2 = _mm512_unpacklo_epi32(words[b + 2], words[b + 3]);
      const __m512i a3 = _mm512_unpackhi_epi32(words[b + 2], words[b + 3]);
      fours[b] = _mm512_unpacklo_epi64(a0, a2);
      fours[b + 1] = _mm512_unpackhi_epi64(a0, a2);
      fours[b + 2] = _mm512_unpacklo_epi64(a1, a3);
      fours[b + 3] = _mm512_unpackhi_epi64(a1, a3);
    }
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const __m512i even = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0x88);
      const __m512i odd = _mm512_shuffle_i32x4(fours[c], fours[4 + c], 0xdd);
      const __m512i even2 = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0x88);
      const __m512i odd2 = _mm512_shuffle_i32x4(fours[8 + c], fours[12 + c], 0xdd);
      words[c] = _mm512_shuffle_i32x4(even, even2, 0x88);
      words[4 + c] = _mm512_shuffle_i32x4(odd, odd2, 0x88);
      words[8 + c] = _mm512_shuffle_i32x4(even, even2, 0xdd);
      words[12 + c] = _mm512_shuffle_i32x4(odd, odd2, 0xdd);
    }
  }

  FO_SIMD W skip_code(W words, W next) {
    const __m512i low = _mm512_set1_epi8(15);
    return _mm512_or_si512(_mm512_slli_epi32(_mm512_and_si512(words, low), 4),
                           _mm512_and_si512(_mm512_srli_epi32(next, 4), low));
  }

  FO_SIMD Table table(const float* code) { return load(code); }
  template <int kUnit>
  FO_SIMD F look_up(const Table& t, W words) {  // vpermps reads the low 4 bits of an index
    return _mm512_permutexvar_ps(_mm512_srli_epi32(words, 4 * kUnit), t);
  }
  FO_SIMD W word_blocks(int64_t rest, int shift) {
    const __m512i start =
        _mm512_add_epi32(_mm512_set1_epi32(static_cast<int>(rest)),
                         _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120));
    return _mm512_srl_epi32(start, _mm_cvtsi32_si128(shift));
  }
  FO_SIMD F pick(const float* from, W index) { return _mm512_permutexvar_ps(index, load(from)); }

  FO_SIMD void store_as(float* p, F v) { store(p, v); }
  FO_SIMD void store_as(Half* p, F v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
  FO_SIMD void store_as(BFloat16* p, F v) {
    const __m512i bits = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
    const __m512i quiet_nan = _mm512_set1_epi32(0x7fc00000);
    const __m512i kept = _mm512_mask_mov_epi32(rounded, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), quiet_nan);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(kept, 16)));
  }
  FO_SIMD F load(const Half* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  FO_SIMD F load(const BFloat16* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  FO_SIMD W as_words(F v) { return _mm512_castps_si512(v); }
  FO_SIMD F as_floats(W v) { return _mm512_castsi512_ps(v); }

  FO_SIMD F set(float v) { return _mm512_set1_ps(v); }
  FO_SIMD F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  FO_SIMD F div(F a, F b) { return _mm512_div_ps(a, b); }
  FO_SIMD F max(F a, F b) { return _mm512_max_ps(a, b); }
  FO_SIMD float max_of(F v) { return _mm512_reduce_max_ps(v); }
  FO_SIMD F quad(F a, F b, F c, F d) {
    const __m512d ab = _mm512_castps_pd(add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)));
    const __m512d cd = _mm512_castps_pd(add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d)));
    return add(_mm512_castpd_ps(_mm512_unpacklo_pd(ab, cd)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab, cd)));
  }
  FO_SIMD F join(const F (&quads)[kLanes / 4]) {
    const F low = add(_mm512_shuffle_f32x4(quads[0], quads[1], 0x88), _mm512_shuffle_f32x4(quads[0], quads[1], 0xdd));
    const F high = add(_mm512_shuffle_f32x4(quads[2], quads[3], 0x88), _mm512_shuffle_f32x4(quads[2], quads[3], 0xdd));
    return add(_mm512_shuffle_f32x4(low, high, 0x88), _mm512_shuffle_f32x4(low, high, 0xdd));
  }
  FO_SIMD F select(uint32_t bits, F a, F b) { return _mm512_mask_mov_ps(b, static_cast<__mmask16>(bits), a); }
  FO_SIMD F abs(F v) { return _mm512_abs_ps(v); }
  FO_SIMD F with_sign(F v, F of) { return _mm512_or_ps(v, _mm512_and_ps(set(-0.0f), of)); }
  FO_SIMD F below(F v, float limit, F a, F b) {
    return _mm512_mask_mov_ps(b, _mm512_cmp_ps_mask(v, set(limit), _CMP_LT_OQ), a);
  }
  FO_SIMD F power_of_two(F shifted) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(as_words(shifted), _mm512_set1_epi32(127)), 23));
  }
#undef FO_SIMD
};

// Units of two bf16. Unit i of a word is its weights (i ^ 1, (i ^ 1) + 4). vdpbf16ps takes subnormals for zeros.
struct Avx512Bf16 : Avx512 {
  static constexpr int kUnits = 4;
  using Table = __m512i;

#define FO_SIMD FO_TARGET_AVX512_BF16 FO_INLINE static
  // Twice over: vpermw reads 5 bits of an index, and the fifth is whatever stands there.
  FO_SIMD Table table(const float* code) {
    return _mm512_broadcast_i64x4(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(load(code))));
  }
  template <int kUnit>
  FO_SIMD F look_up(const Table& t, W words) {
    return _mm512_castsi512_ps(_mm512_permutexvar_epi16(_mm512_srli_epi16(words, 4 * kUnit), t));
  }
  FO_SIMD F mac(F acc, F w, F x) {
    return _mm512_dpbf16_ps(acc, reinterpret_cast<__m512bh>(w), reinterpret_cast<__m512bh>(x));
  }
  // 2 kLanes floats, rounded to bf16.
  FO_SIMD void store_units(float* p, F low, F high) {
    _mm512_storeu_si512(p, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
  // Pairs (a[i], b[i]) of the 2 kLanes bf16 of each: the lower half of them and the upper.
  FO_SIMD void interleave(W a, W b, F& low, F& high) {
    const __m512i index =
        _mm512_setr_epi32(0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007, 0x280008,
                          0x290009, 0x2a000a, 0x2b000b, 0x2c000c, 0x2d000d, 0x2e000e, 0x2f000f);
    low = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, index, b));
    const __m512i later = _mm512_add_epi16(index, _mm512_set1_epi16(16));
    high = _mm512_castsi512_ps(_mm512_permutex2var_epi16(a, later, b));
  }
#undef FO_SIMD
};

#endif  // FASTOPS_X86

}  // namespace fastops::simd
