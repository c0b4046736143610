// Integer attention: every instruction set against the oracle, bit for bit, and the oracle against attention in double.
#include <algorithm>

#include "harness.h"

namespace halfbyte {
namespace {

struct Shape {
  int64_t images, heads, queries, keys, channels, value_channels;
};

// Values of one kind, (images, heads, tokens, channels) in memory or (images, tokens, heads, channels).
struct Block {
  std::vector<uint8_t> bytes;
  Heads heads;

  Block(int64_t images, int64_t count, int64_t tokens, int64_t channels, Dtype dtype, bool by_token)
      : bytes(static_cast<size_t>(images * count * tokens * channels * size_of(dtype) + 1)) {
    heads = {bytes.data(), dtype, tokens, channels, count * tokens * channels, tokens * channels, channels};
    if (by_token) heads.head_stride = channels, heads.token_stride = count * channels;
  }
  int64_t size() const { return static_cast<int64_t>(bytes.size() - 1) / size_of(heads.dtype); }
  void fill(float spread, float middle) {
    std::normal_distribution<float> normal(middle, spread);
    for (int64_t i = 0; i < size(); i++) store(bytes.data(), heads.dtype, i, normal(generator()));
  }
  float at(int64_t image, int64_t head, int64_t token, int64_t channel) const {
    const int64_t index = image * heads.image_stride + head * heads.head_stride + token * heads.token_stride + channel;
    return load(bytes.data(), heads.dtype, index);
  }
};

struct Case {
  Shape shape;
  Block queries, keys, values;
  float factor;
  std::vector<float> scores;  // what is added to them: of every query, or of every image
  ScoreBias bias;

  Case(const Shape& s, Dtype dtype, bool by_token, float spread)
      : shape(s),
        queries(s.images, s.heads, s.queries, s.channels, dtype, by_token),
        keys(s.images, s.heads, s.keys, s.channels, dtype, by_token),
        values(s.images, s.heads, s.keys, s.value_channels, dtype, by_token),
        factor(2048 * 1.44269504f / std::sqrt(static_cast<float>(s.channels))) {
    queries.fill(spread, 0.1f), keys.fill(1, 2), values.fill(1, 0.5f);
  }
  void mask(bool each_query) {
    scores.resize(static_cast<size_t>(shape.images * (each_query ? shape.queries : 1) * shape.keys));
    for (float& score : scores) score = uniform(0, 2) ? 20 * static_cast<float>(uniform(-200, 200)) : -INFINITY;
    const int64_t first = shape.keys / 3 / 64 * 64;  // whole blocks that nobody sees
    for (size_t i = 0; i < scores.size(); i++)
      if (static_cast<int64_t>(i) % shape.keys < first) scores[i] = -INFINITY;
    bias = {scores.data(), each_query ? shape.queries * shape.keys : shape.keys, 0, each_query ? shape.keys : 0};
  }
  std::vector<uint8_t> run(Isa isa, int threads = 2) const {
    Block out(shape.images, shape.heads, shape.queries, shape.value_channels, queries.heads.dtype, true);
    std::fill(out.bytes.begin(), out.bytes.end(), uint8_t{0xaa});
    attend({isa, threads, parallel_for}, shape.images, shape.heads, queries.heads, keys.heads, values.heads, factor, bias,
           out.heads);
    return out.bytes;
  }
};

std::string describe(const Shape& s) {
  std::string text;
  for (int64_t size : {s.images, s.heads, s.queries, s.keys, s.channels, s.value_channels}) text += std::to_string(size) + " ";
  return "attention " + text;
}

// Error energy of the oracle over the energy of attention in double.
double error_of(const Case& c) {
  const std::vector<uint8_t> found = c.run(Isa::scalar);
  double noise = 0, signal = 0;
  for (int64_t image = 0; image < c.shape.images; image++)
    for (int64_t head = 0; head < c.shape.heads; head++)
      for (int64_t q = 0; q < c.shape.queries; q++) {
        std::vector<double> weights;
        double total = 0, most = -1e300;
        for (int64_t k = 0; k < c.shape.keys; k++) {
          double sum = 0;
          for (int64_t i = 0; i < c.shape.channels; i++)
            sum += double{c.queries.at(image, head, q, i)} * c.keys.at(image, head, k, i);
          weights.push_back(sum * c.factor / 2048), most = std::max(most, weights.back());
        }
        for (double& weight : weights) weight = std::exp2(weight - most), total += weight;
        for (int64_t i = 0; i < c.shape.value_channels; i++) {
          double exact = 0;
          for (int64_t k = 0; k < c.shape.keys; k++) exact += weights[k] / total * c.values.at(image, head, k, i);
          const int64_t at = ((image * c.shape.queries + q) * c.shape.heads + head) * c.shape.value_channels + i;
          const double off = load(found.data(), c.queries.heads.dtype, at) - exact;
          noise += off * off, signal += exact * exact;
        }
      }
  return noise / signal;
}

}  // namespace

void test_attention() {
  std::vector<Shape> shapes = {{1, 1, 1, 1, 1, 1}, {2, 3, 5, 7, 16, 16}, {1, 2, 40, 64, 64, 64}, {1, 1, 33, 65, 40, 24},
                               {2, 2, 100, 200, 80, 80}, {1, 1, 97, 77, 128, 130}, {1, 1, 12, 640, 512, 512}};
  for (int i = 0; i < 20; i++)
    shapes.push_back({uniform(1, 2), uniform(1, 3), uniform(1, 70), uniform(1, 150), uniform(1, 90), uniform(1, 90)});
  for (const Shape& shape : shapes)
    for (Dtype dtype : {Dtype::float32, Dtype::bfloat16, Dtype::float16})
      for (float spread : {0.0f, 1.0f, 8.0f}) {
        Case c(shape, dtype, spread == 1, spread);
        for (int masked = 0; masked < 3; masked++) {
          if (masked) c.mask(masked == 2);
          const std::vector<uint8_t> expected = c.run(Isa::scalar);
          for (Isa isa : fast_isas()) check(c.run(isa) == expected, describe(shape) + isa_name(isa));
        }
      }
  check(error_of(Case({1, 2, 64, 200, 64, 64}, Dtype::float32, true, 1)) < 1e-3, "attention is near to exact attention");
  check(error_of(Case({1, 1, 30, 1000, 40, 40}, Dtype::float32, true, 3)) < 2e-3, "sharp attention is near to exact attention");
}

void test_refused_attention() {
  Case c({1, 2, 20, 70, 16, 16}, Dtype::float32, false, 1);
  const float nan = std::nanf(""), infinity = INFINITY;
  const auto with = [&](Block& block, int64_t index, float value) {
    const std::vector<uint8_t> kept = block.bytes;
    store(block.bytes.data(), Dtype::float32, index, value);
    std::vector<uint8_t> expected = c.run(Isa::scalar);
    for (Isa isa : fast_isas()) check(c.run(isa) == expected, "attention with a NaN or an infinity");
    block.bytes = kept;
    int64_t count = 0;
    for (int64_t i = 0; i < 20 * 2 * 16; i++) count += std::isnan(load(expected.data(), Dtype::float32, i));
    return count;
  };
  for (float value : {nan, infinity, -infinity}) {
    check(with(c.queries, 3 * 16, value) == 16, "a NaN among queries is that row's");
    check(with(c.keys, 5, value) == 20 * 16, "a NaN among keys is that head's");
    check(with(c.values, 70 * 16 + 5, value) == 20 * 16, "a NaN among values is that head's");
  }
  check(with(c.keys, 5, 3e38f) == 0, "a huge key is no infinity");
  Block narrow(1, 2, 20, 15, Dtype::float32, true);
  for (Isa isa : fast_isas())
    check_throws([&] { attend({isa, 1, parallel_for}, 1, 2, c.queries.heads, c.keys.heads, c.values.heads, 1, {}, narrow.heads); },
                 "a narrow output");
}

}  // namespace halfbyte
