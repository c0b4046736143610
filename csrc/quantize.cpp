// Inputs to bytes: a scale (and zero point) for every image, and the integers in a zero-padded channels-last buffer.
#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "dispatch.h"
#include "floats.h"

namespace halfbyte {
namespace {

constexpr char quantized_magic[8] = {'h', 'b', 'q', 'u', 'a', 'n', 't', '1'};
constexpr int64_t band_values = 1 << 14;  // work for one task, about 10 microseconds

// Tasks are bands: `rows` rows of one image, or where images are small, `images` whole images.
struct Job {
  const Input& input;
  const InputFormat& format;
  QuantizedHeader header;
  const Kernels& kernels;
  uint8_t* quantized;
  int64_t band_images, band_rows, bands_per_image;
  Range* ranges = nullptr;  // of bands, where an image has several
  float* scales;
  int32_t* zeros;
  Isa isa;
  const GroupNorm* norm = nullptr;  // on the way

  const char* pixels(int64_t image) const {
    return static_cast<const char*>(input.data) + image * input.image_stride * size_of(input.dtype);
  }
  // Calls visit(pointer, values, offset of the first byte to write) for stretches of adjacent values in one row of an image's pixels.
  template <typename Visit>
  void each_stretch(int64_t image, const char* pixels, int64_t y, Visit visit, bool whole_rows) const {
    const char* row = pixels + y * input.row_stride * size_of(input.dtype);
    const int64_t at = pixel_offset(header, image, y + header.pad_top, header.pad_left);
    if (whole_rows && input.pixel_stride == input.channels) return visit(row, input.width * input.channels, at);
    for (int64_t x = 0; x < input.width; x++)
      visit(row + x * input.pixel_stride * size_of(input.dtype), input.channels, at + x * header.pixel_pitch);
  }
};

float usable(float scale) {
  if (scale < std::numeric_limits<float>::min()) return 1.0f;
  return std::isfinite(scale) ? scale : std::numeric_limits<float>::quiet_NaN();
}

void choose_scale(const Job& job, int64_t image, const Range& range) {
  const float nan = std::numeric_limits<float>::quiet_NaN(), top = static_cast<float>(job.format.top);
  const bool is_signed = table_of(job.format.grid).is_signed, finite = range.absmax < 0x7f800000;
  float scale = job.format.scale;
  int zero = is_signed ? 128 : job.format.zero;
  if (job.format.fixed) {
    scale = finite ? scale : nan;
  } else if (is_signed) {
    scale = finite ? usable(float_of_bits(range.absmax) / top) : nan;
  } else {
    scale = finite ? usable((range.high - range.low) / top) : nan;
    const float point = std::nearbyintf(-range.low / scale);
    zero = std::isnan(point) ? 0 : static_cast<int>(point);
  }
  job.scales[image] = scale, job.zeros[image] = zero;
}

Range range_of(const Job& job, int64_t image, const char* pixels, int64_t from, int64_t to) {
  Range range;
  const bool only_absmax = job.format.fixed || table_of(job.format.grid).is_signed;
  const auto widen = [&](const char* values, int64_t count, int64_t) {
    job.kernels.range(values, job.input.dtype, count, only_absmax, &range);
  };
  for (int64_t y = from; y < to; y++) job.each_stretch(image, pixels, y, widen, true);
  return range;
}

void encode_rows(const Job& job, int64_t image, const char* pixels, int64_t from, int64_t to) {
  const QuantizedHeader& h = job.header;
  const GridTable& grid = table_of(job.format.grid);
  const float zero = grid.is_signed ? 0.0f : static_cast<float>(job.zeros[image]);
  const Encoding encoding{&job.format, &grid, 1.0f / job.scales[image], zero, grid.is_signed ? 128 : 0};
  // Subgroups stay inside a pixel; where values are rounded once, or where pixels hold whole subgroups, a row of pixels is one
  // stretch.
  const bool whole_rows = (!rounds_twice(job.format) || h.channels % job.format.subgroup == 0) && h.pixel_pitch == h.channels;
  const int border = job.zeros[image];
  const auto fill = [&](int64_t at, int64_t bytes) { std::memset(job.quantized + at, border, static_cast<size_t>(bytes)); };
  if (from == 0 && h.pad_top) fill(pixel_offset(h, image, 0, 0), h.pad_top * h.row_pitch);
  if (to == h.height && h.pad_bottom) fill(pixel_offset(h, image, h.pad_top + h.height, 0), h.pad_bottom * h.row_pitch);
  for (int64_t y = from; y < to; y++) {
    job.each_stretch(
        image, pixels, y,
        [&](const char* values, int64_t count, int64_t at) {
          job.kernels.encode(values, job.input.dtype, count, encoding, job.quantized + at);
        },
        whole_rows);
    if (h.pad_left) fill(pixel_offset(h, image, y + h.pad_top, 0), h.pad_left * h.pixel_pitch);
    if (h.pad_right) fill(pixel_offset(h, image, y + h.pad_top, h.pad_left + h.width), h.pad_right * h.pixel_pitch);
  }
}

// What a norm makes of an input, in scratch memory of this thread.
Input normed(const Run& run, const Input& input, const GroupNorm& norm) {
  const int64_t pixels = input.height * input.width, values = input.images * pixels * input.channels;
  Input found = input;
  found.data = scratch(Slot::panel, static_cast<size_t>(values * size_of(input.dtype)));
  group_norm(run, {input.dtype, input.images, pixels, input.channels, norm.groups, norm.epsilon, norm.silu, norm.gain, norm.offset,
                   input.data, const_cast<void*>(found.data), norm.shift});
  return found;
}

const char* normed_image(const Job& job, int64_t image) {
  Input one = job.input;
  one.images = 1, one.data = job.pixels(image);
  GroupNorm norm = *job.norm;
  if (norm.shift) norm.shift += image * one.channels;
  return static_cast<const char*>(normed({job.isa, 1, parallel_for}, one, norm).data);
}

void run_images(void* raw, int task) {
  const Job& job = *static_cast<Job*>(raw);
  const int64_t from = task * job.band_images, to = std::min(from + job.band_images, job.header.images);
  for (int64_t image = from; image < to; image++) {
    const char* pixels = job.norm ? normed_image(job, image) : job.pixels(image);
    choose_scale(job, image, range_of(job, image, pixels, 0, job.header.height));
    encode_rows(job, image, pixels, 0, job.header.height);
  }
}

void run_ranges(void* raw, int task) {
  const Job& job = *static_cast<Job*>(raw);
  const int64_t image = task / job.bands_per_image, from = task % job.bands_per_image * job.band_rows;
  job.ranges[task] = range_of(job, image, job.pixels(image), from, std::min(from + job.band_rows, job.header.height));
}

void run_encodes(void* raw, int task) {
  const Job& job = *static_cast<Job*>(raw);
  const int64_t image = task / job.bands_per_image, from = task % job.bands_per_image * job.band_rows;
  encode_rows(job, image, job.pixels(image), from, std::min(from + job.band_rows, job.header.height));
}

void join_ranges(const Job& job) {
  for (int64_t image = 0; image < job.header.images; image++) {
    Range all;
    for (int64_t band = 0; band < job.bands_per_image; band++) {
      const Range& part = job.ranges[image * job.bands_per_image + band];
      all.low = std::min(all.low, part.low), all.high = std::max(all.high, part.high),
      all.absmax = std::max(all.absmax, part.absmax);
    }
    choose_scale(job, image, all);
  }
}

void check(const Input& input, const InputFormat& format, const Layer& layer, const GroupNorm* norm) {
  const GridTable& grid = table_of(format.grid);
  const int step = format.max_multiple ? format.max_multiple : 1 << format.max_shift;
  const int largest = std::max(format.top, std::max(grid.top, -grid.bottom) * step);
  if (input.channels != layer.inputs)
    throw std::invalid_argument("the layer takes " + std::to_string(layer.inputs) + " channels, the input has " +
                                std::to_string(input.channels));
  if (format.top < 1 || largest > (grid.is_signed ? 128 : 255) || format.max_shift < 0 || (format.max_shift && grid.bits == 8))
    throw std::invalid_argument(std::string("inputs of grid ") + grid.name + " cannot reach " + std::to_string(largest) +
                                " in a byte");
  if (format.max_multiple && (grid.bits == 8 || format.max_shift || format.max_multiple < 2 || format.max_multiple > 16))
    throw std::invalid_argument("multiples of an input end at 2 to 16, on 4-bit grids without shifts");
  if (format.subgroup < 1 || format.subgroup > 1024) throw std::invalid_argument("a subgroup of an input holds 1 to 1024 values");
  if (format.truncate && !(format.max_shift && grid.contiguous))
    throw std::invalid_argument("truncation needs shifts and an integer grid");
  const bool dense = input.pixel_stride == input.channels && input.row_stride == input.width * input.channels &&
                     input.image_stride == input.height * input.row_stride;
  if (norm && !dense) throw std::invalid_argument("images with gaps cannot be normed on the way");
  if (norm && (norm->groups <= 0 || input.channels % norm->groups))
    throw std::invalid_argument("group norm: the groups must share the channels evenly");
  if (format.fixed && (!(format.scale > 0) || !std::isfinite(format.scale) || format.zero < 0 || format.zero > 255))
    throw std::invalid_argument("a fixed scale must be finite and above 0, its zero point 0 to 255");
}

}  // namespace

QuantizedHeader plan_quantized(const Input& input, const Layer& layer) {
  QuantizedHeader h{};
  std::memcpy(h.magic, quantized_magic, sizeof h.magic);
  h.images = input.images, h.height = input.height, h.width = input.width, h.channels = input.channels;
  h.pad_top = layer.pad_top, h.pad_bottom = layer.pad_bottom, h.pad_left = layer.pad_left, h.pad_right = layer.pad_right;
  // Neighbouring pixels touch where a kernel row is one stretch. Else rows start on cache lines, no 512 bytes apart: those collide
  // in L1.
  const int64_t lines = round_up(h.channels, 64), spread = lines % 512 ? lines : lines + 64;
  h.pixel_pitch = layer.kernel_h * layer.kernel_w == 1 ? spread : h.channels;
  h.row_pitch = (h.width + h.pad_left + h.pad_right) * h.pixel_pitch;
  h.image_pitch = (h.height + h.pad_top + h.pad_bottom) * h.row_pitch;
  h.scales = round_up(sizeof h, 64);
  h.zeros = h.scales + round_up(h.images * 4, 64);
  h.values = h.zeros + round_up(h.images * 4, 64);
  h.bytes =
      round_up(h.values + h.images * h.image_pitch + 2 * chunk, 64);  // kernels read up to a chunk too far, times weights of 0
  return h;
}

QuantizedHeader quantized_header(const uint8_t* quantized) {
  QuantizedHeader h;
  std::memcpy(&h, quantized, sizeof h);
  if (std::memcmp(h.magic, quantized_magic, sizeof h.magic) != 0) throw std::invalid_argument("these bytes are no quantized input");
  return h;
}

size_t quantized_bytes(const Input& input, const Layer& layer) { return static_cast<size_t>(plan_quantized(input, layer).bytes); }

void quantize(const Run& run, const Input& input, const InputFormat& format, const Layer& layer, uint8_t* quantized,
              const GroupNorm* norm) {
  check(input, format, layer, norm);
  Job job{input, format, plan_quantized(input, layer), kernels_of(run.isa), quantized, 1, 1, 1, nullptr, nullptr, nullptr, run.isa};
  const QuantizedHeader& h = job.header;
  std::memcpy(quantized, &h, sizeof h);
  job.scales = reinterpret_cast<float*>(quantized + h.scales), job.zeros = reinterpret_cast<int32_t*>(quantized + h.zeros);
  std::memset(quantized + h.values + h.images * h.image_pitch, 0,
              static_cast<size_t>(h.bytes - h.values - h.images * h.image_pitch));
  if (!h.images) return;
  const int64_t row_values = std::max<int64_t>(1, h.width * h.channels);
  job.band_rows = std::clamp<int64_t>(band_values / row_values, 1, std::max<int64_t>(1, h.height));
  job.band_images = std::max<int64_t>(1, band_values / (row_values * std::max<int64_t>(1, h.height)));
  job.bands_per_image = (h.height + job.band_rows - 1) / job.band_rows;
  if (job.bands_per_image <= 1 || run.threads <= 1 || h.images >= 2 * run.threads) {  // an image at a time, while it is in the cache
    job.norm = norm;
    run.parallel(static_cast<int>((h.images + job.band_images - 1) / job.band_images), run.threads, run_images, &job);
    return;
  }
  if (norm) return quantize(run, normed(run, input, *norm), format, layer, quantized);
  const int bands = static_cast<int>(h.images * job.bands_per_image);
  job.ranges = reinterpret_cast<Range*>(scratch(Slot::rows, static_cast<size_t>(bands) * sizeof(Range)));
  run.parallel(bands, run.threads, run_ranges, &job);
  join_ranges(job);
  run.parallel(bands, run.threads, run_encodes, &job);
}

void read_quantized(const uint8_t* quantized, int16_t* integers, float* scales) {
  const QuantizedHeader h = quantized_header(quantized);
  std::memcpy(scales, quantized + h.scales, static_cast<size_t>(h.images) * 4);
  const auto* zeros = reinterpret_cast<const int32_t*>(quantized + h.zeros);
  for (int64_t image = 0; image < h.images; image++)
    for (int64_t y = 0; y < h.height; y++)
      for (int64_t x = 0; x < h.width; x++) {
        const uint8_t* pixel = quantized + pixel_offset(h, image, y + h.pad_top, x + h.pad_left);
        for (int64_t c = 0; c < h.channels; c++) *integers++ = static_cast<int16_t>(pixel[c] - zeros[image]);
      }
}

}  // namespace halfbyte
