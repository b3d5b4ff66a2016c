// A pool of threads that run one job together: phase after phase, with barriers between.
//
// Within a job threads spin at barriers, and between jobs for a moment (a decode loop comes back at
// once); after that they park and use no processor. The caller is thread 0.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

class Pool {
 public:
  explicit Pool(int num_threads);
  ~Pool();
  Pool(const Pool&) = delete;
  Pool& operator=(const Pool&) = delete;

  int num_threads() const { return num_threads_; }

  // Run job(thread) on every thread and return when all have ended. One job at a time; jobs must
  // not throw.
  void run(const std::function<void(int)>& job);

  // Wait until every thread of the job has arrived. What was written before is seen after.
  void barrier();

  // Call work(first, last) for parts of [0, count), each number once, from whichever thread comes:
  // every thread begins with a contiguous share and helps the others when it has done. Parts are of
  // `grain` numbers, or of up to `most` times as many while much of a share is left. At most once
  // between two barriers.
  template <class Work>
  void share(int thread, int64_t count, int64_t grain, Work work, int64_t most = 1) {
    const int64_t steps = (count + grain - 1) / grain;
    for (int i = 0; i < num_threads_; ++i) {
      const int owner = (thread + i) % num_threads_;
      const int64_t first = steps * owner / num_threads_, last = steps * (owner + 1) / num_threads_;
      std::atomic<int64_t>& taken = cursors_[owner].taken;
      for (;;) {
        // Look before taking, so that the cursors of finished shares are only read.
        const int64_t left = last - first - taken.load(std::memory_order_relaxed);
        if (left <= 0) break;
        const int64_t wanted = std::max<int64_t>(1, std::min(most, left / 4));
        const int64_t step = first + taken.fetch_add(wanted, std::memory_order_relaxed);
        if (step >= last) break;
        work(step * grain, std::min(std::min(step + wanted, last) * grain, count));
      }
    }
  }

 private:
  struct alignas(64) Cursor {
    std::atomic<int64_t> taken{0};
  };

  void work(int thread);
  void reset_cursors();
  void end_threads();

  const int num_threads_;
  std::unique_ptr<Cursor[]> cursors_;
  const std::function<void(int)>* job_ = nullptr;
  alignas(64) std::atomic<uint64_t> job_number_{0};
  alignas(64) std::atomic<int> unfinished_{0};
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<uint64_t> barrier_number_{0};
  std::atomic<int> parked_{0};
  std::atomic<bool> is_ending_{false};
  std::mutex mutex_;
  std::condition_variable wake_;
  std::vector<std::thread> threads_;
};
