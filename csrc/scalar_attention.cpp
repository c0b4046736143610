// The oracle of attention: a row of queries at a time, every step as plainly as it can be said.
#include <algorithm>
#include <cmath>
#include <vector>

#include "floats.h"
#include "internal.h"

namespace halfbyte {
namespace {

using Row = std::vector<float>;

Row row_of(const Heads& of, int64_t image, int64_t head, int64_t token) {
  Row row;
  for (int64_t i = 0; i < of.channels; i++) row.push_back(load(Attention::at(of, image, head, token), of.dtype, i));
  return row;
}

bool all_finite(const Row& row) {
  return std::all_of(row.begin(), row.end(), [](float value) { return std::isfinite(value); });
}

// Integers and the scale they are to be multiplied with; finite values.
struct Quantized {
  std::vector<int> integers;
  float scale;

  explicit Quantized(const Row& row) {
    float most = 0;
    for (float value : row) most = std::max(most, std::fabs(value));
    scale = most / 127.0f < 0x1p-126f ? 1.0f : most / 127.0f;
    for (float value : row)
      integers.push_back(static_cast<int>(std::clamp(std::nearbyintf(value * (1.0f / scale)), -127.0f, 127.0f)));
  }
};

struct Head {
  std::vector<Quantized> keys, values;  // by token; by channel
  bool finite = true;

  Head(const Attention& call, int64_t image, int64_t head) {
    std::vector<Row> rows;
    for (int64_t token = 0; token < call.keys.tokens; token++) rows.push_back(row_of(call.keys, image, head, token));
    for (int64_t i = 0; i < call.keys.channels; i++) {
      float low = rows[0][i], high = low;
      for (const Row& row : rows) {
        finite = finite && std::isfinite(row[i]);
        low = std::min(low, row[i]), high = std::max(high, row[i]);
      }
      const float middle = (low + high) * 0.5f;
      for (Row& row : rows) row[i] -= middle;
    }
    Row column(rows.size());
    for (int64_t i = 0; i < call.values.channels; i++) {
      for (int64_t token = 0; token < call.values.tokens; token++)
        column[token] = load(Attention::at(call.values, image, head, token), call.values.dtype, i);
      finite = finite && all_finite(column);
      if (finite) values.emplace_back(column);
    }
    for (const Row& row : rows) {
      finite = finite && all_finite(row);
      if (finite) keys.emplace_back(row);
    }
  }
};

// What is summed over blocks of keys, in units of 2**exponent.
struct Sums {
  Row acc;
  float exponent = 0, total = 0;
};

constexpr float lowest = -0x1p60f, unseen = -0x1p90f;

float score_of(const Quantized& query, float factor, const Quantized& key, const float* bias) {
  int32_t sum = 0;
  for (size_t i = 0; i < query.integers.size(); i++) sum += query.integers[i] * key.integers[i];
  float score = static_cast<float>(sum) * key.scale * (query.scale * factor);
  if (bias && !(*bias > -INFINITY)) return unseen;
  if (bias) score += *bias;
  return std::clamp(score, lowest, -lowest);
}

int code_of(float x) {
  const int steps = static_cast<int>(std::max(x, static_cast<float>(least_steps)));
  const int whole = static_cast<int>(std::floor(static_cast<float>(steps) / steps_of_two));
  const uint32_t fraction = static_cast<uint32_t>(steps - whole * steps_of_two) * 32;
  uint32_t power = cubic[0];
  for (int i = 1; i < 4; i++) power = (fraction * power >> 16) + cubic[i];
  return static_cast<int>(((power >> (6 - whole)) + 1) / 2);
}

void add_block(const Attention& call, const Head& head, const Quantized& query, const float* bias, int64_t first, Sums* sums) {
  const int64_t count = std::min<int64_t>(key_block, call.keys.tokens - first);
  Row scores;
  for (int64_t i = 0; i < count; i++)
    scores.push_back(score_of(query, call.factor, head.keys[first + i], bias ? bias + first + i : nullptr));
  const float exponent = std::ceil(std::max(*std::max_element(scores.begin(), scores.end()), lowest) / steps_of_two);
  const float now = first ? std::max(sums->exponent, exponent) : exponent;
  const float keep = first ? std::ldexp(1.0f, static_cast<int>(std::max(sums->exponent - now, -126.0f))) : 0.0f;
  const float weight = std::ldexp(1.0f, static_cast<int>(std::max(exponent - now, -126.0f)));
  std::vector<int> codes;
  int32_t total = 0;
  for (float score : scores) codes.push_back(code_of(score - exponent * steps_of_two)), total += codes.back();
  for (size_t channel = 0; channel < sums->acc.size(); channel++) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i++) sum += codes[i] * head.values[channel].integers[first + i];
    sums->acc[channel] = sums->acc[channel] * keep + static_cast<float>(sum) * weight;
  }
  sums->exponent = now, sums->total = sums->total * keep + static_cast<float>(total) * weight;
}

void run_head(void* raw, int index) {
  const auto& call = *static_cast<const Attention*>(raw);
  const int64_t image = index / call.heads, at = index % call.heads;
  const Head head(call, image, at);
  for (int64_t token = 0; token < call.queries.tokens; token++) {
    char* to = const_cast<char*>(Attention::at(call.output, image, at, token));
    const Row row = row_of(call.queries, image, at, token);
    Sums sums{Row(static_cast<size_t>(call.values.channels)), 0, 0};
    const bool good = head.finite && all_finite(row);
    if (good) {
      const Quantized query(row);
      const float* bias = call.bias_of(image, at, token);
      for (int64_t first = 0; first < call.keys.tokens; first += key_block) add_block(call, head, query, bias, first, &sums);
    }
    const float part = 1.0f / sums.total;
    for (int64_t i = 0; i < call.values.channels; i++)
      store(to, call.output.dtype, i, good ? sums.acc[i] * part * head.values[i].scale : std::nanf(""));
  }
}

}  // namespace

void scalar_attend(const Run& run, const Attention& call) {
  run.parallel(static_cast<int>(call.images * call.heads), run.threads, run_head, const_cast<Attention*>(&call));
}

}  // namespace halfbyte
