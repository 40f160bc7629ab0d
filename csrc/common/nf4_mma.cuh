// 4-bit weights as operands of the matrix units: bytes stream through shared memory and become A fragments by one
// table look-up a byte.
// Layout: a block of 64 weights of a row is 32 bytes; lane (g, t) takes its bytes 8t ... 8t + 7 of rows g and g + 8,
// and step j (0 ... 3) multiplies weights k = 16 t + 4 j + {0, 1, 2, 3}: a permutation of k that x follows, so that a
// lane reads 8 bytes at once and a step never crosses a block of scales. Scales are applied to the fp32 sum of a block.
#pragma once

#include "common/async.cuh"
#include "common/mma.cuh"
#include "common/nf4.cuh"

namespace fastops::nf4 {

// A product's weight [out_features, in_features], in_features a multiple of 64.
struct Weight {
  const uint8_t* packed;  // aligned to 16 bytes
  ScalesView scales;      // blocks of 64 weights or more
  int out_features, in_features;
};

// The codes are rounded to T, so they are first multiplied by the constant that makes NF4's sixteen lie closest to T's
// values (found by search: the rms error falls from 0.27 to 0.16 of a half unit in the last place for bf16, from 0.32
// to 0.13 for fp16); the sum is divided by it. A user's codes are brought to at most 1 by a power of two.
template <class T>
constexpr float kCodeScale = std::is_same_v<T, BFloat16> ? 1.437005f : 1.67769f;

static __device__ const float kGlobalCode[16] = FO_NF4_CODE;  // read by all lanes at once: constant memory would serve
                                                              // them one by one

// 256 pairs of codes, the value of each byte, 32 copies side by side: lane l reads bank l, never a conflict.
template <class T>
struct PairTable {
  static constexpr int kBytes = 256 * 128;
  uint32_t lane_at;  // this lane's copy of pair 0
  float unscale;     // what sums are multiplied by

  // The load comes first; build() finds it done.
  __device__ static float load_code(const float* user, int lane) {
    return __ldg((user ? user : kGlobalCode) + (lane & 15));
  }

  // By `threads` threads, whole warps; the caller synchronises.
  __device__ void build(uint32_t at, float code, bool user, int thread, int threads) {
    const int lane = thread & 31;
    float scale = kCodeScale<T>;
    if (user) {
      float most = fabsf(code);
#pragma unroll
      for (int i = 8; i > 0; i /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, i));
      // 2^-e for most = 2^e 1.xxx; 1 where there is nothing to scale (0, infinity) or nothing to hold 2^-e
      const int exponent = __float_as_int(most) >> 23;
      scale = exponent > 0 && exponent < 254 ? __int_as_float((254 - exponent) << 23) : 1.0f;
    }
    unscale = 1.0f / scale;
    lane_at = at + lane * 4;
    for (int first = 0; first < 256; first += threads / 2) {  // a thread writes half of an entry
      const int entry = first + thread / 2;
      const float high = __shfl_sync(~0u, code, entry >> 4 & 15), low = __shfl_sync(~0u, code, entry & 15);
      const uint32_t pair = pack16(high * scale, low * scale, T{});
      if (entry >= 256) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) {  // rotated, so that eight lanes fill all banks
        const uint32_t to = at + entry * 128 + (thread & 1) * 64 + ((i + (lane >> 1)) & 3) * 16;
        asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" ::"r"(to), "r"(pair) : "memory");
      }
    }
  }

  // The pair of byte kByte of a word.
  template <int kByte>
  __device__ uint32_t look_up(uint32_t word) const {
    const uint32_t offset = (kByte == 0 ? word << 7 : word >> (8 * kByte - 7)) & 0x7f80;
    uint32_t pair;
    // Not volatile, so that look-ups move between the products; only loads that a barrier orders lead to them.
    asm("ld.shared.u32 %0, [%1];" : "=r"(pair) : "r"(lane_at + offset));
    return pair;
  }

  // A fragments of the four steps of a block, from the words of rows g and g + 8.
  __device__ void fragments(uint32_t (&a)[4][4], const uint32_t (&upper)[2], const uint32_t (&lower)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      a[2 * i][0] = look_up<0>(upper[i]), a[2 * i][1] = look_up<0>(lower[i]);
      a[2 * i][2] = look_up<1>(upper[i]), a[2 * i][3] = look_up<1>(lower[i]);
      a[2 * i + 1][0] = look_up<2>(upper[i]), a[2 * i + 1][1] = look_up<2>(lower[i]);
      a[2 * i + 1][2] = look_up<3>(upper[i]), a[2 * i + 1][3] = look_up<3>(lower[i]);
    }
  }
};

// Rows of a strip that a warp works on together.
struct Strip {
  int row, rows;  // rows <= 16; none if not positive
};

// A warp's stream of weights: units of 16 rows x 4 blocks of 64, kStages of them in shared memory, all but one under
// way. It walks the units [first, last) of each strip in turn. Rows and blocks that do not exist leave old bytes, whose
// products nobody reads or which meet a scale of zero.
template <bool kDoubleQuant, int kStages>
class WeightRing {
 public:
  static constexpr int kBytes = 16 * 128 + 16 * 16;  // a stage: packed rows, 16-byte chunks swizzled; then their scales

  __device__ WeightRing(const Weight& w, uint32_t stages, int lane, int first, int last, int strips)
      : w_(w), at_(stages), lane_(lane), first_(first), last_(last), strips_(strips), unit_(first) {
    if constexpr (kDoubleQuant) offset_ = w.scales.absmax_offset ? __ldg(w.scales.absmax_offset) : 0.0f;
  }

  // Turns to the first strip.
  template <class StripOf>
  __device__ void start(StripOf strip_of) {
    if (first_ < last_ && strips_ > 0) aim(strip_of(0));
  }

  // Begins to load the next unit. Every call closes one group of copies.
  template <class StripOf>
  __device__ void prefetch(StripOf strip_of) {
    if (strip_ < strips_ && first_ < last_) {
      const int half = w_.in_features / 2, blocks = w_.in_features / 64, left = blocks - unit_ * 4;
      const uint32_t to = at_ + stage_ * kBytes + (lane_ / 8) * 128 + ((lane_ % 8) ^ (2 * (lane_ / 8 & 3))) * 16;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (lane_ % 8 < 2 * left && 4 * i + lane_ / 8 < rows_) copy16_async(to + i * 512, from_ + i * 4 * half);
      }
      if constexpr (kDoubleQuant) deposit();
#pragma unroll
      for (int i = 0; i < 2; ++i) load_scale(i, (block_ + i * 8 * blocks) >> (w_.scales.block_shift - 6), left);
      from_ += 128;
      block_ += 4;
      if (++unit_ == last_) {
        unit_ = first_;
        if (++strip_ < strips_) aim(strip_of(strip_));
      }
    } else if constexpr (kDoubleQuant) {
      deposit();
    }
    commit_copies();
    stage_ = stage_ + 1 == kStages ? 0 : stage_ + 1;
  }

  // Until the oldest unit is there, for all lanes; then room for another is free.
  __device__ void wait() {
    wait_copies<kStages - 2>();
    __syncwarp();
  }

  // Scales of blocks 0 ... 3 of the oldest unit, rows g and g + 8.
  __device__ void scales(float (&upper)[4], float (&lower)[4]) const {
    const uint32_t from = at_ + oldest_ * kBytes + 2048 + (lane_ >> 2) * 16;
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(upper[0]), "=f"(upper[1]), "=f"(upper[2]), "=f"(upper[3])
                 : "r"(from));
    asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(lower[0]), "=f"(lower[1]), "=f"(lower[2]), "=f"(lower[3])
                 : "r"(from + 128));
  }

  // The packed words of block b of the oldest unit: this lane's 8 bytes of rows g and g + 8.
  struct Words {
    uint32_t upper[2], lower[2];
  };

  __device__ Words words(int b) const {
    const int g = lane_ >> 2, t = lane_ & 3;
    const uint32_t from = (at_ + oldest_ * kBytes + g * 128 + (g & 3) * 32 + t * 8) ^ (b * 32);
    Words w;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(w.upper[0]), "=r"(w.upper[1]) : "r"(from));
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(w.lower[0]), "=r"(w.lower[1]) : "r"(from + 1024));
    return w;
  }

  // The oldest unit has been read.
  __device__ void pop() { oldest_ = oldest_ + 1 == kStages ? 0 : oldest_ + 1; }

 private:
  __device__ void aim(Strip s) {
    rows_ = s.rows;
    from_ = w_.packed + static_cast<int64_t>(s.row + lane_ / 8) * (w_.in_features / 2) + unit_ * 128 + lane_ % 8 * 16;
    block_ = static_cast<uint32_t>(s.row + lane_ / 4) * (w_.in_features / 64) + unit_ * 4 + lane_ % 4;
  }

  // Scale number `index` for row 8 i + lane / 4 and block lane % 4 of the unit.
  __device__ void load_scale(int i, uint32_t index, int left) {
    const bool there = lane_ % 4 < left;
    if (8 * i + lane_ / 4 >= rows_) index = 0;  // any scale will do; this one exists
    if constexpr (kDoubleQuant) {
      quantized_[i] = there ? __ldg(static_cast<const uint8_t*>(w_.scales.absmax) + index) : 0;
      outer_[i] = there ? __ldg(w_.scales.absmax_scale + (index >> w_.scales.absmax_shift)) : 0.0f;
      added_[i] = there ? offset_ : 0.0f;
      deposit_at_ = at_ + stage_ * kBytes + 2048 + lane_ * 4;
    } else {
      const auto* from = static_cast<const float*>(w_.scales.absmax) + (there ? index : 0);
      copy4_async_or_zero(at_ + stage_ * kBytes + 2048 + i * 128 + lane_ * 4, from, there);
    }
  }

  // Double-quantised scales go through registers: loaded with one unit, decoded and stored with the next.
  // Product and offset are rounded apart, as bitsandbytes does.
  __device__ void deposit() {
    if (deposit_at_ == 0) return;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float scale = __fadd_rn(__fmul_rn(__ldg(w_.scales.absmax_code + quantized_[i]), outer_[i]), added_[i]);
      asm volatile("st.shared.f32 [%0], %1;" ::"r"(deposit_at_ + i * 128), "f"(scale) : "memory");
    }
    deposit_at_ = 0;
  }

  const Weight& w_;
  uint32_t at_;
  int lane_, first_, last_, strips_;
  int unit_, strip_ = 0, stage_ = 0, oldest_ = 0, rows_ = 0;
  const uint8_t* from_ = nullptr;
  uint32_t block_ = 0;
  float offset_ = 0.0f;
  int quantized_[2];
  float outer_[2], added_[2];
  uint32_t deposit_at_ = 0;
};

}  // namespace fastops::nf4
