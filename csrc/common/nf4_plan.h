// How to multiply by a 4-bit weight: a model of the time of each way, in bytes, flops and the steps of a warp, and the
// least of them. Host only and free of CUDA, so that it can be read, and called, anywhere.
// Constants marked "measured" come from an H100 (bench/results/h100); they scale with the device's own figures.
#pragma once

#include <algorithm>
#include <cmath>
#include <compare>
#include <cstdint>
#include <sstream>
#include <string>

namespace fastops::nf4 {

// What a device can do, in bytes and flops a microsecond.
struct DeviceFacts {
  int sms, shared_bytes;  // the latter a block can have
  bool wgmma;             // this build's wgmma code runs on it
  double memory, cache, matrix;
  int clusters[5];  // clusters of 1 ... 4 blocks that fit at once, one block a multiprocessor; 0: none
};

struct Problem {
  int64_t rows;  // of x
  int64_t out_features, in_features, item_bytes;
  int64_t weight_bytes;  // packed and scales
  bool fast;             // 16-bit x, in_features % 64 == 0, blocks of 64 or more, aligned: stream and tile can serve
  auto operator<=>(const Problem&) const = default;
};

enum class Way { kStream, kTile, kExpand };

struct Plan {
  Way way = Way::kExpand;
  int cluster = 1, grid = 0, shared = 0;
  int row_tiles = 1, k_groups = 1, passes = 1, bringers = 1, x_stages = 1, x_first = 1, log_rows = 0;  // stream
  int tile = 0;                                                                                        // tile
  double us = 0;
};

constexpr int kStreamMaxRows = 32, kTileMaxRows = 2048;
constexpr int kStreamTable = 256 * 128, kStreamRing = 3 * 16 * 144, kMaxWarps = 16;

inline int ceil_log2(int64_t n) {
  int log = 0;
  while ((int64_t{1} << log) < n) ++log;
  return log;
}

inline int ceil_of(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// Launch, first bytes and last sums, us: measured.
constexpr double kStreamFixed = 4.2, kTileFixed = 8.0, kExpandFixed = 16.0, kClusterFixed = 1.6;

// Of a warp's step, for 8, 16 and 32 columns of x: how much longer than its bytes it takes, and at least, us: measured.
constexpr double kStreamCost[] = {1.0, 1.15, 2.8}, kStreamAlone[] = {0.5, 0.7, 2.2};
constexpr int kFirstBytes = 32 << 10;

// A row-tile x k-group division of a block, and what it costs.
inline bool complete_stream(const DeviceFacts& d, const Problem& p, Plan& plan) {
  const int blocks_of_rows = plan.grid / plan.cluster;
  const int rows = ceil_of(p.out_features, blocks_of_rows), strips = ceil_of(rows, 16);
  const int units = ceil_of(p.in_features, 256), warps = plan.row_tiles * plan.k_groups;
  const int most = ceil_of(units, plan.k_groups * plan.cluster);
  plan.passes = ceil_of(strips, plan.row_tiles);
  if (plan.cluster > 1 && plan.passes > 1) return false;
  if (plan.k_groups * plan.cluster > units) return false;
  plan.log_rows = ceil_log2(p.rows);
  plan.bringers = std::min(4, kMaxWarps - warps);
  const int tiles = p.rows <= 8 ? 1 : p.rows <= 16 ? 2 : 4;
  const int x_bytes = 512 << plan.log_rows;
  const int sums = plan.k_groups * plan.cluster > 1 ? plan.k_groups * plan.row_tiles * tiles * 8 * 20 * 4 : 0;
  const int fixed = kStreamTable + warps * kStreamRing + sums;
  plan.x_stages = std::min(most * plan.passes, (d.shared_bytes - 1024 - fixed) / (plan.k_groups * (x_bytes + 16)));
  if (plan.x_stages < std::min(2, most * plan.passes)) return false;
  // What the first sums wait for; if x is small, all of it.
  plan.x_first = std::clamp(kFirstBytes / (plan.k_groups * x_bytes), 1, std::min(plan.x_stages, most));
  plan.shared = fixed + plan.k_groups * plan.x_stages * (x_bytes + 16);

  // One step: every warp takes a unit of 16 rows x 256, no faster than its weights arrive and no faster than a warp can
  // alone. More columns of x cost shared memory reads beside the weights': measured.
  const int cost = tiles == 1 ? 0 : tiles == 2 ? 1 : 2;
  const double filled = static_cast<double>(rows) / (plan.passes * plan.row_tiles * 16);
  const double weights = warps * 16 * 144 * filled / (d.memory / d.sms) * 1.15;
  const double of_x = plan.k_groups * 512.0 * p.rows / (d.cache / d.sms);
  const double step =
      std::max({weights * kStreamCost[cost], kStreamAlone[cost], warps * 0.11 * kStreamCost[cost]}) + 0.8 * of_x;
  const double start = plan.x_first * plan.k_groups * 512.0 * p.rows / (d.cache / d.sms);
  plan.us = kStreamFixed + start + step * most * plan.passes + 0.15 * plan.passes + 0.2 * (plan.k_groups > 1) +
            (plan.cluster > 1 ? kClusterFixed : 0);
  return true;
}

inline Plan best_stream(const DeviceFacts& d, const Problem& p) {
  Plan best;
  best.us = 1e30;
  for (int cluster = 1; cluster <= 4; cluster *= 2) {
    if (cluster > 1 && d.clusters[cluster] == 0) continue;
    for (int row_tiles = 1; row_tiles < kMaxWarps; ++row_tiles) {
      for (int k_groups = 1; row_tiles * k_groups < kMaxWarps - (k_groups > 1); ++k_groups) {
        Plan plan;
        plan.way = Way::kStream;
        plan.cluster = cluster, plan.row_tiles = row_tiles, plan.k_groups = k_groups;
        plan.grid = cluster == 1 ? std::min<int>(d.sms, p.out_features) : d.clusters[cluster] * cluster;
        if (complete_stream(d, p, plan) && plan.us < best.us) best = plan;
      }
    }
  }
  return best;
}

// The tile kernels there are: rows of x, row and k warpgroups, us of a step (a block of 64 for every warpgroup).
struct TileShape {
  int n, rows, groups;
  double step;  // measured, without the wait for x
};
constexpr TileShape kTileShapes[] = {{32, 4, 1, 0.53}, {32, 1, 3, 0.43},  {64, 3, 1, 0.50},
                                     {64, 1, 2, 0.38}, {128, 2, 1, 0.52}, {128, 1, 2, 0.52}};
constexpr int kTileShapeCount = sizeof(kTileShapes) / sizeof(kTileShapes[0]);

inline Plan best_tile(const DeviceFacts& d, const Problem& p) {
  Plan best;
  best.us = 1e30;
  for (int i = 0; i < kTileShapeCount; ++i) {
    const TileShape& shape = kTileShapes[i];
    const int tiles_of_x = ceil_of(p.rows, shape.n);
    for (int cluster = 1; cluster <= 4; ++cluster) {
      if (d.clusters[cluster] == 0) continue;
      Plan plan;
      plan.way = Way::kTile;
      plan.tile = i, plan.cluster = cluster;
      const int blocks_of_rows = std::min<int>(cluster == 1 ? d.sms : d.clusters[cluster], p.out_features);
      plan.grid = blocks_of_rows * cluster;
      const int rows = ceil_of(p.out_features, blocks_of_rows), share = ceil_of(rows, shape.rows);
      const int tiles = ceil_of(share, 64);
      if (cluster > 1 && tiles > 1) continue;
      const int steps = tiles * 4 * ceil_of(ceil_of(p.in_features, 256), cluster * shape.groups);
      const double of_x = shape.groups * shape.n * 128.0 / (d.cache / d.sms);
      const double weights = rows * 36.0 * shape.groups / tiles / (d.memory / d.sms);
      const double step = std::max({shape.step, of_x, weights});
      plan.us = kTileFixed + (cluster > 1 ? kClusterFixed + shape.n * cluster * 0.004 : 0) +
                tiles_of_x * steps * step * std::min(1.2, 1 + 0.06 * (tiles_of_x - 1));
      if (plan.us < best.us) best = plan;
    }
  }
  return best;
}

// Expanding writes every weight; the product then runs at the matrix peak or reads the expanded weight, and hides most
// of the lesser of the two.
inline Plan expand(const DeviceFacts& d, const Problem& p) {
  const double n = static_cast<double>(p.out_features) * p.in_features;
  const double flops = 2 * n * p.rows / (d.matrix * (p.item_bytes == 4 ? 0.06 : 1.0)),
               read = n * p.item_bytes / d.memory;
  Plan plan;
  plan.us = kExpandFixed + (p.weight_bytes + n * p.item_bytes) / d.memory + std::max(flops, read) +
            0.2 * std::min(flops, read);
  return plan;
}

inline Plan choose(const DeviceFacts& d, const Problem& p) {
  Plan best = expand(d, p);
  if (!p.fast) return best;
  if (p.rows <= kStreamMaxRows) {
    const Plan plan = best_stream(d, p);
    if (plan.us < best.us) best = plan;
  }
  if (d.wgmma && p.rows <= kTileMaxRows && p.rows > 8) {
    const Plan plan = best_tile(d, p);
    if (plan.us < best.us) best = plan;
  }
  return best;
}

// One line, for fastops.explain().
inline std::string describe(const Plan& p) {
  std::ostringstream text;
  if (p.way == Way::kStream) {
    text << "stream: " << p.row_tiles << " row tiles x " << p.k_groups << " k groups, clusters of " << p.cluster << ", "
         << p.passes << (p.passes == 1 ? " pass" : " passes");
  } else if (p.way == Way::kTile) {
    const TileShape& shape = kTileShapes[p.tile];
    text << "tile: " << shape.n << " rows of x, " << shape.rows << " x " << shape.groups << " warpgroups, clusters of "
         << p.cluster;
  } else {
    text << "expand: nf4_dequant and cuBLAS";
  }
  text << "; estimated " << std::lround(p.us) << " us";
  return text.str();
}

}  // namespace fastops::nf4
