// Integer matmul: int8 weights; activations of 8 bits, but for a few of 16; int32 sums. Exact on every instruction path.
//
// Why not 8 bits for all. GPT-2 has channels tens of times larger than the others; a grid that reaches them is too
// coarse for the rest. A row's grid is made for all but its largest numbers, and the few that lie beyond keep up to 16
// bits and are multiplied apart, by other instructions: some 4 % of the work.
//
// Why weights + 128, and four that add up to 127. AVX2's product of bytes (maddubs) takes unsigned times signed ones
// and adds them two by two in 16 bits. Two such sums can be added before they are widened if they fit, and they do
// where, of the four activations, neither the positive ones nor the negative ones add up to more than 127:
//   |(w0 + 128) x0 + … + (w3 + 128) x3| <= 255 * 127 < 2^15
// What the 128 add, 128 (x0 + x1 + …) of the row, is taken off at the end. Sums are exact modulo 2^32.
//
// Cycles, Zen 3: four vector operations a cycle, two of them multiplications. 64 products take two maddubs, an add, a
// madd, which adds neighbours up to 32 bits, and an add: at most 43 products a cycle, where float32 does 16. Zen 4's
// dpbusd on 512 bits does 64 products with their sums a cycle.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "vector.h"

namespace gpt2 {

constexpr int kPanel = 16;                     // outputs side by side: one register of AVX-512, two of AVX2
constexpr int kQuadBytes = 4 * kPanel;         // weights of a panel for four inputs
constexpr int kOctetBytes = 2 * kQuadBytes;
constexpr int kPanelHead = 2 * kPanel * 4;     // a panel begins with its outputs' scales and biases, float32
constexpr int kBlock = 96;                     // octets of inputs at once: 12 KB of a panel and 768 B a row stay in L1

// What an instruction path defines: a register of sums of some outputs, and what it adds to them.
//   dot8   weights of two quads (unsigned bytes) times those of a row (signed bytes)
//   dot2   weights of two inputs (16 bits) times two 16-bit numbers
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)

constexpr int kMaxTile = 12;  // rows at once: 12 sums and 2 weights in 32 registers
typedef uint32_t Register __attribute__((vector_size(64)));
inline Register dot8(Register sums, Register w0, Register w1, uint32_t x0, uint32_t x1) {
  const __m512i first = _mm512_dpbusd_epi32((__m512i)sums, (__m512i)w0, _mm512_set1_epi32(x0));
  return (Register)_mm512_dpbusd_epi32(first, (__m512i)w1, _mm512_set1_epi32(x1));
}
inline Register dot2(Register sums, Register w, uint32_t x) {
  return (Register)_mm512_dpwssd_epi32((__m512i)sums, (__m512i)w, _mm512_set1_epi32(x));
}

#elif defined(__AVX2__)

constexpr int kMaxTile = 4;  // rows at once: 8 sums, 4 weights, 2 activations and a product in 16 registers
typedef uint32_t Register __attribute__((vector_size(32)));
inline Register dot2(Register sums, Register w, uint32_t x) {
  return sums + (Register)_mm256_madd_epi16((__m256i)w, _mm256_set1_epi32(x));
}
inline Register dot8(Register sums, Register w0, Register w1, uint32_t x0, uint32_t x1) {
#if defined(__AVXVNNI__)
  const __m256i first = _mm256_dpbusd_avx_epi32((__m256i)sums, (__m256i)w0, _mm256_set1_epi32(x0));
  return (Register)_mm256_dpbusd_avx_epi32(first, (__m256i)w1, _mm256_set1_epi32(x1));
#else
  const __m256i first = _mm256_maddubs_epi16((__m256i)w0, _mm256_set1_epi32(x0));
  const __m256i second = _mm256_maddubs_epi16((__m256i)w1, _mm256_set1_epi32(x1));
  return dot2(sums, (Register)_mm256_add_epi16(first, second), 0x00010001);
#endif
}

#else

constexpr int kMaxTile = 2;
typedef uint32_t Register __attribute__((vector_size(32)));
inline Register dot2(Register sums, Register w, uint32_t x) {
  return sums + (w & 0xffff) * uint32_t(int16_t(x)) + (w >> 16) * uint32_t(int16_t(x >> 16));
}
inline Register dot8(Register sums, Register w0, Register w1, uint32_t x0, uint32_t x1) {
  for (int i = 0; i < 32; i += 8)
    sums += (w0 >> i & 0xff) * uint32_t(int8_t(x0 >> i)) + (w1 >> i & 0xff) * uint32_t(int8_t(x1 >> i));
  return sums;
}

#endif
constexpr int kLanes = sizeof(Register) / sizeof(uint32_t), kSplit = kPanel / kLanes;

// y = scale W x + bias. W (out, in) is cut into panels of 16 outputs, and everything is read from the first byte to
// the last:
//   16 scales, 16 biases, then for each quad of inputs 4k … 4k + 3:
//   W[16p][4k] … W[16p][4k+3]  W[16p+1][4k] … W[16p+1][4k+3]  …  W[16p+15][4k+3]     (64 bytes, each + 128)
// `in` is filled up to a multiple of 8 and `out` to one of 16.
struct Linear {
  int in = 0, out = 0, octets = 0, panels = 0;
  int limit = 0;  // activations within +-limit cannot overflow a sum: limit * max over outputs of sum |w| < 2^31
  size_t panel_bytes = 0;
  uint8_t* packed = nullptr;  // bytes() of them; belongs to somebody else

  Linear() = default;
  Linear(int in, int out)
      : in(in), out(out), octets((in + 7) / 8), panels((out + kPanel - 1) / kPanel),
        panel_bytes(kPanelHead + size_t(octets) * kOctetBytes) {}
  size_t bytes() const { return panels * panel_bytes; }
  uint8_t* panel(int p) const { return packed + p * panel_bytes; }
  const uint8_t* weights(int p) const { return panel(p) + kPanelHead; }
  const float* scales(int p) const { return reinterpret_cast<const float*>(panel(p)); }
  const float* biases(int p) const { return scales(p) + kPanel; }
  // Of output o, input i.
  int weight(int o, int i) const { return weights(o / kPanel)[place(o, i)] - 128; }
  static size_t place(int o, int i) { return size_t(i / 4) * kQuadBytes + o % kPanel * 4 + i % 4; }

  // Fills panel p; gives the largest sum |w| of an output in it.
  int64_t pack(int p, const int8_t* from, const float* scale, const float* bias) const {
    float* head = reinterpret_cast<float*>(panel(p));
    uint8_t* to = panel(p) + kPanelHead;
    int64_t heaviest = 1;
    for (int o = p * kPanel; o < out && o < (p + 1) * kPanel; o++) {
      head[o % kPanel] = scale[o];
      head[o % kPanel + kPanel] = bias ? bias[o] : 0.f;
      const int8_t* row = from + size_t(o) * in;
      int64_t weight = 0;
      for (int i = 0; i < in; i++) {
        weight += std::abs(int(row[i]));
        to[place(o, i)] = uint8_t(row[i] + 128);
      }
      heaviest = weight > heaviest ? weight : heaviest;
    }
    return heaviest;
  }
  void set_limit(int64_t heaviest) { limit = int(heaviest > 65536 ? 0x7fffffffLL / heaviest : 32767); }
};

// The sum of the positive ones, or that of the negative ones if it is larger, of the four numbers whose products are
// added in 16 bits: lanes 0, 1, 4, 5 and lanes 2, 3, 6, 7. All four get it.
template <class V>
inline V weight_of_four(V x) {
  const V positive = larger(x, V{}), negative = positive - x;
  const V up = positive + swapped(positive), down = negative + swapped(negative);
  return larger(up + halves_swapped(up), down + halves_swapped(down));
}

// What a row has beyond 8 bits: four 16-bit numbers x0, x1, x4, x5 (shift 0) or x2, x3, x6, x7 (shift 16) of an octet.
struct Large {
  int32_t octet, shift;
  uint32_t even, odd;  // the first and the third of the four, the second and the fourth
};

// A row of activations on its way to whole numbers, eight at a time; row = scale * (bytes + large).
struct Split {
  int8_t* bytes;
  Large* large;  // room for one a quad
  int n_large = 0;
  I8 total = {};

  // Integers x[i] … x[i + 7] of at most 15 bits and a sign.
  void take(I8 x, int i) {
    const I8 fits = weight_of_four(x) <= 127;
    store(bytes + i, narrow(x & fits));
    total += x;
    if (!any(~fits)) return;
    for (int j = 0; j < 4; j += 2) {
      if (fits[j]) continue;
      const auto two = [&](int k) { return uint32_t(x[k] & 0xffff) | uint32_t(x[k + 4]) << 16; };
      large[n_large++] = {i / 8, 8 * j, two(j), two(j + 1)};
    }
  }
  // What the 128 in the weights add to a sum.
  uint32_t excess() const {
    uint32_t all = 0;
    for (int j = 0; j < 8; j++) all += uint32_t(total[j]);
    return 128 * all;
  }
};

inline uint32_t quad_at(const int8_t* row, int k) {
  uint32_t quad;
  std::memcpy(&quad, row + 4 * k, sizeof quad);
  return quad;
}

// sums[r] (+)= weights x rows[r] for R rows of bytes that lie `stride` apart. Meanwhile the bytes from `ahead` on, which
// this thread reads next, are asked for, `step` for each octet.
//
// An octet of inputs with 4 rows on AVX2: 16 maddubs, 8 adds, 8 madd, 8 adds, besides 12 plain loads, for 512
// products: 12 cycles. One row: 10 operations for 128 bytes; memory gives about 5 bytes a cycle.
template <int R>
__attribute__((noinline)) void dot_tile(const uint8_t* weights, const uint8_t* ahead, int step, const int8_t* rows,
                                        size_t stride, int octets, bool more, uint32_t (*sums)[kPanel]) {
  Register sum[R][kSplit] = {};
  for (int k = 0; k < octets; k++, ahead += step) {
    const uint8_t* at = weights + size_t(k) * kOctetBytes;
    __builtin_prefetch(ahead);
    __builtin_prefetch(ahead + kQuadBytes);
    Register w[2][kSplit];
#pragma GCC unroll 2
    for (int v = 0; v < kSplit; v++) {
      w[0][v] = load<Register>(at + v * sizeof(Register));
      w[1][v] = load<Register>(at + kQuadBytes + v * sizeof(Register));
    }
#pragma GCC unroll 12
    for (int r = 0; r < R; r++) {
      const uint32_t first = quad_at(rows + r * stride, 2 * k), second = quad_at(rows + r * stride, 2 * k + 1);
#pragma GCC unroll 2
      for (int v = 0; v < kSplit; v++) sum[r][v] = dot8(sum[r][v], w[0][v], w[1][v], first, second);
#if defined(__AVX2__) && !defined(__AVX512VNNI__)
      // Row after row: left free, GCC begins with all rows' products and spills sums, at three fifths of the speed.
      if (R > 2) asm volatile("" : "+x"(sum[r][0]), "+x"(sum[r][kSplit - 1]));
#endif
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int v = 0; v < kSplit; v++) {
      uint32_t* to = sums[r] + v * kLanes;
      store(to, more ? sum[r][v] + load<Register>(to) : sum[r][v]);
    }
}

// The same for n <= kMaxTile rows.
template <int R = kMaxTile>
inline void dot_rows(int n, const uint8_t* weights, const uint8_t* ahead, int step, const int8_t* rows, size_t stride,
                     int octets, bool more, uint32_t (*sums)[kPanel]) {
  if (n == R) {
    dot_tile<R>(weights, ahead, step, rows, stride, octets, more, sums);
  } else if constexpr (R > 1) {
    dot_rows<R - 1>(n, weights, ahead, step, rows, stride, octets, more, sums);
  }
}

// sums[r] = weights x rows[r] for n rows. Full tiles are the quickest, so all are full but the last. Inputs are taken
// in blocks, so that a block of the panel stays in L1 while all rows pass. The memory never rests: one tile is done in
// less than the time of the reading and asks for what comes 1 KB later; several ask for the next block, each for a part.
inline void dot_panel(const uint8_t* weights, const int8_t* rows, size_t stride, int octets, int n,
                      uint32_t (*sums)[kPanel]) {
  const int blocks = n <= kMaxTile ? 1 : (octets + kBlock - 1) / kBlock;
  const int step = kOctetBytes / ((n + kMaxTile - 1) / kMaxTile);
  for (int b = 0, k = 0; b < blocks; b++) {
    const int count = (octets - k) / (blocks - b);
    const uint8_t* at = weights + size_t(k) * kOctetBytes;
    const uint8_t* ahead = at + (n <= kMaxTile ? 1024 : count * kOctetBytes);
    for (int r = 0; r < n; r += kMaxTile, ahead += count * step)
      dot_rows(std::min(n - r, kMaxTile), at, ahead, step, rows + r * stride + 8 * k, stride, count, b > 0, sums + r);
    k += count;
  }
}

// sums += weights x what a row has beyond its bytes.
inline void dot_large(const uint8_t* weights, const Large* large, int n, uint32_t* sums) {
#pragma GCC unroll 2
  for (int v = 0; v < kSplit; v++) {
    Register sum = load<Register>(sums + v * kLanes);
    for (const Large* l = large; l < large + n; l++) {
      const uint8_t* at = weights + size_t(l->octet) * kOctetBytes + v * sizeof(Register);
      const Register w = (load<Register>(at) >> l->shift & 0xffff) | load<Register>(at + kQuadBytes) >> l->shift << 16;
      sum = dot2(dot2(sum, w & 0x00ff00ff, l->even), w >> 8 & 0x00ff00ff, l->odd);
    }
    store(sums + v * kLanes, sum);
  }
}

}  // namespace gpt2
