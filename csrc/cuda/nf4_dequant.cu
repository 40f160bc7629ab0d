// nf4_dequant: out[i] = T(code[nibble i] * absmax[i / blocksize]); double quantisation undone in the same launch.
// Floor at 28672 x 8192, blocksize 64, bf16: 117 MB packed + 15 MB absmax read, 470 MB written = 602 MB, 199 us at
// 3.02 TB/s; 235 Mflop: bytes-bound, and four fifths of the bytes are writes.
// A thread turns one unit of packed bytes into one 16-byte store, so that stores coalesce perfectly: 4 bytes for 16-bit
// outputs, 2 for fp32. Units are loaded 8 or 16 bytes a thread and change hands through shared memory. So do the
// scales, one load (or chain of loads) a block of weights instead of one a thread: it hides behind the packed loads,
// and only one barrier is needed. The codes are looked up in shared memory: 16 entries in 16 banks, never a conflict.
// Measured on an H100: plain, streaming and bulk stores end within 1 % of each other and a persistent grid is 7 %
// slower; the time is 98 % of copy bandwidth plus 2 us (in a graph) to 5 us of launch, ramp and tail, so small matrices
// want a single wave of blocks (8 units a thread) and large ones many small blocks (2 units). Reached:
// bench/results/h100/nf4_dequant.json. Source: arXiv:2604.02556.
#include "common/launch.cuh"
#include "common/nf4_dequant.cuh"
#include "common/register.h"
#include "common/tensor.h"

namespace fastops::nf4_dequant {
namespace {

Tensor nf4_dequant(Tensor packed, Tensor absmax, std::vector<int64_t> shape, ScalarType dtype, int64_t blocksize,
                   std::optional<Tensor> code, std::optional<Tensor> absmax_code, std::optional<Tensor> absmax_scale,
                   std::optional<Tensor> absmax_offset, int64_t absmax_blocksize) {
  nf4::Scales scales{absmax, code, absmax_code, absmax_scale, absmax_offset, blocksize, absmax_blocksize};
  check_float_type(kOp, "dtype", dtype);
  const int64_t n = nf4::count_weights(kOp, shape);
  nf4::check_packed(kOp, packed, scales, n);

  const LaunchScope scope(kOp, packed);
  packed = as_contiguous(packed);
  Tensor out = torch::stable::new_empty(packed, shape, dtype);
  if (n == 0) return out;
  const auto* from = static_cast<const uint8_t*>(packed.const_data_ptr());
  const Params p{from, nf4::view(scales), out.mutable_data_ptr(), n, reinterpret_cast<uintptr_t>(from) % 16 == 0};
  dequantize(p, dtype, scales.double_quant(), packed.get_device_index(), scope.stream());
  scope.check();
  return out;
}

}  // namespace
}  // namespace fastops::nf4_dequant

FO_IMPL(CUDA, "nf4_dequant", &fastops::nf4_dequant::nf4_dequant)
