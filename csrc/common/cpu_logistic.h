// The logistic function and its loss of many values at once, in plain C++ that the compiler vectorises once for each
// instruction set it is inlined under. Both are within a few units in the last place.
#pragma once

#include <bit>
#include <cstdint>

#include "common/cpu_convert.h"

namespace fastops {

// exp(-a) for a >= 0, 0 from 87.3 on: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2].
FO_INLINE float exp_minus(float a) {
  const float bounded = a < 87.3f ? a : 87.3f;
  const float shifted = bounded * -1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the integer
  const float k = shifted - 12582912.0f;
  const float r = (-bounded - k * 0.693359375f) - k * -2.12194440e-4f;  // ln 2 in two parts
  float p = 1.0f / 5040;
  p = p * r + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  const uint32_t power = (std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u;
  return a < 87.3f ? p * std::bit_cast<float>(power) : 0.0f;
}

// log(1 + e) for e in [0, 1]: 2 atanh(e / (2 + e)), whose argument is at most 1/3.
FO_INLINE float log1p_small(float e) {
  const float s = e / (2.0f + e), t = s * s;
  float p = 1.0f / 13;
  p = p * t + 1.0f / 11;
  p = p * t + 1.0f / 9;
  p = p * t + 1.0f / 7;
  p = p * t + 1.0f / 5;
  p = p * t + 1.0f / 3;
  return 2.0f * (s + s * t * p);
}

struct Logistic {
  float probability;  // 1 / (1 + exp(-z))
  float softplus;     // log(1 + exp(z))
};

FO_INLINE Logistic logistic(float z) {
  const float a = z < 0.0f ? -z : z;
  const float e = a == a ? exp_minus(a) : a;  // a NaN stays one
  const float far = 1.0f / (1.0f + e);
  return {z < 0.0f ? e * far : (z == z ? far : z), (z > 0.0f ? z : 0.0f) + log1p_small(e)};
}

}  // namespace fastops
