#include "pool.h"

#include <chrono>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// Spins before the processor is offered to others: about 20 us (Zen 4, 2026-11). Threads that share
// a processor would otherwise wait for each other's time slice.
constexpr int SPINS_BEFORE_YIELD = 500;
// How long an idle thread looks for the next job before it parks. A step's planning and sampling
// take well under a millisecond.
constexpr std::chrono::milliseconds LINGER{5};

template <class Condition>
void spin_until(Condition is_met) {
  for (int n = 0; !is_met(); ++n) {
    if (n < SPINS_BEFORE_YIELD)
      pause();
    else
      std::this_thread::yield();
  }
}

}  // namespace

Pool::Pool(int num_threads)
    : num_threads_(num_threads), cursors_(new Cursor[static_cast<size_t>(num_threads)]) {
  try {
    for (int thread = 1; thread < num_threads; ++thread)
      threads_.emplace_back([this, thread] { work(thread); });
  } catch (...) {  // the system has no more threads: end those that were made
    end_threads();
    throw;
  }
}

Pool::~Pool() { end_threads(); }

void Pool::end_threads() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    is_ending_ = true;
  }
  wake_.notify_all();
  for (std::thread& thread : threads_) thread.join();
}

void Pool::run(const std::function<void(int)>& job) {
  reset_cursors();
  job_ = &job;
  unfinished_.store(num_threads_ - 1, std::memory_order_relaxed);
  job_number_.fetch_add(1, std::memory_order_seq_cst);
  if (parked_.load(std::memory_order_seq_cst) > 0) {
    std::lock_guard<std::mutex> lock(mutex_);
    wake_.notify_all();
  }
  job(0);
  spin_until([&] { return unfinished_.load(std::memory_order_acquire) == 0; });
}

void Pool::barrier() {
  const uint64_t number = barrier_number_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    reset_cursors();
    barrier_number_.store(number + 1, std::memory_order_release);
    return;
  }
  spin_until([&] { return barrier_number_.load(std::memory_order_acquire) != number; });
}

void Pool::reset_cursors() {
  for (int i = 0; i < num_threads_; ++i) cursors_[i].taken.store(0, std::memory_order_relaxed);
}

void Pool::work(int thread) {
  uint64_t seen = 0;
  for (;;) {
    const auto is_called = [&] {
      return job_number_.load(std::memory_order_seq_cst) != seen || is_ending_.load();
    };
    const auto deadline = std::chrono::steady_clock::now() + LINGER;
    for (int n = 0; !is_called(); ++n) {
      if (n < SPINS_BEFORE_YIELD) {
        pause();
        continue;
      }
      std::this_thread::yield();
      if (n % 64 == 0 && std::chrono::steady_clock::now() > deadline) {
        std::unique_lock<std::mutex> lock(mutex_);
        parked_.fetch_add(1, std::memory_order_seq_cst);
        wake_.wait(lock, is_called);
        parked_.fetch_sub(1, std::memory_order_seq_cst);
      }
    }
    if (is_ending_) return;
    seen = job_number_.load(std::memory_order_acquire);
    (*job_)(thread);
    unfinished_.fetch_sub(1, std::memory_order_release);
  }
}
