// Random shapes through the kernels, to be run under sanitizers: sizes odd and even, 1 to 8 threads.
#include <cstdio>
#include <random>

#include "network.cpp"

int main() {
  std::mt19937 random(1);
  auto up_to = [&](int n) { return int(random() % n) + 1; };
  for (int round = 0; round < 24; round++) {
    const int heads = up_to(4), width = heads * up_to(20), vocab = up_to(90), context = up_to(70), layers = up_to(2);
    const int slots = up_to(4), threads = round % 8 + 1;
    auto* net = gpt2_new(vocab, context, layers, heads, width, 1e-5f, slots, threads);
    auto matrix = [&](int layer, int kind, int out, int in) {
      std::vector<int8_t> weights(size_t(out) * in);
      for (auto& w : weights) w = int8_t(int(random() % 255) - 127);
      std::vector<float> scale(out, 0.01f), bias(out, 0.1f);
      gpt2_set_matrix(net, layer, kind, weights.data(), scale.data(), bias.data());
    };
    for (int l = 0; l < layers; l++) {
      matrix(l, 0, 3 * width, width), matrix(l, 1, width, width);
      matrix(l, 2, 4 * width, width), matrix(l, 3, width, 4 * width);
    }
    matrix(layers, 0, vocab, width);
    if (round % 2) matrix(layers, 1, vocab, width);
    for (int kind = 0; kind < 4; kind++) {
      std::vector<float> vector(size_t(kind == 0 ? context : 1) * width, 0.5f);
      gpt2_set_vector(net, kind, vector.data());
    }
    for (int first = 0; first < context;) {  // each slot gets the same tokens, some at a time
      const int count = std::min(context - first, up_to(9));
      std::vector<int32_t> ids, of, positions, outputs;
      for (int slot = 0; slot < slots; slot++)
        for (int i = 0; i < count; i++) {
          ids.push_back(int(random() % vocab)), of.push_back(slot), positions.push_back(first + i);
          if (i == count - 1) outputs.push_back(int(ids.size()) - 1);
        }
      std::vector<float> logits(outputs.size() * vocab);
      gpt2_step(net, int(ids.size()), ids.data(), of.data(), positions.data(), int(outputs.size()), outputs.data(),
                logits.data());
      for (float x : logits)
        if (!std::isfinite(x)) return std::printf("not finite\n"), 1;
      first += count;
    }
    gpt2_copy_slot(net, 0, slots - 1);
    gpt2_free_slot(net, 0);
    gpt2_free(net);

    const int in = up_to(70), out = up_to(70), n = up_to(64);
    std::vector<int8_t> weights(size_t(out) * in, -127);
    std::vector<int16_t> rows(size_t(n) * in, 32767);
    std::vector<int32_t> sums(size_t(n) * out);
    gpt2_dot(in, out, n, weights.data(), rows.data(), sums.data());
  }
  std::printf("done\n");
}
