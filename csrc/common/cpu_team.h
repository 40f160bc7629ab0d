// Many short parallel steps in one parallel region. A region for each would wake and join the threads each time, and
// where cores are shared a join waits for whoever lost its core, for milliseconds. Here a step's units are taken by
// whoever is running: the leader takes all of them if no helper shows up, and waits for units that were taken, no more.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <atomic>
#include <thread>

namespace fastops {

class Team {
 public:
  // Runs `lead(team)` in the calling thread, with torch's other threads as helpers of team.run().
  template <class Lead>
  static void work(Lead&& lead) {
    Team team;
    const int64_t threads = torch::stable::get_num_threads();
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t) {
      if (begin > 0) return team.help();
      try {
        lead(team);
      } catch (...) {
        team.finished_ = true;
        throw;
      }
      team.finished_ = true;
    });
  }

  // step(unit) for unit 0 ... units - 1, in any order, by anyone; returns when all are done. step does not throw.
  template <class Step>
  void run(int64_t units, const Step& step) {
    if (units <= 1) {
      if (units == 1) step(int64_t{0});
      return;
    }
    step_ = &step;
    call_ = [](const void* s, int64_t unit) { (*static_cast<const Step*>(s))(unit); };
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(static_cast<uint64_t>(units) << 32, std::memory_order_release);
    while (take()) {
    }
    Patience patience;
    while (done_.load(std::memory_order_acquire) < units) patience.wait();
  }

 private:
  // First the processor is kept, then offered to the others: one of them may be what is waited for.
  class Patience {
   public:
    void wait() {
      if (++turns_ < 256) {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      } else {
        std::this_thread::yield();
      }
    }

   private:
    int turns_ = 0;
  };

  // A ticket holds how many units there are (high word) and the next one to take (low word), so that what is taken
  // is always of the step that is under way.
  bool take() {
    const auto open = [](uint64_t ticket) { return (ticket & 0xffffffffu) < ticket >> 32; };
    if (!open(ticket_.load(std::memory_order_acquire))) return false;
    const uint64_t mine = ticket_.fetch_add(1, std::memory_order_acq_rel);
    if (!open(mine)) return false;
    call_(step_, static_cast<int64_t>(mine & 0xffffffffu));
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void help() {
    Patience patience;
    while (!finished_.load(std::memory_order_acquire)) {
      if (take()) {
        patience = Patience();
      } else {
        patience.wait();
      }
    }
  }

  const void* step_ = nullptr;
  void (*call_)(const void*, int64_t) = nullptr;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  std::atomic<bool> finished_{false};
};

}  // namespace fastops
