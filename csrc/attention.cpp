// The driver of integer attention. A task takes some queries of one head, and walks over its keys in blocks of 64: scores, softmax
// and the sums over values of a block while its 16 KB of keys and values are in L1. Keys and values of all heads are made panels of
// int8 first, a head a task.
#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "floats.h"
#include "heads.h"

namespace halfbyte {
namespace {

constexpr int64_t divide_up(int64_t value, int64_t by) { return (value + by - 1) / by; }

constexpr int64_t tiles_of_a_task = 8;  // of queries
constexpr int quads_of_codes = key_block / 4;

struct Drive {
  const Attention& call;
  const Kernels& kernels;
  HeadPlan plan;
  uint8_t* heads;         // panels of every head
  std::vector<char> bad;  // heads with a NaN or an infinity among keys or values
  int64_t task_rows, parts;

  uint8_t* head(int64_t index) const { return heads + index * plan.bytes; }
};

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

void run_head(void* raw, int index) {
  auto& d = *static_cast<Drive*>(raw);
  const int64_t image = index / d.call.heads, head = index % d.call.heads;
  d.bad[index] = !take_head(d.call, d.kernels, d.plan, image, head, d.head(index));
}

// Some queries of one head.
struct Task {
  const Drive& d;
  const Attention& call = d.call;
  const Kernels& kernels = d.kernels;
  const HeadPlan& plan = d.plan;
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
      const float scale = range.absmax < 0x7f800000 ? int8_scale(range.absmax) : std::nanf("");
      scales[r] = scale * call.factor;
      if (std::isnan(scale)) continue;
      uint8_t* row = queries + r * pitch;
      encode_int8(kernels, values, from.dtype, from.channels, 1.0f / scale, row);
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
  Drive d{call, kernels, HeadPlan(call, kernels.code_bytes), nullptr, std::vector<char>(static_cast<size_t>(images * heads)), 0, 0};
  d.heads = scratch(Slot::heads, static_cast<size_t>(images * heads * d.plan.bytes));
  const int64_t wanted = divide_up(4 * run.threads, images * heads);  // parts of a head, where there are few
  d.task_rows = round_up(std::min(tiles_of_a_task * kernels.rows, divide_up(queries.tokens, wanted)), kernels.rows);
  d.parts = divide_up(queries.tokens, d.task_rows);
  run.parallel(static_cast<int>(images * heads), run.threads, run_head, &d);
  run.parallel(static_cast<int>(images * heads * d.parts), run.threads, run_task, &d);
}

}  // namespace halfbyte
