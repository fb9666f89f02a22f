// GPT-2 on a CPU with int8 weights: any number of tokens of any sequences, one trip through the weights.
//
//   row      one token: its id, the slot of its sequence, its position there
//   slot     the keys and values of one sequence: 8 bits a number, one scale for a head's key or value
//   phase    what the team does between two barriers; a layer has five (eight with several rows)
//
// A step of GPT-2 small reads 124 MB of weights for whatever number of rows, and 20 KB of keys and values for each
// token that its row looks back on. One row is bound by reading; from about eight rows on the products take longer.
#include "matmul.h"
#include "team.h"

#include <algorithm>
#include <memory>
#include <new>
#include <sys/mman.h>

namespace gpt2 {

// Zeros from the system, which gives pages when they are touched: large ones if asked for, so that a walk through
// the weights misses the address cache once in 2 MB instead of once in 4 KB.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t n, bool large = false) : bytes_(n * sizeof(T) + (large ? kLarge : 0)) {
#if defined(__SANITIZE_ADDRESS__)  // which watches over nothing but its own allocator
    start_ = std::calloc(n, sizeof(T));
    if (!start_) throw std::bad_alloc();
    data_ = static_cast<T*>(start_);
#else
    start_ = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start_ == MAP_FAILED) start_ = nullptr, throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
    if (large) madvise(start_, bytes_, MADV_HUGEPAGE);
#endif
    const uintptr_t at = reinterpret_cast<uintptr_t>(start_);
    data_ = reinterpret_cast<T*>(large ? (at + kLarge - 1) / kLarge * kLarge : at);
#endif
  }
  Buffer(Buffer&& other) noexcept { *this = static_cast<Buffer&&>(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(start_, other.start_);
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~Buffer() {
#if defined(__SANITIZE_ADDRESS__)
    std::free(start_);
#else
    if (start_) munmap(start_, bytes_);
#endif
  }
  T* get() const { return data_; }
  T& operator[](size_t i) const { return data_[i]; }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  static constexpr size_t kLarge = 2 << 20;
  void* start_ = nullptr;
  T* data_ = nullptr;
  size_t bytes_ = 0;
};

constexpr int kRows = 128;        // rows that walk through the layers together: their activations stay in the caches
constexpr int kQueries = 4;       // queries of one sequence that share a look at its keys
constexpr int kPositions = 32;    // slots are a multiple of this long, so that keys are looked at in whole blocks
constexpr int kChunk = 48 << 10;  // bytes of weights that a member takes at a time: some 4 microseconds of reading

inline size_t rounded(size_t n, size_t to) { return (n + to - 1) / to * to; }

struct Row {
  int32_t id, slot, position;
};
struct Run {
  int first, count;  // rows that follow each other in one sequence
};
constexpr int kGroup = 4 * kQueries;

// A row that goes into a matmul; its numbers are scale * (bytes + large).
struct Input {
  float scale, offset;  // offset: what the head adds to all outputs
  uint32_t excess;      // what the 128 in the weights add to a sum
  int n_large;
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
  // A layer of a slot, in bytes: all heads' keys, their values, the scales of both.
  const size_t key_size = heads * positions * head_width, value_size = heads * positions * padded_head;
  const size_t scale_size = heads * positions * sizeof(float), layer_size = key_size + value_size + 2 * scale_size;
  const size_t scratch_size = wider + kQueries * (positions + padded_head);

  std::vector<Layer> layers;
  Linear head, embedding;  // embedding is empty where the head's weights are the embedding too
  Buffer<uint8_t> weights;  // all of them, in the order of the walk
  size_t weight_bytes = 0;
  Buffer<float> position_embedding, final_scale, final_offset;
  Buffer<float> head_column;  // what was taken off every row of the head's weights
  std::vector<Buffer<int8_t>> slots;

  Team team;
  Buffer<float> x, qkv, attended, hidden;         // (rows, stride)
  Buffer<int8_t> input;                           // (rows or team, wider): what the next matmul reads
  Buffer<Large> large;                            // (rows or team, wider / 4): and what is beyond its bytes
  Buffer<Input> inputs;                           // (rows or team)
  Buffer<float> scratch;                          // (team, …): one row, and scores of kQueries

  // The step under way.
  std::vector<Row> rows;
  std::vector<Run> runs;         // all rows of a sequence
  std::vector<Run> groups;       // the same, cut into pieces that are shared out
  std::vector<int32_t> outputs;  // rows whose logits are wanted
  float* logits = nullptr;

  Network(int vocab, int context, int n_layer, int heads, int width, float epsilon, bool tied, int n_slots, int threads)
      : vocab(vocab), context(context), n_layer(n_layer), heads(heads), width(width), epsilon(epsilon),
        layers(n_layer, {{width, 3 * width}, {width, width}, {width, 4 * width}, {4 * width, width}}),
        head(width, vocab), position_embedding(context * wide), final_scale(wide), final_offset(wide),
        head_column(wide), slots(n_slots), team(threads), x(kRows * wide), qkv(kRows * triple),
        attended(kRows * wide), hidden(kRows * wider), input(std::max(kRows, threads) * wider),
        large(std::max(kRows, threads) * wider / 4), inputs(std::max(kRows, threads)),
        scratch(threads * scratch_size) {
    if (!tied) embedding = Linear(width, vocab);
    for_all([&](Linear& linear) { weight_bytes += rounded(linear.bytes(), 64); });
    weights = Buffer<uint8_t>(weight_bytes, true);
    uint8_t* at = weights.get();
    for_all([&](Linear& linear) { linear.packed = at, at += rounded(linear.bytes(), 64); });
  }

  template <class Visit>
  void for_all(Visit visit) {
    for (Layer& layer : layers)
      for (Linear* linear : {&layer.c_attn, &layer.attn_proj, &layer.c_fc, &layer.mlp_proj}) visit(*linear);
    visit(head);
    visit(embedding);
  }

  // The past of one head: keys in blocks of eight positions, (block, head_width, 8), for eight scores at once without
  // a sum across a register. Values (position, padded_head). A key is keys * key_scales[position], a value likewise.
  struct Past {
    int8_t *keys, *values;
    float *key_scales, *value_scales;
  };
  Past past(int slot, int layer, int h) const {
    int8_t* at = slots[slot].get() + layer * layer_size;
    float* scales = reinterpret_cast<float*>(at + key_size + value_size) + h * positions;
    return {at + h * positions * head_width, at + key_size + h * positions * padded_head, scales,
            scales + heads * positions};
  }

  Buffer<int8_t> new_slot() const { return Buffer<int8_t>(n_layer * layer_size); }
  void step();
  void pack(Linear& linear, const int8_t* from, const float* scale, const float* bias);
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
      matmul(layer.c_attn, n_, [&](int r, int o, F8 low, F8 high) {
        put(&net_.qkv[r * net_.triple + o], low, high);
      });
      attention(l);
      round_rows(layer.attn_proj, net_.attended, net_.wide);
      matmul(layer.attn_proj, n_, [&](int r, int o, F8 low, F8 high) {
        add(&net_.x[r * net_.wide + o], low, high);
      });
      normalise(layer.c_fc);
      matmul(layer.c_fc, n_, [&](int r, int o, F8 low, F8 high) {
        put(&net_.hidden[r * net_.wider + o], gelu(low), gelu(high));
      });
      round_rows(layer.mlp_proj, net_.hidden, net_.wider);
      matmul(layer.mlp_proj, n_, [&](int r, int o, F8 low, F8 high) {
        add(&net_.x[r * net_.wide + o], low, high);
      });
    }
    predict();
  }

 private:
  static void put(float* to, F8 low, F8 high) { store(to, low), store(to + 8, high); }
  static void add(float* to, F8 low, F8 high) { put(to, load<F8>(to) + low, load<F8>(to + 8) + high); }

  template <class Call>
  void each(int n, int chunk, Call call) {
    net_.team.each(member_, phase_++, n, chunk, call);
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
    const float scale = table.scales(row.id / kPanel)[row.id % kPanel];
    float* x = &net_.x[r * net_.wide];
    for (int i = 0; i < net_.width; i++) x[i] = table.weight(row.id, i) * scale + position[i];
    std::fill(x + net_.width, x + net_.wide, 0.f);  // an earlier step's NaN may stand there
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

  // n numbers (a multiple of 8) as integers within +-127, eight by eight to give(i, them); the scale that gives them
  // back: NaN if one of them is not finite, and then so is all that is computed from them.
  template <class Give>
  static float round_all(const float* from, int n, Give give) {
    F8 most = all(0.f), spoilt = all(0.f);
    for (int i = 0; i < n; i += 8) {
      const F8 v = load<F8>(from + i);
      most = larger(most, absolute(v));
      spoilt += v * 0.f;
    }
    // Never below the smallest scale whose inverse is finite.
    const float scale = std::max(largest(most) / 127, 1e-37f) + sum(spoilt);
    const bool finite = scale < INFINITY;
    const F8 inverse = all(1.f / scale);
    for (int i = 0; i < n; i += 8) give(i, nearest(finite ? load<F8>(from + i) * inverse : all(0.f)));
    return scale;
  }

  // A row as integers. The grid is as fine as 8 bits allow for all fours of numbers (weight_of_four) but a few: fours
  // are in 16 groups, group by group round the row, and the three groups with the heaviest are left out. So the others
  // keep their bits beside an outlying channel or two; a row without any has a handful of large numbers.
  void round_row(const Linear& next, const float* row, int to) {
    const int n = int(rounded(next.in, 16));
    constexpr int kGroups = 8, kLeftOut = 3;  // registers of two groups
    F8 most[kGroups] = {}, spoilt = all(0.f);
    for (int i = 0; i < n; i += 8) {
      const F8 v = load<F8>(row + i);
      most[i / 8 % kGroups] = larger(most[i / 8 % kGroups], weight_of_four(v));
      spoilt += v * 0.f;
    }
    float largest = 0.f, bound = 0.f;
    for (int left_out = 0; left_out <= kLeftOut; left_out++) {
      F8 heaviest = most[0];
      for (const F8& groups : most) heaviest = larger(heaviest, groups);
      bound = gpt2::largest(heaviest);
      if (left_out == 0) largest = bound;
      for (F8& groups : most) groups = groups < bound ? groups : all(0.f);
    }
    Input& input = net_.inputs[to];
    Split split{&net_.input[to * net_.wider], &net_.large[to * net_.wider / 4]};
    // Never below the smallest scale whose inverse is finite.
    input.scale = std::max({bound / 127, largest / next.limit, 1e-37f}) + sum(spoilt);
    const bool finite = input.scale < INFINITY;
    const F8 inverse = all(1.f / input.scale);
    for (int i = 0; i < n; i += 8) split.take(nearest(finite ? load<F8>(row + i) * inverse : all(0.f)), i);
    input.excess = split.excess();
    input.n_large = split.n_large;
  }

  // Panels taken at a time: kChunk bytes, or less where a team is so large that it would not come out even.
  int chunk(const Linear& w) const {
    const int even = w.panels / (8 * net_.team.size());
    return std::max(1, std::min(even, int(kChunk / w.panel_bytes)));
  }

  // give(row, first output, low, high): 16 outputs, bias added.
  template <class Give>
  void matmul(const Linear& w, int n, Give give) {
    const int first_row = single_ ? member_ : 0;
    const int8_t* bytes = &net_.input[first_row * net_.wider];
    const Large* large = &net_.large[first_row * net_.wider / 4];
    const Input* inputs = &net_.inputs[first_row];
    each(w.panels, chunk(w), [&](int p) {
      uint32_t sums[kRows][kPanel];
      dot_panel(w.weights(p), bytes, net_.wider, w.octets, n, sums);
      const int o = p * kPanel;
      const F8 scale_low = load<F8>(w.scales(p)), scale_high = load<F8>(w.scales(p) + 8);
      const F8 bias_low = load<F8>(w.biases(p)), bias_high = load<F8>(w.biases(p) + 8);
      for (int r = 0; r < n; r++) {
        const Input& input = inputs[r];
        dot_large(w.weights(p), large + r * net_.wider / 4, input.n_large, sums[r]);
        const F8 low = __builtin_convertvector((I8)(load<U8>(sums[r]) - input.excess), F8);
        const F8 high = __builtin_convertvector((I8)(load<U8>(sums[r] + 8) - input.excess), F8);
        const float scale = input.scale;
        give(r, o, low * (scale_low * scale) + bias_low, high * (scale_high * scale) + bias_high);
      }
    });
  }

  // Keys and values of a run join its slot before its rows look back; a run of one row does both at once.
  void attention(int layer) {
    const int heads = net_.heads, runs = int(net_.runs.size()), groups = int(net_.groups.size());
    const bool apart = groups > runs;
    if (apart) each(runs * heads, 1, [&](int i) { remember(layer, i % heads, net_.runs[i / heads]); });
    each(groups * heads, 1, [&](int i) {
      const Run& group = net_.groups[i / heads];
      if (!apart) remember(layer, i % heads, group);
      look_back(layer, i % heads, group);
    });
  }

  // Keys and values of one head and the rows of one sequence, into the slot.
  void remember(int layer, int h, const Run& run) {
    const int D = net_.head_width;
    const Network::Past past = net_.past(net_.rows[run.first].slot, layer, h);
    float* padded = scratch_;
    std::fill(padded, padded + net_.padded_head, 0.f);
    for (int r = run.first; r < run.first + run.count; r++) {
      const size_t position = net_.rows[r].position;
      const float* k = &net_.qkv[r * net_.triple + net_.width + h * D];
      int8_t* key = past.keys + position / 8 * D * 8 + position % 8;
      std::copy(k, k + D, padded);
      past.key_scales[position] = round_all(padded, net_.padded_head, [&](int d, I8 v) {
        for (int i = 0; i < 8 && d + i < D; i++) key[(d + i) * 8] = int8_t(v[i]);
      });
      int8_t* value = past.values + position * net_.padded_head;
      std::copy(k + net_.width, k + net_.width + D, padded);
      past.value_scales[position] = round_all(padded, net_.padded_head, [&](int d, I8 v) {
        store(value + d, narrow(v));
      });
    }
  }

  void look_back(int layer, int h, const Run& group) {
    const Network::Past past = net_.past(net_.rows[group.first].slot, layer, h);
    int r = group.first;
    const int stop = r + group.count;
    for (; r + kQueries <= stop; r += kQueries) look_back<kQueries>(r, h, past);
    for (; r < stop; r++) look_back<1>(r, h, past);
  }

  // softmax(q K^T / sqrt(D)) V for Q rows of one sequence that follow each other.
  template <int Q>
  void look_back(int r, int h, const Network::Past& past) {
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
      const int8_t* block = past.keys + size_t(first) * D;
      for (int d = 0; d < D; d++) {
        // The next keys, a line of 64 bytes every other time: one row waits for memory.
        if (Q == 1 && d % 2 == 0) __builtin_prefetch(block + kPositions * (D + d), 0, 2);
        F8 key[kBlocks];
#pragma GCC unroll 4
        for (int b = 0; b < kBlocks; b++) key[b] = load_bytes(block + (b * D + d) * 8);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++)
#pragma GCC unroll 4
          for (int b = 0; b < kBlocks; b++) score[q][b] += key[b] * query[q * D + d];
      }
      for (int q = 0; q < Q; q++)
        for (int b = 0; b < kBlocks; b++) {
          const int at = first + b * 8;
          store(scores + q * stride + at, score[q][b] * load<F8>(past.key_scales + at));
        }
    }

    float inverse[Q];
    for (int q = 0; q < Q; q++)
      inverse[q] = 1.f / soften(scores + q * stride, length - Q + 1 + q, length, past.value_scales);

    float* out = &net_.attended[r * net_.wide + h * D];
    constexpr int kDims = Q == 1 ? 8 : 2;
    int d = 0;
    for (; d + 8 * kDims <= net_.padded_head; d += 8 * kDims)
      gather<Q, kDims>(scores, inverse, past.values + d, length, out + d, D - d);
    for (; d < net_.padded_head; d += 8) gather<Q, 1>(scores, inverse, past.values + d, length, out + d, D - d);
  }

  // Scores -> e^(score - maximum) for the first n, 0 for the others up to `length`; gives their sum. What stays in
  // `scores` is already multiplied by the scale of the value that it will weigh.
  float soften(float* scores, int n, int length, const float* value_scales) {
    std::fill(scores + n, scores + rounded(length, 8), -INFINITY);
    F8 most = all(-INFINITY), total = all(0.f);
    for (int i = 0; i < n; i += 8) most = larger(most, load<F8>(scores + i));
    const F8 maximum = all(largest(most));
    for (int i = 0; i < n; i += 8) {
      const F8 score = load<F8>(scores + i);
      const F8 chance = score > -INFINITY ? exponential(score - maximum) : all(0.f);
      store(scores + i, chance * load<F8>(value_scales + i));
      total += chance;
    }
    std::fill(scores + n, scores + std::max(length, n), 0.f);
    return sum(total);
  }

  // Dims x 8 numbers of the values' weighted sum, for Q queries; `room` of them belong to this head.
  template <int Q, int Dims>
  void gather(const float* scores, const float* inverse, const int8_t* values, int length, float* out, int room) {
    F8 total[Q][Dims];
    for (auto& of_query : total)
      for (auto& of_dims : of_query) of_dims = all(0.f);
    for (int p = 0; p < length; p++, values += net_.padded_head) {
      if (Q == 1) __builtin_prefetch(values + kPositions * net_.padded_head, 0, 2);
#pragma GCC unroll 8
      for (int d = 0; d < Dims; d++) {
        const F8 value = load_bytes(values + d * 8);
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
      net_.inputs[to].offset = sum(total);
    });
    const Input* inputs = &net_.inputs[single_ ? member_ : 0];
    matmul(net_.head, n, [&](int i, int o, F8 low, F8 high) {
      float sixteen[kPanel];
      put(sixteen, low + inputs[i].offset, high + inputs[i].offset);
      std::copy(sixteen, sixteen + std::min(kPanel, net_.vocab - o), net_.logits + size_t(i) * net_.vocab + o);
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
    if (!slots[row.slot]) slots[row.slot] = new_slot();
  runs.clear(), groups.clear();
  for (int r = 0; r < int(rows.size()); r++) {
    const bool joins = r && rows[r].slot == rows[r - 1].slot;
    if (joins)
      runs.back().count++;
    else
      runs.push_back({r, 1});
    if (joins && groups.back().count < kGroup)
      groups.back().count++;
    else
      groups.push_back({r, 1});
  }
  team.run([](void* self, int member) { Walk(*static_cast<Network*>(self), member).all_layers(); }, this);
}

void Network::pack(Linear& linear, const int8_t* from, const float* scale, const float* bias) {
  struct Job {
    Team& team;
    const Linear& linear;
    const int8_t* from;
    const float *scale, *bias;
    std::vector<int64_t> heaviest;
  } job{team, linear, from, scale, bias, std::vector<int64_t>(linear.panels)};
  team.run(
      [](void* self, int member) {
        Job& job = *static_cast<Job*>(self);
        job.team.each(member, 0, job.linear.panels, 1, [&](int p) {
          job.heaviest[p] = job.linear.pack(p, job.from, job.scale, job.bias);
        });
      },
      &job);
  linear.set_limit(*std::max_element(job.heaviest.begin(), job.heaviest.end()));
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

// Matrix `kind` of a layer: 0 c_attn, 1 attn.c_proj, 2 c_fc, 3 mlp.c_proj; of layer n_layer: 0 head, 1 embedding,
// which is there if the network was made with tied = 0.
// weights (out, in) int8, scale (out) and bias (out) or null; all are copied.
GPT2_API int gpt2_set_matrix(Network* net, int layer, int kind, const int8_t* weights, const float* scale,
                             const float* bias) try {
  if (layer == net->n_layer) {
    net->pack(kind == 0 ? net->head : net->embedding, weights, scale, bias);
  } else {
    gpt2::Layer& to = net->layers[layer];
    gpt2::Linear* matrices[] = {&to.c_attn, &to.attn_proj, &to.c_fc, &to.mlp_proj};
    net->pack(*matrices[kind], weights, scale, bias);
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

// n tokens: those of one sequence side by side and in order. outputs: numbers of the rows, ascending, whose logits
// (n_out, vocab) are wanted. Arguments out of range are the caller's fault and not looked for.
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

// The slot `to` becomes what `from` is, as far as its first n tokens.
GPT2_API int gpt2_copy_slot(Network* net, int from, int to, int n) try {
  if (n == 0 || from == to) return 0;
  if (!net->slots[to]) net->slots[to] = net->new_slot();
  for (int layer = 0; layer < net->n_layer; layer++)
    for (int h = 0; h < net->heads; h++) {
      const Network::Past source = net->past(from, layer, h), target = net->past(to, layer, h);
      std::copy_n(source.keys, gpt2::rounded(n, 8) * net->head_width, target.keys);
      std::copy_n(source.values, size_t(n) * net->padded_head, target.values);
      std::copy_n(source.key_scales, n, target.key_scales);
      std::copy_n(source.value_scales, n, target.value_scales);
    }
  return 0;
} catch (...) {
  return -1;
}

// Gives a slot's memory back to the system.
GPT2_API void gpt2_free_slot(Network* net, int slot) { net->slots[slot] = gpt2::Buffer<int8_t>(); }

// For tests: the packed product alone. weights (out, in) int8, rows (n, in) int16, sums (n, out) int32.
// Gives the largest activation that the weights allow.
GPT2_API int gpt2_dot(int n_in, int n_out, int n, const int8_t* weights, const int16_t* rows, int32_t* sums) try {
  const std::vector<float> scale(n_out);
  gpt2::Linear w(n_in, n_out);
  const gpt2::Buffer<uint8_t> packed(w.bytes());
  w.packed = packed.get();
  int64_t heaviest = 0;
  for (int p = 0; p < w.panels; p++) heaviest = std::max(heaviest, w.pack(p, weights, scale.data(), nullptr));
  w.set_limit(heaviest);
  const size_t stride = gpt2::rounded(n_in, 8);
  std::vector<int8_t> bytes(n * stride);
  std::vector<gpt2::Large> large(n * stride / 4);
  std::vector<gpt2::Split> splits;
  for (int r = 0; r < n; r++) {
    gpt2::Split split{&bytes[r * stride], &large[r * stride / 4]};
    for (int i = 0; i < n_in; i += 8) {
      gpt2::I8 eight = {};
      for (int j = 0; j < 8 && i + j < n_in; j++) eight[j] = rows[size_t(r) * n_in + i + j];
      split.take(eight, i);
    }
    splits.push_back(split);
  }
  const gpt2::Buffer<uint32_t> room(size_t(n) * gpt2::kPanel);
  auto tile = reinterpret_cast<uint32_t(*)[gpt2::kPanel]>(room.get());
  for (int p = 0; p < w.panels; p++) {
    gpt2::dot_panel(w.weights(p), bytes.data(), stride, w.octets, n, tile);
    for (int r = 0; r < n; r++) {
      gpt2::dot_large(w.weights(p), splits[r].large, splits[r].n_large, tile[r]);
      for (int o = p * gpt2::kPanel; o < std::min(n_out, (p + 1) * gpt2::kPanel); o++)
        sums[size_t(r) * n_out + o] = int32_t(tile[r][o % gpt2::kPanel] - splits[r].excess());
    }
  }
  return w.limit;
} catch (...) {
  return -1;
}

// For benchmarks: reads all weights once, each member its share in one straight walk, and does nothing with them; the
// sum keeps the compiler from leaving it out. With a tied head this is the limit of a step of one row.
GPT2_API int64_t gpt2_read(Network* net) {
  struct Job {
    Network& net;
    std::atomic<int64_t> total{0};
  } job{*net};
  net->team.run(
      [](void* self, int member) {
        Job& job = *static_cast<Job*>(self);
        const size_t part = job.net.weight_bytes / job.net.team.size() / 256 * 256;
        const uint8_t* at = job.net.weights.get() + member * part;
        gpt2::I8 sums[8] = {};
        for (size_t i = 0; i < part; i += 256)
          for (int j = 0; j < 8; j++) sums[j] += gpt2::load<gpt2::I8>(at + i + 32 * j);
        for (const gpt2::I8& sum : sums) job.total += sum[0] + sum[5];
      },
      &job);
  return job.total;
}

// For benchmarks: on every member at once, `times` products of one panel of kBlock octets with kMaxTile rows, all in
// L1. This is the limit of many rows. Gives the operations, two a product.
GPT2_API int64_t gpt2_multiply(Network* net, int times) {
  net->team.run(
      [](void* self, int) {
        alignas(64) static const uint8_t weights[gpt2::kBlock * gpt2::kOctetBytes] = {};
        static const int8_t rows[gpt2::kMaxTile * gpt2::kBlock * 8] = {};
        uint32_t sums[gpt2::kMaxTile][gpt2::kPanel];
        for (int i = 0; i < *static_cast<int*>(self); i++) {
          gpt2::dot_panel(weights, rows, gpt2::kBlock * 8, gpt2::kBlock, gpt2::kMaxTile, sums);
          asm volatile("" : : "r"(sums) : "memory");
        }
      },
      &times);
  return int64_t(times) * net->team.size() * gpt2::kMaxTile * gpt2::kPanel * gpt2::kBlock * 8 * 2;
}
