// The driver of integer attention. A task takes some queries of one head, and walks over its keys in blocks of 64: scores, softmax
// and the sums over values of a block while its 16 KB of keys and values are in L1. Keys and values of all heads are made panels of
// int8 first, a head a task.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "dispatch.h"
#include "floats.h"

namespace halfbyte {
namespace {

constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

constexpr int64_t tiles_of_a_task = 8;  // of queries
constexpr int quads_of_codes = key_block / 4;

// Where the parts of a head's keys and values lie, behind each other.
struct Plan {
  int64_t code_bytes, key_chunks, value_blocks, key_blocks;  // chunks of a query's channels, blocks of 16 of a value's, of 64 keys
  int64_t panel;                                             // bytes of a chunk's
  int64_t keys, corrections, scales, values, value_corrections, value_scales, bytes;

  Plan(const Attention& call, int bytes_of_a_code) : code_bytes(bytes_of_a_code), panel(panel_chunk * code_bytes) {
    key_chunks = divide_up(call.keys.channels, chunk), value_blocks = divide_up(call.values.channels, block_channels);
    key_blocks = divide_up(call.keys.tokens, key_block);
    int64_t end = 0;
    const auto take = [&end](int64_t bytes) { return std::exchange(end, end + round_up(bytes, 64)); };
    keys = take(key_blocks * (key_block / block_channels) * key_chunks * panel);
    corrections = take(key_blocks * key_block * 4), scales = take(key_blocks * key_block * 4);
    values = take(key_blocks * value_blocks * panel);
    value_corrections = take(key_blocks * value_blocks * block_channels * 4);
    value_scales = take(value_blocks * block_channels * 4), bytes = end;
  }

  // Writes the code of index k of K and of a channel of a panel: see layout.h.
  void put(int code, int64_t k, int64_t channel, uint8_t* to) const {
    if (code_bytes == 1) {
      to[k / 4 * 64 + channel * 4 + k % 4] = static_cast<uint8_t>(code);
    } else {
      const auto wide = static_cast<int16_t>(code);
      std::memcpy(to + k / 2 * 64 + channel * 4 + k % 2 * 2, &wide, 2);
    }
  }
  // Where along K the codes of keys are: see `Softening::codes`.
  int64_t place_of_key(int64_t key) const {
    return code_bytes == 1 ? key % 16 * 4 + key / 16 : key % 32 * 2 + key / 32;
  }
};

struct Drive {
  const Attention& call;
  const Kernels& kernels;
  Plan plan;
  uint8_t* heads;         // panels of every head
  std::vector<char> bad;  // heads with a NaN or an infinity among keys or values
  int64_t task_rows, parts;

  uint8_t* head(int64_t index) const { return heads + index * plan.bytes; }
};

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

void write_row(const float* from, Dtype dtype, int64_t count, char* to) {
  if (dtype == Dtype::float32) {
    std::memcpy(to, from, static_cast<size_t>(count) * 4);
  } else if (dtype == Dtype::bfloat16) {
    for (int64_t i = 0; i < count; i++) {
      const uint16_t half = to_bfloat16(from[i]);
      std::memcpy(to + i * 2, &half, 2);
    }
  } else {
    for (int64_t i = 0; i < count; i++) store(to, dtype, i, from[i]);
  }
}

// The largest magnitude, as bits: above infinity's where there is a NaN.
uint32_t absmax(const float* values, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; i++) most = std::max(most, bits_of_float(values[i]) & 0x7fffffff);
  return most;
}

float scale_of(uint32_t absmax) {
  const float scale = float_of_bits(absmax) / 127.0f;
  return scale < 0x1p-126f ? 1.0f : scale;
}

const InputFormat bytes_of_input;  // int8, absmax to 127

// Values to integers plus 128.
void encode(const Kernels& kernels, const void* values, Dtype dtype, int64_t count, float reciprocal, uint8_t* codes) {
  kernels.encode(values, dtype, count, {&bytes_of_input, &table_of(Grid::int8), reciprocal, 0, 128}, codes);
}

// Keys less the middle of their channel's range: softmax does not change where all keys do alike, and large common parts would
// take the codes. As panels: see layout.h. Returns whether all are finite.
bool take_keys(const Drive& d, int64_t image, int64_t head, uint8_t* to) {
  const Heads& keys = d.call.keys;
  const int64_t count = keys.channels;
  std::vector<float> row(static_cast<size_t>(count)), low(row), high(row);
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  for (int64_t token = 0; token < keys.tokens; token++) {
    read_row(Attention::at(keys, image, head, token), keys.dtype, count, row.data());
    if (absmax(row.data(), count) >= 0x7f800000) return false;
    for (int64_t i = 0; i < count; i++) {
      low[i] = token ? std::min(low[i], row[i]) : row[i];
      high[i] = token ? std::max(high[i], row[i]) : row[i];
    }
  }
  for (int64_t i = 0; i < count; i++) low[i] = (low[i] + high[i]) * 0.5f;
  auto* corrections = reinterpret_cast<int32_t*>(to + d.plan.corrections);
  auto* scales = reinterpret_cast<float*>(to + d.plan.scales);
  std::memset(to, 0, static_cast<size_t>(d.plan.values));
  for (int64_t token = 0; token < keys.tokens; token++) {
    read_row(Attention::at(keys, image, head, token), keys.dtype, count, row.data());
    for (int64_t i = 0; i < count; i++) row[i] -= low[i];
    const uint32_t most = absmax(row.data(), count);
    if (most >= 0x7f800000) return false;
    scales[token] = scale_of(most);
    encode(d.kernels, row.data(), Dtype::float32, count, 1.0f / scales[token], codes.data());
    uint8_t* block = to + token / block_channels * d.plan.key_chunks * d.plan.panel;
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i++) {
      const int code = codes[i] - 128;
      d.plan.put(code, i, token % block_channels, block);
      sum += code;
    }
    corrections[token] = sum * (128 - d.kernels.tile_zero);
  }
  return true;
}

// Values with a scale for each channel, so that none changes along the sum over tokens.
bool take_values(const Drive& d, int64_t image, int64_t head, uint8_t* to) {
  const Heads& values = d.call.values;
  const int64_t count = values.channels;
  std::vector<float> row(static_cast<size_t>(count)), reciprocal(row);
  std::vector<uint8_t> codes(static_cast<size_t>(count));
  std::vector<uint32_t> most(static_cast<size_t>(count));
  for (int64_t token = 0; token < values.tokens; token++) {
    read_row(Attention::at(values, image, head, token), values.dtype, count, row.data());
    for (int64_t i = 0; i < count; i++) most[i] = std::max(most[i], bits_of_float(row[i]) & 0x7fffffff);
  }
  if (*std::max_element(most.begin(), most.end()) >= 0x7f800000) return false;
  std::memset(to + d.plan.values, 0, static_cast<size_t>(d.plan.bytes - d.plan.values));
  auto* scales = reinterpret_cast<float*>(to + d.plan.value_scales);
  auto* corrections = reinterpret_cast<int32_t*>(to + d.plan.value_corrections);
  for (int64_t i = 0; i < count; i++) scales[i] = scale_of(most[i]), reciprocal[i] = 1.0f / scales[i];
  for (int64_t token = 0; token < values.tokens; token++) {
    read_row(Attention::at(values, image, head, token), values.dtype, count, row.data());
    for (int64_t i = 0; i < count; i++) row[i] *= reciprocal[i];
    encode(d.kernels, row.data(), Dtype::float32, count, 1.0f, codes.data());
    const int64_t block = token / key_block * d.plan.value_blocks, place = d.plan.place_of_key(token % key_block);
    uint8_t* panels = to + d.plan.values + block * d.plan.panel;
    int32_t* correction = corrections + block * block_channels;
    for (int64_t i = 0; i < count; i++) {
      const int code = codes[i] - 128;
      d.plan.put(code, place, i % 16, panels + i / 16 * d.plan.panel);
      correction[i] -= code * d.kernels.tile_zero;
    }
  }
  return true;
}

void run_head(void* raw, int index) {
  auto& d = *static_cast<Drive*>(raw);
  const int64_t image = index / d.call.heads, head = index % d.call.heads;
  d.bad[index] = !take_keys(d, image, head, d.head(index)) || !take_values(d, image, head, d.head(index));
}

// Some queries of one head.
struct Task {
  const Drive& d;
  const Attention& call = d.call;
  const Kernels& kernels = d.kernels;
  const Plan& plan = d.plan;
  const int64_t image, head, first, rows, padded, pitch, width;
  const uint8_t* panels;
  uint8_t *queries, *codes;                  // (padded, pitch), (a tile, 64)
  float *scales, *exponents, *totals, *acc;  // (padded,), and (padded, width)
  int32_t* sums;                             // of one tile of rows with all panels of a block
  std::vector<int64_t> offsets;
  std::vector<int32_t> quads;

  Task(const Drive& drive, int64_t index, int64_t part)
      : d(drive),
        image(index / call.heads),
        head(index % call.heads),
        first(part * d.task_rows),
        rows(std::min(d.task_rows, call.queries.tokens - first)),
        padded(round_up(d.task_rows, most_rows)),
        pitch(row_bytes() + (row_bytes() % 512 ? 0 : chunk)),
        width(plan.value_blocks * block_channels),
        panels(d.head(index)) {
    for (int64_t i = 0; i < plan.key_chunks; i++) {
      offsets.push_back(i * chunk * plan.code_bytes);
      quads.push_back(static_cast<int32_t>(divide_up(std::min<int64_t>(chunk, call.keys.channels - i * chunk), 4)));
    }
    const int64_t bytes = padded * pitch, code_bytes = most_rows * code_pitch(), floats = padded * (3 + width) * 4;
    uint8_t* memory = scratch(Slot::rows, static_cast<size_t>(bytes + code_bytes + floats));
    queries = memory, codes = memory + bytes;
    scales = reinterpret_cast<float*>(codes + code_bytes);
    exponents = scales + padded, totals = exponents + padded, acc = totals + padded;
    std::memset(memory, 0, static_cast<size_t>(bytes + code_bytes));
    const int64_t tiles = divide_up(std::max<int64_t>(key_block / block_channels, plan.value_blocks), kernels.blocks);
    sums = reinterpret_cast<int32_t*>(scratch(Slot::sums, static_cast<size_t>(tile_sums() * tiles) * 4));
  }

  int64_t tile_sums() const { return int64_t{most_rows} * kernels.blocks * block_channels; }
  int64_t row_bytes() const { return plan.key_chunks * chunk * plan.code_bytes; }
  int64_t code_pitch() const { return chunk * plan.code_bytes; }

  void read_queries() {
    const Heads& from = call.queries;
    for (int64_t r = 0; r < rows; r++) {
      const char* values = Attention::at(from, image, head, first + r);
      Range range;
      kernels.range(values, from.dtype, from.channels, true, &range);
      const float scale = range.absmax < 0x7f800000 ? scale_of(range.absmax) : std::nanf("");
      scales[r] = scale * call.factor;
      if (std::isnan(scale)) continue;
      uint8_t* row = queries + r * pitch;
      encode(kernels, values, from.dtype, from.channels, 1.0f / scale, row);
      if (plan.code_bytes == 2) widen(row, from.channels);
    }
  }

  static void widen(uint8_t* row, int64_t count) {  // from the last on, as they overlap
    for (int64_t i = count - 1; i >= 0; i--) row[2 * i + 1] = 0, row[2 * i] = row[i];
  }

  // Sums of a tile of rows with the channels of panels, some at a time.
  void multiply(const uint8_t* from, int64_t stride, int tile_rows, const Walk& walk, const uint8_t* panel, int64_t panel_stride,
                int64_t channels) {
    const uint8_t* row[most_rows];
    for (int r = 0; r < most_rows; r++) row[r] = from + r * stride;
    const int64_t step = kernels.blocks * block_channels;
    for (int64_t c = 0; c < channels; c += step)
      kernels.tile(row, tile_rows, walk, panel + c / block_channels * panel_stride, panel_stride,
                   static_cast<int>(std::min(step, channels - c)), sums + c / step * tile_sums());
  }

  TileSums all_sums() const { return {sums, kernels.blocks, tile_sums()}; }

  void take_block(int64_t block) {
    const int64_t panel_stride = plan.key_chunks * plan.panel, key = block * key_block, channels = call.values.channels;
    const int keys = static_cast<int>(std::min<int64_t>(key_block, call.keys.tokens - key));
    const int64_t in_values = 0;
    const int32_t value_quads = plan.code_bytes == 1 ? std::min(keys, quads_of_codes) : std::min((keys + 1) / 2, quads_of_codes);
    const auto* corrections = reinterpret_cast<const int32_t*>(panels + plan.corrections) + key;
    const auto* key_scales = reinterpret_cast<const float*>(panels + plan.scales) + key;
    const auto* value_corrections = reinterpret_cast<const int32_t*>(panels + plan.value_corrections) + block * width;
    for (int64_t from = 0; from < rows; from += kernels.rows) {
      const int count = static_cast<int>(std::min<int64_t>(kernels.rows, rows - from));
      const int tile_rows = kernels.even_rows ? static_cast<int>(round_up(count, kernels.even_rows)) : count;
      multiply(queries + from * pitch, pitch, tile_rows, {offsets.data(), quads.data(), 0, plan.key_chunks},
               panels + plan.keys + block * (key_block / block_channels) * panel_stride, panel_stride, key_block);
      float keep[most_rows], weight[most_rows];
      const float* bias = call.bias_of(image, head, first + from);
      kernels.soften({count, all_sums(), corrections, key_scales, scales + from, bias ? bias + key : nullptr, call.bias.query_stride,
                      keys, block == 0, codes, exponents + from, totals + from, keep, weight});
      multiply(codes, code_pitch(), tile_rows, {&in_values, &value_quads, 0, 1},
               panels + plan.values + block * plan.value_blocks * plan.panel, plan.panel, channels);
      kernels.gather({count, channels, all_sums(), kernels.tile_zero ? value_corrections : nullptr, keep, weight,
                      acc + from * width});
    }
  }

  void write(bool good) const {
    const auto* value_scales = reinterpret_cast<const float*>(panels + plan.value_scales);
    const int64_t count = call.values.channels;
    for (int64_t r = 0; r < rows; r++) {
      float* row = acc + r * width;
      const float part = 1.0f / totals[r];
      if (!good || std::isnan(scales[r])) {
        std::fill(row, row + count, std::nanf(""));
      } else {
        for (int64_t i = 0; i < count; i++) row[i] = row[i] * part * value_scales[i];
      }
      write_row(row, call.output.dtype, count, const_cast<char*>(Attention::at(call.output, image, head, first + r)));
    }
  }

  void run() {
    read_queries();
    std::memset(acc, 0, static_cast<size_t>(padded * width) * 4);
    if (kernels.begin) kernels.begin();
    for (int64_t block = 0; block < plan.key_blocks; block++) take_block(block);
    if (kernels.end) kernels.end();
    write(true);
  }
};

void run_task(void* raw, int index) {
  const Drive& d = *static_cast<Drive*>(raw);
  Task task(d, index / d.parts, index % d.parts);
  if (d.bad[index / d.parts]) return task.write(false);
  task.run();
}

void check(const Attention& call) {
  const auto must = [](bool good, const char* what) {
    if (!good) throw std::invalid_argument(std::string("attention: ") + what);
  };
  must(call.queries.channels == call.keys.channels, "queries and keys need as many channels");
  must(call.keys.tokens == call.values.tokens, "there must be as many keys as values");
  must(call.output.tokens == call.queries.tokens && call.output.channels == call.values.channels,
       "the output has as many tokens as the queries, and as many channels as the values");
  must(call.keys.channels <= longest_k && call.values.channels <= longest_k, "a head is too wide");
}

}  // namespace

void attend(const Run& run, int64_t images, int64_t heads, const Heads& queries, const Heads& keys, const Heads& values,
            float factor, const ScoreBias& bias, const Heads& output) {
  const Attention call{images, heads, queries, keys, values, output, factor, bias};
  check(call);
  const Kernels& own = kernels_of(run.isa);
  const Kernels& kernels = own.attention ? *own.attention : own;
  if (!images || !heads || !queries.tokens || !keys.tokens || !values.channels) return;
  if (run.isa == Isa::scalar) return scalar_attend(run, call);
  Drive d{call, kernels, Plan(call, kernels.code_bytes), nullptr, std::vector<char>(static_cast<size_t>(images * heads)), 0, 0};
  d.heads = scratch(Slot::heads, static_cast<size_t>(images * heads * d.plan.bytes));
  const int64_t wanted = divide_up(4 * run.threads, images * heads);  // parts of a head, where there are few
  d.task_rows = round_up(std::min(tiles_of_a_task * kernels.rows, divide_up(queries.tokens, wanted)), kernels.rows);
  d.parts = divide_up(queries.tokens, d.task_rows);
  run.parallel(static_cast<int>(images * heads), run.threads, run_head, &d);
  run.parallel(static_cast<int>(images * heads * d.parts), run.threads, run_task, &d);
}

}  // namespace halfbyte
