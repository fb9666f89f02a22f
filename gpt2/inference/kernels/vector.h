// Eight floats side by side, in the compiler's own vector type (GCC, clang): one source for AVX, SSE and NEON.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__) || defined(__i386__)
#include <immintrin.h>
#endif

namespace gpt2 {

typedef float F8 __attribute__((vector_size(32)));
typedef int32_t I8 __attribute__((vector_size(32)));
typedef uint32_t U8 __attribute__((vector_size(32)));
typedef uint64_t L4 __attribute__((vector_size(32)));
typedef int8_t B8 __attribute__((vector_size(8)));

template <class V>
inline V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
inline void store(void* to, V v) {
  std::memcpy(to, &v, sizeof v);
}
inline F8 all(float x) { return F8{x, x, x, x, x, x, x, x}; }
inline I8 bits(F8 v) { return (I8)v; }
template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}
inline F8 smaller(F8 a, F8 b) { return a < b ? a : b; }
inline F8 absolute(F8 v) { return (F8)(bits(v) & 0x7fffffff); }
inline float sum(F8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }
inline float largest(F8 v) {
  float m = v[0];
  for (int i = 1; i < 8; i++) m = v[i] > m ? v[i] : m;
  return m;
}

// The two of each pair of lanes change places.
template <class V>
inline V swapped(V v) {
  return (V)((L4)v << 32 | (L4)v >> 32);
}
// The first four lanes and the last four change places.
template <class V>
inline V halves_swapped(V v) {
  const L4 lanes = (L4)v;
  return (V)L4{lanes[2], lanes[3], lanes[0], lanes[1]};
}
inline bool any(I8 mask) {
  const L4 lanes = (L4)mask;
  return (lanes[0] | lanes[1] | lanes[2] | lanes[3]) != 0;
}

// Eight integers of +-127 as bytes.
inline B8 narrow(I8 v) {
#if defined(__AVX2__)  // GCC 12 goes through memory
  const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1));
  return (B8)_mm_cvtsi128_si64(_mm_packs_epi16(half, half));
#endif
  return __builtin_convertvector(v, B8);
}

// The nearest integer (ties to even) of |v| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction.
inline I8 nearest(F8 v) {
  const F8 magic = all(12582912.f);
  return bits(v + magic) - bits(magic);
}

// e^v to 2 units in the last place, v <= 88; what would be below 2^-126 becomes about that.
// e^v = 2^n e^r with n = round(v / ln 2) and |r| <= ln 2 / 2, where e^r is its Taylor polynomial of degree 7.
inline F8 exponential(F8 v) {
  v = larger(v, all(-87.f));
  const I8 n = nearest(v * 1.44269504f);
  const F8 whole = __builtin_convertvector(n, F8);
  const F8 r = v - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two parts: the first product is exact
  F8 p = r * (1.f / 5040) + (1.f / 720);
  p = p * r + (1.f / 120);
  p = p * r + (1.f / 24);
  p = p * r + (1.f / 6);
  p = p * r + 0.5f;
  p = p * r + 1.f;
  p = p * r + 1.f;
  return p * (F8)((n + 127) << 23);
}

// GELU, tanh form: x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), which is x / (1 + e^(-2u)).
inline F8 gelu(F8 x) {
  const F8 minus_2u = x * (-1.595769122f) * (x * x * 0.044715f + 1.f);
  return x / (exponential(smaller(minus_2u, all(87.f))) + 1.f);
}

inline F8 load_bytes(const int8_t* from) {
#if defined(__AVX2__)  // GCC 12 goes through memory
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#endif
  return __builtin_convertvector(__builtin_convertvector(load<B8>(from), I8), F8);
}

}  // namespace gpt2
