// Integer matmul: int8 weights, int16 activations, int32 sums; exact on every instruction path.
//
// Why 16-bit activations. AVX2's only 8-bit product (maddubs) saturates and needs a second instruction to widen, so
// 32 products cost two multiplier slots; as 16-bit numbers (madd) they cost two as well and nothing can saturate.
// A row then keeps 14 bits or more: a channel 64 times larger than the others still leaves those 8 and more.
#pragma once

#include <cstdlib>
#include <new>

#include "vector.h"

namespace gpt2 {

constexpr int kPanel = 16;  // outputs side by side: their sums fill one AVX-512 register, or two of AVX2
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
constexpr int kMaxTile = 12;  // rows at once: 12 sums, 1 weight of 32 registers
#else
constexpr int kMaxTile = 6;  // rows at once: 12 sums, 2 weights, 1 activation of 16 registers
#endif

// Memory at cache-line borders, all zero; the system gives pages (large ones, if it has them) when they are touched.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t n);
  Buffer(const Buffer&) = delete;
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  Buffer(Buffer&& other) noexcept { *this = static_cast<Buffer&&>(other); }
  ~Buffer();
  T* get() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  T* data_ = nullptr;
  size_t bytes_ = 0;
};

// y = W x + bias. W (out, in) is cut into panels of 16 outputs, read from the first byte to the last:
//   panel p, pair k:  W[16p][2k] W[16p][2k+1]  W[16p+1][2k] W[16p+1][2k+1] … W[16p+15][2k+1]     (32 bytes)
// `in` is filled up to an even number and `out` to a multiple of 16, with zeros.
struct Linear {
  int in = 0, out = 0, pairs = 0, panels = 0;
  int limit = 0;  // activations within +-limit cannot overflow a sum: limit * max over outputs of sum |w| < 2^31
  Buffer<int8_t> packed;
  Buffer<float> scale, bias;  // (16 panels)

  void pack(int n_in, int n_out, const int8_t* weights, const float* scales, const float* biases);
  const int8_t* panel(int p) const { return packed.get() + size_t(p) * pairs * 32; }
  int8_t weight(int o, int i) const { return panel(o / kPanel)[(i / 2) * 32 + (o % kPanel) * 2 + i % 2]; }
};

inline void Linear::pack(int n_in, int n_out, const int8_t* weights, const float* scales, const float* biases) {
  in = n_in, out = n_out, pairs = (in + 1) / 2, panels = (out + kPanel - 1) / kPanel;
  packed = Buffer<int8_t>(size_t(panels) * pairs * 32);
  scale = Buffer<float>(size_t(panels) * kPanel);
  bias = Buffer<float>(size_t(panels) * kPanel);
  int64_t heaviest = 1;
  for (int o = 0; o < out; o++) {
    const int8_t* row = weights + size_t(o) * in;
    int8_t* to = packed.get() + size_t(o / kPanel) * pairs * 32 + (o % kPanel) * 2;
    int64_t weight = 0;
    for (int i = 0; i < in; i++) {
      weight += std::abs(int(row[i]));
      to[size_t(i / 2) * 32 + i % 2] = row[i];
    }
    heaviest = weight > heaviest ? weight : heaviest;
    scale[o] = scales[o];
    bias[o] = biases ? biases[o] : 0.f;
  }
  limit = int(heaviest > 65536 ? 0x7fffffffLL / heaviest : 32767);
}

inline int32_t pair_at(const int16_t* row, int k) {
  int32_t pair;
  std::memcpy(&pair, row + 2 * k, 4);
  return pair;
}

// sums[r][o] = sum over i of panel[o][i] * rows[r][i], for R rows that lie `stride` apart.
//
// AVX2, a step of one pair for R rows: 2 widening loads, R broadcast loads, 2R madd, 2R add; with R = 6 that is
// 26 vector operations for 192 products, 6.5 cycles at four a cycle. AVX-512 VNNI: R + 1 operations for 32R products.
template <int R>
inline void dot_tile(const int8_t* panel, const int16_t* rows, size_t stride, int pairs, int32_t (*sums)[kPanel]) {
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
  constexpr int kChains = R >= 4 ? 1 : 4 / R;  // dpwssd takes 4 to 5 cycles: as many independent sums at least
  __m512i sum[R][kChains];
  for (int r = 0; r < R; r++)
    for (int c = 0; c < kChains; c++) sum[r][c] = _mm512_setzero_si512();
  int k = 0;
  for (; k + kChains <= pairs; k += kChains) {
#pragma GCC unroll 4
    for (int c = 0; c < kChains; c++) {
      const __m512i w = _mm512_cvtepi8_epi16(_mm256_load_si256((const __m256i*)(panel + size_t(k + c) * 32)));
#pragma GCC unroll 12
      for (int r = 0; r < R; r++)
        sum[r][c] = _mm512_dpwssd_epi32(sum[r][c], w, _mm512_set1_epi32(pair_at(rows + r * stride, k + c)));
    }
  }
  for (; k < pairs; k++) {
    const __m512i w = _mm512_cvtepi8_epi16(_mm256_load_si256((const __m256i*)(panel + size_t(k) * 32)));
    for (int r = 0; r < R; r++)
      sum[r][0] = _mm512_dpwssd_epi32(sum[r][0], w, _mm512_set1_epi32(pair_at(rows + r * stride, k)));
  }
  for (int r = 0; r < R; r++) {
    for (int c = 1; c < kChains; c++) sum[r][0] = _mm512_add_epi32(sum[r][0], sum[r][c]);
    _mm512_storeu_si512(sums[r], sum[r][0]);
  }
#elif defined(__AVX2__)
  __m256i low[R], high[R];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) low[r] = high[r] = _mm256_setzero_si256();
  for (int k = 0; k < pairs; k++) {
    const __m128i* at = (const __m128i*)(panel + size_t(k) * 32);
    const __m256i w_low = _mm256_cvtepi8_epi16(_mm_load_si128(at));
    const __m256i w_high = _mm256_cvtepi8_epi16(_mm_load_si128(at + 1));
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      const __m256i a = _mm256_set1_epi32(pair_at(rows + r * stride, k));
      low[r] = _mm256_add_epi32(low[r], _mm256_madd_epi16(w_low, a));
      high[r] = _mm256_add_epi32(high[r], _mm256_madd_epi16(w_high, a));
    }
  }
  for (int r = 0; r < R; r++) {
    _mm256_storeu_si256((__m256i*)sums[r], low[r]);
    _mm256_storeu_si256((__m256i*)(sums[r] + 8), high[r]);
  }
#else
  for (int r = 0; r < R; r++) {
    const int16_t* row = rows + r * stride;
    int32_t sum[kPanel] = {};
    for (int k = 0; k < pairs; k++) {
      const int8_t* w = panel + size_t(k) * 32;
      const int32_t a0 = row[2 * k], a1 = row[2 * k + 1];
      for (int o = 0; o < kPanel; o++) sum[o] += w[2 * o] * a0 + w[2 * o + 1] * a1;
    }
    std::memcpy(sums[r], sum, sizeof sum);
  }
#endif
}

// The same for 1 to kMaxTile rows.
inline void dot_rows(int n, const int8_t* panel, const int16_t* rows, size_t stride, int pairs, int32_t (*sums)[kPanel]) {
  switch (n) {
    case 1: return dot_tile<1>(panel, rows, stride, pairs, sums);
    case 2: return dot_tile<2>(panel, rows, stride, pairs, sums);
    case 3: return dot_tile<3>(panel, rows, stride, pairs, sums);
    case 4: return dot_tile<4>(panel, rows, stride, pairs, sums);
    case 5: return dot_tile<5>(panel, rows, stride, pairs, sums);
    case 6: return dot_tile<6>(panel, rows, stride, pairs, sums);
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
    case 7: return dot_tile<7>(panel, rows, stride, pairs, sums);
    case 8: return dot_tile<8>(panel, rows, stride, pairs, sums);
    case 9: return dot_tile<9>(panel, rows, stride, pairs, sums);
    case 10: return dot_tile<10>(panel, rows, stride, pairs, sums);
    case 11: return dot_tile<11>(panel, rows, stride, pairs, sums);
    case 12: return dot_tile<12>(panel, rows, stride, pairs, sums);
#endif
  }
}

// Calls visit(first row, rows, sums) for tiles of nearly equal size over n rows.
template <class Visit>
inline void dot_panel(const int8_t* panel, const int16_t* rows, size_t stride, int pairs, int n, Visit visit) {
  const int tiles = (n + kMaxTile - 1) / kMaxTile;
  int32_t sums[kMaxTile][kPanel];
  for (int t = 0, first = 0; t < tiles; t++) {
    const int count = (n - first) / (tiles - t);
    dot_rows(count, panel, rows + first * stride, stride, pairs, sums);
    visit(first, count, sums);
    first += count;
  }
}

}  // namespace gpt2
