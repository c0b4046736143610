#include "heads.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "floats.h"

namespace halfbyte {
namespace {

constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

const InputFormat bytes_of_input;  // int8, absmax to 127

constexpr uint32_t infinite = 0x7f800000;  // and above: NaN

void read_row(const char* from, Dtype dtype, int64_t count, float* to) {
  if (dtype == Dtype::float32) {
    std::memcpy(to, from, static_cast<size_t>(count) * 4);
  } else if (dtype == Dtype::bfloat16) {
    for (int64_t i = 0; i < count; i++) {
      uint16_t half;
      std::memcpy(&half, from + i * 2, 2);
      to[i] = float_of_bits(static_cast<uint32_t>(half) << 16);
    }
  } else {
    for (int64_t i = 0; i < count; i++) to[i] = load(from, dtype, i);
  }
}

// The largest magnitude, as bits: above infinity's where there is a NaN.
uint32_t absmax(const float* values, int64_t count) {
  int32_t most = 0;
  for (int64_t i = 0; i < count; i++) most = std::max(most, static_cast<int32_t>(bits_of_float(values[i]) & 0x7fffffff));
  return static_cast<uint32_t>(most);
}

// 16 channels of some rows woven into one: (channel, row), each less 128, in bytes or in 16 bits.
template <typename Code, int Rows>
void weave(const uint8_t* rows, int64_t pitch, uint8_t* to) {
  Code codes[block_channels * Rows];
  for (int i = 0; i < block_channels; i++)
    for (int r = 0; r < Rows; r++) codes[i * Rows + r] = static_cast<Code>(rows[r * pitch + i] - 128);
  std::memcpy(to, codes, sizeof codes);
}

struct HeadTask {
  const Attention& call;
  const Kernels& kernels;
  const HeadPlan& plan;
  int64_t image, head;
  uint8_t* to;

  const char* key(int64_t token) const { return Attention::at(call.keys, image, head, token); }
  const char* value(int64_t token) const { return Attention::at(call.values, image, head, token); }

  // Keys less the middle of their channel's range: softmax does not change where all keys do alike, and large common parts would
  // take the codes.
  bool take_keys() const {
    const Heads& keys = call.keys;
    const int64_t count = keys.channels;
    std::vector<float> row(static_cast<size_t>(count)), middle(row);
    if (!find_middle(row.data(), middle.data())) return false;
    auto* corrections = reinterpret_cast<int32_t*>(to + plan.corrections);
    auto* scales = reinterpret_cast<float*>(to + plan.scales);
    std::memset(to, 0, static_cast<size_t>(plan.values));
    std::vector<uint8_t> codes(static_cast<size_t>(round_up(count, 4)), 128);
    for (int64_t token = 0; token < keys.tokens; token++) {
      read_row(key(token), keys.dtype, count, row.data());
      for (int64_t i = 0; i < count; i++) row[i] -= middle[i];
      const uint32_t most = absmax(row.data(), count);
      if (most >= infinite) return false;
      scales[token] = int8_scale(most);
      encode_int8(kernels, row.data(), Dtype::float32, count, 1.0f / scales[token], codes.data());
      int32_t sum = 0;
      for (int64_t i = 0; i < count; i++) sum += codes[i];
      corrections[token] = (sum - static_cast<int32_t>(128 * count)) * (128 - kernels.tile_zero);
      put_key(codes.data(), count, to + token / block_channels * plan.key_chunks * plan.panel + token % block_channels * 4);
    }
    return true;
  }

  // Of the range of each channel; false where a key is no finite number.
  bool find_middle(float* row, float* middle) const {
    const Heads& keys = call.keys;
    const int64_t count = keys.channels;
    std::vector<float> above(static_cast<size_t>(count)), unlike(above);
    float *low = middle, *high = above.data(), *wrong = unlike.data();
    read_row(key(0), keys.dtype, count, low), read_row(key(0), keys.dtype, count, high);
    for (int64_t token = 0; token < keys.tokens; token++) {
      read_row(key(token), keys.dtype, count, row);
      for (int64_t i = 0; i < count; i++) {
        low[i] = row[i] < low[i] ? row[i] : low[i], high[i] = row[i] > high[i] ? row[i] : high[i];
        wrong[i] += row[i] - row[i];  // 0, or a NaN for good
      }
    }
    if (absmax(wrong, count)) return false;
    for (int64_t i = 0; i < count; i++) middle[i] = (low[i] + high[i]) * 0.5f;
    return true;
  }

  // One channel of a panel, 4 bytes of every 64.
  void put_key(const uint8_t* codes, int64_t count, uint8_t* panel) const {
    if (plan.code_bytes == 1) {
      for (int64_t i = 0; i < count; i += 4, panel += 64) {
        uint32_t four;
        std::memcpy(&four, codes + i, 4);
        four ^= 0x80808080;  // less 128
        std::memcpy(panel, &four, 4);
      }
    } else {
      for (int64_t i = 0; i < count; i += 2, panel += 64) {
        const int16_t two[] = {static_cast<int16_t>(codes[i] - 128), static_cast<int16_t>(codes[i + 1] - 128)};
        std::memcpy(panel, two, 4);
      }
    }
  }

  // Values with a scale for each channel, so that none changes along the sum over tokens.
  bool take_values() const {
    const Heads& values = call.values;
    const int64_t count = values.channels;
    std::vector<float> row(static_cast<size_t>(count)), reciprocal(row);
    std::vector<int32_t> most(static_cast<size_t>(count));
    for (int64_t token = 0; token < values.tokens; token++) {
      read_row(value(token), values.dtype, count, row.data());
      for (int64_t i = 0; i < count; i++)
        most[i] = std::max(most[i], static_cast<int32_t>(bits_of_float(row[i]) & 0x7fffffff));
    }
    if (static_cast<uint32_t>(*std::max_element(most.begin(), most.end())) >= infinite) return false;
    auto* scales = reinterpret_cast<float*>(to + plan.value_scales);
    for (int64_t i = 0; i < count; i++)
      scales[i] = int8_scale(static_cast<uint32_t>(most[i])), reciprocal[i] = 1.0f / scales[i];
    std::memset(to + plan.values, 0, static_cast<size_t>(plan.value_scales - plan.values));
    // A quad or a pair of a block along K: tokens so far from each other, in the order of `Softening::codes`.
    const int64_t parts = 4 / plan.code_bytes, apart = key_block / parts, pitch = round_up(count, block_channels);
    std::vector<uint8_t> codes(static_cast<size_t>(4 * pitch));
    for (int64_t block = 0; block < plan.key_blocks; block++)
      for (int64_t first = 0; first < apart && block * key_block + first < values.tokens; first++) {
        std::fill(codes.begin(), codes.end(), uint8_t{128});
        for (int64_t part = 0; part < parts; part++) {
          const int64_t token = block * key_block + part * apart + first;
          if (token >= values.tokens) break;
          read_row(value(token), values.dtype, count, row.data());
          for (int64_t i = 0; i < count; i++) row[i] *= reciprocal[i];
          encode_int8(kernels, row.data(), Dtype::float32, count, 1.0f, codes.data() + part * pitch);
        }
        put_values(codes.data(), pitch, block, first);
      }
    return true;
  }

  void put_values(const uint8_t* codes, int64_t pitch, int64_t block, int64_t place) const {
    uint8_t* panel = to + plan.values + block * plan.value_blocks * plan.panel + place * 64;
    auto* corrections = reinterpret_cast<int32_t*>(to + plan.value_corrections) + block * pitch;
    for (int64_t c = 0; c < pitch; c += block_channels, panel += plan.panel)
      (plan.code_bytes == 1 ? weave<int8_t, 4> : weave<int16_t, 2>)(codes + c, pitch, panel);
    if (!kernels.tile_zero) return;
    for (int64_t r = 0; r < 4; r++)
      for (int64_t i = 0; i < pitch; i++) corrections[i] -= (codes[r * pitch + i] - 128) * kernels.tile_zero;
  }
};

}  // namespace

HeadPlan::HeadPlan(const Attention& call, int bytes_of_a_code) : code_bytes(bytes_of_a_code), panel(panel_chunk * code_bytes) {
  key_chunks = divide_up(call.keys.channels, chunk), value_blocks = divide_up(call.values.channels, block_channels);
  key_blocks = divide_up(call.keys.tokens, key_block);
  int64_t end = 0;
  const auto take = [&end](int64_t size) { return std::exchange(end, end + round_up(size, 64)); };
  keys = take(key_blocks * (key_block / block_channels) * key_chunks * panel);
  corrections = take(key_blocks * key_block * 4), scales = take(key_blocks * key_block * 4);
  values = take(key_blocks * value_blocks * panel);
  value_corrections = take(key_blocks * value_blocks * block_channels * 4);
  value_scales = take(value_blocks * block_channels * 4), bytes = end;
}

bool take_head(const Attention& call, const Kernels& kernels, const HeadPlan& plan, int64_t image, int64_t head, uint8_t* to) {
  const HeadTask task{call, kernels, plan, image, head, to};
  return task.take_keys() && task.take_values();
}

void encode_int8(const Kernels& kernels, const void* values, Dtype dtype, int64_t count, float reciprocal, uint8_t* codes) {
  kernels.encode(values, dtype, count, {&bytes_of_input, &table_of(Grid::int8), reciprocal, 0, 128}, codes);
}

float int8_scale(uint32_t absmax) {
  const float scale = float_of_bits(absmax) / 127.0f;
  return scale < 0x1p-126f ? 1.0f : scale;
}

}  // namespace halfbyte
