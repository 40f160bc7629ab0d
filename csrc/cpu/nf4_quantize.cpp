// nf4_quantize: absmax[b] = max |w| over block b; nibble i = number of code midpoints below w[i] / absmax, in code
// order. Floor at 4096 x 4096, blocksize 64, bf16: 33.6 MB read, 9.4 MB written = 43 MB, 1.5 ms at 28 GB/s (copy, 2
// threads). About 35 operations a weight (15 comparisons among them): compute-bound on a CPU, 8 lanes at a time, which
// is how wide the compiler goes. The arithmetic is bitsandbytes' CPU path, operation by operation: a full block
// multiplies by the reciprocal of its absmax, a last partial one divides by it and stores it no smaller than 1e-38.
// Reached: bench/results/cpu/nf4_quantize.json.
#include <algorithm>
#include <bit>
#include <cmath>

#include "common/cpu_convert.h"
#include "common/cpu_isa.h"
#include "common/dispatch.h"
#include "common/nf4.h"
#include "common/register.h"

namespace fastops::nf4_quantize {
namespace {

constexpr char kOp[] = "nf4_quantize";
constexpr int64_t kGrainWeights = 1 << 13;

struct Params {
  const void* w;
  uint8_t* packed;
  float* absmax;
  int64_t n;
  int block_shift;
  float bounds[15];   // midpoints of the sorted code
  uint8_t order[16];  // sorted position -> nibble
  bool sorted;        // order changes nothing
};

void set_code(Params& p, const float* code) {
  for (int i = 0; i < 16; ++i) p.order[i] = static_cast<uint8_t>(i);
  std::stable_sort(p.order, p.order + 16, [&](uint8_t a, uint8_t b) {
    return code[a] < code[b] || (!std::isnan(code[a]) && std::isnan(code[b]));  // NaNs last
  });
  for (int i = 0; i < 15; ++i) {
    const float middle = (code[p.order[i]] + code[p.order[i + 1]]) / 2;
    p.bounds[i] = std::isnan(middle) ? INFINITY : middle;  // no number is nearer to a NaN
  }
  p.sorted = std::is_sorted(p.order, p.order + 16);
}

// Everything below is plain C++ that the compiler vectorises once for each instruction set it is inlined under.
constexpr int kChunk = 32;  // weights in flight: 16 packed bytes

// The codes of `size` scaled values, two a byte.
FO_INLINE void pack_chunk(const Params& p, const float (&value)[kChunk], int size, uint8_t* packed) {
  int32_t rank[kChunk] = {};
  for (int k = 0; k < 15; ++k) {
    const float bound = p.bounds[k];
    for (int i = 0; i < kChunk; ++i) rank[i] += !(value[i] <= bound);  // NaN counts as above every bound
  }
  if (p.sorted && size == kChunk) {
    for (int i = 0; i < kChunk / 2; ++i) packed[i] = static_cast<uint8_t>(rank[2 * i] << 4 | rank[2 * i + 1]);
    return;
  }
  for (int i = 0; i < (size + 1) / 2; ++i) {
    packed[i] = static_cast<uint8_t>(p.order[rank[2 * i]] << 4 | p.order[rank[2 * i + 1]]);
  }
}

template <class T>
FO_INLINE void quantize_block(const Params& p, int64_t block) {
  const int64_t blocksize = int64_t{1} << p.block_shift, start = block * blocksize;
  const int64_t count = std::min(blocksize, p.n - start);
  const T* w = static_cast<const T*>(p.w) + start;

  // The maximum of the magnitudes as integers: same order, and a NaN wins.
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    largest = std::max(largest, static_cast<int32_t>(std::bit_cast<uint32_t>(to_float(w[i])) & 0x7fffffffu));
  }
  const float raw = std::bit_cast<float>(largest);
  const float clamped = raw < nf4::kMinAbsmax ? nf4::kMinAbsmax : raw;
  const bool partial = count < blocksize;
  p.absmax[block] = partial ? clamped : raw;

  const float reciprocal = 1.0f / clamped;
  uint8_t* packed = p.packed + start / 2;
  if (!partial) {
    for (int64_t base = 0; base < count; base += kChunk) {  // blocks are multiples of a chunk
      float value[kChunk];
      for (int i = 0; i < kChunk; ++i) value[i] = to_float(w[base + i]) * reciprocal;
      pack_chunk(p, value, kChunk, packed + base / 2);
    }
    return;
  }
  for (int64_t base = 0; base < count; base += kChunk) {
    const int size = static_cast<int>(std::min<int64_t>(kChunk, count - base));
    float value[kChunk] = {};  // the padding nibble of an odd length is the code of 0
    for (int i = 0; i < size; ++i) value[i] = to_float(w[base + i]) / clamped;
    pack_chunk(p, value, size, packed + base / 2);
  }
}

template <class T>
FO_INLINE void quantize_blocks(const Params& p, int64_t begin, int64_t end) {
  for (int64_t block = begin; block < end; ++block) quantize_block<T>(p, block);
}

template <class T>
void quantize_scalar(const Params& p, int64_t begin, int64_t end) {
  quantize_blocks<T>(p, begin, end);
}

#if defined(FASTOPS_X86)
template <class T>
FO_TARGET_AVX2 void quantize_avx2(const Params& p, int64_t begin, int64_t end) {
  quantize_blocks<T>(p, begin, end);
}

template <class T>
FO_TARGET_AVX512 void quantize_avx512(const Params& p, int64_t begin, int64_t end) {
  quantize_blocks<T>(p, begin, end);
}
#endif

template <class T>
auto kernel_for(Isa isa) {
#if defined(FASTOPS_X86)
  if (isa >= Isa::kAvx512) return &quantize_avx512<T>;
  if (isa == Isa::kAvx2) return &quantize_avx2<T>;
#endif
  (void)isa;
  return &quantize_scalar<T>;
}

std::tuple<Tensor, Tensor> nf4_quantize(Tensor w, int64_t blocksize, std::optional<Tensor> code) {
  check_float_type(kOp, "w", w.scalar_type());
  nf4::check_blocksize(kOp, "blocksize", blocksize);
  nf4::check_code(kOp, code, "w", w);

  w = as_contiguous(w);
  code = as_contiguous(code);
  const int64_t n = w.numel(), n_blocks = ceil_div(n, blocksize);
  Tensor packed = torch::stable::new_empty(w, std::vector<int64_t>{ceil_div(n, 2)}, ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(w, std::vector<int64_t>{n_blocks}, ScalarType::Float);
  Params p{w.const_data_ptr(),
           static_cast<uint8_t*>(packed.mutable_data_ptr()),
           static_cast<float*>(absmax.mutable_data_ptr()),
           n,
           log2_exact(blocksize),
           {},
           {},
           false};
  set_code(p, code ? static_cast<const float*>(code->const_data_ptr()) : nf4::kCode);
  dispatch_float(w.scalar_type(), [&](auto zero) {
    const auto kernel = kernel_for<decltype(zero)>(active_isa);
    torch::stable::parallel_for(0, n_blocks, std::max<int64_t>(1, kGrainWeights / blocksize),
                                [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
  });
  return {packed, absmax};
}

}  // namespace
}  // namespace fastops::nf4_quantize

FO_IMPL(CPU, "nf4_quantize", &fastops::nf4_quantize::nf4_quantize)
