// The C interface that Python binds with ctypes. Functions return null or 0 where they fail.
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "pack.h"
#include "pool.h"
#include "program.h"

#define PUNA_API extern "C" __attribute__((visibility("default")))

namespace {

// Instruction sets that this library has and this processor runs, best first.
std::vector<const Kernels*> usable_kernels() {
  std::vector<const Kernels*> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  [[maybe_unused]] const bool has_avx2 = __builtin_cpu_supports("avx2") &&
                                         __builtin_cpu_supports("fma") &&
                                         __builtin_cpu_supports("f16c");
  [[maybe_unused]] const bool has_avx512 =
      has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#if defined(PUNA_HAS_VNNI)
  if (has_avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16"))
    found.push_back(vnni_kernels());
#endif
#if defined(PUNA_HAS_AVX512)
  if (has_avx512) found.push_back(avx512_kernels());
#endif
#if defined(PUNA_HAS_AVX2)
  if (has_avx2) found.push_back(avx2_kernels());
#endif
#endif
  found.push_back(portable_kernels());
  return found;
}

const Kernels* kernels_named(const char* name) {
  for (const Kernels* kernels : usable_kernels())
    if (std::strcmp(kernels->name, name) == 0) return kernels;
  return nullptr;
}

// Whether `action` went through; nothing may be thrown into ctypes.
template <class Action>
int succeeds(Action action) {
  try {
    action();
    return 1;
  } catch (...) {
    return 0;
  }
}

}  // namespace

PUNA_API const char* puna_source_digest() { return PUNA_SOURCE_DIGEST; }

// Names of the usable instruction sets, best first, separated by commas.
PUNA_API const char* puna_instruction_sets() {
  static const std::string names = [] {
    std::string joined;
    for (const Kernels* kernels : usable_kernels())
      joined += (joined.empty() ? "" : ",") + std::string(kernels->name);
    return joined;
  }();
  return names.c_str();
}

PUNA_API Machine* puna_machine_new(int num_threads, const char* instruction_set) {
  const Kernels* kernels = kernels_named(instruction_set);
  if (!kernels || num_threads < 1) return nullptr;
  Machine* made = nullptr;
  succeeds([&] { made = new Machine(num_threads, kernels); });
  return made;
}
PUNA_API void puna_machine_free(Machine* machine) { delete machine; }

PUNA_API Program* puna_program_new(Machine* machine, const Scratch* scratch) {
  Program* made = nullptr;
  succeeds([&] { made = new Program(machine, *scratch); });
  return made;
}
PUNA_API void puna_program_free(Program* program) { delete program; }

PUNA_API int puna_program_embed(Program* program, const int32_t* token_ids_T, const Linear* table,
                                const Stream* x) {
  return succeeds([&] { program->embed(token_ids_T, *table, *x); });
}
PUNA_API int puna_program_qkv(Program* program, const Stream* x, const Norm* norm,
                              const Linear* linear, const Rope* rope, const Batch* batch,
                              const Cache* cache, float* q_TQ, int num_heads) {
  return succeeds(
      [&] { program->qkv(*x, *norm, *linear, *rope, *batch, *cache, q_TQ, num_heads); });
}
PUNA_API int puna_program_attention(Program* program, const float* q_TQ, int num_heads,
                                    const Batch* batch, const Cache* cache, const Linear* out,
                                    const Stream* x) {
  return succeeds([&] { program->attention(q_TQ, num_heads, *batch, *cache, *out, *x); });
}
PUNA_API int puna_program_gate_up(Program* program, const Stream* x, const Norm* norm,
                                  const Linear* linear, float* act_TF) {
  return succeeds([&] { program->gate_up(*x, *norm, *linear, act_TF); });
}
PUNA_API int puna_program_down(Program* program, const float* act_TF, const Linear* linear,
                               const Stream* x) {
  return succeeds([&] { program->down(act_TF, *linear, *x); });
}
PUNA_API int puna_program_head(Program* program, const Stream* x, const int32_t* rows_L,
                               int num_rows, const Norm* norm, const Linear* linear,
                               float* logits_LV, int64_t stride) {
  return succeeds([&] { program->head(*x, rows_L, num_rows, *norm, *linear, logits_LV, stride); });
}
PUNA_API int puna_program_end(Program* program) {
  return succeeds([&] { program->end(); });
}
PUNA_API int puna_program_run(Program* program) {
  return succeeds([&] { program->run(); });
}

PUNA_API void puna_pack_words(const void* x, int64_t num_rows, int64_t row_bytes, int64_t num_words,
                              void* out) {
  pack_words(x, num_rows, row_bytes, num_words, out);
}
PUNA_API void puna_pack_integers(const void* q, int bits, int has_min, int64_t num_rows,
                                 int64_t num_cols, void* out) {
  pack_integers(q, bits, has_min != 0, num_rows, num_cols, out);
}
PUNA_API void puna_pack_halves(const void* x, int64_t num_rows, int64_t num_cols, void* out) {
  pack_halves(x, num_rows, num_cols, out);
}

// Float32 rows to int8 numbers and float32 scales, as puna.quant.quantize.
PUNA_API void puna_quantize(const float* x, int64_t num_rows, int num_cols, int group, int limit,
                            int scale_f32, int8_t* q, float* scales) {
  static const Kernels* const best = usable_kernels().front();
  const int64_t groups = group ? (num_cols + group - 1) / group : 1;
  for (int64_t row = 0; row < num_rows; ++row)
    best->quantize(x + row * num_cols, num_cols, group, limit, scale_f32, q + row * num_cols,
                   scales + row * groups);
}

// Read bandwidth in GB/s: all threads over one buffer of num_bytes, best of `rounds`; 0 where the
// memory cannot be had.
PUNA_API double puna_read_bandwidth(int num_threads, int64_t num_bytes, int rounds) {
  if (num_threads < 1) return 0;
  void* buffer = mmap(nullptr, static_cast<size_t>(num_bytes), PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (buffer == MAP_FAILED) return 0;
#if defined(MADV_HUGEPAGE)
  madvise(buffer, static_cast<size_t>(num_bytes), MADV_HUGEPAGE);
#endif
  double best = 0;
  succeeds([&] {
    Pool pool(num_threads);
    const Kernels* kernels = usable_kernels().front();
    auto* const bytes = static_cast<unsigned char*>(buffer);
    std::atomic<uint64_t> sink{0};
    const int64_t share = num_bytes / num_threads / 4096 * 4096;
    pool.run([&](int thread) {
      std::memset(bytes + thread * share, thread + 1, static_cast<size_t>(share));
    });
    for (int round = 0; round < rounds; ++round) {
      const auto start = std::chrono::steady_clock::now();
      pool.run([&](int thread) { sink += kernels->read(bytes + thread * share, share); });
      const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
      const double rate = static_cast<double>(share * num_threads) / seconds.count() / 1e9;
      if (rate > best) best = rate;
    }
  });
  munmap(buffer, static_cast<size_t>(num_bytes));
  return best;
}
