// dense_linear: y = x @ W.T + bias, W in panels of 32 outputs side by side.
// Floor at 3072 x 576, fp32, up to 14 rows: 7.1 MB read, 0.24 ms at 30 GB/s (read, 2 threads); 3.5 Mflop a row, 15 us
// at 235 Gflop/s (fp32, 2 threads at 3.67 GHz). Few rows are a stream of W through the cores, in the order it lies in,
// and all else stays in the caches; torch's own layer reads at 12 of those 30 GB/s.
// Reached: bench/results/cpu/dense_linear.json.
#include <algorithm>
#include <array>
#include <cstring>
#include <utility>

#include "common/cpu_convert.h"
#include "common/cpu_output.h"
#include "common/cpu_scratch.h"
#include "common/cpu_simd.h"
#include "common/register.h"
#include "common/tensor.h"

namespace fastops::dense_linear {
namespace {

constexpr char kOp[] = "dense_linear";
constexpr int64_t kPanel = 32;             // outputs of a panel
constexpr int64_t kDepth = 128;            // units added up one after the other, at most; see depth_of()
constexpr int64_t kBlockRows = 252;        // rows of x laid out at a time, which the L2 cache holds
constexpr int64_t kGrainBytes = 64 << 10;  // of W that are worth another thread

struct Job {
  const void* x;  // [M, K]
  const void* panels;
  const void* bias;  // null where there is none
  void* out;         // [M, N]
  int64_t n, k, depth;
};

// The rounding errors of a chain of sums weigh less where there are more chains, and those of adding up many more.
constexpr int64_t depth_of(int64_t k) { return k <= 512 ? kDepth / 4 : k <= 2048 ? kDepth / 2 : kDepth; }

// The kernels for one instruction set and dtype.
struct Kernels {
  int lanes, width, tall, per_unit;
  void (*pack_x)(const Job&, int64_t m0, const RowGroups&, int64_t group, float* packed);
  void (*multiply)(const Job&, int64_t panel, int64_t m0, const RowGroups&, int64_t g_first, int64_t g_last,
                   const float* packed, float* scratch);
};

}  // namespace

#define FO_KERNELS "common/cpu_dense_linear.h"
#include "common/cpu_each_isa.h"

namespace {

void check(const Tensor& x, const Tensor& panels, int64_t out_features, const std::optional<Tensor>& bias) {
  check_float_type(kOp, "x", x.scalar_type());
  FO_CHECK(x.dim() >= 1, kOp, "x must have at least 1 dimension, got 0");
  FO_CHECK(out_features >= 0, kOp, "out_features must not be negative, got ", out_features);
  check_same_device(kOp, "panels", panels, "x", x);
  check_dtype(kOp, "panels", panels, x.scalar_type());
  const int64_t count = ceil_div(out_features, kPanel), k = x.size(x.dim() - 1);
  FO_CHECK(panels.dim() == 3 && panels.size(0) == count && panels.size(1) == k && panels.size(2) == kPanel, kOp,
           "panels must be [ceil(out_features / 32), K, 32] = [", count, ", ", k, ", 32], got ",
           shape_string(panels.sizes()));
  FO_CHECK(panels.is_contiguous(), kOp, "panels must be contiguous");
  if (!bias) return;
  check_same_device(kOp, "bias", *bias, "x", x);
  check_dtype(kOp, "bias", *bias, x.scalar_type());
  FO_CHECK(bias->dim() == 1 && bias->size(0) == out_features, kOp, "bias must be [", out_features, "], got ",
           shape_string(bias->sizes()));
}

// A block of rows: laid out, then a panel at a time; where panels are few, a panel and some of the rows.
void multiply(const Job& job, const Kernels& kernels, int64_t m0, int64_t rows, float* packed, int64_t item) {
  const RowGroups groups(rows, kernels.tall);
  const int64_t panels = ceil_div(job.n, kPanel),
                grain = ceil_div(kGrainBytes, std::max<int64_t>(1, kPanel * job.k * item));
  if (groups.count == 1) {
    kernels.pack_x(job, m0, groups, 0, packed);
  } else {
    torch::stable::parallel_for(0, groups.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t g = begin; g < end; ++g) kernels.pack_x(job, m0, groups, g, packed);
    });
  }
  const int64_t threads = torch::stable::get_num_threads();
  const RowGroups parts(groups.count, ceil_div(groups.count, ceil_div(4 * threads, panels)));
  torch::stable::parallel_for(0, panels * parts.count, groups.count == 1 ? grain : 1, [&](int64_t begin, int64_t end) {
    const ThreadBuffer scratch((kDepth + (parts.size + 1) * kernels.tall) * kernels.width);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t part = i % parts.count;
      kernels.multiply(job, i / parts.count, m0, groups, parts.start(part), parts.start(part + 1), packed,
                       scratch.get());
    }
  });
}

Tensor dense_linear(Tensor x, Tensor panels, int64_t out_features, std::optional<Tensor> bias) {
  check(x, panels, out_features, bias);
  const int64_t k = panels.size(1);
  int64_t rows = 1;
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  for (size_t i = 0; i + 1 < sizes.size(); ++i) rows *= sizes[i];
  sizes.back() = out_features;
  Tensor out = cpu_output(x, sizes, x.scalar_type());
  if (rows == 0 || out_features == 0) return out;
  const Tensor given = as_contiguous(x);
  const std::optional<Tensor> added = as_contiguous(bias);
  const Job job{given.const_data_ptr(),
                panels.const_data_ptr(),
                added ? added->const_data_ptr() : nullptr,
                out.mutable_data_ptr(),
                out_features,
                k,
                depth_of(k)};
  dispatch_float(x.scalar_type(), [&](auto zero) {
    const Kernels kernels = kernels_for<decltype(zero)>(active_isa);
    const RowGroups blocks(rows, kBlockRows);
    const RowGroups groups(blocks.size + (blocks.longer > 0), kernels.tall);
    const Buffer packed((groups.count * ceil_div(k, int64_t{kernels.per_unit}) + 1) * kernels.lanes);
    for (int64_t block = 0; block < blocks.count; ++block) {
      const int64_t m0 = blocks.start(block);
      multiply(job, kernels, m0, blocks.start(block + 1) - m0, packed.get(), sizeof(zero));
    }
  });
  return out;
}

}  // namespace
}  // namespace fastops::dense_linear

FO_IMPL(CPU, "dense_linear", &fastops::dense_linear::dense_linear)
