// Matrix units for 16-bit inputs and fp32 sums: mma.sync (sm_80 and later) and wgmma (sm_90a) with A in registers.
// Both take A in the same layout, so one decoder feeds either: lane (g = lane / 4, t = lane % 4) of a warp holds, of a
// 16 x 16 tile, a[0] = (row g, columns 2t, 2t + 1), a[1] = (row g + 8, same), a[2], a[3] = the same rows, 8 columns on;
// and of the result d[4 i + 0, 1] = (row g, columns 8 i + 2 t, + 1), d[4 i + 2, 3] = row g + 8.
#pragma once

#include <type_traits>

#include "common/dispatch.h"

namespace fastops {

__device__ inline uint32_t pack16(float low, float high, BFloat16) {
  uint32_t v;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

__device__ inline uint32_t pack16(float low, float high, Half) {
  uint32_t v;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
  return v;
}

// d += a b for 16 x 8 x 16.
template <class T>
__device__ inline void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Code for wgmma exists only in a build for sm_90a itself.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define FO_HAS_WGMMA 1
#else
#define FO_HAS_WGMMA 0
#endif

// Matrix descriptor of B in shared memory: k-major rows of 128 bytes, 128-byte swizzle, eight rows 1024 bytes apart.
__device__ inline uint64_t wgmma_descriptor(uint32_t address) {
  return uint64_t{1} << 62 | uint64_t{64} << 32 | uint64_t{1} << 16 | (address >> 4 & 0x3fff);
}

__device__ inline void wgmma_fence() {
#if FO_HAS_WGMMA
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

__device__ inline void wgmma_commit() {
#if FO_HAS_WGMMA
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

// Until every wgmma has finished; d may be read from here on.
template <int kCount>
__device__ inline void wgmma_wait(float (&d)[kCount]) {
#if FO_HAS_WGMMA
  asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(d[i]));
#endif
}

// Hands registers from one role of a block to another: all warps of a warpgroup call it.
template <int kCount, bool kMore>
__device__ inline void set_registers() {
#if FO_HAS_WGMMA
  if constexpr (kMore) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kCount));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kCount));
  }
#endif
}

#define FO_D4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define FO_D16(d, i) FO_D4(d, i), FO_D4(d, i + 4), FO_D4(d, i + 8), FO_D4(d, i + 12)
#define FO_D32(d, i) FO_D16(d, i), FO_D16(d, i + 16)
#define FO_D64(d, i) FO_D32(d, i), FO_D32(d, i + 32)
#define FO_N16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define FO_N32 FO_N16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define FO_N64                                                                                                    \
  FO_N32                                                                                                          \
  ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58," \
  "%59,%60,%61,%62,%63"
#define FO_WGMMA(n, type, ds, operands, a0, a1, a2, a3, b, add)                                                    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, " add ", 0;\nwgmma.mma_async.sync.aligned.m64n" n "k16.f32." type \
               "." type " {" ds "}, {" a0 "," a1 "," a2 "," a3 "}, " b ", p, 1, 1, 0;\n}"                          \
               : operands                                                                                          \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor), "r"(int(accumulate)))

// d = a b (+ d) for 64 x kN x 16 by a warpgroup; asynchronous.
template <class T, int kN>
__device__ inline void wgmma(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t descriptor, bool accumulate) {
#if FO_HAS_WGMMA
  static_assert(kN == 32 || kN == 64 || kN == 128);
  if constexpr (std::is_same_v<T, BFloat16>) {
    if constexpr (kN == 32) FO_WGMMA("32", "bf16", FO_N16, FO_D16(d, 0), "%16", "%17", "%18", "%19", "%20", "%21");
    if constexpr (kN == 64) FO_WGMMA("64", "bf16", FO_N32, FO_D32(d, 0), "%32", "%33", "%34", "%35", "%36", "%37");
    if constexpr (kN == 128) FO_WGMMA("128", "bf16", FO_N64, FO_D64(d, 0), "%64", "%65", "%66", "%67", "%68", "%69");
  } else {
    if constexpr (kN == 32) FO_WGMMA("32", "f16", FO_N16, FO_D16(d, 0), "%16", "%17", "%18", "%19", "%20", "%21");
    if constexpr (kN == 64) FO_WGMMA("64", "f16", FO_N32, FO_D32(d, 0), "%32", "%33", "%34", "%35", "%36", "%37");
    if constexpr (kN == 128) FO_WGMMA("128", "f16", FO_N64, FO_D64(d, 0), "%64", "%65", "%66", "%67", "%68", "%69");
  }
#endif
}

}  // namespace fastops
