// kv_append: cache[b, h, lengths[b] + t] = new[b, h, t], with kv_compact and kv_scatter, its kin; in place, one launch.
// Floor at B 64, Hkv 8, T 16, D 128, bf16: 33.6 MB read and 33.6 MB written, 22 us at 3.02 TB/s; at T 1 4.2 MB, 1.4 us:
// there the launch and three dependent accesses count (length, page, then the row itself goes out). No flops but a
// rotation's. A thread carries 16 bytes of k and of v; the new rows are loaded before it is known where they go.
// kv_compact works in place without a barrier: a thread keeps its columns and walks the accepted rows in order, eight
// loads in flight; as an index never lies below its place, no row is overwritten before it was read.
// Reached: bench/results/h100/kv_append.json.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/dispatch.h"
#include "common/kv_cache.cuh"
#include "common/launch.cuh"
#include "common/register.h"
#include "common/tensor.h"

namespace fastops::kv_append {
namespace {

using kv::CacheShape;
using kv::Ints;
using kv::Pages;
using kv::RowStrides;

// Cache and new rows of k or of v.
struct Side {
  void* cache;
  RowStrides to;
  const void* rows;
  int64_t from_batch, from_head, from_row;
};

struct Rotary {
  const void *cos, *sin;
  int64_t cos_row, sin_row, positions;  // positions: how many there are
  int half;                             // R / 2
  bool interleaved;
  Ints at;  // null where position is lengths + t
};

// kv_append; kv_scatter where `index` is given.
struct Params {
  Side k, v;
  Pages pages;
  Rotary rotary;
  Ints lengths, q_lens, index;
  uint32_t rows, heads, new_rows;
  int words;  // a row's
};

struct CompactParams {
  void *k, *v;
  RowStrides k_strides, v_strides;
  Pages pages;
  Ints lengths, accept_index, accept_len;
  uint32_t rows, heads;  // rows: B Hkv
  int tree, words;
};

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(BFloat16 v) { return __uint_as_float(static_cast<uint32_t>(v.x) << 16); }
__device__ inline float to_float(Half v) { return __half2float(__ushort_as_half(v.x)); }

template <class T>
__device__ inline T from_float(float v) {
  if constexpr (std::is_same_v<T, Half>) {
    return Half(__half_as_ushort(__float2half_rn(v)), Half::from_bits());
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return BFloat16(__bfloat16_as_ushort(__float2bfloat16_rn(v)), BFloat16::from_bits());
  } else {
    return v;
  }
}

// N elements that are loaded and stored at once.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T v[N];
};

template <class T, int N>
__device__ inline Pack<T, N> load_pack(const void* base, int64_t element) {
  return *reinterpret_cast<const Pack<T, N>*>(static_cast<const T*>(base) + element);
}

// Elements e … e + N - 1 of a rotated row; e lies below R. Where N > 1, R / 2 is a multiple of N.
template <class T, class C, int N>
__device__ inline Pack<T, N> rotate(const Rotary& r, const void* rows, int64_t row, int e, Pack<T, N> own,
                                    int64_t position) {
  Pack<T, N> out;
  const int64_t cos_row = position * r.cos_row, sin_row = position * r.sin_row;
  if (!r.interleaved) {
    const bool second = e >= r.half;
    const Pack<T, N> other = load_pack<T, N>(rows, row + (second ? e - r.half : e + r.half));
    const int angle = second ? e - r.half : e;
    const auto cos = load_pack<C, N>(r.cos, cos_row + angle), sin = load_pack<C, N>(r.sin, sin_row + angle);
#pragma unroll
    for (int i = 0; i < N; ++i) {
      const float turned = to_float(other.v[i]) * to_float(sin.v[i]);
      out.v[i] = from_float<T>(to_float(own.v[i]) * to_float(cos.v[i]) + (second ? turned : -turned));
    }
  } else if constexpr (N == 1) {
    const float other = to_float(load_pack<T, 1>(rows, row + (e ^ 1)).v[0]);
    const float turned = other * to_float(load_pack<C, 1>(r.sin, sin_row + e / 2).v[0]);
    const float cos = to_float(load_pack<C, 1>(r.cos, cos_row + e / 2).v[0]);
    out.v[0] = from_float<T>(to_float(own.v[0]) * cos + (e & 1 ? turned : -turned));
  } else {
    const auto cos = load_pack<C, N / 2>(r.cos, cos_row + e / 2), sin = load_pack<C, N / 2>(r.sin, sin_row + e / 2);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      const float a = to_float(own.v[2 * i]), b = to_float(own.v[2 * i + 1]);
      const float c = to_float(cos.v[i]), s = to_float(sin.v[i]);
      out.v[2 * i] = from_float<T>(a * c - b * s);
      out.v[2 * i + 1] = from_float<T>(b * c + a * s);
    }
  }
  return out;
}

// T: the data, or bits of its size where nothing is computed. C: the angles, or void without them. A word is N
// elements.
template <class T, class C, int N>
__global__ void append_kernel(const __grid_constant__ Params p) {
  const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  const uint32_t h = row % p.heads, rest = row / p.heads, t = rest % p.new_rows, b = rest / p.new_rows;
  const int64_t k_row = b * p.k.from_batch + h * p.k.from_head + t * p.k.from_row;
  const int64_t v_row = b * p.v.from_batch + h * p.v.from_head + t * p.v.from_row;
  int word = threadIdx.x;
  Pack<T, N> k, v;
  const auto load = [&] {
    k = load_pack<T, N>(p.k.rows, k_row + word * N);
    v = load_pack<T, N>(p.v.rows, v_row + word * N);
  };
  if (word < p.words) load();

  int64_t position;
  if (p.index.data) {
    position = p.index.at(b, t);
  } else {
    const int length = p.lengths.at(b);
    if (length < 0 || (p.q_lens.data && static_cast<int64_t>(t) >= p.q_lens.at(b))) return;
    position = static_cast<int64_t>(length) + t;
  }
  const int64_t k_to = kv::find_row(p.pages, p.k.to, b, h, position);
  if (k_to < 0) return;
  const int64_t v_to = kv::find_row(p.pages, p.v.to, b, h, position);
  [[maybe_unused]] int64_t angle = 0;
  if constexpr (!std::is_void_v<C>) {
    angle = p.rotary.at.data ? p.rotary.at.at(b, t) : position;
    if (angle < 0 || angle >= p.rotary.positions) return;
  }
  while (word < p.words) {
    if constexpr (!std::is_void_v<C>) {
      if (word * N < 2 * p.rotary.half) k = rotate<T, C, N>(p.rotary, p.k.rows, k_row, word * N, k, angle);
    }
    *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(p.k.cache) + k_to + word * N) = k;
    *reinterpret_cast<Pack<T, N>*>(static_cast<T*>(p.v.cache) + v_to + word * N) = v;
    word += blockDim.x;
    if (word < p.words) load();
  }
}

constexpr int kWalk = 8;  // rows in flight

template <class T, int N>
__global__ void compact_kernel(const __grid_constant__ CompactParams p) {
  const uint32_t row = blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= p.rows) return;
  const uint32_t h = row % p.heads, b = row / p.heads;
  T* cache = static_cast<T*>(blockIdx.y ? p.v : p.k);
  const RowStrides strides = blockIdx.y ? p.v_strides : p.k_strides;
  const int64_t length = p.lengths.at(b);
  const int count = min(p.accept_len.at(b), p.tree);
  if (length < 0) return;
  for (int word = threadIdx.x; word < p.words; word += blockDim.x) {
    int last = -1;
    for (int first = 0; first < count; first += kWalk) {
      int index[kWalk];
      int64_t to[kWalk];
      Pack<T, N> held[kWalk];
#pragma unroll
      for (int u = 0; u < kWalk; ++u) index[u] = first + u < count ? p.accept_index.at(b, first + u) : -1;
#pragma unroll
      for (int u = 0; u < kWalk; ++u) {
        to[u] = -1;
        // Beyond the last row, and from the first bad one on, nothing moves.
        last = index[u] > last && index[u] < p.tree ? index[u] : INT32_MAX;
        if (last == INT32_MAX || last == first + u) continue;
        const int64_t from = kv::find_row(p.pages, strides, b, h, length + last);
        if (from < 0) continue;
        to[u] = kv::find_row(p.pages, strides, b, h, length + first + u);
        if (to[u] >= 0) held[u] = load_pack<T, N>(cache, from + word * N);
      }
#pragma unroll
      for (int u = 0; u < kWalk; ++u) {
        if (to[u] >= 0) *reinterpret_cast<Pack<T, N>*>(cache + to[u] + word * N) = held[u];
      }
      if (last == INT32_MAX) break;
    }
  }
}

// Whether rows of a tensor start at multiples of 16 bytes, its last dimension left out.
bool rows_aligned(const Tensor& t, int64_t item) {
  if (reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16) return false;
  for (int64_t d = 0; d + 1 < t.dim(); ++d) {
    if (t.size(d) > 1 && t.stride(d) * item % 16) return false;
  }
  return true;
}

// Threads side by side take a row, so many rows a block: 64 threads where they are few, so that all multiprocessors
// have some, and 256 otherwise.
struct Shape {
  dim3 grid, block;
};

Shape launch_shape(int64_t rows, int words) {
  int lanes = 1;
  while (lanes < words && lanes < 256) lanes *= 2;
  const int threads = rows * lanes <= 132 * 512 ? 64 : 256;
  const int together = threads > lanes ? threads / lanes : 1;
  return {dim3(static_cast<unsigned>(ceil_div(rows, together))), dim3(lanes, together)};
}

Side side(const Tensor& cache, bool paged, const Tensor& rows) {
  return {cache.mutable_data_ptr(), kv::row_strides(cache, paged),
          rows.const_data_ptr(),    rows.stride(0),
          rows.stride(1),           rows.stride(2)};
}

// f(T{}, N): bits that hold an element, and how many of them are a word.
template <class F>
void dispatch_copy(int64_t item, bool vector, F&& f) {
  if (item == 4) {
    vector ? f(uint32_t{}, std::integral_constant<int, 4>{}) : f(uint32_t{}, std::integral_constant<int, 1>{});
  } else {
    vector ? f(uint16_t{}, std::integral_constant<int, 8>{}) : f(uint16_t{}, std::integral_constant<int, 1>{});
  }
}

void launch_copy(Params& p, int64_t dim, int64_t item, bool vector, cudaStream_t stream) {
  dispatch_copy(item, vector, [&](auto zero, auto n) {
    p.words = static_cast<int>(dim / n);
    const Shape s = launch_shape(p.rows, p.words);
    append_kernel<decltype(zero), void, n><<<s.grid, s.block, 0, stream>>>(p);
  });
}

template <class T, class C>
void launch_rotated(Params& p, int64_t dim, bool vector, cudaStream_t stream) {
  constexpr int kWord = 16 / sizeof(T);
  p.words = static_cast<int>(vector ? dim / kWord : dim);
  const Shape s = launch_shape(p.rows, p.words);
  if (vector) {
    append_kernel<T, C, kWord><<<s.grid, s.block, 0, stream>>>(p);
  } else {
    append_kernel<T, C, 1><<<s.grid, s.block, 0, stream>>>(p);
  }
}

int64_t item_size(const Tensor& t) { return t.scalar_type() == ScalarType::Float ? 4 : 2; }

bool all_aligned(const Tensor& k_cache, const Tensor& v_cache, int64_t dim, int64_t item) {
  return dim * item % 16 == 0 && rows_aligned(k_cache, item) && rows_aligned(v_cache, item);
}

void kv_append(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor lengths, std::optional<Tensor> block_table,
               std::optional<Tensor> q_lens, std::optional<Tensor> cos, std::optional<Tensor> sin,
               bool rope_interleaved, std::optional<Tensor> positions) {
  constexpr char kOp[] = "kv_append";
  const CacheShape shape = kv::check_writable_caches(kOp, k_cache, v_cache, block_table);
  const int64_t new_rows = kv::check_rows(kOp, k_cache, k, v, shape, "T");
  Params p{};
  p.lengths = kv::check_ints(kOp, "lengths", lengths, k_cache, "[B]", {shape.batch});
  if (q_lens) p.q_lens = kv::check_ints(kOp, "q_lens", *q_lens, k_cache, "[B]", {shape.batch});
  kv::check_rotary(kOp, k_cache, shape.dim, cos, sin, rope_interleaved, positions);
  if (positions) p.rotary.at = kv::check_ints(kOp, "positions", *positions, k_cache, "[B, T]", {shape.batch, new_rows});
  const int64_t rows = shape.batch * shape.heads * new_rows, item = item_size(k);
  if (rows == 0) return;

  const LaunchScope scope(kOp, k_cache);
  p.k = side(k_cache, block_table.has_value(), k);
  p.v = side(v_cache, block_table.has_value(), v);
  p.pages = kv::pages(k_cache, block_table, shape);
  p.rows = static_cast<uint32_t>(rows);
  p.heads = static_cast<uint32_t>(shape.heads);
  p.new_rows = static_cast<uint32_t>(new_rows);
  bool vector = all_aligned(k_cache, v_cache, shape.dim, item) && rows_aligned(k, item) && rows_aligned(v, item);
  if (!cos) {
    launch_copy(p, shape.dim, item, vector, scope.stream());
    return scope.check();
  }
  p.rotary.cos = cos->const_data_ptr();
  p.rotary.sin = sin->const_data_ptr();
  p.rotary.cos_row = cos->stride(0);
  p.rotary.sin_row = sin->stride(0);
  p.rotary.positions = cos->size(0);
  p.rotary.half = static_cast<int>(cos->size(1));
  p.rotary.interleaved = rope_interleaved;
  const int64_t angle_item = item_size(*cos);
  vector =
      vector && rows_aligned(*cos, angle_item) && rows_aligned(*sin, angle_item) && cos->size(1) % (16 / item) == 0;
  dispatch_float(k.scalar_type(), [&](auto zero) {
    using T = decltype(zero);
    if (angle_item == 4) {
      launch_rotated<T, float>(p, shape.dim, vector, scope.stream());
    } else {
      launch_rotated<T, T>(p, shape.dim, vector, scope.stream());
    }
  });
  scope.check();
}

void kv_compact(Tensor k_cache, Tensor v_cache, Tensor lengths, Tensor accept_index, Tensor accept_len,
                std::optional<Tensor> block_table) {
  constexpr char kOp[] = "kv_compact";
  const CacheShape shape = kv::check_writable_caches(kOp, k_cache, v_cache, block_table);
  CompactParams p{};
  p.lengths = kv::check_ints(kOp, "lengths", lengths, k_cache, "[B]", {shape.batch});
  const int64_t tree = accept_index.dim() ? accept_index.size(accept_index.dim() - 1) : 0;
  p.accept_index = kv::check_ints(kOp, "accept_index", accept_index, k_cache, "[B, T]", {shape.batch, tree});
  p.accept_len = kv::check_ints(kOp, "accept_len", accept_len, k_cache, "[B]", {shape.batch});
  const int64_t rows = shape.batch * shape.heads, item = item_size(k_cache);
  FO_CHECK(rows < INT32_MAX, kOp, "k_cache must have fewer than 2^31 heads in all, got ", rows);
  FO_CHECK(tree < INT32_MAX, kOp, "accept_index must have fewer than ", INT32_MAX, " columns, got ", tree);
  if (rows == 0 || tree < 2) return;  // a root alone never moves

  const LaunchScope scope(kOp, k_cache);
  p.k = k_cache.mutable_data_ptr();
  p.v = v_cache.mutable_data_ptr();
  p.k_strides = kv::row_strides(k_cache, block_table.has_value());
  p.v_strides = kv::row_strides(v_cache, block_table.has_value());
  p.pages = kv::pages(k_cache, block_table, shape);
  p.rows = static_cast<uint32_t>(rows);
  p.heads = static_cast<uint32_t>(shape.heads);
  p.tree = static_cast<int>(tree);
  dispatch_copy(item, all_aligned(k_cache, v_cache, shape.dim, item), [&](auto zero, auto n) {
    p.words = static_cast<int>(shape.dim / n);
    Shape s = launch_shape(rows, p.words);
    s.grid.y = 2;
    compact_kernel<decltype(zero), n><<<s.grid, s.block, 0, scope.stream()>>>(p);
  });
  scope.check();
}

void kv_scatter(Tensor k_cache, Tensor v_cache, Tensor k, Tensor v, Tensor index) {
  constexpr char kOp[] = "kv_scatter";
  const CacheShape shape = kv::check_writable_caches(kOp, k_cache, v_cache, std::nullopt);
  const int64_t new_rows = kv::check_rows(kOp, k_cache, k, v, shape, "A");
  Params p{};
  p.index = kv::check_ints(kOp, "index", index, k_cache, "[B, A]", {shape.batch, new_rows});
  const int64_t rows = shape.batch * shape.heads * new_rows, item = item_size(k);
  if (rows == 0) return;

  const LaunchScope scope(kOp, k_cache);
  p.k = side(k_cache, false, k);
  p.v = side(v_cache, false, v);
  p.pages = kv::pages(k_cache, std::nullopt, shape);
  p.rows = static_cast<uint32_t>(rows);
  p.heads = static_cast<uint32_t>(shape.heads);
  p.new_rows = static_cast<uint32_t>(new_rows);
  const bool vector = all_aligned(k_cache, v_cache, shape.dim, item) && rows_aligned(k, item) && rows_aligned(v, item);
  launch_copy(p, shape.dim, item, vector, scope.stream());
  scope.check();
}

}  // namespace
}  // namespace fastops::kv_append

FO_IMPL(CUDA, "kv_append", &fastops::kv_append::kv_append)
FO_IMPL(CUDA, "kv_compact", &fastops::kv_append::kv_compact)
FO_IMPL(CUDA, "kv_scatter", &fastops::kv_append::kv_scatter)
