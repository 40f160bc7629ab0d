// Which instruction set the CPU kernels use on this machine, decided once at run time.
#pragma once

#include <atomic>

namespace fastops {

enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16 };  // each has what the ones before it have

#if defined(__x86_64__)
#define FASTOPS_X86 1
#define FO_TARGET_AVX2 __attribute__((target("avx2,fma,f16c")))
#define FO_TARGET_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#define FO_TARGET_AVX512_BF16 __attribute__((target("avx512bf16,avx512f,avx512bw,avx512vl,avx512dq,avx2,fma,f16c")))
#endif

inline Isa detect_isa() {
#if defined(FASTOPS_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return __builtin_cpu_supports("avx512bf16") ? Isa::kAvx512Bf16 : Isa::kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return Isa::kAvx2;
  }
#endif
  return Isa::kScalar;
}

// What the kernels of this library use; fastops._C.limit_cpu_isa lowers it so that tests reach every path.
inline std::atomic<Isa> active_isa{detect_isa()};

inline const char* isa_name(Isa isa) {
  constexpr const char* kNames[] = {"scalar", "avx2", "avx512", "avx512_bf16"};
  return kNames[static_cast<int>(isa)];
}

}  // namespace fastops
