// Integer matmul: int8 weights, int16 activations, int32 sums; exact on every instruction path.
//
// Why 16-bit activations. AVX2's only 8-bit product (maddubs) saturates and needs a second instruction to widen, so
// 32 products cost two multiplier slots; as 16-bit numbers (madd) they cost two as well and nothing can saturate.
// A row then keeps 14 bits or more: a channel 64 times larger than the others still leaves those 8 and more.
//
// Cycles, Zen 3: four vector operations a cycle, two of them multiplications. A madd (16 products) needs an add, so
// 32 products a cycle are the most, twice what float32 could do there (two FMA of 8); widening the weights takes
// one operation in 13 with 6 rows at once. Measured, a core at 3.24 GHz: 159 GOP/s of 167 that madd and add alone
// reach; float32 with unpacked weights 101. Zen 4's dpwssd on 512 bits does 32 products with their sums a cycle.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "vector.h"

namespace gpt2 {

constexpr int kPanel = 16;                     // outputs side by side: one register of AVX-512, two of AVX2
constexpr int kPairBytes = 2 * kPanel;         // weights of a panel for two inputs
constexpr int kPanelHead = 2 * kPanel * 4;     // a panel begins with its outputs' scales and biases, float32
constexpr int kBlock = 384;                    // pairs of inputs at once: 12 KB of a panel and 1.5 KB a row stay in L1

// What an instruction path defines: a register of sums of kLanes outputs, the weights of a pair of inputs for them, and
// the product   sums[o] += weights[2o] * pair.low + weights[2o + 1] * pair.high.
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

constexpr int kMaxTile = 12;  // rows at once: 12 sums and a weight in 32 registers
typedef __m512i Register;
inline Register widened(const int8_t* at) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)at)); }
inline Register multiply_add(Register sums, Register weights, int32_t pair) {
  return _mm512_dpwssd_epi32(sums, weights, _mm512_set1_epi32(pair));
}

#elif defined(__AVX2__)

constexpr int kMaxTile = 6;  // rows at once: 12 sums, 2 weights, an activation and a product in 16 registers
typedef __m256i Register;
inline Register widened(const int8_t* at) { return _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)at)); }
inline Register multiply_add(Register sums, Register weights, int32_t pair) {
#if defined(__AVXVNNI__)
  return _mm256_dpwssd_avx_epi32(sums, weights, _mm256_set1_epi32(pair));
#else
  return _mm256_add_epi32(sums, _mm256_madd_epi16(weights, _mm256_set1_epi32(pair)));
#endif
}

#else

constexpr int kMaxTile = 2;
typedef I8 Register;
inline Register widened(const int8_t* at) {
  typedef int8_t B16 __attribute__((vector_size(16)));
  typedef int16_t S16 __attribute__((vector_size(32)));
  return (I8)__builtin_convertvector(load<B16>(at), S16);
}
inline Register multiply_add(Register sums, Register weights, int32_t pair) {
  const I8 low = (I8)((U8)weights << 16) >> 16, high = weights >> 16;
  return sums + low * int32_t(int16_t(pair)) + high * (pair >> 16);
}

#endif
typedef int32_t I32 __attribute__((vector_size(sizeof(Register))));
constexpr int kLanes = sizeof(Register) / sizeof(int32_t), kSplit = kPanel / kLanes;

// y = scale W x + bias. W (out, in) is cut into panels of 16 outputs, and everything is read from the first byte to
// the last:
//   16 scales, 16 biases, then for each pair of inputs 2k, 2k + 1:
//   W[16p][2k] W[16p][2k+1]  W[16p+1][2k] W[16p+1][2k+1]  …  W[16p+15][2k+1]     (32 bytes)
// `in` is filled up to an even number and `out` to a multiple of 16, with zeros.
struct Linear {
  int in = 0, out = 0, pairs = 0, panels = 0;
  int limit = 0;  // activations within +-limit cannot overflow a sum: limit * max over outputs of sum |w| < 2^31
  size_t panel_bytes = 0;
  int8_t* packed = nullptr;  // bytes() of them, zero at first; belongs to somebody else

  Linear() = default;
  Linear(int in, int out)
      : in(in), out(out), pairs((in + 1) / 2), panels((out + kPanel - 1) / kPanel),
        panel_bytes(kPanelHead + size_t(pairs) * kPairBytes) {}
  size_t bytes() const { return panels * panel_bytes; }
  int8_t* panel(int p) const { return packed + p * panel_bytes; }
  const int8_t* weights(int p) const { return panel(p) + kPanelHead; }
  const float* scales(int p) const { return reinterpret_cast<const float*>(panel(p)); }
  const float* biases(int p) const { return scales(p) + kPanel; }

  // Fills panel p; gives the largest sum |w| of an output in it.
  int64_t pack(int p, const int8_t* from, const float* scale, const float* bias) const {
    float* head = reinterpret_cast<float*>(panel(p));
    int8_t* to = panel(p) + kPanelHead;
    int64_t heaviest = 1;
    for (int o = p * kPanel; o < out && o < (p + 1) * kPanel; o++, to += 2) {
      head[o % kPanel] = scale[o];
      head[o % kPanel + kPanel] = bias ? bias[o] : 0.f;
      const int8_t* row = from + size_t(o) * in;
      int64_t weight = 0;
      for (int i = 0; i < in; i++) {
        weight += std::abs(int(row[i]));
        to[size_t(i / 2) * kPairBytes + i % 2] = row[i];
      }
      heaviest = weight > heaviest ? weight : heaviest;
    }
    return heaviest;
  }
  void set_limit(int64_t heaviest) { limit = int(heaviest > 65536 ? 0x7fffffffLL / heaviest : 32767); }
};

inline int32_t pair_at(const int16_t* row, int k) {
  int32_t pair;
  std::memcpy(&pair, row + 2 * k, sizeof pair);
  return pair;
}

// sums[r] (+)= weights x rows[r] for R rows that lie `stride` apart. Meanwhile the bytes kAhead further on, which this
// thread reads next, are asked for: a row's products take half the time of the reading, so the memory never rests.
//
// A pair of inputs with 6 rows on AVX2: 2 widening loads, 6 broadcasts, 12 madd, 12 add: 26 vector operations besides
// plain loads for 192 products, 6.5 cycles. One row: 6 operations for 32 bytes; memory gives about 5 bytes a cycle.
template <int R, bool kFirst>
__attribute__((noinline)) void dot_tile(const int8_t* weights, const int16_t* rows, size_t stride, int pairs, bool more,
                                        int32_t (*sums)[kPanel]) {
  constexpr int kAhead = R == 1 ? 1024 : 2048;
  constexpr int kChains = R >= 4 ? 1 : 4 / R;  // enough independent sums to hide a product's 4 to 5 cycles
  Register sum[R][kChains][kSplit];
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int c = 0; c < kChains; c++)
#pragma GCC unroll 2
      for (int v = 0; v < kSplit; v++) sum[r][c][v] = Register{};
  int k = 0;
  for (; k + kChains <= pairs; k += kChains) {
    const int8_t* at = weights + size_t(k) * kPairBytes;
    if (kFirst && (kChains % 2 == 0 || k % 2 == 0)) {
      __builtin_prefetch(at + kAhead);
      if (kChains == 4) __builtin_prefetch(at + kAhead + 64);
    }
#pragma GCC unroll 4
    for (int c = 0; c < kChains; c++) {
      Register w[kSplit];
#pragma GCC unroll 2
      for (int v = 0; v < kSplit; v++) w[v] = widened(at + c * kPairBytes + v * 2 * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) {
        const int32_t pair = pair_at(rows + r * stride, k + c);
#pragma GCC unroll 2
        for (int v = 0; v < kSplit; v++) sum[r][c][v] = multiply_add(sum[r][c][v], w[v], pair);
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
        // Row after row: left free, GCC begins with all rows' products and spills sums, at three fifths of the speed.
        if (R > 2) asm volatile("" : "+x"(sum[r][c][0]), "+x"(sum[r][c][kSplit - 1]));
#endif
      }
    }
  }
  for (; kChains > 1 && k < pairs; k++)
#pragma GCC unroll 2
    for (int v = 0; v < kSplit; v++) {
      const Register w = widened(weights + size_t(k) * kPairBytes + v * 2 * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < R; r++) sum[r][0][v] = multiply_add(sum[r][0][v], w, pair_at(rows + r * stride, k));
    }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < kSplit; v++) {
      I32 total = (I32)sum[r][0][v];
#pragma GCC unroll 4
      for (int c = 1; c < kChains; c++) total += (I32)sum[r][c][v];
      int32_t* to = sums[r] + v * kLanes;
      store(to, more ? total + load<I32>(to) : total);
    }
}

// The same for n <= kMaxTile rows.
template <bool kFirst, int R = kMaxTile>
inline void dot_rows(int n, const int8_t* weights, const int16_t* rows, size_t stride, int pairs, bool more,
                     int32_t (*sums)[kPanel]) {
  if (n == R) {
    dot_tile<R, kFirst>(weights, rows, stride, pairs, more, sums);
  } else if constexpr (R > 1) {
    dot_rows<kFirst, R - 1>(n, weights, rows, stride, pairs, more, sums);
  }
}

// sums[r] = weights x rows[r] for n rows. Full tiles are the quickest, so all are full but the last. Inputs are taken in blocks, so that a block of the panel stays in L1 while all rows pass.
inline void dot_panel(const int8_t* weights, const int16_t* rows, size_t stride, int pairs, int n,
                      int32_t (*sums)[kPanel]) {
  const int blocks = n <= kMaxTile ? 1 : (pairs + kBlock - 1) / kBlock;
  for (int b = 0, k = 0; b < blocks; b++) {
    const int count = (pairs - k) / (blocks - b);
    const size_t at = size_t(k) * kPairBytes;
    const int16_t* from = rows + 2 * k;
    dot_rows<true>(std::min(n, kMaxTile), weights + at, from, stride, count, b > 0, sums);
    for (int r = kMaxTile; r < n; r += kMaxTile)
      dot_rows<false>(std::min(n - r, kMaxTile), weights + at, from + r * stride, stride, count, b > 0, sums + r);
    k += count;
  }
}

}  // namespace gpt2
