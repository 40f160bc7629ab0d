// split_attn: out = softmax(scale q [k_active, k_cached]^T) [v_active, v_cached], and the log of the softmax's sum.
// Floor at batch 2, 16 heads, 64 queries, 64 + 256 keys, D 64, fp32: 6.8 MB, 0.24 ms at 28 GB/s (copy, 2 threads); 168
// Mflop, 0.7 ms at 235 Gflop/s (fp32, 2 threads at 3.67 GHz), half of it where the CPU multiplies bf16: flop-bound.
// A head's keys and values are laid out once in the caches for up to 66 queries, and both products run in registers:
// see common/cpu_split_attn.h.
// Reached: bench/results/cpu/split_attn.json.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <type_traits>

#include "common/cpu_output.h"
#include "common/cpu_simd.h"
#include "common/register.h"

namespace fastops::split_attn {
namespace {

constexpr char kOp[] = "split_attn";
constexpr int64_t kMaxHeadDim = 256;
constexpr int64_t kRows = 66;  // queries that share a tile of keys: MAR's 64 in whole groups
constexpr int64_t kKeys = 64;  // in a tile
constexpr int kGroup = 6;      // queries multiplied together
constexpr double kGrainFlops = 1 << 18;
constexpr float kLn2 = 0.69314718055994531f, kLog2E = 1.4426950408889634f;

// A [B, H, rows, D] tensor; strides in elements.
struct View {
  const void* data;
  int64_t batch, head, row_stride;
  template <class T>
  const T* row(int64_t b, int64_t h, int64_t i) const {
    return static_cast<const T*>(data) + b * batch + h * head + i * row_stride;
  }
};

struct Params {
  View q, k_active, v_active, k_cached, v_cached;
  const bool* mask;  // null: every cached key takes part
  int64_t mask_batch, mask_head, mask_key;
  int64_t h, a, active, cached, d, tiles;  // tiles of kRows queries a head
  float factor;                            // of the scores, which are in units of log 2
  void* out;                               // [B, A, H, D]
  float* lse;
};

// Floats of scratch for a head dim and a vector's lanes.
struct Sizes {
  int64_t width, q, keys, values, scores, out, laid_out;
  Sizes(int64_t d, int64_t lanes)
      : width(ceil_div(d, lanes) * lanes),
        q(kRows * width),
        keys(width * kKeys),
        values(kKeys * width),
        scores(kRows * kKeys),
        out(kRows * width),
        laid_out(lanes * width) {}
  int64_t all() const { return q + keys + values + scores + out + laid_out; }
};

// The keys that take part, active ones first, kKeys at a time.
struct Walk {
  const Params& p;
  int64_t batch, head, at = 0;

  template <class T>
  int64_t next(const T** keys, const T** values) {
    const bool* mask = p.mask ? p.mask + batch * p.mask_batch + head * p.mask_head : nullptr;
    int64_t count = 0;
    for (; at < p.active + p.cached && count < kKeys; ++at) {
      const int64_t slot = at - p.active;
      if (slot >= 0 && mask && !mask[slot * p.mask_key]) continue;
      keys[count] = slot < 0 ? p.k_active.row<T>(batch, head, at) : p.k_cached.row<T>(batch, head, slot);
      values[count++] = slot < 0 ? p.v_active.row<T>(batch, head, at) : p.v_cached.row<T>(batch, head, slot);
    }
    return count;
  }
};

struct Kernel {
  void (*run)(const Params&, int64_t task, float* scratch);
  int lanes;
};

}  // namespace

#define FO_KERNELS "common/cpu_split_attn.h"
#include "common/cpu_each_isa.h"

namespace {

void check_rows(const char* name, const Tensor& t) {
  FO_CHECK(t.size(t.dim() - 1) <= 1 || t.stride(t.dim() - 1) == 1, kOp, name,
           " must have a contiguous last dimension, got stride ", t.stride(t.dim() - 1));
}

// `rows` < 0: any number, which the message calls `any`.
void check_keys(const char* name, const Tensor& keys, const Tensor& q, int64_t rows, const char* any) {
  check_same_device(kOp, name, keys, "q", q);
  FO_CHECK(keys.scalar_type() == q.scalar_type(), kOp, name, " must be ", dtype_name(q.scalar_type()), " like q, got ",
           dtype_name(keys.scalar_type()));
  const bool fits =
      keys.dim() == 4 && keys.size(0) == q.size(0) && keys.size(1) == q.size(1) && keys.size(3) == q.size(3);
  FO_CHECK(fits && (rows < 0 || keys.size(2) == rows), kOp, name, " must be [", q.size(0), ", ", q.size(1), ", ",
           rows < 0 ? any : std::to_string(rows), ", ", q.size(3), "], got ", shape_string(keys.sizes()));
  check_rows(name, keys);
}

void check(const Tensor& q, const Tensor& k_active, const Tensor& v_active, const Tensor& k_cached,
           const Tensor& v_cached, const std::optional<Tensor>& mask) {
  check_float_type(kOp, "q", q.scalar_type());
  FO_CHECK(q.dim() == 4, kOp, "q must be [B, H, A, D], got ", shape_string(q.sizes()));
  FO_CHECK(q.size(3) >= 1 && q.size(3) <= kMaxHeadDim, kOp, "q must have a last dimension from 1 to ", kMaxHeadDim,
           ", got ", q.size(3));
  check_rows("q", q);
  check_keys("k_active", k_active, q, -1, "A'");
  check_keys("v_active", v_active, q, k_active.size(2), "");
  check_keys("k_cached", k_cached, q, -1, "C");
  check_keys("v_cached", v_cached, q, k_cached.size(2), "");
  if (!mask) return;
  check_same_device(kOp, "cached_mask", *mask, "q", q);
  check_dtype(kOp, "cached_mask", *mask, ScalarType::Bool);
  const int64_t b = q.size(0), h = q.size(1), c = k_cached.size(2);
  const bool of_batch = mask->dim() == 2 && mask->size(0) == b && mask->size(1) == c;
  const bool of_heads = mask->dim() == 3 && mask->size(0) == b && mask->size(1) == h && mask->size(2) == c;
  FO_CHECK(of_batch || of_heads, kOp, "cached_mask must be [", b, ", ", c, "] or [", b, ", ", h, ", ", c, "], got ",
           shape_string(mask->sizes()));
}

View view(const Tensor& t) { return {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2)}; }

struct Free {
  void operator()(float* floats) const { ::operator delete(floats, std::align_val_t(64)); }
};

std::tuple<Tensor, Tensor> split_attn(Tensor q, Tensor k_active, Tensor v_active, Tensor k_cached, Tensor v_cached,
                                      std::optional<Tensor> cached_mask, std::optional<double> scale) {
  check(q, k_active, v_active, k_cached, v_cached, cached_mask);
  const int64_t b = q.size(0), h = q.size(1), a = q.size(2), d = q.size(3);
  Tensor out = cpu_output(q, {b, a, h, d}, q.scalar_type());
  Tensor lse = cpu_output(q, {b, h, a}, ScalarType::Float);
  if (lse.numel() > 0) {
    Params p{};
    p.q = view(q), p.k_active = view(k_active), p.v_active = view(v_active);
    p.k_cached = view(k_cached), p.v_cached = view(v_cached);
    if (cached_mask) {
      const Tensor& mask = *cached_mask;
      p.mask = static_cast<const bool*>(mask.const_data_ptr());
      p.mask_batch = mask.stride(0);
      p.mask_head = mask.dim() == 3 ? mask.stride(1) : 0;
      p.mask_key = mask.stride(mask.dim() - 1);
    }
    p.h = h, p.a = a, p.active = k_active.size(2), p.cached = k_cached.size(2), p.d = d, p.tiles = ceil_div(a, kRows);
    p.factor = static_cast<float>(scale.value_or(1.0 / std::sqrt(static_cast<double>(d)))) * kLog2E;
    p.out = out.mutable_data_ptr();
    p.lse = static_cast<float*>(lse.mutable_data_ptr());
    dispatch_float(q.scalar_type(), [&](auto zero) {
      const Kernel kernel = kernels_for<decltype(zero)>(active_isa);
      const double flops = 4.0 * static_cast<double>(std::min(a, kRows) * d) * static_cast<double>(p.active + p.cached);
      const auto grain = static_cast<int64_t>(std::clamp(kGrainFlops / std::max(flops, 1.0), 1.0, 1e9));
      torch::stable::parallel_for(0, b * h * p.tiles, grain, [&](int64_t begin, int64_t end) {
        const size_t bytes = static_cast<size_t>(Sizes(d, kernel.lanes).all()) * sizeof(float);
        const std::unique_ptr<float, Free> scratch(static_cast<float*>(::operator new(bytes, std::align_val_t(64))));
        for (int64_t task = begin; task < end; ++task) kernel.run(p, task, scratch.get());
      });
    });
  }
  return {torch::stable::transpose(out, 1, 2), lse};
}

}  // namespace
}  // namespace fastops::split_attn

FO_IMPL(CPU, "split_attn", &fastops::split_attn::split_attn)
