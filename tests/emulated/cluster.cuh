// csrc/cluster.cuh without a GPU.
#pragma once
#include "sm90.cuh"

inline u32 cluster_rank() { return machine.self->cta->rank; }
// One meeting of all threads of two CTAs: who arrives goes on, who waits does so until all have arrived.
inline void cluster_arrive() {
  Meeting& m = *machine.self->cta->cluster;
  ++machine.progress;
  if (++m.count % (2 * machine.block.x) == 0) ++m.generation;
}
inline void cluster_wait() {
  // The n-th wait of a CTA's threads is over when the n-th meeting is.
  auto& waits = machine.self->cta->barriers[-1 - threadIdx.x].generation;
  Meeting& m = *machine.self->cta->cluster;
  const unsigned mine = ++waits;
  machine.wait([&] { return m.generation >= mine; });
}
inline u32 remote(u32 addr, u32 rank) { return (addr & 0xffffff) | (rank + 1) << 24; }
inline void send(u32 to, float4 v, u32 bar) {
  auto* place = reinterpret_cast<float4*>(at(to));
  Barrier* b = &barrier(bar);
  machine.copies.emplace_back(machine.random() % 8, [=] {
    *place = v;
    b->receive(16);
  });
}
inline void arrive_remotely(u32 bar) { barrier(bar).arrive(0); }
