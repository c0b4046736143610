// Quantized inputs of every instruction set against the scalar oracle, to the last bit.
#include "harness.h"

namespace halfbyte {

namespace {

constexpr Dtype dtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

struct Read {
  std::vector<int16_t> integers;
  std::vector<float> scales;
};

Read quantize_with(const Run& run, const Input& input, const InputFormat& format, const Layer& layer, const GroupNorm* norm = nullptr) {
  std::vector<uint8_t> memory(quantized_bytes(input, layer) + 64);
  uint8_t* quantized = memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
  quantize(run, input, format, layer, quantized, norm);
  Read read{std::vector<int16_t>(static_cast<size_t>(input.images * input.height * input.width * input.channels)),
            std::vector<float>(static_cast<size_t>(input.images))};
  read_quantized(quantized, read.integers.data(), read.scales.data());
  return read;
}

bool same_floats(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); i++)
    if (bits_of_float(a[i]) != bits_of_float(b[i]) && !(std::isnan(a[i]) && std::isnan(b[i]))) return false;
  return true;
}

void compare(const Input& input, const InputFormat& format, const Layer& layer) {
  const Read expected = quantize_with(Run{}, input, format, layer);
  for (Isa isa : fast_isas())
    for (int threads : {1, 3}) {
      const Read got = quantize_with(Run{isa, threads, parallel_for}, input, format, layer);
      const std::string what =
          std::string(isa_name(isa)) + " quantizes " + describe(format) + ", " + std::to_string(input.channels) + " channels";
      check(got.integers == expected.integers, what + ": integers");
      check(same_floats(got.scales, expected.scales), what + ": scales");
    }
}

// Two subgroups of whole numbers with scale 1: every magnitude, every saturation.
void test_every_step(const InputFormat& format) {
  const GridTable& grid = table_of(format.grid);
  const int limit = grid.is_signed ? format.top : 255;
  Layer layer;
  layer.inputs = 128, layer.outputs = 1;
  std::vector<float> values;
  for (int largest = 0; largest <= limit; largest++)
    for (int i = 0; i < 128; i++) {
      const float magnitude = i % 64 == 0 ? static_cast<float>(largest) : static_cast<float>(uniform(0, largest));
      values.push_back(grid.is_signed && uniform(0, 1) ? -magnitude : magnitude);
    }
  InputFormat fixed = format;
  fixed.fixed = true, fixed.scale = 1.0f, fixed.zero = 0;
  compare({values.data(), Dtype::float32, limit + 1, 1, 1, 128, 128, 128, 128}, fixed, layer);
}

// A norm on the way against a norm before, whose output is kept.
void test_norms_on_the_way() {
  for (Dtype dtype : dtypes)
    for (int trial = 0; trial < 12; trial++) {
      const int64_t groups = uniform(1, 4), channels = groups * uniform(1, 20), images = trial % 2 ? 9 : 2, height = uniform(1, 40);
      const int64_t width = uniform(1, 20), count = images * height * width * channels;
      Layer layer;
      layer.inputs = channels, layer.outputs = 1, layer.kernel_h = layer.kernel_w = 3, layer.pad_top = layer.pad_left = trial % 3;
      std::vector<uint8_t> x(static_cast<size_t>(count * size_of(dtype))), y(x);
      std::vector<float> shift(static_cast<size_t>(images * channels));
      for (int64_t i = 0; i < count; i++) store(x.data(), dtype, i, 0.1f * static_cast<float>(uniform(-50, 80)));
      for (float& value : shift) value = 0.1f * static_cast<float>(uniform(-50, 80));
      if (trial == 5) store(x.data(), dtype, uniform(0, count - 1), INFINITY);
      GroupNorm norm{dtype, images, height * width, channels, groups, 1e-5, trial % 4 < 2};
      norm.x = x.data(), norm.y = y.data(), norm.shift = trial % 4 ? shift.data() : nullptr;
      group_norm({}, norm);
      Input input{x.data(), dtype, images, height, width, channels, height * width * channels, width * channels, channels};
      Input kept = input;
      kept.data = y.data();
      norm.x = norm.y = nullptr;
      InputFormat format;
      if (trial % 2) format.grid = Grid::uint8, format.top = 255;
      const Read expected = quantize_with({}, kept, format, layer);
      for (Isa isa : fast_isas())
        for (int threads : {1, 3}) {
          const Read got = quantize_with({isa, threads, parallel_for}, input, format, layer, &norm);
          check(got.integers == expected.integers && same_floats(got.scales, expected.scales),
                std::string(isa_name(isa)) + " norms on the way");
        }
    }
  const float one[6] = {};
  Layer layer;
  layer.inputs = 3;
  std::vector<uint8_t> memory(4096);
  const GroupNorm norm{Dtype::float32, 1, 1, 3, 1};
  check_throws([&] { quantize({}, {one, Dtype::float32, 1, 1, 1, 3, 6, 6, 4}, {}, layer, memory.data(), &norm); }, "images with gaps");
}

}  // namespace

void test_quantize() {
  test_norms_on_the_way();
  for (const InputFormat& format : input_formats()) {
    for (Dtype dtype : dtypes)
      for (int64_t channels : {1, 7, 15, 16, 17, 33, 64, 100, 1030}) {
        Layer layer;
        layer.inputs = channels, layer.outputs = 1;
        const Images images(dtype, 24, 1, 1, channels, uniform(0, 3), uniform(0, 2));
        compare(images.input, format, layer);
      }
    if (rounds_twice(format)) test_every_step(format);
    Layer padded;
    padded.inputs = 24, padded.outputs = 1, padded.kernel_h = padded.kernel_w = 3, padded.pad_left = 1, padded.pad_bottom = 2;
    const Images images(Dtype::bfloat16, 3, 40, 37, 24);
    compare(images.input, format, padded);
  }
}

void test_refused_multiples() {
  const Images images(Dtype::float32, 2, 1, 1, 24);
  Layer layer;
  layer.inputs = 24, layer.outputs = 1;
  InputFormat shifted = multiples(Grid::lzs4, 4, 16, 28);
  shifted.max_shift = 1;
  for (const InputFormat& format : {multiples(Grid::e2m1, 11, 16, 127), multiples(Grid::lzs4, 17, 16, 119),
                                    multiples(Grid::lzs4, 1, 16, 7), multiples(Grid::int8, 2, 16, 127), shifted})
    check_throws([&] { quantize_with(Run{}, images.input, format, layer); }, "refuses " + describe(format));
}

// The nearest float32 below and above every tie of every table.
void test_ties() {
  for (const InputFormat& format : input_formats()) {
    if (rounds_twice(format) || format.fixed) continue;
    const GridTable& grid = table_of(format.grid);
    std::vector<float> values;
    for (float middle = 0; middle < static_cast<float>(format.top); middle += 0.5f)
      for (float value : {middle, std::nextafter(middle, -1.0f), std::nextafter(middle, 999.0f)})
        for (float sign : {1.0f, -1.0f}) values.push_back(grid.is_signed ? sign * value : value);
    Layer layer;
    layer.inputs = static_cast<int64_t>(values.size()), layer.outputs = 1;
    InputFormat fixed = format;
    fixed.fixed = true, fixed.scale = 1.0f, fixed.zero = 0;
    compare({values.data(), Dtype::float32, 1, 1, 1, layer.inputs, layer.inputs, layer.inputs, layer.inputs}, fixed, layer);
  }
}

}  // namespace halfbyte
