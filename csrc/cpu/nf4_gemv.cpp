// nf4_gemv: y = x @ W.T + bias for one row, nf4_linear for any number, nf4_linear_dx: dx = dy @ W; W stays 4-bit.
// Floor at 4096 x 14336, blocksize 64: 29.4 MB packed + 3.7 MB absmax = 33 MB read, 1.0 ms at 32 GB/s (read, 2
// threads); 117 Mflop a row, 0.5 ms at 235 Gflop/s (fp32, 2 threads at 3.67 GHz), 0.25 ms in bf16: bytes-bound to 2
// rows in fp32 and 4 in bf16, flop-bound beyond. So a weight is decoded once for all rows of x, in registers, at one
// look-up (vpermps, vpermw) a vector: what that takes is in common/cpu_nf4_product.h.
// Reached: bench/results/cpu/nf4_gemv.json, nf4_linear.json, nf4_linear_dx.json.
//
// Weights stay fp32, except where x is bf16 and the CPU multiplies bf16: then the code table, times a constant that
// makes its 16 roundings small, is bf16 and the scales are fp32. Rounding the scaled weights would cost twice the
// error.
#include <algorithm>
#include <array>
#include <bit>
#include <cstring>
#include <utility>

#include "common/cpu_output.h"
#include "common/cpu_scratch.h"
#include "common/cpu_simd.h"
#include "common/nf4.h"
#include "common/register.h"

namespace fastops::nf4_gemv {
namespace {

constexpr int64_t kDxRows = 128;      // rows of W in a tile of dx
constexpr int64_t kDotRows = 4;       // rows of x that are few
constexpr int64_t kStreamGroups = 2;  // groups of rows of x up to which decoding W for each group beats tiles
constexpr int64_t kBlockRows = 768;   // rows of x laid out at a time: what the caches hold
constexpr int64_t kMinChain = 32;     // see chain()
constexpr double kGrainFlops = 1 << 18;

// NF4 times this lies near bf16 numbers: the rms rounding error of a code falls from 0.27 to 0.16 ulp.
constexpr float kBf16Factor = 1.437005f;

// One product, or a block of rows of one, as the kernels see it.
struct Job {
  const uint8_t* packed;
  nf4::ScalesView scales;
  int64_t n, k;        // of W
  int64_t rows, most;  // of x or dy, and of a group of them
  int64_t n_blocks;
  int64_t segment;  // columns, from a multiple of it on, that lie in one block in every row of W; 0: no such
  float code[16];   // weight = code * scale * scale_factor
  float scale_factor;
  const float* bias;  // [n] and a tile more
  const float* x;     // units, laid out by the kernel's pack
  void* out;
};

// fp32 products of a sum of `size` that are added up one after the other before their sum joins the others: the
// rounding errors of a chain weigh less where there are more of them.
constexpr int64_t chain(int64_t size) { return size < 256 ? kMinChain : 2 * kMinChain; }

// Floats between the scales of two rows of W in the scratch of dot_rows.
inline int64_t dot_scales(const Job& job, int64_t lanes) { return (job.k >> job.scales.block_shift) + 2 + lanes; }

// The kernels for one instruction set and dtype.
template <class T>
struct Kernels {
  int lanes, units, rows, stream_rows;
  int64_t linear_tile, dx_tile;  // floats of scratch
  void (*pack_dot)(const Job&, const T* x, float* to) = nullptr;
  void (*dot_rows)(const Job&, int64_t begin, int64_t end, float* scratch) = nullptr;
  void (*pack_block)(const Job&, const T* x, int64_t size, int64_t chunk, bool plain, int64_t group,
                     float* to) = nullptr;
  void (*stream_strip)(const Job&, int64_t n0, int64_t first, int64_t last, float* scratch) = nullptr;
  void (*linear_strip)(const Job&, int64_t n0, int64_t first, int64_t last, float* scratch) = nullptr;
  void (*dx_strip)(const Job&, int64_t k0, int64_t first, int64_t last, float* scratch) = nullptr;
};

}  // namespace

#define FO_KERNELS "common/cpu_nf4_product.h"
#include "common/cpu_each_isa.h"

namespace {

// Items 0 ... count - 1 in parallel, each given scratch of `floats` floats and worth `flops`.
template <class F>
void parallel_items(int64_t count, double flops, int64_t floats, const F& f) {
  const auto grain = static_cast<int64_t>(std::clamp(kGrainFlops / std::max(flops, 1.0), 1.0, 1e9));
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    const Buffer scratch(floats);
    f(begin, end, scratch.get());
  });
}

template <class T>
void few_rows(const Kernels<T>& kernels, Job job, const T* x) {
  const int64_t padded = ceil_div(job.k, 8 * kernels.lanes) * 8 * kernels.lanes;
  const Buffer units(job.rows * padded / 8 * kernels.units);
  kernels.pack_dot(job, x, units.get());
  job.x = units.get();
  constexpr int64_t kOutputs = 4;  // that share a load of x
  parallel_items(ceil_div(job.n, kOutputs), 2.0 * kOutputs * job.k * job.rows,
                 kOutputs * dot_scales(job, kernels.lanes), [&](int64_t begin, int64_t end, float* scratch) {
                   kernels.dot_rows(job, begin * kOutputs, std::min(end * kOutputs, job.n), scratch);
                 });
}

// Strips of W side by side, times parts of the groups of rows where the strips are too few for the threads.
struct Strips {
  int64_t size, width;           // of the output's rows, of a strip
  int64_t scratch, scratch_row;  // floats: for a strip, and for each row in it
};

template <class Kernel>
void run_strips(const Job& job, const Strips& s, Kernel kernel) {
  const int64_t groups = ceil_div(job.rows, job.most), across = ceil_div(s.size, s.width);
  const int64_t down = std::min(groups, ceil_div(2 * int64_t{torch::stable::get_num_threads()}, across));
  const double flops = 2.0 * static_cast<double>(job.rows) * static_cast<double>(job.n) * static_cast<double>(job.k);
  parallel_items(across * down, flops / static_cast<double>(across * down),
                 s.scratch + ceil_div(groups, down) * job.most * s.scratch_row,
                 [&](int64_t begin, int64_t end, float* scratch) {
                   for (int64_t i = begin; i < end; ++i) {
                     const int64_t part = i / across;
                     kernel(job, i % across * s.width, part * groups / down, (part + 1) * groups / down, scratch);
                   }
                 });
}

// Blocks of rows one after the other: lay x out, then go through W.
template <class T>
void many_rows(const Kernels<T>& kernels, const Job& whole, const T* x, bool dx) {
  const bool stream = !dx && whole.segment && whole.rows <= kStreamGroups * kernels.stream_rows;
  const int64_t in = dx ? whole.n : whole.k, out = dx ? whole.k : whole.n, lanes = kernels.lanes;
  const int64_t chunk = dx ? kDxRows : stream ? in : 8 * lanes;
  const int64_t scales = whole.segment ? whole.k / whole.segment * 2 * lanes : 8 * lanes / kMinChain * 2 * lanes;
  const Strips strips = dx ? Strips{out, 16 * lanes, kernels.dx_tile, 16 * lanes}
                           : Strips{out, 2 * lanes, kernels.linear_tile + scales, 2 * lanes};
  const Buffer units(std::min(whole.rows, kBlockRows) * (dx ? in : ceil_div(in, 8) * kernels.units));
  const RowGroups blocks(whole.rows, kBlockRows);
  for (int64_t b = 0; b < blocks.count; ++b) {
    Job job = whole;
    const int64_t first = blocks.start(b);
    job.rows = blocks.start(b + 1) - first;
    job.most = stream ? kernels.stream_rows : kernels.rows;
    job.x = units.get();
    job.out = static_cast<T*>(whole.out) + first * out;
    parallel_items(ceil_div(job.rows, job.most), 8.0 * static_cast<double>(job.most * in), 0,
                   [&](int64_t begin, int64_t end, float*) {
                     for (int64_t g = begin; g < end; ++g) {
                       kernels.pack_block(job, x + first * in, in, chunk, dx, g, units.get());
                     }
                   });
    run_strips(job, strips, dx ? kernels.dx_strip : stream ? kernels.stream_strip : kernels.linear_strip);
  }
}

// The part of a Job that all three products share. `scales` must outlive it.
Job make_job(const Tensor& packed, nf4::Scales& scales, const nf4::ProductSizes& sizes) {
  Job job{};
  job.packed = static_cast<const uint8_t*>(packed.const_data_ptr());
  job.scales = nf4::view(scales);
  job.n = sizes.out_features;
  job.k = sizes.in_features;
  job.rows = sizes.rows;
  job.n_blocks = scales.absmax.numel();
  std::memcpy(job.code, job.scales.code ? job.scales.code : nf4::kCode, sizeof(job.code));
  job.scale_factor = 1.0f;
  return job;
}

std::vector<int64_t> output_shape(const Tensor& x, int64_t last) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = last;
  return shape;
}

// What multiplies floats.
Isa float_isa() { return std::min(active_isa.load(), Isa::kAvx512); }

// Multiplies as bf16: only where the table is NF4's, which a constant makes fit.
bool use_bf16_units(Job& job, ScalarType dtype) {
  if (active_isa < Isa::kAvx512Bf16 || dtype != ScalarType::BFloat16) return false;
  if (std::memcmp(job.code, nf4::kCode, sizeof(job.code)) != 0) return false;
  for (float& code : job.code) code *= kBf16Factor;
  job.scale_factor = 1.0f / kBf16Factor;
  return true;
}

Tensor forward(const char* op, bool one_row, Tensor x, Tensor packed, nf4::Scales scales, int64_t out_features,
               std::optional<Tensor> bias) {
  const nf4::ProductSizes sizes = nf4::check_product(op, "x", x, "out_features", out_features, packed, scales, one_row);
  nf4::check_bias(op, bias, x, out_features);

  x = as_contiguous(x);
  packed = as_contiguous(packed);
  bias = as_contiguous(bias);
  Tensor out = cpu_output(x, output_shape(x, out_features), x.scalar_type());
  if (out.numel() == 0) return out;
  Job job = make_job(packed, scales, sizes);
  job.out = out.mutable_data_ptr();
  const bool few = job.rows <= kDotRows && job.k % 8 == 0;
  if (job.k % 8 == 0 && job.k > 0) job.segment = std::min(job.k & -job.k, scales.blocksize);
  const bool bf16_units = (few || job.segment) && use_bf16_units(job, x.scalar_type());
  dispatch_float(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    const Kernels<T> kernels = kernels_for<T>(bf16_units ? Isa::kAvx512Bf16 : float_isa());
    std::vector<float> bias_values(static_cast<size_t>(job.n + 2 * kernels.lanes));
    if (bias) {
      const T* from = static_cast<const T*>(bias->const_data_ptr());
      for (int64_t i = 0; i < job.n; ++i) bias_values[static_cast<size_t>(i)] = to_float(from[i]);
    }
    job.bias = bias_values.data();
    job.segment = std::min(job.segment, bf16_units ? int64_t{8} * kernels.lanes : chain(job.k));
    const T* from = static_cast<const T*>(x.const_data_ptr());
    few ? few_rows(kernels, job, from) : many_rows(kernels, job, from, false);
  });
  return out;
}

Tensor nf4_gemv(Tensor x, Tensor packed, Tensor absmax, int64_t out_features, int64_t blocksize,
                std::optional<Tensor> bias, std::optional<Tensor> code, std::optional<Tensor> absmax_code,
                std::optional<Tensor> absmax_scale, std::optional<Tensor> absmax_offset, int64_t absmax_blocksize) {
  return forward("nf4_gemv", true, x, packed,
                 {absmax, code, absmax_code, absmax_scale, absmax_offset, blocksize, absmax_blocksize}, out_features,
                 bias);
}

Tensor nf4_linear(Tensor x, Tensor packed, Tensor absmax, int64_t out_features, int64_t blocksize,
                  std::optional<Tensor> bias, std::optional<Tensor> code, std::optional<Tensor> absmax_code,
                  std::optional<Tensor> absmax_scale, std::optional<Tensor> absmax_offset, int64_t absmax_blocksize) {
  return forward("nf4_linear", false, x, packed,
                 {absmax, code, absmax_code, absmax_scale, absmax_offset, blocksize, absmax_blocksize}, out_features,
                 bias);
}

Tensor nf4_linear_dx(Tensor dy, Tensor packed, Tensor absmax, int64_t in_features, int64_t blocksize,
                     std::optional<Tensor> code, std::optional<Tensor> absmax_code, std::optional<Tensor> absmax_scale,
                     std::optional<Tensor> absmax_offset, int64_t absmax_blocksize) {
  nf4::Scales scales{absmax, code, absmax_code, absmax_scale, absmax_offset, blocksize, absmax_blocksize};
  const nf4::ProductSizes sizes =
      nf4::check_product("nf4_linear_dx", "dy", dy, "in_features", in_features, packed, scales);

  dy = as_contiguous(dy);
  packed = as_contiguous(packed);
  Tensor out = cpu_output(dy, output_shape(dy, in_features), dy.scalar_type());
  if (out.numel() == 0) return out;
  Job job = make_job(packed, scales, sizes);
  job.out = out.mutable_data_ptr();
  job.segment = job.k % 8 == 0 ? 8 : 0;
  dispatch_float(dy.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    many_rows(kernels_for<T>(float_isa()), job, static_cast<const T*>(dy.const_data_ptr()), true);
  });
  return out;
}

}  // namespace
}  // namespace fastops::nf4_gemv

FO_IMPL(CPU, "nf4_gemv", &fastops::nf4_gemv::nf4_gemv)
FO_IMPL(CPU, "nf4_linear", &fastops::nf4_gemv::nf4_linear)
FO_IMPL(CPU, "nf4_linear_dx", &fastops::nf4_gemv::nf4_linear_dx)
