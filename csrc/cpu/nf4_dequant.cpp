// nf4_dequant: out[i] = T(code[nibble i] * absmax[i / blocksize]).
// Floor at 4096 x 4096, blocksize 64, bf16: 8.4 MB packed + 1.0 MB absmax read, 33.6 MB written = 43 MB, 1.5 ms at
// 28 GB/s (copy, 2 threads); 17 Mflop: bytes-bound. What makes it so: a block has only 16 different outputs, so they
// are scaled and rounded once a block, and the rest is a table look-up in registers (vpermw, vpermps, pshufb) with no
// arithmetic on the data.
// Reached: bench/results/cpu/nf4_dequant.json.
#include <algorithm>
#include <cstring>

#include "common/cpu_isa.h"
#include "common/cpu_output.h"
#include "common/dispatch.h"
#include "common/nf4.h"
#include "common/register.h"

#if defined(FASTOPS_X86)
#include <immintrin.h>
#endif

namespace fastops::nf4_dequant {
namespace {

constexpr char kOp[] = "nf4_dequant";

// Weights a thread should have at least, so that starting it pays.
constexpr int64_t kGrainWeights = 1 << 15;

struct Params {
  const uint8_t* packed;
  nf4::ScalesView scales;
  int64_t n;
};

inline float block_scale(const nf4::ScalesView& s, int64_t block) {
  if (!s.absmax_code) return static_cast<const float*>(s.absmax)[block];
  const uint8_t q = static_cast<const uint8_t*>(s.absmax)[block];
  const float scaled = s.absmax_code[q] * s.absmax_scale[block >> s.absmax_shift];
  return s.absmax_offset ? scaled + *s.absmax_offset : scaled;
}

// The 16 outputs a block can have: every code times the block's scale, rounded to T.
template <class T>
void scale_table(const float (&code)[16], float scale, T (&table)[16]) {
  for (int i = 0; i < 16; ++i) table[i] = static_cast<T>(code[i] * scale);
}

// One block (or the rest of one) of `count` weights by plain look-ups.
template <class T>
void expand_scalar(const uint8_t* packed, const T (&table)[16], T* out, int64_t count) {
  for (int64_t i = 0; i + 1 < count; i += 2) {
    out[i] = table[packed[i / 2] >> 4];
    out[i + 1] = table[packed[i / 2] & 15];
  }
  if (count & 1) out[count - 1] = table[packed[count / 2] >> 4];
}

#if defined(FASTOPS_X86)

FO_TARGET_AVX512 inline __m512 scale_table_avx512(const float (&code)[16], float scale) {
  return _mm512_mul_ps(_mm512_loadu_ps(code), _mm512_set1_ps(scale));
}

FO_TARGET_AVX512 inline __m256i round_avx512(__m512 v, Half) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT); }

// Round to nearest even in integers: vcvtneps2bf16 would flush subnormals.
FO_TARGET_AVX512 inline __m256i round_avx512(__m512 v, BFloat16) {
  const __m512i bits = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, odd), _mm512_set1_epi32(0x7fff));
  const __m512i quiet_nan = _mm512_set1_epi32(0x7fc00000);
  const __mmask16 is_nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_mask_mov_epi32(rounded, is_nan, quiet_nan), 16));
}

// 16-bit outputs, 32 weights a step: each 32-bit lane holds one byte; its two nibbles become the two 16-bit indices.
template <class T>
FO_TARGET_AVX512 int64_t expand_avx512(const uint8_t* packed, const float (&code)[16], float scale, T* out,
                                       int64_t count)
  requires(sizeof(T) == 2)
{
  const __m512i lut = _mm512_broadcast_i64x4(round_avx512(scale_table_avx512(code, scale), T{}));
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(bytes, 4), _mm512_slli_epi32(bytes, 16));
    // vpermw reads 5 bits: the table stands twice, so the stray high bit of the low nibble's index does not matter.
    _mm512_storeu_si512(out + i, _mm512_permutexvar_epi16(index, lut));
  }
  return i;
}

// 32-bit outputs, 32 weights a step: look up high and low nibbles apart, then interleave.
FO_TARGET_AVX512 int64_t expand_avx512(const uint8_t* packed, const float (&code)[16], float scale, float* out,
                                       int64_t count) {
  const __m512 lut = scale_table_avx512(code, scale);
  const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  const __m512i second = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2)));
    const __m512 high = _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), lut);
    const __m512 low = _mm512_permutexvar_ps(bytes, lut);  // reads the low 4 bits
    _mm512_storeu_ps(out + i, _mm512_permutex2var_ps(high, first, low));
    _mm512_storeu_ps(out + i + 16, _mm512_permutex2var_ps(high, second, low));
  }
  return i;
}

FO_TARGET_AVX2 inline void scale_table_avx2(const float (&code)[16], float scale, float (&table)[16]) {
  for (int i = 0; i < 16; i += 8) {
    _mm256_storeu_ps(table + i, _mm256_mul_ps(_mm256_loadu_ps(code + i), _mm256_set1_ps(scale)));
  }
}

FO_TARGET_AVX2 inline void scale_table_avx2(const float (&code)[16], float scale, Half (&table)[16]) {
  for (int i = 0; i < 16; i += 8) {
    const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(code + i), _mm256_set1_ps(scale));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(table + i), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
  }
}

FO_TARGET_AVX2 inline void scale_table_avx2(const float (&code)[16], float scale, BFloat16 (&table)[16]) {
  for (int i = 0; i < 16; i += 8) {
    const __m256 v = _mm256_mul_ps(_mm256_loadu_ps(code + i), _mm256_set1_ps(scale));
    const __m256i bits = _mm256_castps_si256(v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, odd), _mm256_set1_epi32(0x7fff));
    const __m256 is_nan = _mm256_cmp_ps(v, v, _CMP_UNORD_Q);
    const __m256 kept =
        _mm256_blendv_ps(_mm256_castsi256_ps(rounded), _mm256_castsi256_ps(_mm256_set1_epi32(0x7fc00000)), is_nan);
    const __m256i high = _mm256_srli_epi32(_mm256_castps_si256(kept), 16);
    const __m128i narrow = _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(table + i), narrow);
  }
}

// The table split by byte, one pshufb register for each byte of T: looked up apart, then interleaved.
template <class T>
FO_TARGET_AVX2 int64_t expand_avx2(const uint8_t* packed, const float (&code)[16], float scale, T* out, int64_t count) {
  T table[16];
  scale_table_avx2(code, scale, table);
  alignas(16) uint8_t planes[sizeof(T)][16];
  uint8_t bytes_of[16][sizeof(T)];
  std::memcpy(bytes_of, table, sizeof(table));
  for (int i = 0; i < 16; ++i) {
    for (size_t b = 0; b < sizeof(T); ++b) planes[b][i] = bytes_of[i][b];
  }
  __m128i lut[sizeof(T)];
  for (size_t b = 0; b < sizeof(T); ++b) lut[b] = _mm_load_si128(reinterpret_cast<const __m128i*>(planes[b]));
  const __m128i mask = _mm_set1_epi8(15);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed + i / 2));
    const __m128i high = _mm_and_si128(_mm_srli_epi16(bytes, 4), mask), low = _mm_and_si128(bytes, mask);
    const __m128i index[2] = {_mm_unpacklo_epi8(high, low), _mm_unpackhi_epi8(high, low)};
    for (int half = 0; half < 2; ++half) {
      __m128i* to = reinterpret_cast<__m128i*>(out + i + 16 * half);
      const __m128i b0 = _mm_shuffle_epi8(lut[0], index[half]), b1 = _mm_shuffle_epi8(lut[1], index[half]);
      const __m128i w0 = _mm_unpacklo_epi8(b0, b1), w1 = _mm_unpackhi_epi8(b0, b1);
      if constexpr (sizeof(T) == 2) {
        _mm_storeu_si128(to, w0);
        _mm_storeu_si128(to + 1, w1);
      } else {
        const __m128i b2 = _mm_shuffle_epi8(lut[2], index[half]), b3 = _mm_shuffle_epi8(lut[3], index[half]);
        const __m128i w2 = _mm_unpacklo_epi8(b2, b3), w3 = _mm_unpackhi_epi8(b2, b3);
        _mm_storeu_si128(to, _mm_unpacklo_epi16(w0, w2));
        _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(w0, w2));
        _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(w1, w3));
        _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(w1, w3));
      }
    }
  }
  return i;
}

#endif  // FASTOPS_X86

template <class T>
void expand_blocks(const Params& p, T* out, int64_t first_block, int64_t last_block, Isa isa) {
  const int64_t blocksize = int64_t{1} << p.scales.block_shift;
  float code[16];
  std::memcpy(code, p.scales.code ? p.scales.code : nf4::kCode, sizeof(code));
  for (int64_t block = first_block; block < last_block; ++block) {
    const int64_t start = block * blocksize;
    const int64_t count = std::min(blocksize, p.n - start);
    const uint8_t* packed = p.packed + start / 2;
    const float scale = block_scale(p.scales, block);
    int64_t done = 0;
#if defined(FASTOPS_X86)
    if (isa >= Isa::kAvx512) done = expand_avx512(packed, code, scale, out + start, count);
    if (isa == Isa::kAvx2) done = expand_avx2(packed, code, scale, out + start, count);
#endif
    if (done == count) continue;
    T table[16];
    scale_table(code, scale, table);
    expand_scalar(packed + done / 2, table, out + start + done, count - done);
  }
}

Tensor nf4_dequant(Tensor packed, Tensor absmax, std::vector<int64_t> shape, ScalarType dtype, int64_t blocksize,
                   std::optional<Tensor> code, std::optional<Tensor> absmax_code, std::optional<Tensor> absmax_scale,
                   std::optional<Tensor> absmax_offset, int64_t absmax_blocksize) {
  nf4::Scales scales{absmax, code, absmax_code, absmax_scale, absmax_offset, blocksize, absmax_blocksize};
  check_float_type(kOp, "dtype", dtype);
  const int64_t n = nf4::count_weights(kOp, shape);
  nf4::check_packed(kOp, packed, scales, n);

  packed = as_contiguous(packed);
  Tensor out = cpu_output(packed, shape, dtype);
  dispatch_float(dtype, [&](auto zero) {
    using T = decltype(zero);
    T* to = static_cast<T*>(out.mutable_data_ptr());
    const Params p{static_cast<const uint8_t*>(packed.const_data_ptr()), nf4::view(scales), n};
    torch::stable::parallel_for(
        0, ceil_div(n, blocksize), std::max<int64_t>(1, kGrainWeights / blocksize),
        [&, isa = active_isa.load()](int64_t begin, int64_t end) { expand_blocks(p, to, begin, end, isa); });
  });
  return out;
}

}  // namespace
}  // namespace fastops::nf4_dequant

FO_IMPL(CPU, "nf4_dequant", &fastops::nf4_dequant::nf4_dequant)
