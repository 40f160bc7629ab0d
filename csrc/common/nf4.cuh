// NF4 on the device.
#pragma once

#include "common/nf4.h"

namespace fastops::nf4 {

static __constant__ const float kDeviceCode[16] = FO_NF4_CODE;

// How many midpoints of NF4's codes lie below a value in [-1, 1], in one step: the value's bin, 1/15 wide, narrower
// than any two midpoints lie apart, holds at most one of them. first[bin] is the index of that one, or of the next
// below.
struct RankTable {
  static constexpr int kBins = 32;
  float midpoint[15];
  int first[kBins];
};

constexpr RankTable rank_table(const float (&code)[16]) {
  RankTable t{};
  for (int i = 0; i < 15; ++i) t.midpoint[i] = (code[i] + code[i + 1]) / 2;
  for (int bin = 0; bin < RankTable::kBins; ++bin) {
    while (t.first[bin] < 14 && t.midpoint[t.first[bin]] < (bin - 16.5) / 15) ++t.first[bin];
  }
  return t;
}

static __constant__ const RankTable kDeviceRanks = rank_table(kCode);

// Round to nearest of 15 v + 16, by adding 2^23. A NaN falls into the last bin, above every midpoint.
__device__ inline int rank_bin(float v) {
  return static_cast<int>(__float_as_uint(fmaf(v, 15.0f, 8388624.0f)) & (RankTable::kBins - 1));
}

// Entry i of the user's table, or of NF4's when there is none.
__device__ inline float code_at(const float* user_code, int i) { return user_code ? user_code[i] : kDeviceCode[i]; }

}  // namespace fastops::nf4
