// nf4_quantize: absmax[b] = max |w| over block b; nibble i = number of code midpoints below w[i] / absmax, in code
// order. Floor at 28672 x 8192, blocksize 64, bf16: 470 MB read, 132 MB written = 602 MB, 199 us at 3.02 TB/s. About 20
// instructions a weight, 2 of them shared-memory look-ups: 160 us of issue slots, not far behind.
// A thread holds 8 weights (one 16-byte load of a 16-bit type, one 4-byte store); blocksize / 8 neighbouring threads
// share a block and its maximum, by shuffles within a warp and through shared memory beyond it.
// Reached: bench/results/h100/nf4_quantize.json.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dispatch.h"
#include "common/launch.cuh"
#include "common/nf4.cuh"
#include "common/register.h"
#include "common/tensor.h"

namespace fastops::nf4_quantize {
namespace {

constexpr char kOp[] = "nf4_quantize";
constexpr int kWeights = 8;  // a thread's

struct Params {
  const void* w;
  const float* code;  // [16] or null for NF4
  uint8_t* packed;
  float* absmax;
  int64_t n;
  bool aligned;  // w starts at a multiple of 16 bytes
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(BFloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.x) << 16); }
__device__ inline float to_float(Half v) { return __half2float(__ushort_as_half(v.x)); }

template <class T>
__device__ inline void load_weights(const Params& p, int64_t start, float (&value)[kWeights]) {
  const T* w = static_cast<const T*>(p.w) + start;
  if (p.aligned && start + kWeights <= p.n) {
    alignas(16) T raw[kWeights];
#pragma unroll
    for (size_t i = 0; i < sizeof(raw) / 16; ++i) {
      reinterpret_cast<uint4*>(raw)[i] = __ldg(reinterpret_cast<const uint4*>(w) + i);
    }
#pragma unroll
    for (int i = 0; i < kWeights; ++i) value[i] = to_float(raw[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kWeights; ++i) value[i] = start + i < p.n ? to_float(w[i]) : 0.0f;
}

// Where a value lies among the codes, in shared memory: by NF4's bins, or for a user's code by its sorted midpoints and
// the way back from a sorted position to its nibble.
struct Ranks {
  float midpoint[15];
  int first[nf4::RankTable::kBins];
  uint8_t order[16];

  // By the first 32 threads; ends with a barrier.
  __device__ void fill(const float* user_code, float* sorted) {
    const int i = threadIdx.x;
    if (!user_code) {
      if (i < 15) midpoint[i] = nf4::kDeviceRanks.midpoint[i];
      if (i < nf4::RankTable::kBins) first[i] = nf4::kDeviceRanks.first[i];
      __syncthreads();
      return;
    }
    if (i < 16) {
      const float mine = user_code[i];
      int rank = 0;  // a stable sort with NaNs last: equal codes keep their order
      for (int j = 0; j < 16; ++j) {
        const float other = user_code[j];
        const bool same = other == mine || (isnan(other) && isnan(mine));
        rank += other < mine || (isnan(mine) && !isnan(other)) || (same && j < i);
      }
      sorted[rank] = mine;
      order[rank] = static_cast<uint8_t>(i);
    }
    __syncthreads();
    if (i < 15) {  // beside a NaN: only a NaN lies above
      const float middle = (sorted[i] + sorted[i + 1]) / 2;
      midpoint[i] = isnan(middle) ? INFINITY : middle;
    }
    __syncthreads();
  }

  __device__ uint32_t nf4_nibble(float v) const {
    const int r = first[nf4::rank_bin(v)];
    return r + !(v <= midpoint[r]);
  }

  // How many midpoints lie below v, by binary search; a NaN is above all of them.
  __device__ uint32_t user_nibble(float v) const {
    int r = !(v <= midpoint[7]) * 8;
    r += !(v <= midpoint[r + 3]) * 4;
    r += !(v <= midpoint[r + 1]) * 2;
    return order[r + !(v <= midpoint[r])];
  }
};

// The largest magnitude of a group of kGroup neighbouring threads, as an integer: same order, and a NaN wins.
template <int kGroup>
__device__ inline int group_max(int largest, int* warp_max) {
#pragma unroll
  for (int offset = (kGroup < 32 ? kGroup : 32) / 2; offset > 0; offset /= 2) {
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, offset));
  }
  if constexpr (kGroup > 32) {
    const int warp = threadIdx.x / 32;
    if (threadIdx.x % 32 == 0) warp_max[warp] = largest;
    __syncthreads();
    constexpr int kWarps = kGroup / 32;
    const int first = warp / kWarps * kWarps;
    for (int i = 0; i < kWarps; ++i) largest = max(largest, warp_max[first + i]);
  }
  return largest;
}

template <int kGroup>
constexpr int kThreads = kGroup > 256 ? kGroup : 256;

template <class T, int kGroup>
__global__ void __launch_bounds__(kThreads<kGroup>) quantize_kernel(const Params p) {
  __shared__ Ranks ranks;
  __shared__ float sorted[16];
  __shared__ int warp_max[kThreads<kGroup> / 32];
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads<kGroup> + threadIdx.x;
  const int64_t start = thread * kWeights;
  float value[kWeights];
  load_weights<T>(p, start, value);
  ranks.fill(p.code, sorted);

  int largest = 0;
#pragma unroll
  for (int i = 0; i < kWeights; ++i) largest = max(largest, static_cast<int>(__float_as_uint(value[i]) & 0x7fffffffu));
  const float raw = __int_as_float(group_max<kGroup>(largest, warp_max));
  if (start >= p.n) return;

  // bitsandbytes' CPU path: a full block multiplies by the reciprocal, a last partial one divides.
  const float clamped = raw < nf4::kMinAbsmax ? nf4::kMinAbsmax : raw;
  const int64_t block = thread / kGroup;
  const bool partial = (block + 1) * kGroup * kWeights > p.n;
  if (thread % kGroup == 0) p.absmax[block] = partial ? clamped : raw;
  if (partial) {
    // The padding nibble of an odd length stays the code of 0, whatever the scale.
    for (int i = 0; i < kWeights; ++i) value[i] = start + i < p.n ? value[i] / clamped : 0.0f;
  } else {
    const float reciprocal = 1.0f / clamped;
#pragma unroll
    for (int i = 0; i < kWeights; ++i) value[i] *= reciprocal;
  }

  const auto place = [](uint32_t nibble, int i) { return nibble << (8 * (i / 2) + (i % 2 ? 0 : 4)); };
  uint32_t word = 0;
  if (p.code) {
    for (int i = 0; i < kWeights; ++i) word |= place(ranks.user_nibble(value[i]), i);
  } else {
#pragma unroll
    for (int i = 0; i < kWeights; ++i) word |= place(ranks.nf4_nibble(value[i]), i);
  }
  if (start + kWeights <= p.n) {
    reinterpret_cast<uint32_t*>(p.packed)[thread] = word;
  } else {
    for (int i = 0; i < (p.n - start + 1) / 2; ++i) p.packed[start / 2 + i] = static_cast<uint8_t>(word >> (8 * i));
  }
}

template <class T, int kGroup = nf4::kMinBlocksize / kWeights>
void launch(const Params& p, int64_t blocksize, cudaStream_t stream) {
  if constexpr (kGroup <= nf4::kMaxBlocksize / kWeights) {
    if (blocksize != kGroup * kWeights) return launch<T, 2 * kGroup>(p, blocksize, stream);
    const int64_t grid = ceil_div(p.n, static_cast<int64_t>(kWeights) * kThreads<kGroup>);
    FO_CHECK(grid <= INT32_MAX, kOp, "w must have fewer than ",
             static_cast<int64_t>(INT32_MAX) * kWeights * kThreads<kGroup>, " elements, got ", p.n);
    quantize_kernel<T, kGroup><<<static_cast<unsigned>(grid), kThreads<kGroup>, 0, stream>>>(p);
  }
}

std::tuple<Tensor, Tensor> nf4_quantize(Tensor w, int64_t blocksize, std::optional<Tensor> code) {
  check_float_type(kOp, "w", w.scalar_type());
  nf4::check_blocksize(kOp, "blocksize", blocksize);
  nf4::check_code(kOp, code, "w", w);

  const LaunchScope scope(kOp, w);
  w = as_contiguous(w);
  code = as_contiguous(code);
  const int64_t n = w.numel();
  Tensor packed = torch::stable::new_empty(w, std::vector<int64_t>{ceil_div(n, 2)}, ScalarType::Byte);
  Tensor absmax = torch::stable::new_empty(w, std::vector<int64_t>{ceil_div(n, blocksize)}, ScalarType::Float);
  if (n == 0) return {packed, absmax};
  const void* from = w.const_data_ptr();
  const Params p{from,
                 code ? static_cast<const float*>(code->const_data_ptr()) : nullptr,
                 static_cast<uint8_t*>(packed.mutable_data_ptr()),
                 static_cast<float*>(absmax.mutable_data_ptr()),
                 n,
                 reinterpret_cast<uintptr_t>(from) % 16 == 0};
  dispatch_float(w.scalar_type(), [&](auto zero) { launch<decltype(zero)>(p, blocksize, scope.stream()); });
  scope.check();
  return {packed, absmax};
}

}  // namespace
}  // namespace fastops::nf4_quantize

FO_IMPL(CUDA, "nf4_quantize", &fastops::nf4_quantize::nf4_quantize)
