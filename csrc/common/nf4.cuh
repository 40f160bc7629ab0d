// NF4 on the device.
#pragma once

#include "common/nf4.h"

namespace fastops::nf4 {

static __constant__ const float kDeviceCode[16] = FO_NF4_CODE;

// Decision boundaries between neighbouring codes; NF4's are sorted.
struct Midpoints {
  float value[15];
};

constexpr Midpoints midpoints(const float (&code)[16]) {
  Midpoints m{};
  for (int i = 0; i < 15; ++i) m.value[i] = (code[i] + code[i + 1]) / 2;
  return m;
}

static __constant__ const Midpoints kDeviceMidpoints = midpoints(kCode);

// Entry i of the user's table, or of NF4's when there is none.
__device__ inline float code_at(const float* user_code, int i) { return user_code ? user_code[i] : kDeviceCode[i]; }

}  // namespace fastops::nf4
