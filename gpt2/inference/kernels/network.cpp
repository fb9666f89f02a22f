// GPT-2 on a CPU with int8 weights: any number of tokens of any sequences, one trip through the weights.
//
//   row      one token: its id, the slot of its sequence, its position there
//   slot     the keys and values of one sequence, 16-bit
//   phase    what the team does between two barriers; a layer has five (eight with several rows)
//
// A step of GPT-2 small reads 124 MB of weights for whatever number of rows, and 37 KB of keys and values for each
// token that its row looks back on. One row is bound by reading; from about eight rows on the products take longer.
#include "matmul.h"
#include "team.h"

#include <algorithm>
#include <memory>
#include <sys/mman.h>

namespace gpt2 {

template <class T>
Buffer<T>::Buffer(size_t n) : bytes_(n * sizeof(T) + 64) {
  void* at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  data_ = static_cast<T*>(at);
}
template <class T>
Buffer<T>::~Buffer() {
  if (data_) munmap(data_, bytes_);
}

constexpr int kRows = 128;     // rows that walk through the layers together: their activations stay in the L3 cache
constexpr int kQueries = 4;    // queries of one sequence that share a look at its keys
constexpr int kPositions = 32;  // slots are a multiple of this long, so that keys are looked at in whole blocks

inline size_t rounded(size_t n, size_t to) { return (n + to - 1) / to * to; }

struct Row {
  int32_t id, slot, position;
};
struct Run {
  int first, count;  // rows that follow each other in one sequence
};

struct Layer {
  Linear c_attn, attn_proj, c_fc, mlp_proj;  // the layer norms' scale and offset stand in c_attn and c_fc
};

struct Network {
  const int vocab, context, n_layer, heads, width;
  const float epsilon;
  const int head_width = width / heads, padded_head = int(rounded(head_width, 8));
  const size_t positions = rounded(context, kPositions);
  const size_t wide = rounded(width, 16), wider = rounded(4 * size_t(width), 16);  // strides of rows
  const size_t triple = rounded(3 * size_t(width), 16);
  const size_t key_size = heads * positions * head_width, value_size = heads * positions * padded_head;
  const size_t scratch_size = wider + kQueries * (positions + padded_head);

  std::vector<Layer> layers{size_t(n_layer)};
  Linear head, embedding;  // embedding is empty where the head's weights are the embedding too
  Buffer<float> position_embedding, final_scale, final_offset;
  Buffer<float> head_column;  // what was taken off every row of the head's weights
  std::vector<Buffer<uint16_t>> slots;

  Team team;
  Buffer<float> x, qkv, attended, hidden;         // (rows, stride)
  Buffer<int16_t> input;                          // (rows or team, wider): what the next matmul reads
  Buffer<float> input_scale, input_offset;        // (rows or team)
  Buffer<float> scratch;                          // (team, …): one row, and scores of kQueries

  // The step under way.
  std::vector<Row> rows;
  std::vector<Run> runs;
  std::vector<int32_t> outputs;  // rows whose logits are wanted
  float* logits = nullptr;

  Network(int vocab, int context, int n_layer, int heads, int width, float epsilon, bool, int n_slots, int threads)
      : vocab(vocab), context(context), n_layer(n_layer), heads(heads), width(width), epsilon(epsilon),
        position_embedding(context * wide), final_scale(wide), final_offset(wide), head_column(wide),
        slots(n_slots), team(threads), x(kRows * wide), qkv(kRows * triple), attended(kRows * wide),
        hidden(kRows * wider), input(std::max(kRows, threads) * wider), input_scale(std::max(kRows, threads)),
        input_offset(std::max(kRows, threads)), scratch(threads * scratch_size) {}

  uint16_t* keys(const Row& row, int layer, int h) {
    return slots[row.slot].get() + layer * (key_size + value_size) + h * positions * head_width;
  }
  uint16_t* values(const Row& row, int layer, int h) {
    return slots[row.slot].get() + layer * (key_size + value_size) + key_size + h * positions * padded_head;
  }

  void step();
  void walk(int member);
};

// What one member of the team does in a step. Every member goes through the same phases in the same order.
class Walk {
 public:
  Walk(Network& net, int member)
      : net_(net), member_(member), n_(int(net.rows.size())), scratch_(net.scratch.get() + member * net.scratch_size) {}

  void all_layers() {
    each(n_, 1, [&](int r) { embed(r); });
    for (int l = 0; l < net_.n_layer; l++) {
      const Layer& layer = net_.layers[l];
      normalise(layer.c_attn);
      matmul(layer.c_attn, n_, [&](int r, int o, F8 low, F8 high) { put(&net_.qkv[r * net_.triple + o], low, high); });
      each(int(net_.runs.size()) * net_.heads, 1,
           [&](int i) { attend(l, i % net_.heads, net_.runs[i / net_.heads]); });
      round_rows(layer.attn_proj, net_.attended, net_.wide);
      matmul(layer.attn_proj, n_, [&](int r, int o, F8 low, F8 high) { add(&net_.x[r * net_.wide + o], low, high); });
      normalise(layer.c_fc);
      matmul(layer.c_fc, n_, [&](int r, int o, F8 low, F8 high) {
        put(&net_.hidden[r * net_.wider + o], gelu(low), gelu(high));
      });
      round_rows(layer.mlp_proj, net_.hidden, net_.wider);
      matmul(layer.mlp_proj, n_, [&](int r, int o, F8 low, F8 high) { add(&net_.x[r * net_.wide + o], low, high); });
    }
    predict();
  }

 private:
  static void put(float* to, F8 low, F8 high) { store(to, low), store(to + 8, high); }
  static void add(float* to, F8 low, F8 high) { put(to, load<F8>(to) + low, load<F8>(to + 8) + high); }

  // A phase: work(i) for the items 0 … n-1, shared among the team, then a barrier.
  template <class Work>
  void each(int n, int chunk, Work work) {
    const int phase = phase_++;
    for (int first; (first = net_.team.take(phase, chunk)) < n;)
      for (int i = first; i < std::min(first + chunk, n); i++) work(i);
    net_.team.barrier();
  }

  // For the input of a matmul: a single row each member prepares for itself, which is quicker than a barrier.
  template <class Work>
  void each_input(int n, Work work) {
    if (n == 1)
      work(0, member_);
    else
      each(n, 1, [&](int r) { work(r, r); });
    single_ = n == 1;
  }

  void embed(int r) {
    const Row& row = net_.rows[r];
    const Linear& table = net_.embedding.in ? net_.embedding : net_.head;
    const float* position = &net_.position_embedding[row.position * net_.wide];
    const int8_t* at = table.panel(row.id / kPanel) + row.id % kPanel * 2;
    const float scale = table.scale[row.id];
    float* x = &net_.x[r * net_.wide];
    for (int i = 0; i < net_.width; i++) x[i] = at[i / 2 * 32 + i % 2] * scale + position[i];
  }

  // (x - mean) / sqrt(variance + epsilon) of a row into the scratch row, in float32 with the mean taken off first.
  float* normalised(const float* x) {
    const int C = net_.width, stride = int(net_.wide);
    F8 total = all(0.f), squares = all(0.f);
    for (int i = 0; i < stride; i += 8) total += load<F8>(x + i);  // beyond C there are zeros
    const F8 mean = all(sum(total) / C);
    for (int i = 0; i < stride; i += 8) store(scratch_ + i, load<F8>(x + i) - mean);
    std::fill(scratch_ + C, scratch_ + stride, 0.f);
    for (int i = 0; i < stride; i += 8) squares += load<F8>(scratch_ + i) * load<F8>(scratch_ + i);
    const F8 scale = all(1.f / std::sqrt(sum(squares) / C + net_.epsilon));
    for (int i = 0; i < stride; i += 8) store(scratch_ + i, load<F8>(scratch_ + i) * scale);
    return scratch_;
  }

  void normalise(const Linear& next) {
    each_input(n_, [&](int r, int to) { round_row(next, normalised(&net_.x[r * net_.wide]), to); });
  }
  void round_rows(const Linear& next, const Buffer<float>& from, size_t stride) {
    each_input(n_, [&](int r, int to) { round_row(next, &from[r * stride], to); });
  }

  // A row as integers of at most next.limit, and the scale that gives it back.
  void round_row(const Linear& next, const float* row, int to) {
    const int stride = int(rounded(next.in, 16));
    F8 most = all(0.f);
    for (int i = 0; i < stride; i += 8) most = larger(most, absolute(load<F8>(row + i)));
    // Never below the smallest scale whose inverse is finite; a row that is not finite gives logits that are not.
    const float scale = std::max(largest(most) / next.limit, 1e-37f);
    const F8 inverse = all(1.f / scale);
    int16_t* out = &net_.input[to * net_.wider];
    for (int i = 0; i < stride; i += 8)
      store(out + i, __builtin_convertvector(nearest(load<F8>(row + i) * inverse), S8));
    net_.input_scale[to] = scale;
  }

  // give(row, first output, low, high): 16 outputs, bias added. Panels are taken in chunks of about 48 KB.
  template <class Give>
  void matmul(const Linear& w, int n, Give give) {
    const int first_row = single_ ? member_ : 0;
    const int16_t* input = &net_.input[first_row * net_.wider];
    const float* input_scale = &net_.input_scale[first_row];
    each(w.panels, std::max(1, 1536 / w.pairs), [&](int p) {
      const int o = p * kPanel;
      const F8 scale_low = load<F8>(&w.scale[o]), scale_high = load<F8>(&w.scale[o + 8]);
      const F8 bias_low = load<F8>(&w.bias[o]), bias_high = load<F8>(&w.bias[o + 8]);
      dot_panel(w.panel(p), input, net_.wider, w.pairs, n, [&](int first, int count, const int32_t (*sums)[kPanel]) {
        for (int r = 0; r < count; r++) {
          const float scale = input_scale[first + r];
          const F8 low = __builtin_convertvector(load<I8>(sums[r]), F8);
          const F8 high = __builtin_convertvector(load<I8>(sums[r] + 8), F8);
          give(first + r, o, low * (scale_low * scale) + bias_low, high * (scale_high * scale) + bias_high);
        }
      });
    });
  }

  // One head over the rows of one sequence: their keys and values join the slot, then each looks back.
  void attend(int layer, int h, const Run& run) {
    const int D = net_.head_width;
    const Row& first = net_.rows[run.first];
    uint16_t* keys = net_.keys(first, layer, h);
    uint16_t* values = net_.values(first, layer, h);
    float* padded = scratch_;
    std::fill(padded, padded + net_.padded_head, 0.f);
    for (int r = run.first; r < run.first + run.count; r++) {
      const size_t position = net_.rows[r].position;
      const float* k = &net_.qkv[r * net_.triple + net_.width + h * D];
      // Keys lie in blocks of eight positions, (block, D, 8): eight scores at once without a sum across a register.
      uint16_t* to = keys + position / 8 * D * 8 + position % 8;
      uint16_t half[8];
      std::copy(k, k + D, padded);
      for (int d = 0; d < D; d++) {
        if (d % 8 == 0) store_half(half, load<F8>(padded + d));
        to[d * 8] = half[d % 8];
      }
      std::copy(k + net_.width, k + net_.width + D, padded);
      for (int d = 0; d < D; d += 8) store_half(values + position * net_.padded_head + d, load<F8>(padded + d));
    }
    int r = run.first;
    for (; r + kQueries <= run.first + run.count; r += kQueries) look_back<kQueries>(r, h, keys, values);
    for (; r < run.first + run.count; r++) look_back<1>(r, h, keys, values);
  }

  // softmax(q K^T / sqrt(D)) V for Q rows of one sequence that follow each other.
  template <int Q>
  void look_back(int r, int h, const uint16_t* keys, const uint16_t* values) {
    const int D = net_.head_width, length = net_.rows[r + Q - 1].position + 1;
    const size_t stride = net_.positions;
    float* scores = scratch_ + net_.wider;          // (Q, positions)
    float* query = scores + kQueries * stride;      // (Q, D)
    const float scale = 1.f / std::sqrt(float(D));
    for (int q = 0; q < Q; q++)
      for (int d = 0; d < D; d++) query[q * D + d] = net_.qkv[(r + q) * net_.triple + h * D + d] * scale;

    constexpr int kBlocks = Q == 1 ? 4 : 2;
    for (int first = 0; first < length; first += 8 * kBlocks) {
      F8 score[Q][kBlocks];
      for (auto& of_query : score)
        for (auto& of_block : of_query) of_block = all(0.f);
      const uint16_t* block = keys + size_t(first) * D;
      for (int d = 0; d < D; d++) {
        F8 key[kBlocks];
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; b++) key[b] = load_half(block + (b * D + d) * 8);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
          for (int b = 0; b < kBlocks; b++) score[q][b] += key[b] * query[q * D + d];
      }
      for (int q = 0; q < Q; q++)
        for (int b = 0; b < kBlocks; b++) store(scores + q * stride + first + b * 8, score[q][b]);
    }

    float inverse[Q];
    for (int q = 0; q < Q; q++) inverse[q] = 1.f / soften(scores + q * stride, length - Q + 1 + q, length);

    float* out = &net_.attended[r * net_.wide + h * D];
    constexpr int kDims = Q == 1 ? 8 : 2;
    int d = 0;
    for (; d + 8 * kDims <= net_.padded_head; d += 8 * kDims)
      gather<Q, kDims>(scores, inverse, values + d, length, out + d, D - d);
    for (; d < net_.padded_head; d += 8) gather<Q, 1>(scores, inverse, values + d, length, out + d, D - d);
  }

  // Scores -> e^(score - maximum) for the first n, 0 for the others up to `length`; their sum.
  float soften(float* scores, int n, int length) {
    std::fill(scores + n, scores + rounded(length, 8), -INFINITY);
    F8 most = all(-INFINITY), total = all(0.f);
    for (int i = 0; i < n; i += 8) most = larger(most, load<F8>(scores + i));
    const F8 maximum = all(largest(most));
    for (int i = 0; i < n; i += 8) {
      const F8 score = load<F8>(scores + i);
      const F8 chance = score > -INFINITY ? exponential(score - maximum) : all(0.f);
      store(scores + i, chance);
      total += chance;
    }
    std::fill(scores + n, scores + std::max(length, n), 0.f);
    return sum(total);
  }

  // Dims x 8 numbers of the values' weighted sum, for Q queries; `room` of them belong to this head.
  template <int Q, int Dims>
  void gather(const float* scores, const float* inverse, const uint16_t* values, int length, float* out, int room) {
    F8 total[Q][Dims];
    for (auto& of_query : total)
      for (auto& of_dims : of_query) of_dims = all(0.f);
    for (int p = 0; p < length; p++, values += net_.padded_head) {
#pragma GCC unroll 8
      for (int d = 0; d < Dims; d++) {
        const F8 value = load_half(values + d * 8);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) total[q][d] += value * scores[q * net_.positions + p];
      }
    }
    for (int q = 0; q < Q; q++)
      for (int d = 0; d < Dims; d++) {
        float eight[8];
        store(eight, total[q][d] * inverse[q]);
        std::copy(eight, eight + std::min(8, room - d * 8), out + q * net_.wide + d * 8);
      }
  }

  // Logits of the rows that are asked for. The column that was taken off the weights adds the same to all of a row.
  void predict() {
    const int n = int(net_.outputs.size());
    if (n == 0) return;
    each_input(n, [&](int i, int to) {
      float* row = normalised(&net_.x[net_.outputs[i] * net_.wide]);
      F8 total = all(0.f);
      for (int c = 0; c < int(net_.wide); c += 8) {
        const F8 y = load<F8>(row + c) * load<F8>(&net_.final_scale[c]) + load<F8>(&net_.final_offset[c]);
        store(row + c, y);
        total += y * load<F8>(&net_.head_column[c]);
      }
      round_row(net_.head, row, to);
      net_.input_offset[to] = sum(total);
    });
    const float* offset = &net_.input_offset[single_ ? member_ : 0];
    matmul(net_.head, n, [&](int i, int o, F8 low, F8 high) {
      float sixteen[16];
      put(sixteen, low + offset[i], high + offset[i]);
      std::copy(sixteen, sixteen + std::min(16, net_.vocab - o), net_.logits + size_t(i) * net_.vocab + o);
    });
  }

  Network& net_;
  const int member_, n_;
  float* const scratch_;
  int phase_ = 0;
  bool single_ = false;
};

void Network::step() {
  for (const Row& row : rows)
    if (!slots[row.slot]) slots[row.slot] = Buffer<uint16_t>(n_layer * (key_size + value_size));
  runs.clear();
  for (int r = 0; r < int(rows.size()); r++) {
    if (r && rows[r].slot == rows[r - 1].slot && rows[r].position == rows[r - 1].position + 1)
      runs.back().count++;
    else
      runs.push_back({r, 1});
  }
  team.run([](void* self, int member) { Walk(*static_cast<Network*>(self), member).all_layers(); }, this,
           n_layer * 9 + 3);
}

}  // namespace gpt2

// The interface: plain C, no exceptions. Where a function gives an int, 0 is success, -1 no memory.
using gpt2::Network;

#define GPT2_API extern "C" __attribute__((visibility("default")))

GPT2_API Network* gpt2_new(int vocab, int context, int n_layer, int heads, int width, float epsilon, int tied,
                           int slots, int threads) try {
  return new Network(vocab, context, n_layer, heads, width, epsilon, tied, slots, threads);
} catch (...) {
  return nullptr;
}

GPT2_API void gpt2_free(Network* net) { delete net; }

// Matrix `kind` of a layer: 0 c_attn, 1 attn.c_proj, 2 c_fc, 3 mlp.c_proj; of layer n_layer: 0 head, 1 embedding.
// weights (out, in) int8, scale (out) and bias (out) or null; all are copied.
GPT2_API int gpt2_set_matrix(Network* net, int layer, int kind, const int8_t* weights, const float* scale,
                             const float* bias) try {
  const int C = net->width;
  if (layer == net->n_layer) {
    (kind == 0 ? net->head : net->embedding).pack(C, net->vocab, weights, scale, nullptr);
    return 0;
  }
  gpt2::Layer& to = net->layers[layer];
  switch (kind) {
    case 0: to.c_attn.pack(C, 3 * C, weights, scale, bias); break;
    case 1: to.attn_proj.pack(C, C, weights, scale, bias); break;
    case 2: to.c_fc.pack(C, 4 * C, weights, scale, bias); break;
    case 3: to.mlp_proj.pack(4 * C, C, weights, scale, bias); break;
  }
  return 0;
} catch (...) {
  return -1;
}

// 0: position embedding (context, width); 1, 2: final layer norm's scale and offset; 3: the head's column (width).
GPT2_API void gpt2_set_vector(Network* net, int kind, const float* from) {
  gpt2::Buffer<float>* to[] = {&net->position_embedding, &net->final_scale, &net->final_offset, &net->head_column};
  for (int r = 0; r < (kind == 0 ? net->context : 1); r++)
    std::copy(from + size_t(r) * net->width, from + size_t(r + 1) * net->width, to[kind]->get() + r * net->wide);
}

// n tokens: those of one sequence in order, all else as you like. outputs: numbers of the rows, ascending, whose
// logits (n_out, vocab) are wanted. Arguments out of range are the caller's fault and not looked for.
GPT2_API int gpt2_step(Network* net, int n, const int32_t* ids, const int32_t* slots, const int32_t* positions,
                       int n_out, const int32_t* outputs, float* logits) try {
  for (int first = 0, out = 0; first < n; first += gpt2::kRows) {
    const int stop = std::min(n, first + gpt2::kRows);
    net->rows.clear(), net->outputs.clear();
    for (int r = first; r < stop; r++) net->rows.push_back({ids[r], slots[r], positions[r]});
    net->logits = logits + size_t(out) * net->vocab;
    for (; out < n_out && outputs[out] < stop; out++) net->outputs.push_back(outputs[out] - first);
    net->step();
  }
  return 0;
} catch (...) {
  return -1;
}

// The slot `to` becomes what `from` is.
GPT2_API int gpt2_copy_slot(Network* net, int from, int to, int) try {
  const size_t size = net->n_layer * (net->key_size + net->value_size);
  if (!net->slots[to]) net->slots[to] = gpt2::Buffer<uint16_t>(size);
  if (net->slots[from]) std::copy(net->slots[from].get(), net->slots[from].get() + size, net->slots[to].get());
  return 0;
} catch (...) {
  return -1;
}

// Gives a slot's memory back to the system.
GPT2_API void gpt2_free_slot(Network* net, int slot) { net->slots[slot] = gpt2::Buffer<uint16_t>(); }

// For tests: the packed product alone. weights (out, in) int8, rows (n, in) int16, sums (n, out) int32.
// Gives the largest activation that the weights allow.
GPT2_API int gpt2_dot(int n_in, int n_out, int n, const int8_t* weights, const int16_t* rows, int32_t* sums) try {
  const std::vector<float> scale(n_out);
  gpt2::Linear w;
  w.pack(n_in, n_out, weights, scale.data(), nullptr);
  const size_t stride = 2 * size_t(w.pairs);
  std::vector<int16_t> padded(n * stride);
  for (int r = 0; r < n; r++) std::copy(rows + size_t(r) * n_in, rows + size_t(r + 1) * n_in, &padded[r * stride]);
  for (int p = 0; p < w.panels; p++)
    gpt2::dot_panel(w.panel(p), padded.data(), stride, w.pairs, n,
                    [&](int first, int count, const int32_t (*tile)[gpt2::kPanel]) {
                      const int o = p * gpt2::kPanel, room = std::min(gpt2::kPanel, n_out - o);
                      for (int r = 0; r < count; r++)
                        std::copy(tile[r], tile[r] + room, sums + size_t(first + r) * n_out + o);
                    });
  return w.limit;
} catch (...) {
  return -1;
}

// For benchmarks: milliseconds that `threads` take to read `bytes` at `from` once, in one straight walk each.
GPT2_API float gpt2_read(int threads, const int8_t* from, size_t bytes) { return 0.f; }
