// Walks through random small networks by the kernels' own interface, for the sanitizers: driver SEED ROUNDS.
#include "../../gpt2/inference/kernels/network.cpp"

#include <cstdio>
#include <cstdlib>
#include <random>

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  std::mt19937 random(std::atoi(argv[1]));
  const auto below = [&](int n) { return int(random() % unsigned(n)); };
  const auto one_to = [&](int n) { return 1 + below(n); };
  for (int round = 0; round < std::atoi(argv[2]); round++) {
    const int heads = one_to(4), width = heads * one_to(20), context = one_to(70), n_layer = one_to(2);
    const int vocab = one_to(60), tied = below(2), slots = one_to(4), threads = one_to(8);
    Network* net = gpt2_new(vocab, context, n_layer, heads, width, 1e-5f, tied, slots, threads);
    if (!net) return 1;
    const auto matrix = [&](int layer, int kind, int out, int in, bool with_bias) {
      std::vector<int8_t> weights(size_t(out) * in);
      std::vector<float> scale(out), bias(out);
      for (auto& w : weights) w = int8_t(below(255) - 127);
      for (auto& s : scale) s = 0.001f * one_to(100);
      for (auto& b : bias) b = 0.01f * below(100);
      if (gpt2_set_matrix(net, layer, kind, weights.data(), scale.data(), with_bias ? bias.data() : nullptr)) std::abort();
    };
    for (int l = 0; l < n_layer; l++) {
      matrix(l, 0, 3 * width, width, true), matrix(l, 1, width, width, true);
      matrix(l, 2, 4 * width, width, true), matrix(l, 3, width, 4 * width, below(2));
    }
    matrix(n_layer, 0, vocab, width, false);
    if (!tied) matrix(n_layer, 1, vocab, width, false);
    std::vector<float> vector(size_t(context) * width, 0.5f);
    for (int kind = 0; kind < 4; kind++) gpt2_set_vector(net, kind, vector.data());

    std::vector<int> length(slots);
    for (int step = 0; step < 6; step++) {
      for (int slot = 0; slot < slots; slot++) {
        if (below(5) == 0) gpt2_free_slot(net, slot), length[slot] = 0;
        if (below(5) == 0) {
          const int from = below(slots);
          if (gpt2_copy_slot(net, from, slot, length[from])) std::abort();
          length[slot] = length[from];
        }
      }
      std::vector<int32_t> ids, of, positions, outputs;
      for (int slot = 0; slot < slots; slot++) {
        length[slot] = below(length[slot] + 1);
        for (int n = below(3) ? one_to(2) : below(context + 1); n > 0 && length[slot] < context; n--) {
          if (below(3)) outputs.push_back(int(ids.size()));
          ids.push_back(below(vocab)), of.push_back(slot), positions.push_back(length[slot]++);
        }
      }
      std::vector<float> logits(outputs.size() * vocab);
      if (gpt2_step(net, int(ids.size()), ids.data(), of.data(), positions.data(), int(outputs.size()), outputs.data(),
                    logits.data()))
        std::abort();
      for (float x : logits)
        if (!std::isfinite(x)) std::abort();
    }
    gpt2_free(net);

    const int in = one_to(1000), out = one_to(40), n = one_to(64);
    std::vector<int8_t> weights(size_t(out) * in, -127);
    std::vector<int16_t> rows(size_t(n) * in, 16000);
    std::vector<int32_t> sums(size_t(n) * out);
    gpt2_dot(in, out, n, weights.data(), rows.data(), sums.data());
    for (int32_t sum : sums)
      if (sum != -127 * 16000 * in) std::abort();
  }
  std::puts("done");
}
