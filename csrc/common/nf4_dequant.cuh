// The kernel of nf4_dequant, which products that expand their weight launch too; its floor stands in
// cuda/nf4_dequant.cu.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "common/dispatch.h"
#include "common/launch.cuh"
#include "common/nf4.cuh"
#include "common/tensor.h"
#include "common/tuned_device.cuh"

namespace fastops::nf4_dequant {

constexpr char kOp[] = "nf4_dequant";

struct Config {
  int threads, units;  // units a thread
};

// What `python -m fastops tune` chooses from; the index is what tuned tables hold.
constexpr Config kConfigs[] = {{256, 2}, {512, 2}, {512, 4}, {128, 8}, {256, 8}, {512, 8}, {128, 16}, {64, 16}};
constexpr int kConfigCount = sizeof(kConfigs) / sizeof(kConfigs[0]);
constexpr int kDefaultConfig = 0;

struct Params {
  const uint8_t* packed;
  nf4::ScalesView scales;
  void* out;
  int64_t n;
  bool aligned;  // packed starts at a multiple of 16 bytes
};

template <class T>
struct Unit {
  static constexpr int kWeights = 16 / sizeof(T), kBytes = kWeights / 2;
};

__device__ inline uint32_t pack(float a, float b, BFloat16) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

__device__ inline uint32_t pack(float a, float b, Half) {
  const __half2 pair = __floats2half2_rn(a, b);
  return *reinterpret_cast<const uint32_t*>(&pair);
}

// Weight j of a unit: byte j / 2, the high nibble first.
__device__ inline float look_up(const float* code, uint32_t bytes, int j) {
  return code[bytes >> (8 * (j / 2) + (j % 2 ? 0 : 4)) & 15];
}

template <class T>
__device__ inline uint4 expand(const float* code, uint32_t bytes, float scale) {
  uint32_t words[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 4) {
      words[i] = __float_as_uint(look_up(code, bytes, i) * scale);
    } else {
      words[i] = pack(look_up(code, bytes, 2 * i) * scale, look_up(code, bytes, 2 * i + 1) * scale, T{});
    }
  }
  return {words[0], words[1], words[2], words[3]};
}

// Byte by byte, for a packed that is not aligned or ends within the unit.
template <class T>
__device__ inline uint32_t load_unit(const Params& p, int64_t unit) {
  uint32_t bytes = 0;
  for (int i = 0; i < Unit<T>::kBytes; ++i) {
    const int64_t at = unit * Unit<T>::kBytes + i;
    if (at < (p.n + 1) / 2) bytes |= static_cast<uint32_t>(p.packed[at]) << (8 * i);
  }
  return bytes;
}

// A block's scale in two steps: the loads that need only its index, which come first of all, and the look-up that needs
// their result, which waits in the shadow of the packed loads.
template <bool kDoubleQuant>
struct BlockScale {
  float scale;
  int quantized;

  __device__ void load(const nf4::ScalesView& s, int64_t block) {
    if constexpr (kDoubleQuant) {
      quantized = __ldg(static_cast<const uint8_t*>(s.absmax) + block);
      scale = __ldg(s.absmax_scale + (block >> s.absmax_shift));
    } else {
      scale = __ldg(static_cast<const float*>(s.absmax) + block);
    }
  }

  // Product and offset rounded apart, as bitsandbytes does: no fused multiply-add.
  __device__ float value(const nf4::ScalesView& s) const {
    if constexpr (!kDoubleQuant) return scale;
    const float product = __fmul_rn(__ldg(s.absmax_code + quantized), scale);
    return s.absmax_offset ? __fadd_rn(product, __ldg(s.absmax_offset)) : product;
  }
};

template <class T>
__device__ inline void store_unit(const Params& p, int64_t unit, uint4 value) {
  T* to = static_cast<T*>(p.out) + unit * Unit<T>::kWeights;
  const int64_t left = p.n - unit * Unit<T>::kWeights;
  if (left >= Unit<T>::kWeights) {
    *reinterpret_cast<uint4*>(to) = value;
    return;
  }
  const uint32_t words[4] = {value.x, value.y, value.z, value.w};
#pragma unroll
  for (int i = 0; i < Unit<T>::kWeights; ++i) {  // indices known at compile time keep the words in registers
    if (i >= left) return;
    if constexpr (sizeof(T) == 4) {
      reinterpret_cast<uint32_t*>(to)[i] = words[i];
    } else {
      reinterpret_cast<uint16_t*>(to)[i] = static_cast<uint16_t>(words[i / 2] >> (16 * (i % 2)));
    }
  }
}

// The widest load that divides a thread's share of the packed bytes.
template <int kBytes>
struct Vector {
  using type = std::conditional_t<kBytes % 16 == 0, uint4, std::conditional_t<kBytes % 8 == 0, uint2, uint32_t>>;
  static constexpr int kCount = kBytes / sizeof(type);
};

template <class T, bool kDoubleQuant, int kThreads, int kUnits>
static __global__ void __launch_bounds__(kThreads) dequant_kernel(const Params p) {
  using Bytes = std::conditional_t<sizeof(T) == 4, uint16_t, uint32_t>;  // of a unit
  using Load = Vector<kUnits * Unit<T>::kBytes>;
  using LoadType = typename Load::type;
  constexpr int kTileUnits = kThreads * kUnits, kTileWeights = kTileUnits * Unit<T>::kWeights;
  __shared__ alignas(16) Bytes packed[kTileUnits];
  __shared__ float scale[kTileWeights / nf4::kMinBlocksize];
  __shared__ float code[16];

  const int unit_shift = p.scales.block_shift - (sizeof(T) == 4 ? 2 : 3);  // unit index -> block index
  const int64_t tile = static_cast<int64_t>(blockIdx.x) * kTileUnits;
  // True for all but the last block of an aligned input.
  const bool whole = p.aligned && (tile + kTileUnits) * Unit<T>::kWeights <= p.n;

  constexpr int kScales = (kTileWeights / nf4::kMinBlocksize + kThreads - 1) / kThreads;  // a thread's, at most
  const int blocks = max(1, kTileWeights >> p.scales.block_shift);
  BlockScale<kDoubleQuant> mine[kScales];
  LoadType loaded[Load::kCount];
  if (whole) {
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int block = i * kThreads + threadIdx.x;
      if (block < blocks) mine[i].load(p.scales, (tile >> unit_shift) + block);
    }
    const auto* from = reinterpret_cast<const LoadType*>(p.packed + tile * Unit<T>::kBytes);
#pragma unroll
    for (int i = 0; i < Load::kCount; ++i) loaded[i] = __ldg(from + i * kThreads + threadIdx.x);
  }
  if (threadIdx.x < 16) code[threadIdx.x] = nf4::code_at(p.scales.code, threadIdx.x);
  if (whole) {
#pragma unroll
    for (int i = 0; i < kScales; ++i) {
      const int block = i * kThreads + threadIdx.x;
      if (block < blocks) scale[block] = mine[i].value(p.scales);
    }
#pragma unroll
    for (int i = 0; i < Load::kCount; ++i) reinterpret_cast<LoadType*>(packed)[i * kThreads + threadIdx.x] = loaded[i];
  }
  __syncthreads();

  if (whole) {
#pragma unroll
    for (int u = 0; u < kUnits; ++u) {
      const int unit = u * kThreads + threadIdx.x;
      static_cast<uint4*>(p.out)[tile + unit] = expand<T>(code, packed[unit], scale[unit >> unit_shift]);
    }
    return;
  }
  const int64_t end = min(tile + kTileUnits, ceil_div(p.n, Unit<T>::kWeights));
  for (int64_t unit = tile + threadIdx.x; unit < end; unit += kThreads) {
    BlockScale<kDoubleQuant> one;
    one.load(p.scales, unit >> unit_shift);
    store_unit<T>(p, unit, expand<T>(code, load_unit<T>(p, unit), one.value(p.scales)));
  }
}

template <class T, bool kDoubleQuant, int kConfig = 0>
void launch(const Params& p, int config, cudaStream_t stream) {
  if constexpr (kConfig < kConfigCount) {
    if (config != kConfig) return launch<T, kDoubleQuant, kConfig + 1>(p, config, stream);
    constexpr Config c = kConfigs[kConfig];
    const int64_t grid = ceil_div(p.n, static_cast<int64_t>(Unit<T>::kWeights) * c.threads * c.units);
    FO_CHECK(grid <= INT32_MAX, kOp, "shape must have fewer than ",
             static_cast<int64_t>(INT32_MAX) * Unit<T>::kWeights * c.threads * c.units, " weights, got ", p.n);
    dequant_kernel<T, kDoubleQuant, c.threads, c.units><<<static_cast<unsigned>(grid), c.threads, 0, stream>>>(p);
  }
}

// Expands to `type` on the caller's stream, with the configuration tuned for the size.
inline void dequantize(const Params& p, ScalarType type, bool double_quantized, int device, cudaStream_t stream) {
  dispatch_float(type, [&](auto zero) {
    dispatch_bool(double_quantized, [&](auto double_quant) {
      using T = decltype(zero);
      const int64_t key = 2 * static_cast<int64_t>(sizeof(T)) + double_quant.value;
      const int config = tuned_config(kOp, device, key, p.n, kDefaultConfig, kConfigCount);
      launch<T, double_quant.value>(p, config, stream);
    });
  });
}

}  // namespace fastops::nf4_dequant
