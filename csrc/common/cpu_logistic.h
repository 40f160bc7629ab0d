// The logistic function and its loss of sixteen values at once, within a few units in the last place. In the compiler's
// own vectors: each instruction set under which this is inlined takes them in registers of its width.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/cpu_convert.h"

namespace fastops {

typedef float Floats __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));
constexpr int kFloats = 16;

// exp(-a) for a >= 0, exp(-87.3) = 1e-38 from there on: 2^k times a polynomial on [-ln 2 / 2, ln 2 / 2]. A NaN stays
// one.
FO_INLINE void exp_minus(const Floats& a, Floats& out) {
  const Floats most = Floats{} + 87.3f, bounded = most < a ? most : a;
  const Floats shifted = bounded * -1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's last bits are the integer
  const Floats k = shifted - 12582912.0f;
  const Floats r = (-bounded - k * 0.693359375f) - k * -2.12194440e-4f;  // ln 2 in two parts
  Floats p = r * (1.0f / 5040) + 1.0f / 720;
  p = p * r + 1.0f / 120;
  p = p * r + 1.0f / 24;
  p = p * r + 1.0f / 6;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  Words power;
  std::memcpy(&power, &shifted, sizeof(power));
  power = (power << 23) + 0x3f800000u;
  std::memcpy(&out, &power, sizeof(out));
  out *= p;
}

// log(1 + e) for e in [0, 1]: 2 atanh(e / (2 + e)), whose argument is at most 1/3.
FO_INLINE void log1p_small(const Floats& e, Floats& out) {
  const Floats s = e / (2.0f + e), t = s * s;
  Floats p = t * (1.0f / 13) + 1.0f / 11;
  p = p * t + 1.0f / 9;
  p = p * t + 1.0f / 7;
  p = p * t + 1.0f / 5;
  p = p * t + 1.0f / 3;
  out = 2.0f * (s + s * t * p);
}

// z [16] -> 1 / (1 + exp(-z)), in place, and softplus [16] = log(1 + exp(z)).
FO_INLINE void logistic(float* z, float* softplus) {
  Floats x, e, tail;
  std::memcpy(&x, z, sizeof(x));
  const Floats zero{};
  exp_minus(x < zero ? -x : x, e);
  log1p_small(e, tail);
  const Floats high = 1.0f / (1.0f + e), low = e * high;
  const Floats probability = x < zero ? low : high, loss = (x > zero ? x : zero) + tail;
  std::memcpy(z, &probability, sizeof(x));
  std::memcpy(softplus, &loss, sizeof(x));
}

}  // namespace fastops
