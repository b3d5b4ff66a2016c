// Sixteen lanes of float32 or int32, whatever the width of the machine's registers.
//
// Every kernel is written once against F16 and I16 and compiled once for each instruction set,
// which differ only in this file. Everything lies in an anonymous namespace and uses no templates
// of the standard library: a function that two of these compilations shared could be merged by the
// linker into the one that needs the newer processor.
//
// fma is one rounding where the instruction exists and two elsewhere; nothing else differs between
// instruction sets but the dot products of bfloat16 (dot_bf16).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define PUNA_AVX512 1
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define PUNA_AVX2 1
#endif
#if defined(PUNA_AVX512) && defined(__AVX512VNNI__) && defined(__AVX512BF16__)
#define PUNA_VNNI 1
#endif

#define PUNA_INLINE inline __attribute__((always_inline))

namespace {

constexpr int LANES = 16;

// ---- one register: VF floats, VI int32; NV of them make sixteen lanes
// ----------------------------

#if defined(PUNA_AVX512)

typedef __m512 VF;
typedef __m512i VI;
constexpr int NV = 1;

PUNA_INLINE VF vload(const float* p) { return _mm512_loadu_ps(p); }
PUNA_INLINE void vstore(float* p, VF x) { _mm512_storeu_ps(p, x); }
PUNA_INLINE VF vsplat(float x) { return _mm512_set1_ps(x); }
PUNA_INLINE VF vadd(VF a, VF b) { return _mm512_add_ps(a, b); }
PUNA_INLINE VF vsub(VF a, VF b) { return _mm512_sub_ps(a, b); }
PUNA_INLINE VF vmul(VF a, VF b) { return _mm512_mul_ps(a, b); }
PUNA_INLINE VF vdiv(VF a, VF b) { return _mm512_div_ps(a, b); }
PUNA_INLINE VF vfma(VF a, VF b, VF c) { return _mm512_fmadd_ps(a, b, c); }
PUNA_INLINE VF vmax(VF a, VF b) { return _mm512_max_ps(a, b); }
PUNA_INLINE VF vmin(VF a, VF b) { return _mm512_min_ps(a, b); }
PUNA_INLINE VF vabs(VF a) { return _mm512_abs_ps(a); }
PUNA_INLINE VF vzero_below(VF x, VF at, VF low) {  // x where at >= low, else 0
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(at, low, _CMP_NLT_UQ), x);
}
PUNA_INLINE VI viload(const void* p) { return _mm512_loadu_si512(p); }
PUNA_INLINE VI visplat(int32_t x) { return _mm512_set1_epi32(x); }
PUNA_INLINE VI viadd(VI a, VI b) { return _mm512_add_epi32(a, b); }
PUNA_INLINE VI visub(VI a, VI b) { return _mm512_sub_epi32(a, b); }
PUNA_INLINE VI vishl(VI a, int n) { return _mm512_slli_epi32(a, n); }
PUNA_INLINE VF vcvt(VI x) { return _mm512_cvtepi32_ps(x); }
PUNA_INLINE VI vround(VF x) { return _mm512_cvtps_epi32(x); }
PUNA_INLINE VF vbits(VI x) { return _mm512_castsi512_ps(x); }
PUNA_INLINE VF vload_half(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
}
PUNA_INLINE VF vload_bf16(const uint16_t* p) {
  return vbits(vishl(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16));
}
PUNA_INLINE VF vload_i8(const int8_t* p) {
  return vcvt(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
PUNA_INLINE void vstore_half(uint16_t* p, VF x) {
  _mm256_storeu_si256((__m256i*)p, _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
PUNA_INLINE void vstore_i8(int8_t* p, VI x) {
  _mm_storeu_si128((__m128i*)p, _mm512_cvtepi32_epi8(x));
}
PUNA_INLINE VF veven_bf16(VI x) { return vbits(vishl(x, 16)); }
PUNA_INLINE VF vodd_bf16(VI x) { return vbits(_mm512_and_si512(x, visplat((int)0xffff0000))); }
PUNA_INLINE float vsum(VF x) { return _mm512_reduce_add_ps(x); }
PUNA_INLINE int32_t visum(VI x) { return _mm512_reduce_add_epi32(x); }
PUNA_INLINE float vlargest(VF x) { return _mm512_reduce_max_ps(x); }
PUNA_INLINE VF veven_half(VI x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
PUNA_INLINE VF vodd_half(VI x) { return veven_half(_mm512_srli_epi32(x, 16)); }
PUNA_INLINE VI vlow4(VI x) { return _mm512_and_si512(x, _mm512_set1_epi8(15)); }
PUNA_INLINE VI vhigh4(VI x) {
  return _mm512_and_si512(_mm512_srli_epi16(x, 4), _mm512_set1_epi8(15));
}
#if defined(PUNA_VNNI)
typedef __m512i VX;  // four signed bytes in every lane
PUNA_INLINE VX vfour(int32_t x) { return _mm512_set1_epi32(x); }
PUNA_INLINE VI vdot4(VI acc, VI w, VX x) { return _mm512_dpbusd_epi32(acc, w, x); }
#else
struct VX {
  __m512i even, odd;
};
PUNA_INLINE VX vfour(int32_t x) {
  VI v = _mm512_set1_epi32(x);
  return {_mm512_srai_epi16(_mm512_slli_epi16(v, 8), 8), _mm512_srai_epi16(v, 8)};
}
PUNA_INLINE VI vdot4(VI acc, VI w, VX x) {
  VI even = _mm512_and_si512(w, _mm512_set1_epi16(255)), odd = _mm512_srli_epi16(w, 8);
  acc = _mm512_add_epi32(acc, _mm512_madd_epi16(even, x.even));
  return _mm512_add_epi32(acc, _mm512_madd_epi16(odd, x.odd));
}
#endif

#elif defined(PUNA_AVX2)

typedef __m256 VF;
typedef __m256i VI;
constexpr int NV = 2;

PUNA_INLINE VF vload(const float* p) { return _mm256_loadu_ps(p); }
PUNA_INLINE void vstore(float* p, VF x) { _mm256_storeu_ps(p, x); }
PUNA_INLINE VF vsplat(float x) { return _mm256_set1_ps(x); }
PUNA_INLINE VF vadd(VF a, VF b) { return _mm256_add_ps(a, b); }
PUNA_INLINE VF vsub(VF a, VF b) { return _mm256_sub_ps(a, b); }
PUNA_INLINE VF vmul(VF a, VF b) { return _mm256_mul_ps(a, b); }
PUNA_INLINE VF vdiv(VF a, VF b) { return _mm256_div_ps(a, b); }
PUNA_INLINE VF vfma(VF a, VF b, VF c) { return _mm256_fmadd_ps(a, b, c); }
PUNA_INLINE VF vmax(VF a, VF b) { return _mm256_max_ps(a, b); }
PUNA_INLINE VF vmin(VF a, VF b) { return _mm256_min_ps(a, b); }
PUNA_INLINE VF vabs(VF a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
PUNA_INLINE VF vzero_below(VF x, VF at, VF low) {
  return _mm256_and_ps(_mm256_cmp_ps(at, low, _CMP_NLT_UQ), x);
}
PUNA_INLINE VI viload(const void* p) { return _mm256_loadu_si256((const __m256i*)p); }
PUNA_INLINE VI visplat(int32_t x) { return _mm256_set1_epi32(x); }
PUNA_INLINE VI viadd(VI a, VI b) { return _mm256_add_epi32(a, b); }
PUNA_INLINE VI visub(VI a, VI b) { return _mm256_sub_epi32(a, b); }
PUNA_INLINE VI vishl(VI a, int n) { return _mm256_slli_epi32(a, n); }
PUNA_INLINE VF vcvt(VI x) { return _mm256_cvtepi32_ps(x); }
PUNA_INLINE VI vround(VF x) { return _mm256_cvtps_epi32(x); }
PUNA_INLINE VF vbits(VI x) { return _mm256_castsi256_ps(x); }
PUNA_INLINE VF vload_half(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
}
PUNA_INLINE VF vload_bf16(const uint16_t* p) {
  return vbits(vishl(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16));
}
PUNA_INLINE VF vload_i8(const int8_t* p) {
  return vcvt(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
}
PUNA_INLINE void vstore_half(uint16_t* p, VF x) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT));
}
PUNA_INLINE void vstore_i8(int8_t* p, VI x) {
  __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  _mm_storel_epi64((__m128i*)p, _mm_packs_epi16(words, words));
}
PUNA_INLINE VF veven_bf16(VI x) { return vbits(vishl(x, 16)); }
PUNA_INLINE VF vodd_bf16(VI x) { return vbits(_mm256_and_si256(x, visplat((int)0xffff0000))); }
PUNA_INLINE VF vodd_half(VI x) {
  __m256i words = _mm256_srli_epi32(x, 16);
  words = _mm256_permute4x64_epi64(_mm256_packus_epi32(words, words), 0x08);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(words));
}
PUNA_INLINE VF veven_half(VI x) { return vodd_half(vishl(x, 16)); }
PUNA_INLINE VI vlow4(VI x) { return _mm256_and_si256(x, _mm256_set1_epi8(15)); }
PUNA_INLINE VI vhigh4(VI x) {
  return _mm256_and_si256(_mm256_srli_epi16(x, 4), _mm256_set1_epi8(15));
}
struct VX {
  __m256i even, odd;
};
PUNA_INLINE VX vfour(int32_t x) {
  VI v = _mm256_set1_epi32(x);
  return {_mm256_srai_epi16(_mm256_slli_epi16(v, 8), 8), _mm256_srai_epi16(v, 8)};
}
PUNA_INLINE VI vdot4(VI acc, VI w, VX x) {
  VI even = _mm256_and_si256(w, _mm256_set1_epi16(255)), odd = _mm256_srli_epi16(w, 8);
  acc = _mm256_add_epi32(acc, _mm256_madd_epi16(even, x.even));
  return _mm256_add_epi32(acc, _mm256_madd_epi16(odd, x.odd));
}

#else  // any 64-bit machine: four lanes, which compilers turn into SSE2 or NEON

typedef float VF __attribute__((vector_size(16)));
typedef int32_t VI __attribute__((vector_size(16)));
constexpr int NV = 4;

PUNA_INLINE VF vload(const float* p) {
  VF x;
  memcpy(&x, p, sizeof x);
  return x;
}
PUNA_INLINE void vstore(float* p, VF x) { memcpy(p, &x, sizeof x); }
PUNA_INLINE VF vsplat(float x) { return VF{x, x, x, x}; }
PUNA_INLINE VF vadd(VF a, VF b) { return a + b; }
PUNA_INLINE VF vsub(VF a, VF b) { return a - b; }
PUNA_INLINE VF vmul(VF a, VF b) { return a * b; }
PUNA_INLINE VF vdiv(VF a, VF b) { return a / b; }
PUNA_INLINE VF vfma(VF a, VF b, VF c) { return a * b + c; }
// As x86's instructions: b where either is NaN.
PUNA_INLINE VF vmax(VF a, VF b) { return a > b ? a : b; }
PUNA_INLINE VF vmin(VF a, VF b) { return a < b ? a : b; }
PUNA_INLINE VF vbits(VI x) { return (VF)x; }
PUNA_INLINE VF vabs(VF a) { return (VF)((VI)a & 0x7fffffff); }
PUNA_INLINE VF vzero_below(VF x, VF at, VF low) { return at < low ? x - x : x; }
PUNA_INLINE VI viload(const void* p) {
  VI x;
  memcpy(&x, p, sizeof x);
  return x;
}
PUNA_INLINE VI visplat(int32_t x) { return VI{x, x, x, x}; }
PUNA_INLINE VI viadd(VI a, VI b) { return a + b; }
PUNA_INLINE VI visub(VI a, VI b) { return a - b; }
PUNA_INLINE VI vishl(VI a, int n) { return a << n; }
PUNA_INLINE VF vcvt(VI x) { return __builtin_convertvector(x, VF); }
PUNA_INLINE VI vround(VF x) {  // to nearest, ties to even, for |x| < 2^22
  const VF magic = vsplat(12582912.0f);
  return (VI)(x + magic) - (VI)magic;
}
PUNA_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, fraction = h & 1023;
  float value;
  if (exponent == 0) {
    value = (float)fraction * 5.9604644775390625e-8f;  // 2^-24
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bits |= sign;
    memcpy(&value, &bits, 4);
    return value;
  }
  uint32_t bits = sign | (exponent == 31 ? 0x7f800000 : (exponent + 112) << 23) | fraction << 13;
  memcpy(&value, &bits, 4);
  return value;
}
PUNA_INLINE uint16_t float_to_half(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return (uint16_t)(sign | 0x7e00);
  if (magnitude >= 0x477ff000) return (uint16_t)(sign | 0x7c00);
  if (magnitude < 0x38800000) {  // subnormal: let the addition round
    float small, half = 0.5f;
    memcpy(&small, &magnitude, 4);
    small += half;
    uint32_t rounded, base;
    memcpy(&rounded, &small, 4);
    memcpy(&base, &half, 4);
    return (uint16_t)(sign | (rounded - base));
  }
  magnitude += 0xfff + ((magnitude >> 13) & 1);
  return (uint16_t)(sign | ((magnitude - 0x38000000) >> 13));
}
PUNA_INLINE VF vload_half(const uint16_t* p) {
  return VF{half_to_float(p[0]), half_to_float(p[1]), half_to_float(p[2]), half_to_float(p[3])};
}
PUNA_INLINE VF vload_bf16(const uint16_t* p) {
  return vbits(VI{(int)((uint32_t)p[0] << 16), (int)((uint32_t)p[1] << 16),
                  (int)((uint32_t)p[2] << 16), (int)((uint32_t)p[3] << 16)});
}
PUNA_INLINE VF vload_i8(const int8_t* p) { return vcvt(VI{p[0], p[1], p[2], p[3]}); }
PUNA_INLINE void vstore_half(uint16_t* p, VF x) {
  for (int i = 0; i < 4; ++i) p[i] = float_to_half(x[i]);
}
PUNA_INLINE void vstore_i8(int8_t* p, VI x) {
  for (int i = 0; i < 4; ++i) p[i] = (int8_t)x[i];
}
PUNA_INLINE VF veven_bf16(VI x) { return vbits(x << 16); }
PUNA_INLINE VF vodd_bf16(VI x) { return vbits(x & (int)0xffff0000); }
PUNA_INLINE VF veven_half(VI x) {
  return VF{half_to_float((uint16_t)x[0]), half_to_float((uint16_t)x[1]),
            half_to_float((uint16_t)x[2]), half_to_float((uint16_t)x[3])};
}
PUNA_INLINE VF vodd_half(VI x) { return veven_half(x >> 16); }
PUNA_INLINE VI vlow4(VI x) { return x & 0x0f0f0f0f; }
PUNA_INLINE VI vhigh4(VI x) { return (x >> 4) & 0x0f0f0f0f; }
#if defined(__SSE2__)
struct VX {
  __m128i even, odd;
};
PUNA_INLINE VX vfour(int32_t x) {
  __m128i v = _mm_set1_epi32(x);
  return {_mm_srai_epi16(_mm_slli_epi16(v, 8), 8), _mm_srai_epi16(v, 8)};
}
PUNA_INLINE VI vdot4(VI acc, VI w, VX x) {
  __m128i even = _mm_and_si128((__m128i)w, _mm_set1_epi16(255));
  __m128i odd = _mm_srli_epi16((__m128i)w, 8);
  return acc + (VI)_mm_madd_epi16(even, x.even) + (VI)_mm_madd_epi16(odd, x.odd);
}
#else
typedef VI VX;
PUNA_INLINE VX vfour(int32_t x) { return visplat(x); }
PUNA_INLINE VI vdot4(VI acc, VI w, VX x) {
  for (int byte = 0; byte < 4; ++byte) {
    VI unsigned_byte = (w >> (8 * byte)) & 255;
    VI signed_byte = (x << (24 - 8 * byte)) >> 24;
    acc += unsigned_byte * signed_byte;
  }
  return acc;
}
#endif

#endif

// ---- sixteen lanes ------------------------------------------------------------------------------

struct F16 {
  VF v[NV];
};
struct I16 {
  VI v[NV];
};
struct X16 {
  VX v;
};
constexpr int WIDTH = LANES / NV;

#define PUNA_EACH(i) for (int i = 0; i < NV; ++i)

PUNA_INLINE F16 splat(float x) {
  F16 r;
  PUNA_EACH(i) r.v[i] = vsplat(x);
  return r;
}
PUNA_INLINE F16 load(const float* p) {
  F16 r;
  PUNA_EACH(i) r.v[i] = vload(p + i * WIDTH);
  return r;
}
PUNA_INLINE F16 load_half(const uint16_t* p) {
  F16 r;
  PUNA_EACH(i) r.v[i] = vload_half(p + i * WIDTH);
  return r;
}
PUNA_INLINE F16 load_bf16(const uint16_t* p) {
  F16 r;
  PUNA_EACH(i) r.v[i] = vload_bf16(p + i * WIDTH);
  return r;
}
PUNA_INLINE F16 load_i8(const int8_t* p) {
  F16 r;
  PUNA_EACH(i) r.v[i] = vload_i8(p + i * WIDTH);
  return r;
}
PUNA_INLINE void store(float* p, F16 x) { PUNA_EACH(i) vstore(p + i * WIDTH, x.v[i]); }
PUNA_INLINE void store_half(uint16_t* p, F16 x) { PUNA_EACH(i) vstore_half(p + i * WIDTH, x.v[i]); }
PUNA_INLINE void store_i8(int8_t* p, I16 x) { PUNA_EACH(i) vstore_i8(p + i * WIDTH, x.v[i]); }

#define PUNA_BINARY(name, native)                 \
  PUNA_INLINE F16 name(F16 a, F16 b) {            \
    F16 r;                                        \
    PUNA_EACH(i) r.v[i] = native(a.v[i], b.v[i]); \
    return r;                                     \
  }
PUNA_BINARY(add, vadd)
PUNA_BINARY(sub, vsub)
PUNA_BINARY(mul, vmul)
PUNA_BINARY(div, vdiv)
PUNA_BINARY(max, vmax)
PUNA_BINARY(min, vmin)
#undef PUNA_BINARY

PUNA_INLINE F16 abs(F16 a) {
  PUNA_EACH(i) a.v[i] = vabs(a.v[i]);
  return a;
}
PUNA_INLINE F16 fma(F16 a, F16 b, F16 c) {
  PUNA_EACH(i) c.v[i] = vfma(a.v[i], b.v[i], c.v[i]);
  return c;
}
PUNA_INLINE I16 splat_int(int32_t x) {
  I16 r;
  PUNA_EACH(i) r.v[i] = visplat(x);
  return r;
}
PUNA_INLINE I16 load_bytes(const void* p) {  // 64 bytes
  I16 r;
  PUNA_EACH(i) r.v[i] = viload((const char*)p + i * 4 * WIDTH);
  return r;
}
PUNA_INLINE I16 add(I16 a, I16 b) {
  PUNA_EACH(i) a.v[i] = viadd(a.v[i], b.v[i]);
  return a;
}
PUNA_INLINE I16 sub(I16 a, I16 b) {
  PUNA_EACH(i) a.v[i] = visub(a.v[i], b.v[i]);
  return a;
}
PUNA_INLINE I16 shift_left(I16 a, int n) {
  PUNA_EACH(i) a.v[i] = vishl(a.v[i], n);
  return a;
}
PUNA_INLINE F16 to_float(I16 x) {
  F16 r;
  PUNA_EACH(i) r.v[i] = vcvt(x.v[i]);
  return r;
}
PUNA_INLINE I16 round_to_int(F16 x) {
  I16 r;
  PUNA_EACH(i) r.v[i] = vround(x.v[i]);
  return r;
}
PUNA_INLINE I16 low4(I16 x) {
  PUNA_EACH(i) x.v[i] = vlow4(x.v[i]);
  return x;
}
PUNA_INLINE I16 high4(I16 x) {
  PUNA_EACH(i) x.v[i] = vhigh4(x.v[i]);
  return x;
}
// The first or the second of two 16-bit numbers in every lane.
#define PUNA_HALVES(name, native)         \
  PUNA_INLINE F16 name(I16 x) {           \
    F16 r;                                \
    PUNA_EACH(i) r.v[i] = native(x.v[i]); \
    return r;                             \
  }
PUNA_HALVES(even_bf16, veven_bf16)
PUNA_HALVES(odd_bf16, vodd_bf16)
PUNA_HALVES(even_half, veven_half)
PUNA_HALVES(odd_half, vodd_half)
#undef PUNA_HALVES
// Four signed bytes, the same in every lane.
PUNA_INLINE X16 four(const int8_t* p) {
  int32_t x;
  memcpy(&x, p, 4);
  return {vfour(x)};
}
// acc + the products of four unsigned bytes a lane with x's four signed ones, exactly.
PUNA_INLINE I16 dot4(I16 acc, I16 w, X16 x) {
  PUNA_EACH(i) acc.v[i] = vdot4(acc.v[i], w.v[i], x.v);
  return acc;
}

#if defined(PUNA_VNNI)
// Sixteen pairs of bfloat16: lane i is (a[i], b[i]).
PUNA_INLINE I16 zip_bf16(const uint16_t* a, const uint16_t* b) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i both =
      _mm512_inserti64x4(_mm512_castsi256_si512(_mm256_loadu_si256((const __m256i*)a)),
                         _mm256_loadu_si256((const __m256i*)b), 1);
  return {{_mm512_permutexvar_epi16(order, both)}};
}
// A pair of bfloat16, the same in every lane.
PUNA_INLINE I16 two_bf16(const uint16_t* p) {
  int32_t pair;
  memcpy(&pair, p, 4);
  return splat_int(pair);
}
// acc + the products of a pair with a pair in every lane.
PUNA_INLINE F16 dot_bf16(F16 acc, I16 a, I16 b) {
  return {{_mm512_dpbf16_ps(acc.v[0], (__m512bh)a.v[0], (__m512bh)b.v[0])}};
}
#endif

// Bring a cache line nearer, into L2.
PUNA_INLINE void fetch(const void* p) { __builtin_prefetch(p, 0, 2); }
PUNA_INLINE void fetch_to_write(void* p) { __builtin_prefetch(p, 1, 3); }

PUNA_INLINE float lane0(F16 x) {
  float a[LANES];
  store(a, x);
  return a[0];
}

// The order of a sum is fixed: lanes i and i + 8, then i and i + 4, ...
PUNA_INLINE float sum(F16 x) {
#if defined(PUNA_AVX512)
  return vsum(x.v[0]);
#else
  float a[LANES];
  store(a, x);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a[i] += a[i + half];
  return a[0];
#endif
}
PUNA_INLINE int32_t sum(I16 x) {
#if defined(PUNA_AVX512)
  return visum(x.v[0]);
#else
  uint32_t a[LANES], total = 0;  // unsigned: what was no number may add up to anything
  memcpy(a, &x, sizeof a);
  for (int i = 0; i < LANES; ++i) total += a[i];
  return (int32_t)total;
#endif
}
PUNA_INLINE float largest(F16 x) {  // a NaN among the lanes may get lost
#if defined(PUNA_AVX512)
  return vlargest(x.v[0]);
#else
  float a[LANES];
  store(a, x);
  for (int half = 8; half; half /= 2)
    for (int i = 0; i < half; ++i) a[i] = a[i] > a[i + half] ? a[i] : a[i + half];
  return a[0];
#endif
}

// One result for each of sixteen registers: lane i is the largest, or the sum, of the lanes of
// x[i].
#if defined(PUNA_AVX512)
// Halve the registers and what is left of each, four times: two shuffles bring together what one
// operation then joins. `cast` and `back` lead to float and from it, for the shuffles.
#define PUNA_JOIN(shuffle, a, b, low, high, op, cast, back) \
  op(back(shuffle(cast(a), cast(b), low)), back(shuffle(cast(a), cast(b), high)))
#define PUNA_OF_EACH(T, x, op, cast, back)                                                        \
  T quads[4], pairs[2];                                                                           \
  for (int j = 0; j < 4; ++j) {                                                                   \
    T a = PUNA_JOIN(_mm512_shuffle_f32x4, x[j].v[0], x[j + 4].v[0], 0x44, 0xee, op, cast, back);  \
    T b = PUNA_JOIN(_mm512_shuffle_f32x4, x[j + 8].v[0], x[j + 12].v[0], 0x44, 0xee, op, cast,    \
                    back);                                                                        \
    quads[j] = PUNA_JOIN(_mm512_shuffle_f32x4, a, b, 0x88, 0xdd, op, cast, back);                 \
  }                                                                                               \
  for (int j = 0; j < 2; ++j)                                                                     \
    pairs[j] =                                                                                    \
        PUNA_JOIN(_mm512_shuffle_ps, quads[2 * j], quads[2 * j + 1], 0x44, 0xee, op, cast, back); \
  return {{PUNA_JOIN(_mm512_shuffle_ps, pairs[0], pairs[1], 0x88, 0xdd, op, cast, back)}};
PUNA_INLINE F16 largest_of_each(const F16* x){PUNA_OF_EACH(VF, x, vmax, , )} PUNA_INLINE I16
    sum_of_each(const I16* x){PUNA_OF_EACH(VI, x, viadd, _mm512_castsi512_ps, _mm512_castps_si512)}
#undef PUNA_OF_EACH
#undef PUNA_JOIN
#else
PUNA_INLINE F16 largest_of_each(const F16* x) {
  float a[LANES];
  for (int i = 0; i < LANES; ++i) a[i] = largest(x[i]);
  return load(a);
}
PUNA_INLINE I16 sum_of_each(const I16* x) {
  int32_t a[LANES];
  for (int i = 0; i < LANES; ++i) a[i] = sum(x[i]);
  return load_bytes(a);
}
#endif

// x where `at` is not below `low`, else 0.
PUNA_INLINE F16 zero_below(F16 x, F16 at, F16 low) {
  PUNA_EACH(i) x.v[i] = vzero_below(x.v[i], at.v[i], low.v[i]);
  return x;
}

// The first n of 16 elements, and zeros: reads and writes nothing beyond them.
PUNA_INLINE F16 load_part(const float* p, int n) {
  float a[LANES] = {};
  memcpy(a, p, 4 * (size_t)n);
  return load(a);
}
PUNA_INLINE void store_part(float* p, F16 x, int n) {
  float a[LANES];
  store(a, x);
  memcpy(p, a, 4 * (size_t)n);
}
PUNA_INLINE void store_bytes(void* p, I16 x) { memcpy(p, &x, sizeof x); }

// e^x, about 1 ulp: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2] (the coefficients are those of
// Cephes' expf). 0 below -87.3, at most 2.4e38, NaN stays NaN.
PUNA_INLINE F16 exp(F16 x) {
  const F16 low = splat(-87.3f);
  F16 at = max(low, min(splat(88.3f), x));
  I16 n = round_to_int(mul(at, splat(1.44269504f)));
  F16 nf = to_float(n);
  F16 r = fma(nf, splat(-0.693359375f), at);
  r = fma(nf, splat(2.12194440e-4f), r);
  F16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), splat(1.0f));
  I16 exponent = shift_left(add(n, splat_int(127)), 23);
  PUNA_EACH(i) p.v[i] = vmul(p.v[i], vbits(exponent.v[i]));
  return zero_below(p, x, low);
}

PUNA_INLINE uint16_t bf16_of(float x) {  // to nearest, ties to even
  uint32_t bits;
  memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffff) > 0x7f800000) return (uint16_t)(bits >> 16 | 64);
  return (uint16_t)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
PUNA_INLINE void store_bf16(uint16_t* p, F16 x) {
#if defined(PUNA_VNNI)
  _mm256_storeu_si256((__m256i*)p, (__m256i)_mm512_cvtneps_pbh(x.v[0]));
#else
  float a[LANES];
  store(a, x);
  for (int i = 0; i < LANES; ++i) p[i] = bf16_of(a[i]);
#endif
}

}  // namespace
