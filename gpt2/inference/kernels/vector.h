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
typedef int16_t S8 __attribute__((vector_size(16)));
typedef uint16_t H8 __attribute__((vector_size(16)));

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
inline F8 larger(F8 a, F8 b) { return a > b ? a : b; }
inline F8 smaller(F8 a, F8 b) { return a < b ? a : b; }
inline F8 absolute(F8 v) { return (F8)(bits(v) & 0x7fffffff); }
inline float sum(F8 v) { return ((v[0] + v[4]) + (v[1] + v[5])) + ((v[2] + v[6]) + (v[3] + v[7])); }
inline float largest(F8 v) {
  float m = v[0];
  for (int i = 1; i < 8; i++) m = v[i] > m ? v[i] : m;
  return m;
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

// IEEE half precision: 11 bits for a key or a value, two bytes each. Beyond +-65504 the largest half is stored.
inline F8 load_half(const uint16_t* from) {
#if defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)from));
#else
  const I8 h = __builtin_convertvector(load<H8>(from), I8);
  const F8 magnitude = (F8)((h & 0x7fff) << 13) * 5.192296858534828e33f;  // 2^112 moves the exponent's origin
  return (F8)(bits(magnitude) | ((h & 0x8000) << 16));
#endif
}
inline void store_half(uint16_t* to, F8 v) {
  v = smaller(larger(v, all(-65504.f)), all(65504.f));
#if defined(__F16C__)
  _mm_storeu_si128((__m128i*)to, _mm256_cvtps_ph(v, 0));
#else
  const F8 magnitude = absolute(v);
  const I8 b = bits(magnitude);
  const I8 normal = ((b + 0xfff + ((b >> 13) & 1)) >> 13) - (112 << 10);
  const I8 subnormal = nearest(smaller(magnitude, all(0.0001220703125f)) * 16777216.f);
  const I8 h = (magnitude < 6.103515625e-05f ? subnormal : normal) | ((bits(v) >> 16) & 0x8000);
  store(to, __builtin_convertvector(h, H8));
#endif
}

}  // namespace gpt2
