// The pool by itself, for ThreadSanitizer: plain memory that jobs hand to each other and to the
// caller, so that whatever the pool does not order is a data race. Exits with 1 on a wrong number.
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "pool.h"

namespace {

void check(bool is_right, const char* what) {
  if (is_right) return;
  std::fprintf(stderr, "wrong: %s\n", what);
  std::exit(1);
}

// The caller writes, each thread adds, the caller reads: ordered by run() alone, no barrier.
void hand_over(Pool& pool, int num_jobs, int pause_ms) {
  std::vector<long> numbers(static_cast<size_t>(pool.num_threads()));
  for (int job = 1; job <= num_jobs; ++job) {
    for (long& number : numbers) number += 1;
    pool.run([&](int thread) { numbers[static_cast<size_t>(thread)] += 1; });
    for (long number : numbers) check(number == 2 * job, "a number after run()");
    if (pause_ms) std::this_thread::sleep_for(std::chrono::milliseconds(pause_ms));
  }
}

// Each thread reads what its neighbour wrote before the barrier.
void exchange(Pool& pool, int num_rounds) {
  const int n = pool.num_threads();
  std::vector<long> from(static_cast<size_t>(n)), to(from);
  pool.run([&](int thread) {
    for (int round = 0; round < num_rounds; ++round) {
      from[static_cast<size_t>(thread)] = round;
      pool.barrier();
      to[static_cast<size_t>(thread)] += from[static_cast<size_t>((thread + 1) % n)];
      pool.barrier();
    }
  });
  for (long sum : to) check(sum == long{num_rounds} * (num_rounds - 1) / 2, "a sum of rounds");
}

// share() hands out every number once, whatever the count and grain, phase after phase.
void share(Pool& pool) {
  for (int count : {0, 1, 2, 7, 64, 1001}) {
    for (int grain : {1, 3, 64}) {
      std::vector<int> met(static_cast<size_t>(count));
      pool.run([&](int thread) {
        for (int phase = 0; phase < 3; ++phase) {
          pool.share(thread, count, grain, [&](int64_t first, int64_t last) {
            check(first < last && last - first <= grain, "a share");
            for (int64_t i = first; i < last; ++i) met[static_cast<size_t>(i)] += 1;
          });
          pool.barrier();
        }
      });
      for (int times : met) check(times == 3, "how often share() gave a number");
    }
  }
}

}  // namespace

extern "C" int pool_race() {
  for (int num_threads = 1; num_threads <= 4; ++num_threads) {
    Pool pool(num_threads);
    hand_over(pool, 200, 0);
    exchange(pool, 100);
    share(pool);
    hand_over(pool, 12, 5);   // about what a thread lingers: parks just as it is called
    hand_over(pool, 6, 15);   // well beyond: parked
  }
  for (int turn = 0; turn < 40; ++turn) {
    Pool first(1 + turn % 4), second(3);
    if (turn % 2) hand_over(first, 1, 0);
    if (turn % 5 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(turn % 10 ? 6 : 15));
    if (turn % 3) hand_over(second, 2, 0);
  }
  return 0;
}
