// nf4_gemv: y = x W^T + bias for one row x and a 4-bit weight W; nf4_linear: any number of rows; nf4_linear_dx: dy W.
// Floor at 28672 x 8192, blocksize 64, 1 row: 117 MB packed + 15 MB absmax = 132 MB, 44 us at 3.02 TB/s; 0.47 Gflop.
// Bytes-bound up to about 75 rows, then flops-bound: 128 rows are 60 Gflop, 84 us at 716 Tflop/s.
// Three ways, chosen by a model of their time (nf4_plan.h):
//   stream  few rows: every block takes its share of W's rows and warps stream strips of 16 of them, each with its own
//           ring of asynchronous copies, through mma.sync; other warps bring x. W is read once.
//   tile    up to some hundred rows, sm_90a: warpgroups decode tiles of 64 rows into the registers that wgmma takes as
//           A, while the tile before is multiplied; x, in the order that wgmma wants, comes by bulk copies.
//   expand  the rest: nf4_dequant's kernel into a workspace, slab by slab, and cuBLAS.
// Small copies by the bulk engine, a row's 128 bytes each, took twice as long as cp.async; loads into registers half
// as long again, since a warp's load of 8 rows costs 8 cache look-ups (28672 x 8192: 101, 86 and 53 us on an H100).
// Reached: bench/results/h100/nf4_gemv.json, nf4_linear.json. Source: QLoRA, arXiv:2305.14314; arXiv:2604.02556.
#include <algorithm>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <tuple>

#include "common/cublas.cuh"
#include "common/launch.cuh"
#include "common/nf4_dequant.cuh"
#include "common/nf4_mma.cuh"
#include "common/nf4_plan.h"
#include "common/register.h"

namespace fastops::nf4_gemv {
namespace {

using nf4::PairTable;
using nf4::Strip;
using nf4::Weight;
using nf4::WeightRing;

constexpr int kStages = 3;                      // of a warp's ring of weights
constexpr int kRingBytes = kStages * 16 * 144;  // WeightRing::kBytes each

struct Params {
  Weight weight;
  const void* x;      // [rows, in_features]
  const void* bias;   // [out_features] or null
  void* y;            // [rows, out_features]
  const void* image;  // tile: x in wgmma's order
  int rows;
  nf4::Plan plan;
};

// y[row_of_x][row_of_w] = sum + bias, rounded once.
template <class T>
__device__ inline void store(const Params& p, int row_of_x, int row_of_w, float sum) {
  const T* bias = static_cast<const T*>(p.bias);
  const float value = bias ? sum + static_cast<float>(bias[row_of_w]) : sum;
  static_cast<T*>(p.y)[static_cast<int64_t>(row_of_x) * p.weight.out_features + row_of_w] = static_cast<T>(value);
}

// Rows [first, first + count) of `all`, shared out evenly.
struct Share {
  int first, count;
  __device__ Share(int all, int parts, int part) {
    const int each = all / parts, more = all - each * parts;
    first = part * each + min(part, more);
    count = each + (part < more);
  }
};

// Shared memory of the stream kernel: pair table, weight rings, x ring [k group][stage], its barriers, sums.
struct StreamLayout {
  uint32_t table, rings, x, barriers, sums;
  int x_bytes;  // of a stage: 4 blocks x 2^log_rows rows x 128 bytes
  __device__ StreamLayout(uint32_t base, const nf4::Plan& plan) {
    x_bytes = 512 << plan.log_rows;
    table = base;
    rings = table + PairTable<Half>::kBytes;
    x = rings + plan.row_tiles * plan.k_groups * kRingBytes;
    barriers = x + plan.k_groups * plan.x_stages * x_bytes;
    sums = barriers + plan.k_groups * plan.x_stages * 16;
  }
  __device__ uint32_t full(int slot) const { return barriers + slot * 16; }
  __device__ uint32_t empty(int slot) const { return barriers + slot * 16 + 8; }
};

// Copies x for one unit of 4 blocks of 64, in the order in which lanes read it: 16-byte chunk
// ((2 block + half) rows + m) 4 + t  <-  x[m][64 block + 16 t + 8 half ...]. Rows beyond the last repeat it.
__device__ inline void copy_x(const Params& p, uint32_t to, int unit, int chunk, int step) {
  const int shift = p.plan.log_rows, blocks = p.weight.in_features / 64;
  for (; chunk < 32 << shift; chunk += step) {
    const int t = chunk & 3, m = chunk >> 2 & ((1 << shift) - 1), half = chunk >> (2 + shift),
              block = unit * 4 + half / 2;
    const bool there = block < blocks;
    const auto* row =
        static_cast<const uint16_t*>(p.x) + static_cast<int64_t>(min(m, p.rows - 1)) * p.weight.in_features;
    copy16_async_or_zero(to + chunk * 16, row + (there ? block * 64 + t * 16 + half % 2 * 8 : 0), there);
  }
}

// How the sums of a strip lie in shared memory while k groups, and the blocks of a cluster, are added up in order.
template <int kTiles>
struct StripSums {
  static constexpr int kPitch = 20, kStrip = kTiles * 8 * kPitch;  // floats; column m of strip: 16 rows
};

// Few rows of x: kTiles x 8 of them. A block is row_tiles x k_groups warps with a ring of weights each, and warps that
// bring x; each takes an even share of W's rows in strips of at most 16, in as many passes as that takes. k groups
// share out k; so do the blocks of a cluster.
template <class T, bool kDoubleQuant, int kTiles>
__global__ void __launch_bounds__(512, 1) stream_kernel(const __grid_constant__ Params p) {
  extern __shared__ __align__(128) uint8_t shared[];
  const nf4::Plan& plan = p.plan;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  const StreamLayout at(shared_address(shared), plan);
  const int warps = plan.row_tiles * plan.k_groups;
  const int units = (p.weight.in_features + 255) / 256, groups = plan.k_groups * plan.cluster;
  const int rank = blockIdx.x % plan.cluster;
  const Share block(p.weight.out_features, gridDim.x / plan.cluster, blockIdx.x / plan.cluster);
  const auto first_unit = [&](int group) { return (rank * plan.k_groups + group) * units / groups; };
  const int most = (units + groups - 1) / groups;  // units of a group, at most

  if (warp >= warps) {  // brings x
    const int me = warp - warps, many = blockDim.x / 32 - warps;
    if (me == 0) {
      for (int i = lane; i < plan.k_groups * plan.x_stages; i += 32) {
        barrier_init(at.full(i), 32);
        barrier_init(at.empty(i), plan.row_tiles);
      }
    }
    __syncthreads();
    int stage = 0, parity = 1, step = 0, group = me;
    const int steps = most * plan.passes;
    for (; step < steps; ++step) {
      for (; group < plan.k_groups; group += many) {
        const int slot = group * plan.x_stages + stage, within = step % most;
        const int unit = first_unit(group) + within;
        if (step >= plan.x_first) {
          if (step >= plan.x_stages) barrier_wait(at.empty(slot), parity);
          if (unit < first_unit(group + 1)) copy_x(p, at.x + slot * at.x_bytes, unit, lane, 32);
        }
        barrier_arrive_after_copies(at.full(slot));
      }
      group -= plan.k_groups;
      if (++stage == plan.x_stages) stage = 0, parity ^= 1;
    }
    wait_copies<0>();
  } else {
    const float code = PairTable<T>::load_code(p.weight.scales.code, lane);
    const int group = warp / plan.row_tiles, tile = warp % plan.row_tiles;
    const int first = first_unit(group), last = first_unit(group + 1);
    const int per_pass = (block.count + plan.passes - 1) / plan.passes;
    const int height = (per_pass + plan.row_tiles - 1) / plan.row_tiles;
    const auto strip_of = [&](int pass) {
      const int skip = pass * per_pass + tile * height, end = min(block.count, (pass + 1) * per_pass);
      return Strip{block.first + skip, min(end - skip, height)};
    };
    WeightRing<kDoubleQuant, kStages> ring(p.weight, at.rings + warp * kRingBytes, lane, first, last, plan.passes);
    // x for the first units before any weight: it is small, and nothing can begin without it.
    for (int i = warp; i < plan.x_first * plan.k_groups; i += warps) {
      const int stage = i / plan.k_groups, k = i - stage * plan.k_groups, unit = first_unit(k) + stage;
      if (unit < first_unit(k + 1)) copy_x(p, at.x + (k * plan.x_stages + stage) * at.x_bytes, unit, lane, 32);
    }
    commit_copies();
    ring.start(strip_of);
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) ring.prefetch(strip_of);
    PairTable<T> pairs;
    pairs.build(at.table, code, p.weight.scales.code != nullptr, thread, warps * 32);
    wait_copies<kStages - 1>();
    __syncthreads();

    int stage = 0, parity = 0;
    uint32_t x_lane[kTiles];
#pragma unroll
    for (int n = 0; n < kTiles; ++n) x_lane[n] = (min(g + 8 * n, p.rows - 1) * 4 + t) * 16;
    const int x_half = 64 << plan.log_rows;
    for (int pass = 0; pass < plan.passes; ++pass) {
      float sum[kTiles][4] = {};
      for (int i = 0; i < most; ++i) {
        const int slot = group * plan.x_stages + stage;
        if (first + i < last) {
          ring.wait();
          ring.prefetch(strip_of);
          barrier_wait(at.full(slot), parity);
          const uint32_t x = at.x + slot * at.x_bytes;
          float upper[4], lower[4];
          ring.scales(upper, lower);
#pragma unroll
          for (int b = 0; b < 4; ++b) {
            const auto words = ring.words(b);
            uint32_t a[4][4];
            pairs.fragments(a, words.upper, words.lower);
#pragma unroll
            for (int n = 0; n < kTiles; ++n) {
              uint32_t v[8];
#pragma unroll
              for (int h = 0; h < 2; ++h) {
                asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                             : "=r"(v[4 * h]), "=r"(v[4 * h + 1]), "=r"(v[4 * h + 2]), "=r"(v[4 * h + 3])
                             : "r"(x + (2 * b + h) * x_half + x_lane[n]));
              }
              float of_block[4] = {};
#pragma unroll
              for (int j = 0; j < 4; ++j) mma<T>(of_block, a[j], v[2 * j], v[2 * j + 1]);
              sum[n][0] += upper[b] * of_block[0];
              sum[n][1] += upper[b] * of_block[1];
              sum[n][2] += lower[b] * of_block[2];
              sum[n][3] += lower[b] * of_block[3];
            }
          }
          ring.pop();
        } else {
          barrier_wait(at.full(slot), parity);
        }
        __syncwarp();
        if (lane == 0) barrier_arrive(at.empty(slot));
        if (++stage == plan.x_stages) stage = 0, parity ^= 1;
      }

      using Sums = StripSums<kTiles>;
      const Strip strip = strip_of(pass);
      // Where this lane's element (row g, column 2 t) of its strip stands in slice `slice` of the sums.
      const auto place = [&](int slice) {
        return at.sums + ((slice * plan.row_tiles + tile) * Sums::kStrip + 2 * t * Sums::kPitch + g) * 4;
      };
      const auto offset = [](int n, int i) {
        return (n * 8 * Sums::kPitch + (i & 1) * Sums::kPitch + (i & 2) * 4) * 4;
      };
      if (pass > 0 && groups > 1) named_barrier(1, warps * 32);  // the sums of the pass before have been read
      if (group > 0) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i)
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(place(group) + offset(n, i)), "f"(sum[n][i]) : "memory");
        }
      }
      if (plan.k_groups > 1) named_barrier(1, warps * 32);
      if (group > 0) continue;
      for (int k = 1; k < plan.k_groups; ++k) {
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            float v;
            asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(place(k) + offset(n, i)));
            sum[n][i] += v;
          }
        }
      }
#pragma unroll
      for (int n = 0; n < kTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float total = sum[n][i] * pairs.unscale;
          if (plan.cluster > 1) {
            asm volatile("st.shared.f32 [%0], %1;" ::"r"(place(0) + offset(n, i)), "f"(total) : "memory");
          } else {
            const int m = n * 8 + 2 * t + (i & 1), row = g + (i & 2) * 4;
            if (m < p.rows && row < strip.rows) store<T>(p, m, strip.row + row, total);
          }
        }
      }
    }
  }
  if (plan.cluster == 1) return;

  // One pass. Strip s of all blocks of the cluster is finished by block s % cluster.
  cluster_sync();
  using Sums = StripSums<kTiles>;
  const int height = (block.count + plan.row_tiles - 1) / plan.row_tiles;
  const int strips = (plan.row_tiles - rank + plan.cluster - 1) / plan.cluster;
  for (int i = thread; i < strips * p.rows * 4; i += blockDim.x) {
    const int four = i & 3, m = (i >> 2) % p.rows, s = (i >> 2) / p.rows * plan.cluster + rank;
    const uint32_t from = at.sums + (s * Sums::kStrip + m * Sums::kPitch + four * 4) * 4;
    float4 sum = {};
    for (int k = 0; k < plan.cluster; ++k) {
      const float4 v = load_cluster(from, k);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
    const int left = min(block.count - s * height, height);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (four * 4 + j < left) store<T>(p, m, block.first + s * height + four * 4 + j, values[j]);
    }
  }
  cluster_sync();  // nobody leaves while its shared memory is read
}

// x in wgmma's order: [tile of kN rows][block of 64, padded to 4][row][128 bytes swizzled], k permuted as the fragments
// of the weights are (nf4_mma.cuh), zeros beyond x.
__global__ void __launch_bounds__(256)
    image_kernel(const uint16_t* x, uint8_t* image, int rows, int in_features, int n) {
  allow_next_kernel();
  const int blocks = in_features / 64, padded = (blocks + 3) / 4 * 4;
  const int m = blockIdx.y * 4 + threadIdx.x / 64, row = blockIdx.z * n + m;
  const int i = blockIdx.x * 64 + threadIdx.x % 64, block = i / 8, chunk = i % 8;
  if (block >= padded) return;
  uint32_t v[4] = {};
  if (row < rows && block < blocks) {
    const auto* from = reinterpret_cast<const uint32_t*>(x + static_cast<int64_t>(row) * in_features + block * 64);
#pragma unroll
    for (int t = 0; t < 4; ++t) v[t] = from[8 * t + chunk];
  }
  uint8_t* to = image + ((static_cast<int64_t>(blockIdx.z) * padded + block) * n + m) * 128;
  *reinterpret_cast<uint4*>(to + ((chunk ^ (m & 7)) * 16)) = {v[0], v[1], v[2], v[3]};
}

// What a tile kernel is made of: kRows x kGroups warpgroups (rows of W; shares of k) and one that brings x.
template <int kN_, int kRows_, int kGroups_, int kXStages_, int kXBlocks_>
struct Tile {
  static constexpr int kN = kN_, kRows = kRows_, kGroups = kGroups_, kXStages = kXStages_, kXBlocks = kXBlocks_;
  static constexpr int kWarpgroups = kRows * kGroups, kThreads = (kWarpgroups + 1) * 128;
  static constexpr int kXBytes = kXBlocks * kN * 128, kPitch = 64 * kRows + 4;
  static constexpr int kMoreRegisters = kWarpgroups == 2 ? 224 : kWarpgroups == 3 ? 152 : 104;
  static constexpr int kFewRegisters = kWarpgroups == 4 ? 64 : 56;
  // Shared memory: x, pair table, weight rings, sums of the k groups but the first; a cluster's sums lie over x.
  static constexpr int kTableAt = kGroups * kXStages * kXBytes, kRingsAt = kTableAt + PairTable<Half>::kBytes;
  static constexpr int kSumsAt = kRingsAt + kWarpgroups * 4 * kRingBytes;
  static constexpr int kBytes = kSumsAt + (kGroups - 1) * kN * kPitch * 4;
  static_assert(kN * kPitch * 4 <= kSumsAt && kBytes <= 226 * 1024);
};

// Up to Tile::kN rows of x (blockIdx.y: which). A block takes an even share of W's rows, its warpgroups tiles of at
// most 64; the blocks of a cluster, and the k groups within, share out k.
template <class T, bool kDoubleQuant, class Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1) tile_kernel(const __grid_constant__ Params p) {
#if FO_HAS_WGMMA
  extern __shared__ __align__(1024) uint8_t tile_shared[];
  __shared__ alignas(8) uint64_t barriers[2 * Tile::kXStages * Tile::kGroups];
  constexpr int kSums = Tile::kN / 2, kPitch = Tile::kPitch;
  const uint32_t base = shared_address(tile_shared), full0 = shared_address(barriers);
  const uint32_t empty0 = full0 + Tile::kXStages * Tile::kGroups * 8;
  const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5, g = lane >> 2, t = lane & 3;
  const int cluster = p.plan.cluster, rank = blockIdx.x % cluster, blocks = p.weight.in_features / 64;
  const int units = (blocks + 3) / 4;
  const Share block(p.weight.out_features, gridDim.x / cluster, blockIdx.x / cluster);
  const int share = (block.count + Tile::kRows - 1) / Tile::kRows, tiles = (share + 63) / 64;
  const int height = (share + tiles - 1) / tiles;
  const auto first_unit = [&](int group) { return (rank * Tile::kGroups + group) * units / (cluster * Tile::kGroups); };

  if (warp >= Tile::kWarpgroups * 4) {
    set_registers<Tile::kFewRegisters, false>();
    const int group = warp - Tile::kWarpgroups * 4;
    if (thread == Tile::kWarpgroups * 128) {
      for (int i = 0; i < Tile::kXStages * Tile::kGroups; ++i) {
        barrier_init(full0 + 8 * i, 1);
        barrier_init(empty0 + 8 * i, Tile::kRows * 4);
      }
      fence_barrier_init();
    }
    __syncthreads();
    if (group < Tile::kGroups && lane == 0) {
      wait_for_previous_kernel();
      const auto* image =
          static_cast<const uint8_t*>(p.image) + static_cast<int64_t>(blockIdx.y) * units * 4 * Tile::kN * 128;
      int stage = 0, parity = 1;
      for (int tile = 0; tile < tiles; ++tile) {
        for (int b = first_unit(group) * 4; b < first_unit(group + 1) * 4; b += Tile::kXBlocks) {
          const int slot = group * Tile::kXStages + stage;
          barrier_wait(empty0 + 8 * slot, parity);
          barrier_expect(full0 + 8 * slot, Tile::kXBytes);
          copy_bulk(base + slot * Tile::kXBytes, image + static_cast<int64_t>(b) * Tile::kN * 128, Tile::kXBytes,
                    full0 + 8 * slot);
          if (++stage == Tile::kXStages) stage = 0, parity ^= 1;
        }
      }
    }
  } else {
    set_registers<Tile::kMoreRegisters, true>();
    const float code = PairTable<T>::load_code(p.weight.scales.code, lane);
    const int group = warp / (4 * Tile::kRows), part = warp / 4 % Tile::kRows, quarter = warp % 4;
    const int first = first_unit(group), last = first_unit(group + 1);
    const int begin = min(block.count, part * share), end = min(block.count, begin + share);
    const auto strip_of = [&](int tile) {
      const int row = begin + tile * height + quarter * 16;
      return Strip{block.first + row, min(end, begin + (tile + 1) * height) - row};
    };
    WeightRing<kDoubleQuant, kStages> ring(p.weight, base + Tile::kRingsAt + warp * kRingBytes, lane, first, last,
                                           tiles);
    ring.start(strip_of);
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) ring.prefetch(strip_of);
    PairTable<T> pairs;
    pairs.build(base + Tile::kTableAt, code, p.weight.scales.code != nullptr, thread, Tile::kWarpgroups * 128);
    __syncthreads();

    const bool idle = strip_of(0).rows <= 0;  // then its fragments stay as they are, and nobody reads the products
    uint32_t a[2][4][4] = {};
    float upper[4], lower[4];
    const uint32_t x = base + group * Tile::kXStages * Tile::kXBytes;
    const uint32_t full = full0 + group * Tile::kXStages * 8, empty = empty0 + group * Tile::kXStages * 8;
    int stage = 0, parity = 0;
    ring.wait();
    ring.prefetch(strip_of);
    const auto decode = [&](int b) {
      if (idle) return;
      const auto words = ring.words(b);
      pairs.fragments(a[b & 1], words.upper, words.lower);
    };
    decode(0);
    ring.scales(upper, lower);
    for (int tile = 0; tile < tiles; ++tile) {
      float sum[kSums];
#pragma unroll
      for (int i = 0; i < kSums; ++i) sum[i] = 0.0f;
      for (int unit = first; unit < last; ++unit) {
#pragma unroll
        for (int b = 0; b < 4; ++b) {  // multiplies block b while it decodes the next
          if (b % Tile::kXBlocks == 0) barrier_wait(full + 8 * stage, parity);
          const uint32_t xb = x + stage * Tile::kXBytes + b % Tile::kXBlocks * Tile::kN * 128;
          float of_block[kSums];
          wgmma_fence();
#pragma unroll
          for (int j = 0; j < 4; ++j) wgmma<T, Tile::kN>(of_block, a[b & 1][j], wgmma_descriptor(xb + j * 32), j > 0);
          wgmma_commit();
          if (b == 3) {
            ring.pop();
            ring.wait();
            ring.prefetch(strip_of);
          }
          decode((b + 1) % 4);
          wgmma_wait(of_block);
          if ((b + 1) % Tile::kXBlocks == 0) {
            if (lane == 0) barrier_arrive(empty + 8 * stage);
            if (++stage == Tile::kXStages) stage = 0, parity ^= 1;
          }
#pragma unroll
          for (int i = 0; i < kSums; ++i) sum[i] += (i & 2 ? lower[b] : upper[b]) * of_block[i];
          if (b == 3) ring.scales(upper, lower);
        }
      }

      // Element i of this lane: row `at_row` + 8 (i / 2 % 2) of the block's tile, column i / 4 * 8 + 2 t + i % 2.
      const int at_row = part * 64 + quarter * 16 + g;
      const auto place = [&](int i) { return (i / 4 * 8 + 2 * t + (i & 1)) * kPitch + at_row + (i & 2) * 4; };
      if constexpr (Tile::kGroups > 1) {
        auto* sums = reinterpret_cast<float*>(tile_shared + Tile::kSumsAt);
        if (tile > 0) named_barrier(2 + part, Tile::kGroups * 128);
        if (group > 0) {
#pragma unroll
          for (int i = 0; i < kSums; ++i) sums[(group - 1) * Tile::kN * kPitch + place(i)] = sum[i];
        }
        named_barrier(2 + part, Tile::kGroups * 128);
        if (group > 0) continue;
#pragma unroll
        for (int k = 0; k + 1 < Tile::kGroups; ++k) {
#pragma unroll
          for (int i = 0; i < kSums; ++i) sum[i] += sums[k * Tile::kN * kPitch + place(i)];
        }
      }
      if (cluster > 1) {
        named_barrier(1, Tile::kRows * 128);  // all x has been read: its place is free
#pragma unroll
        for (int i = 0; i < kSums; ++i) reinterpret_cast<float*>(tile_shared)[place(i)] = sum[i] * pairs.unscale;
      } else {
        const Strip strip = strip_of(tile);
#pragma unroll
        for (int i = 0; i < kSums; ++i) {
          const int m = blockIdx.y * Tile::kN + i / 4 * 8 + 2 * t + (i & 1), row = g + (i & 2) * 4;
          if (m < p.rows && row < strip.rows) store<T>(p, m, strip.row + row, sum[i] * pairs.unscale);
        }
      }
    }
  }
  if (cluster == 1) return;

  // One tile a warpgroup. Rows of x are shared out over the cluster to be finished.
  cluster_sync();
  const int mine = min(Tile::kN, p.rows - static_cast<int>(blockIdx.y) * Tile::kN);
  const int low = mine * rank / cluster, high = mine * (rank + 1) / cluster;
  for (int i = thread; i < (high - low) * 16 * Tile::kRows; i += Tile::kThreads) {
    const int row = i % (16 * Tile::kRows) * 4, m = low + i / (16 * Tile::kRows);
    float4 sum = {};
    for (int k = 0; k < cluster; ++k) {
      const float4 v = load_cluster(base + (m * kPitch + row) * 4, k);
      sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w;
    }
    const float values[4] = {sum.x, sum.y, sum.z, sum.w};
    const int within = row % 64, to = row / 64 * share + within;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if (within + j < share && to + j < block.count) {
        store<T>(p, blockIdx.y * Tile::kN + m, block.first + to + j, values[j]);
      }
    }
  }
  cluster_sync();
#endif
}

using Tiles = std::tuple<Tile<32, 4, 1, 3, 4>, Tile<32, 1, 3, 3, 2>, Tile<64, 3, 1, 3, 2>, Tile<64, 1, 2, 3, 2>,
                         Tile<128, 2, 1, 4, 1>, Tile<128, 1, 2, 2, 1>>;
static_assert(std::tuple_size_v<Tiles> == nf4::kTileShapeCount);

// Lets a kernel have the shared memory it wants; asked once a device and kernel.
void allow_shared(const char* op, void (*kernel)(Params), int device, int bytes) {
  static std::mutex mutex;
  static std::set<std::pair<int, void (*)(Params)>> done;
  const std::lock_guard lock(mutex);
  if (!done.insert({device, kernel}).second) return;
  FO_CHECK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes) == cudaSuccess, op,
           "CUDA: a block cannot have ", bytes, " bytes of shared memory");
}

// What a kernel is launched with: clusters and early starts are attributes.
struct Launch {
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute attributes[2];

  Launch(dim3 grid, int threads, int shared, cudaStream_t stream, int cluster, bool early) {
    config.gridDim = grid, config.blockDim = threads, config.dynamicSmemBytes = shared, config.stream = stream;
    config.attrs = attributes;
    if (cluster > 1) {
      auto& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeClusterDimension;
      a.val.clusterDim.x = cluster, a.val.clusterDim.y = a.val.clusterDim.z = 1;
    }
    if (early) {
      auto& a = attributes[config.numAttrs++];
      a.id = cudaLaunchAttributeProgrammaticStreamSerialization;
      a.val.programmaticStreamSerializationAllowed = 1;
    }
  }
};

// What the current device can do; asked once.
const nf4::DeviceFacts& device_facts(int device) {
  static std::mutex mutex;
  static std::map<int, nf4::DeviceFacts> all;
  const std::lock_guard lock(mutex);
  const auto known = all.find(device);
  if (known != all.end()) return known->second;
  const auto ask = [&](cudaDeviceAttr attribute) {
    int value = 0;
    cudaDeviceGetAttribute(&value, attribute, device);
    return value;
  };
  nf4::DeviceFacts d{};
  d.sms = ask(cudaDevAttrMultiProcessorCount);
  d.shared_bytes = ask(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  const int major = ask(cudaDevAttrComputeCapabilityMajor), minor = ask(cudaDevAttrComputeCapabilityMinor);
  const double mhz = ask(cudaDevAttrClockRate) / 1000.0;
  // Shares of the paper figures that copies, cache reads and products reach: measured.
  d.memory = 0.9 * 2 * ask(cudaDevAttrMemoryClockRate) / 1000.0 * ask(cudaDevAttrGlobalMemoryBusWidth) / 8;
  d.cache = 24.0 * mhz * d.sms;
  d.matrix = 0.72 * (major >= 9 ? 4096.0 : major * 10 + minor == 80 ? 2048.0 : 1024.0) * mhz * d.sms;
  cudaFuncAttributes tile{};
  using First = std::tuple_element_t<0, Tiles>;
  d.wgmma = major == 9 && minor == 0 &&
            cudaFuncGetAttributes(&tile, tile_kernel<BFloat16, false, First>) == cudaSuccess &&
            tile.binaryVersion == 90 && tile.numRegs > 64;  // without wgmma its body is empty
  d.clusters[1] = d.sms;
  if (major >= 9) {
    auto* kernel = stream_kernel<BFloat16, false, 1>;
    cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, d.shared_bytes - 1024);
    for (int cluster = 2; cluster <= 4; ++cluster) {
      const Launch launch(dim3(cluster), 512, d.shared_bytes - 1024, nullptr, cluster, false);
      if (cudaOccupancyMaxActiveClusters(&d.clusters[cluster], kernel, &launch.config) != cudaSuccess) {
        d.clusters[cluster] = 0;
      }
    }
  }
  cudaGetLastError();
  return all[device] = d;
}

// Plans, each made once: planning takes longer than a launch.
nf4::Plan plan_for(int device, const nf4::Problem& problem) {
  static std::mutex mutex;
  static std::map<std::pair<int, nf4::Problem>, nf4::Plan> plans;
  const nf4::DeviceFacts& facts = device_facts(device);
  const std::lock_guard lock(mutex);
  const auto known = plans.find({device, problem});
  if (known != plans.end()) return known->second;
  if (plans.size() > 10000) plans.clear();
  return plans[{device, problem}] = nf4::choose(facts, problem);
}

nf4::Problem make_problem(int64_t rows, int64_t n, int64_t k, int64_t item_bytes, int64_t blocksize, bool double_quant,
                          bool aligned) {
  const bool fast = item_bytes == 2 && k > 0 && k % 64 == 0 && blocksize >= 64 && aligned && n <= INT32_MAX / 64 &&
                    k <= INT32_MAX / 64 && n * (k / 64) <= UINT32_MAX;
  return {rows,
          std::min<int64_t>(n, INT32_MAX),
          std::min<int64_t>(k, INT32_MAX),
          item_bytes,
          n * k / 2 + ceil_div(n * k, blocksize) * (double_quant ? 1 : 4),
          fast};
}

template <class T, bool kDoubleQuant, int kTiles>
void launch_stream(const char* op, const Params& p, int device, cudaStream_t stream) {
  auto* kernel = stream_kernel<T, kDoubleQuant, kTiles>;
  allow_shared(op, kernel, device, device_facts(device).shared_bytes - 1024);
  const int threads = (p.plan.row_tiles * p.plan.k_groups + p.plan.bringers) * 32;
  const Launch launch(dim3(p.plan.grid), threads, p.plan.shared, stream, p.plan.cluster, false);
  cudaLaunchKernelEx(&launch.config, kernel, p);
}

template <class T, bool kDoubleQuant>
void stream_product(const char* op, const Params& p, int device, cudaStream_t stream) {
  if (p.rows <= 8) return launch_stream<T, kDoubleQuant, 1>(op, p, device, stream);
  if (p.rows <= 16) return launch_stream<T, kDoubleQuant, 2>(op, p, device, stream);
  launch_stream<T, kDoubleQuant, 4>(op, p, device, stream);
}

template <class T, bool kDoubleQuant, int kTile = 0>
void tile_product(const char* op, Params p, const Tensor& x, int device, cudaStream_t stream) {
  if constexpr (kTile < nf4::kTileShapeCount) {
    if (p.plan.tile != kTile) return tile_product<T, kDoubleQuant, kTile + 1>(op, p, x, device, stream);
    using Shape = std::tuple_element_t<kTile, Tiles>;
    auto* kernel = tile_kernel<T, kDoubleQuant, Shape>;
    allow_shared(op, kernel, device, Shape::kBytes);
    const int tiles = static_cast<int>(ceil_div(p.rows, Shape::kN));
    const int padded = static_cast<int>(ceil_div(p.weight.in_features, 256)) * 4;  // blocks of 64
    const Tensor image = torch::stable::new_empty(x, {int64_t{tiles} * padded * Shape::kN * 128}, ScalarType::Byte);
    p.image = image.const_data_ptr();
    image_kernel<<<dim3(static_cast<unsigned>(ceil_div(padded, 8)), Shape::kN / 4, tiles), 256, 0, stream>>>(
        static_cast<const uint16_t*>(p.x), static_cast<uint8_t*>(image.mutable_data_ptr()), p.rows,
        p.weight.in_features, Shape::kN);
    const Launch launch(dim3(p.plan.grid, tiles), Shape::kThreads, Shape::kBytes, stream, p.plan.cluster, true);
    cudaLaunchKernelEx(&launch.config, kernel, p);
  }
}

// Bytes of expanded weight at a time. A slab this large still keeps cuBLAS at its peak.
constexpr int64_t kWorkspaceBytes = 256 << 20;

// Rows of a slab: as many as the workspace takes, in steps at which blocks of scales (and their blocks) begin.
int64_t slab_rows(const nf4::Scales& s, int64_t out_features, int64_t in_features, int64_t item_bytes) {
  int64_t step = s.blocksize * (s.double_quant() ? s.absmax_blocksize : 1);
  for (int64_t k = in_features; k % 2 == 0 && step > 1; k /= 2) step /= 2;
  if (in_features == 0) return out_features;
  const int64_t fitting = kWorkspaceBytes / (in_features * item_bytes) / step * step;
  return std::min(out_features, std::max(fitting, step));
}

// Rows [first, first + count) of the weight in `type`.
Tensor expand_rows(const Tensor& packed, const nf4::Scales& s, const nf4::ScalesView& view, int64_t first,
                   int64_t count, int64_t in_features, ScalarType type, const LaunchScope& scope) {
  Tensor dense = torch::stable::new_empty(packed, {count, in_features}, type);
  const int64_t skipped = first * in_features, block = skipped / s.blocksize;
  nf4_dequant::Params p{static_cast<const uint8_t*>(packed.const_data_ptr()) + skipped / 2, view,
                        dense.mutable_data_ptr(), count * in_features, false};
  p.aligned = reinterpret_cast<uintptr_t>(p.packed) % 16 == 0;
  p.scales.absmax = static_cast<const uint8_t*>(view.absmax) + block * (s.double_quant() ? 1 : 4);
  if (s.double_quant()) p.scales.absmax_scale += block / s.absmax_blocksize;
  if (p.n > 0) nf4_dequant::dequantize(p, type, s.double_quant(), packed.get_device_index(), scope.stream());
  return dense;
}

void expanded_product(const char* op, const Tensor& x, const Tensor& packed, const nf4::Scales& s,
                      const nf4::ScalesView& view, std::optional<Tensor> bias, Tensor& y, const LaunchScope& scope) {
  const int64_t out_features = y.size(1), in_features = x.size(1);
  const int64_t slab = slab_rows(s, out_features, in_features, x.element_size());
  for (int64_t first = 0; first < out_features; first += slab) {
    const int64_t count = std::min(slab, out_features - first);
    const Tensor dense = expand_rows(packed, s, view, first, count, in_features, x.scalar_type(), scope);
    Tensor part = torch::stable::narrow(y, 1, first, count);
    const std::optional<Tensor> some =
        bias ? std::optional(torch::stable::narrow(*bias, 0, first, count)) : std::nullopt;
    matrix_product(op, part, x, torch::stable::transpose(dense, 0, 1), some ? &*some : nullptr);
  }
}

std::vector<int64_t> with_last(const Tensor& t, int64_t last) {
  std::vector<int64_t> sizes(t.sizes().begin(), t.sizes().end());
  sizes.back() = last;
  return sizes;
}

// Where neither stream nor tile serves (odd sizes, blocks of 32), few rows are multiplied in fp32: still bytes-bound,
// and weights rounded to 16 bits would be the largest error there is.
constexpr int64_t kFp32MaxRows = 128;

Tensor to_fp32(const Tensor& t) {
  Tensor wide =
      torch::stable::new_empty(t, std::vector<int64_t>(t.sizes().begin(), t.sizes().end()), ScalarType::Float);
  return torch::stable::copy_(wide, t);
}

bool is_aligned(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

Tensor product(const char* op, bool one_row, Tensor x, Tensor packed, nf4::Scales scales, int64_t out_features,
               std::optional<Tensor> bias) {
  const auto [rows, n, k] = nf4::check_product(op, "x", x, "out_features", out_features, packed, scales, one_row);
  nf4::check_bias(op, bias, x, out_features);
  const LaunchScope scope(op, x);
  const int device = x.get_device_index();
  Tensor y = torch::stable::new_empty(x, with_last(x, n));
  if (rows == 0 || n == 0) return y;
  x = as_contiguous(x);
  packed = as_contiguous(packed);
  if (bias) bias = torch::stable::view(as_contiguous(*bias), {n});
  if (!is_aligned(x)) x = torch::stable::clone(x);
  const nf4::ScalesView view = nf4::view(scales);

  const nf4::Problem problem =
      make_problem(rows, n, k, x.element_size(), scales.blocksize, scales.double_quant(), is_aligned(packed));
  const nf4::Plan plan = plan_for(device, problem);
  if (plan.way == nf4::Way::kExpand) {
    const Tensor flat_x = torch::stable::view(x, {rows, k});
    Tensor flat_y = torch::stable::view(y, {rows, n});
    const bool in_fp32 = !problem.fast && problem.item_bytes == 2 && rows <= kFp32MaxRows;
    if (in_fp32) {
      Tensor wide_y = torch::stable::new_empty(y, {rows, n}, ScalarType::Float);
      expanded_product(op, to_fp32(flat_x), packed, scales, view, bias ? std::optional(to_fp32(*bias)) : bias, wide_y,
                       scope);
      torch::stable::copy_(flat_y, wide_y);
    } else {
      expanded_product(op, flat_x, packed, scales, view, bias, flat_y, scope);
    }
  } else {
    const Params p{
        {static_cast<const uint8_t*>(packed.const_data_ptr()), view, static_cast<int>(n), static_cast<int>(k)},
        x.const_data_ptr(),
        bias ? bias->const_data_ptr() : nullptr,
        y.mutable_data_ptr(),
        nullptr,
        static_cast<int>(rows),
        plan};
    const auto run = [&](auto zero, auto double_quant) {
      using T = decltype(zero);
      if (plan.way == nf4::Way::kStream) return stream_product<T, double_quant.value>(op, p, device, scope.stream());
      tile_product<T, double_quant.value>(op, p, x, device, scope.stream());
    };
    dispatch_bool(scales.double_quant(), [&](auto double_quant) {
      x.scalar_type() == ScalarType::Half ? run(Half{}, double_quant) : run(BFloat16{}, double_quant);
    });
  }
  scope.check();
  return y;
}

Tensor nf4_gemv(Tensor x, Tensor packed, Tensor absmax, int64_t out_features, int64_t blocksize,
                std::optional<Tensor> bias, std::optional<Tensor> code, std::optional<Tensor> absmax_code,
                std::optional<Tensor> absmax_scale, std::optional<Tensor> absmax_offset, int64_t absmax_blocksize) {
  return product("nf4_gemv", true, x, packed,
                 {absmax, code, absmax_code, absmax_scale, absmax_offset, blocksize, absmax_blocksize}, out_features,
                 bias);
}

Tensor nf4_linear(Tensor x, Tensor packed, Tensor absmax, int64_t out_features, int64_t blocksize,
                  std::optional<Tensor> bias, std::optional<Tensor> code, std::optional<Tensor> absmax_code,
                  std::optional<Tensor> absmax_scale, std::optional<Tensor> absmax_offset, int64_t absmax_blocksize) {
  return product("nf4_linear", false, x, packed,
                 {absmax, code, absmax_code, absmax_scale, absmax_offset, blocksize, absmax_blocksize}, out_features,
                 bias);
}

// The whole weight is expanded: sums over slabs of rows would be rounded once a slab.
Tensor nf4_linear_dx(Tensor dy, Tensor packed, Tensor absmax, int64_t in_features, int64_t blocksize,
                     std::optional<Tensor> code, std::optional<Tensor> absmax_code, std::optional<Tensor> absmax_scale,
                     std::optional<Tensor> absmax_offset, int64_t absmax_blocksize) {
  constexpr char kOp[] = "nf4_linear_dx";
  nf4::Scales scales{absmax, code, absmax_code, absmax_scale, absmax_offset, blocksize, absmax_blocksize};
  const auto [rows, n, k] = nf4::check_product(kOp, "dy", dy, "in_features", in_features, packed, scales, false);
  const LaunchScope scope(kOp, dy);
  Tensor dx = torch::stable::new_empty(dy, with_last(dy, k));
  if (rows == 0 || k == 0) return dx;
  if (n == 0) return torch::stable::zero_(dx);
  dy = as_contiguous(dy);
  packed = as_contiguous(packed);
  const nf4::ScalesView view = nf4::view(scales);
  const Tensor dense = expand_rows(packed, scales, view, 0, n, k, dy.scalar_type(), scope);
  Tensor flat = torch::stable::view(dx, {rows, k});
  matrix_product(kOp, flat, torch::stable::view(dy, {rows, n}), dense);
  scope.check();
  return dx;
}

}  // namespace

std::string describe(int device, int64_t rows, int64_t n, int64_t k, int64_t item_bytes, int64_t blocksize,
                     bool double_quant, bool aligned) {
  return nf4::describe(plan_for(device, make_problem(rows, n, k, item_bytes, blocksize, double_quant, aligned)));
}

}  // namespace fastops::nf4_gemv

FO_IMPL(CUDA, "nf4_gemv", &fastops::nf4_gemv::nf4_gemv)
FO_IMPL(CUDA, "nf4_linear", &fastops::nf4_gemv::nf4_linear)
FO_IMPL(CUDA, "nf4_linear_dx", &fastops::nf4_gemv::nf4_linear_dx)
