// Attention over a KV cache on the CPU: what decode_attn and prefill_attn share. A call is cut into items, one for each
// tile of rows of a sequence, chunk of keys and KV head, in a way that depends on the sequence alone; threads take them
// as they come. The last to finish a tile adds up its parts in order, so neither the number of threads nor the other
// sequences change a bit.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <cstring>
#include <memory>
#include <numbers>
#include <utility>
#include <vector>

#include "common/attention.h"
#include "common/cpu_scratch.h"
#include "common/cpu_simd.h"

namespace fastops::attention {

constexpr int64_t kBlock = 128, kFewBlock = 64;  // keys at a time, of many rows and of few
constexpr int64_t kTileRows = 128;               // times heads: a tile has fewer where it can
constexpr int64_t kChunk = 512;                  // keys of an item of a sequence that is split
constexpr int64_t kGrain = 1 << 17;              // work of a thread, see run()

constexpr int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// What a row sees: keys low ... high - 1, and of the 64 keys from the sequence's first new row on those of `nodes`.
struct Sight {
  int64_t low, high;
  uint64_t nodes;
};

// One sequence of a call; offsets in elements.
struct Sequence {
  int64_t rows, place;  // of the results; of the first new row
  int64_t cache;        // the index of its contiguous cache, or of its row of the block table
  int64_t q, out, lse;  // where its rows begin
  int64_t sights;       // where in Call::sights those of its rows begin
};

struct Strides {
  int64_t row, head;
};

// One call. The strides of caches are those of a sequence or page, a KV head and a row.
struct Call {
  const void *q, *k, *v;
  void* out;
  float* lse;
  Strides q_stride, out_stride, lse_stride;
  int64_t k_stride[3], v_stride[3];
  int64_t kv_heads, group, d;
  const int32_t* table;  // null: contiguous caches
  int64_t table_row, page_rows;
  float factor, cap;  // z log2(e) = factor q.k, or cap tanh(factor q.k) where cap is not 0
  std::vector<Sequence> sequences;
  std::vector<Sight> sights;
};

// The keys and values of one sequence and KV head.
template <class T>
struct Keys {
  const T *k, *v;
  int64_t k_row, v_row, k_page, v_page;
  const int32_t* table;
  int64_t page_rows;
};

// Where the rows of some keys and values lie.
template <class T>
struct Block {
  int64_t count = 0;
  const T *k[kBlock], *v[kBlock];

  // Those of `some` keys from `first` on, and up to `most` of any.
  void point(const Keys<T>& keys, int64_t first, int64_t some, int64_t most) {
    count = some;
    find(keys, first, some);
    std::fill(k + some, k + most, some ? k[some - 1] : keys.k);
    std::fill(v + some, v + most, some ? v[some - 1] : keys.v);
  }

 private:
  void find(const Keys<T>& keys, int64_t first, int64_t some) {
    if (!keys.table) {
      for (int64_t j = 0; j < some; ++j) {
        k[j] = keys.k + (first + j) * keys.k_row;
        v[j] = keys.v + (first + j) * keys.v_row;
      }
      return;
    }
    int64_t page = first / keys.page_rows, row = first % keys.page_rows;
    for (int64_t j = 0; j < some; ++page, row = 0) {
      const T* k_at = keys.k + keys.table[page] * keys.k_page;
      const T* v_at = keys.v + keys.table[page] * keys.v_page;
      for (; j < some && row < keys.page_rows; ++j, ++row) {
        k[j] = k_at + row * keys.k_row;
        v[j] = v_at + row * keys.v_row;
      }
    }
  }
};

// Of each row of a tile, not yet divided by `sum`: acc = sum of 2^(z - top) v, and the largest z.
struct Sums {
  float *acc, *top, *sum;
};

// Rows of a sequence times the query heads of a KV head, against some of its keys.
template <class T>
struct Tile {
  const T* q;
  Strides q_stride;
  int64_t rows, group, d;
  Keys<T> keys;
  int64_t first, last;  // keys
  int64_t block;        // keys at a time
  const Sight* sights;
  int64_t node0;  // the key that bit 0 of Sight::nodes stands for
  float factor, cap;
  Sums sums;
};

// The keys that a thread goes on to: `count` from `first` on.
template <class T>
struct Ahead {
  Keys<T> keys;
  int64_t first, count;
};

template <class T>
struct Output {
  T* out;
  Strides stride;
  float* lse;
  Strides lse_stride;
  int64_t rows, group, d;
};

// What the kernels keep beside their sums; `width` is D in whole vectors of units.
struct Scratch {
  float *q, *keys, *values, *scores, *part;
  Scratch(float* at, int64_t rows, int64_t width, int64_t block, int64_t rows_at_once)
      : q(at),
        keys(q + rows * width),
        values(keys + block * width),
        scores(values + block * width),
        part(scores + block * rows_at_once) {}
  static int64_t floats(int64_t rows, int64_t width, int64_t block, int64_t rows_at_once) {
    return rows * width + block * (2 * width + rows_at_once) + rows_at_once * width;
  }
};

// Which of up to 64 keys from k0 on a row sees.
inline uint64_t seen_keys(const Sight& sight, int64_t node0, int64_t k0, int64_t count) {
  const auto below = [](int64_t n) { return n <= 0 ? 0 : n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; };
  uint64_t seen = below(sight.high - k0) & ~below(sight.low - k0);
  const int64_t shift = node0 - k0;
  if (shift >= 0 && shift < 64) seen |= sight.nodes << shift;
  if (shift < 0 && shift > -64) seen |= sight.nodes >> -shift;
  return seen & below(count);
}

// Whether rows `from` ... `to` may see keys first ... last - 1.
template <class T>
bool any_seen(const Tile<T>& tile, int64_t from, int64_t to, int64_t first, int64_t last) {
  for (int64_t t = from; t <= to; ++t) {
    const Sight& s = tile.sights[t];
    if (std::max(s.low, first) < std::min(s.high, last)) return true;
    if (s.nodes && tile.node0 < last && tile.node0 + 64 > first) return true;
  }
  return false;
}

// The kernels for one instruction set and dtype.
template <class T>
struct Kernels {
  int64_t width, rows;  // of a vector of units, in elements; of a product in registers
  void (*attend)(const Tile<T>&, const Ahead<T>&, float* scratch);
  void (*finish)(const Output<T>&, const Sums&, int64_t parts, int64_t part_stride);
};

#define FO_KERNELS "common/cpu_attention_kernel.h"
#include "common/cpu_each_isa.h"

// A tile of rows and a chunk of the keys that they see, for every KV head.
struct Task {
  const Sequence* sequence;
  int64_t row, rows;    // of the sequence
  int64_t first, last;  // keys
  int64_t part, parts;  // of the tile
  int64_t slot;         // of the tile's first part among the partial sums
  int64_t work() const { return (last - first) * rows; }
};

// Tiles of `tile_rows` rows, and chunks of them where `split` or where a sequence has but one tile.
inline std::vector<Task> make_tasks(const Call& call, int64_t tile_rows, bool split, int64_t* slots) {
  std::vector<Task> tasks;
  tasks.reserve(call.sequences.size());
  *slots = 0;
  for (const Sequence& s : call.sequences) {
    for (int64_t row = 0; row < s.rows; row += tile_rows) {
      const int64_t rows = std::min(tile_rows, s.rows - row);
      int64_t first = INT64_MAX, last = 0;
      for (const Sight* sight = &call.sights[s.sights + row]; sight != &call.sights[s.sights + row] + rows; ++sight) {
        if (sight->low < sight->high) {
          first = std::min(first, sight->low);
          last = std::max(last, sight->high);
        }
        if (sight->nodes) {
          first = std::min(first, s.place + __builtin_ctzll(sight->nodes));
          last = std::max(last, s.place + 64 - __builtin_clzll(sight->nodes));
        }
      }
      first = std::clamp<int64_t>(first, 0, last);
      const int64_t chunk = split || s.rows <= tile_rows ? kChunk : std::max<int64_t>(last, 1), before = first / chunk;
      const int64_t parts = std::max<int64_t>(ceil_div(last, chunk) - before, 1);
      for (int64_t i = 0; i < parts; ++i) {
        tasks.push_back({&s, row, rows, std::max(first, (before + i) * chunk), std::min(last, (before + i + 1) * chunk),
                         i, parts, *slots});
      }
      if (parts > 1) *slots += parts;
    }
  }
  return tasks;
}

template <class T>
Keys<T> make_keys(const Call& call, const Sequence& s, int64_t head) {
  const int64_t cache = call.table ? 0 : s.cache;
  return {static_cast<const T*>(call.k) + cache * call.k_stride[0] + head * call.k_stride[1],
          static_cast<const T*>(call.v) + cache * call.v_stride[0] + head * call.v_stride[1],
          call.k_stride[2],
          call.v_stride[2],
          call.k_stride[0],
          call.v_stride[0],
          call.table ? call.table + s.cache * call.table_row : nullptr,
          call.page_rows};
}

template <class T>
Tile<T> make_tile(const Call& call, const Task& task, int64_t head) {
  const Sequence& s = *task.sequence;
  Tile<T> tile{};
  tile.q = static_cast<const T*>(call.q) + s.q + task.row * call.q_stride.row + head * call.group * call.q_stride.head;
  tile.q_stride = call.q_stride;
  tile.rows = task.rows;
  tile.group = call.group;
  tile.d = call.d;
  tile.keys = make_keys<T>(call, s, head);
  tile.first = task.first;
  tile.last = task.last;
  tile.sights = &call.sights[s.sights + task.row];
  tile.node0 = s.place;
  tile.factor = call.factor;
  tile.cap = call.cap;
  return tile;
}

template <class T>
Output<T> make_output(const Call& call, const Task& task, int64_t head) {
  const Sequence& s = *task.sequence;
  const int64_t first = head * call.group;
  return {static_cast<T*>(call.out) + s.out + task.row * call.out_stride.row + first * call.out_stride.head,
          call.out_stride,
          call.lse + s.lse + task.row * call.lse_stride.row + first * call.lse_stride.head,
          call.lse_stride,
          task.rows,
          call.group,
          call.d};
}

// `work(i, after)` for items 0 ... count - 1, each by the thread that is free first, which then knows what it does
// after that (`count`: nothing); `scratch` floats for each thread.
template <class F>
void take_items(int64_t count, int64_t threads, int64_t scratch, const F& work) {
  std::atomic<int64_t> taken{0};
  const auto loop = [&](int64_t, int64_t) {
    const ThreadBuffer buffer(scratch);
    const auto take = [&] { return std::min(taken.fetch_add(1, std::memory_order_relaxed), count); };
    for (int64_t i = take(), after; i < count; i = after) {
      after = take();
      work(i, after, buffer.get());
    }
  };
  threads > 1 ? torch::stable::parallel_for(0, threads, 1, loop) : loop(0, 1);
}

template <class T>
void run_as(const Call& call, bool split) {
  const Kernels<T> kernels = kernels_for<T>(active_isa);
  const int64_t tile_rows = std::max<int64_t>(kTileRows / call.group, 1);
  int64_t slots;
  std::vector<Task> tasks = make_tasks(call, tile_rows, split, &slots);
  double work = 0;
  int64_t most_rows = 0;
  for (const Task& t : tasks) {
    work += static_cast<double>((t.last - t.first) * call.d * (t.rows * call.group + 4) * call.kv_heads);
    most_rows = std::max(most_rows, t.rows * call.group);
  }
  const int64_t items = static_cast<int64_t>(tasks.size()) * call.kv_heads;
  const int64_t threads =
      work < 2 * kGrain
          ? 1
          : std::min<int64_t>({torch::stable::get_num_threads(), items, static_cast<int64_t>(work) / kGrain});
  if (threads > 1) {  // the longest first
    std::stable_sort(tasks.begin(), tasks.end(), [](const Task& a, const Task& b) { return a.work() > b.work(); });
  }

  const auto block = [&](int64_t rows) { return rows <= kernels.rows ? kFewBlock : kBlock; };
  const int64_t width = round_up(call.d, kernels.width);
  const int64_t sums = round_up(most_rows * (width + 2), 16);
  const auto sums_at = [&](float* at) { return Sums{at, at + most_rows * width, at + most_rows * (width + 1)}; };
  std::optional<Buffer> partial;
  if (slots) partial.emplace(slots * call.kv_heads * sums);
  const std::unique_ptr<std::atomic<int32_t>[]> done(slots ? new std::atomic<int32_t>[slots * call.kv_heads]()
                                                           : nullptr);
  take_items(items, threads, sums + Scratch::floats(most_rows, width, block(most_rows), kernels.rows),
             [&](int64_t i, int64_t after, float* own) {
               const Task& task = tasks[i / call.kv_heads];
               const int64_t head = i % call.kv_heads, first = head * slots + task.slot;
               const bool whole = task.parts == 1;
               Tile<T> tile = make_tile<T>(call, task, head);
               tile.block = block(task.rows * call.group);
               tile.sums = sums_at(whole ? own : partial->get() + (first + task.part) * sums);
               Ahead<T> ahead{tile.keys, tile.last, 0};
               if (after < items) {
                 const Task& then = tasks[after / call.kv_heads];
                 ahead = {make_keys<T>(call, *then.sequence, after % call.kv_heads), then.first,
                          then.last - then.first};
               }
               kernels.attend(tile, ahead, own + sums);
               if (!whole && done[first].fetch_add(1, std::memory_order_acq_rel) + 1 < task.parts) return;
               const Sums parts = whole ? tile.sums : sums_at(partial->get() + first * sums);
               kernels.finish(make_output<T>(call, task, head), parts, task.parts, sums);
             });
}

// Instantiated in csrc/cpu/decode_attn.cpp, once for both ops.
extern template void run_as<float>(const Call&, bool);
extern template void run_as<Half>(const Call&, bool);
extern template void run_as<BFloat16>(const Call&, bool);

// `split`: chunks of every tile's keys are items of their own.
inline void run(const Call& call, ScalarType type, bool split) {
  dispatch_float(type, [&](auto zero) { run_as<decltype(zero)>(call, split); });
}

}  // namespace fastops::attention
