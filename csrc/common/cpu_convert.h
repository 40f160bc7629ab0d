// Data types to float, written so that the compiler vectorises them under whatever instruction set they are inlined.
#pragma once

#include <bit>
#include <cstdint>

#include "common/dispatch.h"

#define FO_INLINE __attribute__((always_inline)) inline

namespace fastops {

FO_INLINE float to_float(float v) { return v; }

FO_INLINE float to_float(BFloat16 v) { return std::bit_cast<float>(static_cast<uint32_t>(v.x) << 16); }

// Half to float without a branch, so that it vectorises: rebias the exponent by a multiplication (exact, subnormals
// included), then restore infinities and NaNs.
FO_INLINE float to_float(Half v) {
  const uint32_t sign = static_cast<uint32_t>(v.x & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(v.x & 0x7fff) << 13;
  const uint32_t scaled = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) * 0x1p112f);
  const uint32_t special = magnitude >= 0x0f800000u ? 0x7f800000u : 0u;
  return std::bit_cast<float>(sign | scaled | special);
}

}  // namespace fastops
