// kv_recompute: cache[b, h, start + l] = x[b, l] @ w^T + b for K and V, K normed and rotated on its way; in place.
// Floor at B 4, L 256, H 2048, Hkv D 512, fp32: 4.3 Gflop, 18 ms at 235 Gflop/s (fp32, 2 threads at 3.67 GHz); 21 MB,
// 0.7 ms. A decode step (L 1) is bound by the bytes of the weights instead.
// Rows of x come in blocks that are laid out once, and threads take strips of whole heads for them: see
// common/cpu_kv_recompute.h. Every value is checked before the first byte is written.
// Reached: bench/results/cpu/kv_recompute.json. Source: KVPR, arXiv:2411.17089.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <utility>

#include "common/cpu_convert.h"
#include "common/cpu_scratch.h"
#include "common/cpu_simd.h"
#include "common/cpu_team.h"
#include "common/kv_cache.h"
#include "common/register.h"

namespace fastops::kv_recompute {
namespace {

using kv::CacheShape;
using kv::Pages;
using kv::RowStrides;

constexpr char kOp[] = "kv_recompute";
constexpr int64_t kBlockRows = 504;  // rows of x laid out at a time, some of which the L2 cache holds
constexpr int64_t kDepth = 128;      // units that are added up one after the other, at most; see depth_of()
constexpr int64_t kStripColumns = 64, kMostColumns = 192;
constexpr double kTeamFlops = 1 << 18;  // fewer are not worth waking other threads for

// K or V: its weights, bias and cache; strides in elements.
struct Side {
  const void* w;
  int64_t w_row;
  const void* bias;
  void* cache;
  RowStrides to;
};

// Some heads of K or V.
struct Strip {
  const Side* side;
  int64_t head, heads;
};

struct Job {
  const void* x;
  int64_t x_batch, x_row;
  int64_t rows, hidden;  // L, H
  int64_t heads, dim, depth;
  Side k, v;
  const float* norm;  // null where there is none
  float eps;
  const void *cos, *sin;
  int64_t cos_row, sin_row, half;
  bool interleaved, fp32_angles;
  Pages pages;
  int64_t start;

  int64_t row_offset(const Side& side, int64_t b, int64_t row) const {
    const int64_t position = start + row;
    if (!pages.table) return b * side.to.outer + position * side.to.row;
    const int64_t page = pages.table[b * pages.table_row + position / pages.block * pages.table_column];
    return page * side.to.outer + position % pages.block * side.to.row;
  }
};

// The rounding errors of a chain of sums weigh less where there are more of them.
constexpr int64_t depth_of(int64_t units) { return units <= 2 * kDepth ? kDepth / 2 : kDepth; }

// The kernels for one instruction set and dtype.
template <class T>
struct Kernels {
  int lanes, width, tall, per_unit;
  int64_t tile;
  void (*pack_x)(const Job&, int64_t m0, const RowGroups&, int64_t group, float* packed);
  void (*product)(const Job&, const Strip&, int64_t m0, const RowGroups&, int64_t g_first, int64_t g_last,
                  const float* packed, float* scratch);
};

}  // namespace

#define FO_KERNELS "common/cpu_kv_recompute.h"
#include "common/cpu_each_isa.h"

namespace {

// As many heads in a strip as leave few columns of its panels unused, up to kMostColumns; small heads share a strip.
int64_t heads_of_strip(int64_t heads, int64_t dim, int64_t width) {
  const auto unused = [&](int64_t n) {
    return static_cast<double>(ceil_div(n * dim, width) * width) / static_cast<double>(n * dim);
  };
  int64_t best = 1;
  for (int64_t n = 2; n <= std::min(heads, kMostColumns / dim); ++n) {
    const double gain = unused(best) - unused(n);
    if (gain > 0.02 || (gain >= 0 && n * dim <= kStripColumns)) best = n;
  }
  return best;
}

// `run(units, step)` calls step(unit) for each, on several threads or on one.
template <class T, class Run>
void compute(const Job& job, const Kernels<T>& kernels, int64_t total, const Buffer& packed, const Run& run) {
  const int64_t each = heads_of_strip(job.heads, job.dim, kernels.width), strips = ceil_div(job.heads, each);
  const int64_t width = ceil_div(each * job.dim, kernels.width) * kernels.width;
  const RowGroups blocks(total, kBlockRows);
  for (int64_t block = 0; block < blocks.count; ++block) {
    const int64_t m0 = blocks.start(block), rows = blocks.start(block + 1) - m0;
    const RowGroups groups(rows, kernels.tall);
    run(groups.count, [&](int64_t g) { kernels.pack_x(job, m0, groups, g, packed.get()); });
    // Few strips are cut along the rows, so that all threads have some.
    const int64_t threads = torch::stable::get_num_threads();
    const RowGroups parts(groups.count, ceil_div(groups.count, ceil_div(4 * threads, 2 * strips)));
    run(2 * strips * parts.count, [&](int64_t i) {
      const int64_t strip = i / parts.count, part = i % parts.count, head = strip % strips * each;
      const Strip some{strip < strips ? &job.k : &job.v, head, std::min(each, job.heads - head)};
      const ThreadBuffer scratch(kernels.tile + (parts.size + 1) * kernels.tall * width + kernels.lanes);
      kernels.product(job, some, m0, groups, parts.start(part), parts.start(part + 1), packed.get(), scratch.get());
    });
  }
}

template <class T>
void compute(Job& job, int64_t total) {
  const Kernels<T> kernels = kernels_for<T>(active_isa);
  const int64_t units = ceil_div(job.hidden, kernels.per_unit);
  job.depth = depth_of(units);
  const int64_t most = std::min(total, kBlockRows);
  const Buffer packed(ceil_div(most, kernels.tall) * units * kernels.lanes + kernels.lanes);
  const double flops = 4.0 * static_cast<double>(total * job.hidden) * static_cast<double>(job.heads * job.dim);
  if (flops < kTeamFlops) {
    compute(job, kernels, total, packed, [](int64_t steps, const auto& step) {
      for (int64_t i = 0; i < steps; ++i) step(i);
    });
  } else {
    Team::work([&](Team& team) {
      compute(job, kernels, total, packed, [&](int64_t steps, const auto& step) { team.run(steps, step); });
    });
  }
}

const void* check_vector(const char* name, const Tensor& t, const Tensor& k_cache, const char* form, int64_t size) {
  check_same_device(kOp, name, t, "k_cache", k_cache);
  check_dtype(kOp, name, t, k_cache.scalar_type());
  FO_CHECK(t.dim() == 1 && t.size(0) == size, kOp, name, " must be ", form, " = [", size, "], got ",
           shape_string(t.sizes()));
  kv::check_last_dim(kOp, name, t);
  return t.const_data_ptr();
}

void check_inputs(const Tensor& x, const Tensor& w_k, const Tensor& w_v, const Tensor& k_cache, const CacheShape& c) {
  check_same_device(kOp, "x", x, "k_cache", k_cache);
  check_dtype(kOp, "x", x, k_cache.scalar_type());
  FO_CHECK(x.dim() == 3 && x.size(0) == c.batch, kOp, "x must be [B, L, H] = [", c.batch, ", L, H], got ",
           shape_string(x.sizes()));
  kv::check_last_dim(kOp, "x", x);
  FO_CHECK(x.size(0) * x.size(1) <= INT32_MAX, kOp, "x must have fewer than 2^31 rows in all, got ",
           shape_string(x.sizes()));
  for (const Tensor* w : {&w_k, &w_v}) {
    const char* name = w == &w_k ? "w_k" : "w_v";
    check_same_device(kOp, name, *w, "k_cache", k_cache);
    check_dtype(kOp, name, *w, k_cache.scalar_type());
    FO_CHECK(w->dim() == 2 && w->size(0) == c.heads * c.dim && w->size(1) == x.size(2), kOp, name,
             " must be [Hkv D, H] = [", c.heads * c.dim, ", ", x.size(2), "], got ", shape_string(w->sizes()));
    kv::check_last_dim(kOp, name, *w);
  }
}

// pyops/ops/kv_recompute.py checks the same in the same order.
void kv_recompute(Tensor x, Tensor w_k, Tensor w_v, std::optional<Tensor> b_k, std::optional<Tensor> b_v,
                  std::optional<Tensor> cos, std::optional<Tensor> sin, Tensor k_cache, Tensor v_cache, int64_t start,
                  std::optional<Tensor> k_norm_weight, double k_norm_eps, bool rope_interleaved,
                  std::optional<Tensor> block_table) {
  const CacheShape shape = kv::check_writable_caches(kOp, k_cache, v_cache, block_table);
  check_inputs(x, w_k, w_v, k_cache, shape);
  const int64_t columns = shape.heads * shape.dim, rows = x.size(1);
  const void* k_bias = b_k ? check_vector("b_k", *b_k, k_cache, "[Hkv D]", columns) : nullptr;
  const void* v_bias = b_v ? check_vector("b_v", *b_v, k_cache, "[Hkv D]", columns) : nullptr;
  FO_CHECK(start >= 0 && start <= shape.capacity - rows, kOp, "start must be from 0 to ", shape.capacity - rows,
           " (capacity ", shape.capacity, ", ", rows, " rows), got ", start);
  const void* norm = k_norm_weight ? check_vector("k_norm_weight", *k_norm_weight, k_cache, "[D]", shape.dim) : nullptr;
  FO_CHECK(k_norm_eps >= 0, kOp, "k_norm_eps must not be negative, got ", k_norm_eps);
  kv::check_rotary(kOp, k_cache, shape.dim, cos, sin, rope_interleaved, std::nullopt, rows);
  const Pages pages = kv::pages(k_cache, block_table, shape);
  for (int64_t b = 0; pages.table && rows > 0 && b < shape.batch; ++b) {
    for (int64_t column = start / pages.block; column <= (start + rows - 1) / pages.block; ++column) {
      kv::check_page(kOp, pages, b, column);
    }
  }
  if (shape.batch * rows * columns == 0) return;

  const auto side = [&](const Tensor& w, const void* bias, Tensor& cache) {
    return Side{w.const_data_ptr(), w.stride(0), bias, cache.mutable_data_ptr(),
                kv::row_strides(cache, block_table.has_value())};
  };
  Job job{};
  job.x = x.const_data_ptr();
  job.x_batch = x.stride(0), job.x_row = x.stride(1);
  job.rows = rows, job.hidden = x.size(2);
  job.heads = shape.heads, job.dim = shape.dim;
  job.k = side(w_k, k_bias, k_cache), job.v = side(w_v, v_bias, v_cache);
  job.eps = static_cast<float>(k_norm_eps);
  if (cos) {
    job.cos = cos->const_data_ptr(), job.sin = sin->const_data_ptr();
    job.cos_row = cos->stride(0), job.sin_row = sin->stride(0);
    job.half = cos->size(1);
    job.interleaved = rope_interleaved;
    job.fp32_angles = cos->scalar_type() == ScalarType::Float;
  }
  job.pages = pages;
  job.start = start;
  dispatch_float(x.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    std::vector<float> weight(norm ? static_cast<size_t>(shape.dim) : 0);
    for (size_t i = 0; i < weight.size(); ++i) weight[i] = to_float(static_cast<const T*>(norm)[i]);
    job.norm = norm ? weight.data() : nullptr;
    compute<T>(job, shape.batch * rows);
  });
}

}  // namespace
}  // namespace fastops::kv_recompute

FO_IMPL(CPU, "kv_recompute", &fastops::kv_recompute::kv_recompute)
