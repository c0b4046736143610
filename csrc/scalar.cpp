// The oracle: every step as plainly as it can be said. Runs anywhere; fast instruction sets must agree with it to the last bit.
#include <algorithm>
#include <cmath>
#include <vector>

#include "floats.h"
#include "internal.h"

namespace halfbyte {
namespace {

// A whole number at a shift: the nearest level << shift.
int round_shifted(int value, int shift, const GridTable& grid) {
  return round_to_grid(std::ldexp(static_cast<float>(value), -shift), grid) * (1 << shift);
}

int cut(int value, int shift, const GridTable& grid) {
  const int kept = std::min(std::abs(value) >> shift, grid.top) << shift;
  return value < 0 ? -kept : kept;
}

int round_multiple(int value, int multiple, const GridTable& grid) {
  return round_to_grid(static_cast<float>(value) / static_cast<float>(multiple), grid) * multiple;
}

// The smallest multiple with which the table's top reaches the largest magnitude; or one less, where that lowers the squared error.
// See quantizers.round_with_multiples.
void round_to_multiples(int* values, int64_t count, const InputFormat& format, const GridTable& grid) {
  int largest = 0;
  for (int64_t i = 0; i < count; i++) largest = std::max(largest, std::abs(values[i]));
  const int reaching = std::clamp((largest + grid.top - 1) / grid.top, 1, format.max_multiple), less = std::max(reaching - 1, 1);
  int64_t error = 0, lower_error = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t off = round_multiple(values[i], reaching, grid) - values[i],
                  lower = round_multiple(values[i], less, grid) - values[i];
    error += off * off, lower_error += lower * lower;
  }
  const int multiple = lower_error < error ? less : reaching;
  for (int64_t i = 0; i < count; i++) values[i] = round_multiple(values[i], multiple, grid);
}

// Leading-zero suppression: the smallest shift at which the largest magnitude is no longer, in bits, than the table's top; or one
// more, where that lowers the squared error. See quantizers.round_with_shifts.
void round_subgroup(int* values, int64_t count, const InputFormat& format, const GridTable& grid) {
  if (format.max_multiple) return round_to_multiples(values, count, format, grid);
  int largest = 0;
  for (int64_t i = 0; i < count; i++) largest = std::max(largest, std::abs(values[i]));
  const int flag = std::clamp(bit_length(largest) - bit_length(grid.top), 0, format.max_shift);
  if (format.truncate) {
    for (int64_t i = 0; i < count; i++) values[i] = cut(values[i], flag, grid);
    return;
  }
  const int more = std::min(flag + 1, format.max_shift);
  int64_t low_error = 0, high_error = 0;
  for (int64_t i = 0; i < count; i++) {
    const int64_t low = round_shifted(values[i], flag, grid) - values[i], high = round_shifted(values[i], more, grid) - values[i];
    low_error += low * low, high_error += high * high;
  }
  const int shift = high_error < low_error ? more : flag;
  for (int64_t i = 0; i < count; i++) values[i] = round_shifted(values[i], shift, grid);
}

}  // namespace

void scalar_range(const void* values, Dtype dtype, int64_t count, bool, Range* range) {
  for (int64_t i = 0; i < count; i++) {
    const float value = load(values, dtype, i);
    range->absmax = std::max(range->absmax, bits_of_float(value) & 0x7fffffff);
    range->low = std::min(range->low, value), range->high = std::max(range->high, value);
  }
}

void scalar_encode(const void* values, Dtype dtype, int64_t count, const Encoding& e, uint8_t* out) {
  const InputFormat& format = *e.format;
  const bool twice = rounds_twice(format);
  const int64_t step = twice ? format.subgroup : 64;
  int integers[1024];
  for (int64_t start = 0; start < count; start += step) {
    const int64_t length = std::min(step, count - start);
    for (int64_t i = 0; i < length; i++) {
      const float scaled = load(values, dtype, start + i) * e.reciprocal;
      const float units = (std::isfinite(scaled) ? scaled : 0.0f) + (e.grid->is_signed ? 0.0f : e.zero);
      const float top = static_cast<float>(format.top);
      integers[i] = twice ? static_cast<int>(std::clamp(std::nearbyintf(units), e.grid->is_signed ? -top : 0.0f, top))
                          : round_to_grid(units, *e.grid);
    }
    if (twice) round_subgroup(integers, length, format, *e.grid);
    for (int64_t i = 0; i < length; i++) out[start + i] = static_cast<uint8_t>(integers[i] + e.offset);
  }
}

void scalar_finish(const int32_t* sums, int sum_stride, const Epilogue& e, const Rows& rows) {
  for (int r = 0; r < rows.count; r++)
    for (int n = 0; n < e.columns; n++) {
      const uint32_t correction = static_cast<uint32_t>(rows.zeros[r]) * static_cast<uint32_t>(e.colsum[n]);
      const float total = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(sums[r * sum_stride + n]) - correction));
      const float y = total * (rows.scales[r] * e.weight_scale[n]);
      store(rows.out + r * rows.out_stride, rows.dtype, n, e.bias ? y + e.bias[n] : y);
    }
}

namespace {

struct Convolution {
  const Problem& p;
  const Output& output;

  // The sums of one output pixel with a block's channels, tap by tap: none of the segments and strides that the fast way uses.
  void add_taps(int64_t image, int64_t y, int64_t x, int64_t group, const int8_t* panel, uint32_t* sums) const {
    const PackedHeader& w = p.weights;
    const Layer& layer = w.layer;
    const int64_t channels = layer.inputs / layer.groups;
    for (int64_t k = 0; k < contraction(layer); k++) {
      const int64_t tap_y = k / channels / layer.kernel_w, tap_x = k / channels % layer.kernel_w;
      const int64_t from = pixel_offset(p.inputs, image, y * layer.stride_h + tap_y * layer.dilation_h,
                                        x * layer.stride_w + tap_x * layer.dilation_w);
      const int value = p.quantized[from + group * channels + k % channels];
      const int64_t at_chunk = k / w.length * w.segment_chunks() + k % w.length / chunk, at = k % w.length % chunk;
      const int8_t* quad = panel + at_chunk * panel_chunk + at / 4 * 64 + at % 4;
      for (int n = 0; n < block_channels; n++) sums[n] += static_cast<uint32_t>(value * quad[n * 4]);
    }
  }

  static void run(void* raw, int block) {
    const auto& [p, output] = *static_cast<Convolution*>(raw);
    const PackedHeader& w = p.weights;
    std::vector<int8_t> panel(static_cast<size_t>(w.panel_bytes()));
    decode_block(p.packed, w, block, panel.data());
    const int64_t group = block / w.group_blocks, inside = block % w.group_blocks * block_channels;
    const int64_t channels = std::min<int64_t>(block_channels, w.group_outputs - inside), first = group * w.group_outputs + inside;
    int32_t colsum[block_channels];
    std::memcpy(colsum, p.packed + w.sums + block * block_channels * 4, sizeof colsum);
    const Epilogue epilogue{colsum, p.weight_scale + first, p.bias ? p.bias + first : nullptr, static_cast<int>(channels)};
    for (int64_t row = 0; row < p.rows; row++) {
      const int64_t x = row % p.out_width, y = row / p.out_width % p.out_height, image = row / p.out_width / p.out_height;
      uint32_t sums[block_channels] = {};
      static_cast<Convolution*>(raw)->add_taps(image, y, x, group, panel.data(), sums);
      char* out = static_cast<char*>(output.data) + (row * output.pixel_stride + first) * size_of(output.dtype);
      scalar_finish(reinterpret_cast<int32_t*>(sums), 0, epilogue, {1, p.zeros + image, p.scales + image, out, 0, output.dtype});
    }
  }
};

}  // namespace

void scalar_product(const Run& run, const Problem& p, const Output& output) {
  Convolution convolution{p, output};
  run.parallel(static_cast<int>(p.weights.blocks()), run.threads, Convolution::run, &convolution);
}

}  // namespace halfbyte
