// Compiles a header of kernels once for each instruction set, and picks among them. No include guard: a kernel file
// includes this once, after it has defined
//   FO_KERNELS     that header's name; it reads FO_VECTOR and FO_KERNEL, and offers kernels<T>()
//   FO_FLOAT_ONLY  where products of bf16 are of no use to it
// It sees what stands before this line in the file, which is in the kernel's namespace.

namespace scalar {
#define FO_VECTOR simd::Scalar
#define FO_KERNEL
#include FO_KERNELS
#undef FO_VECTOR
#undef FO_KERNEL
}  // namespace scalar

#if defined(FASTOPS_X86)
namespace avx2 {
#define FO_VECTOR simd::Avx2
#define FO_KERNEL FO_TARGET_AVX2
#include FO_KERNELS
#undef FO_VECTOR
#undef FO_KERNEL
}  // namespace avx2

namespace avx512 {
#define FO_VECTOR simd::Avx512
#define FO_KERNEL FO_TARGET_AVX512
#include FO_KERNELS
#undef FO_VECTOR
#undef FO_KERNEL
}  // namespace avx512

#if !defined(FO_FLOAT_ONLY)
namespace avx512_bf16 {
#define FO_VECTOR simd::Avx512Bf16
#define FO_KERNEL FO_TARGET_AVX512_BF16
#include FO_KERNELS
#undef FO_VECTOR
#undef FO_KERNEL
}  // namespace avx512_bf16
#endif
#endif

namespace {

// The best kernels for T up to `isa`.
template <class T>
auto kernels_for(Isa isa) {
#if defined(FASTOPS_X86)
#if !defined(FO_FLOAT_ONLY)
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (isa >= Isa::kAvx512Bf16) return avx512_bf16::kernels<T>();
  }
#endif
  if (isa >= Isa::kAvx512) return avx512::kernels<T>();
  if (isa == Isa::kAvx2) return avx2::kernels<T>();
#endif
  (void)isa;
  return scalar::kernels<T>();
}

}  // namespace

#undef FO_KERNELS
#undef FO_FLOAT_ONLY
