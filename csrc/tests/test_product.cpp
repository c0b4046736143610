// Whole layers of every instruction set against the scalar oracle, to the last bit.
#include <atomic>
#include <thread>

#include "harness.h"

namespace halfbyte {
namespace {

constexpr Dtype dtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

void compare(const Layer& layer, const WeightFormat& format, const InputFormat& input_format, const Images& images, Dtype out) {
  const Weights w = random_weights(layer, format);
  const bool bias = uniform(0, 1);
  const int64_t gap = uniform(0, 2);
  const auto expected = run_layer(Run{}, layer, w, images.input, input_format, out, bias, gap);
  for (Isa isa : fast_isas()) {
    const int threads = static_cast<int>(uniform(1, 3));
    const auto got = run_layer(Run{isa, threads, parallel_for}, layer, w, images.input, input_format, out, bias, gap);
    check(same(got, expected, out), std::string(isa_name(isa)) + " multiplies " + describe(format) + " by " +
                                        describe(input_format) + ": images " + std::to_string(images.input.images) + "x" +
                                        std::to_string(images.input.height) + "x" + std::to_string(images.input.width) +
                                        ", channels " + std::to_string(layer.inputs) + " to " + std::to_string(layer.outputs) +
                                        ", kernel " + std::to_string(layer.kernel_h) + "x" + std::to_string(layer.kernel_w) +
                                        ", groups " + std::to_string(layer.groups));
  }
}

const InputFormat& any_input() {
  return input_formats()[static_cast<size_t>(uniform(0, static_cast<int64_t>(input_formats().size()) - 1))];
}
Dtype any_dtype() { return dtypes[uniform(0, 2)]; }

Layer linear(int64_t inputs, int64_t outputs) {
  Layer layer;
  layer.inputs = inputs, layer.outputs = outputs;
  return layer;
}

}  // namespace

void test_linear() {
  for (const WeightFormat& format : weight_formats()) {
    for (int64_t rows : {1, 2, 5, 11, 12, 13, 16, 31, 33, 70}) {
      const int64_t inputs = uniform(1, 300);
      compare(linear(inputs, uniform(1, 100)), format, any_input(), Images(any_dtype(), rows, 1, 1, inputs), any_dtype());
    }
    for (int64_t inputs : {1, 3, 4, 15, 16, 63, 64, 65, 127, 128, 200, 1024})
      for (int64_t outputs : {1, 15, 16, 17, 31, 32, 33, 48, 65, 130}) {
        const int64_t rows = uniform(1, 40);
        const Images images(any_dtype(), rows, 1, 1, inputs, uniform(0, 3), uniform(0, 3));
        compare(linear(inputs, outputs), format, any_input(), images, any_dtype());
      }
  }
}

void test_extremes() {  // the largest magnitudes both sides can have, at the largest K
  for (const WeightFormat& format : weight_formats())
    for (const InputFormat& input_format : input_formats()) {
      Layer layer = linear(uniform(0, 9) ? 640 : longest_k, 17);
      Images images(Dtype::float32, 14, 1, 1, layer.inputs, 0, 0, false);
      auto* values = reinterpret_cast<float*>(images.bytes.data());
      for (size_t i = 0; i < images.bytes.size() / 4; i++) values[i] = uniform(0, 3) ? 1e3f : -1e3f;
      compare(layer, format, input_format, images, Dtype::float32);
    }
}

void test_conv() {
  for (const WeightFormat& format : weight_formats())
    for (int i = 0; i < 30; i++) {
      Layer layer;
      const int64_t channels[] = {3, 4, 16, 20, 32, 48, 64, 96, 128};
      layer.groups = uniform(0, 4) ? 1 : static_cast<int>(uniform(2, 4));
      layer.inputs = layer.groups * channels[uniform(0, 8)], layer.outputs = layer.groups * uniform(1, 50);
      const int64_t kernels[] = {1, 2, 3, 3, 3, 5};
      layer.kernel_h = static_cast<int>(kernels[uniform(0, 5)]),
      layer.kernel_w = uniform(0, 3) ? layer.kernel_h : static_cast<int>(kernels[uniform(0, 5)]);
      layer.stride_h = static_cast<int>(uniform(1, 2)),
      layer.stride_w = uniform(0, 3) ? layer.stride_h : static_cast<int>(uniform(1, 3));
      layer.dilation_h = static_cast<int>(uniform(0, 3) ? 1 : 2), layer.dilation_w = static_cast<int>(uniform(0, 3) ? 1 : 2);
      for (int* pad : {&layer.pad_top, &layer.pad_bottom, &layer.pad_left, &layer.pad_right})
        *pad = static_cast<int>(uniform(0, 2));
      const int64_t height = uniform(1, 20), width = uniform(1, 40);
      if (!output_height(layer, height) || !output_width(layer, width)) continue;
      compare(layer, format, any_input(),
              Images(any_dtype(), uniform(1, 3), height, width, layer.inputs, uniform(0, 1), uniform(0, 1)), any_dtype());
    }
  Layer depthwise;
  depthwise.inputs = depthwise.outputs = depthwise.groups = 40, depthwise.kernel_h = depthwise.kernel_w = 3,
  depthwise.pad_top = depthwise.pad_left = 1;
  for (const WeightFormat& format : weight_formats())
    compare(depthwise, format, any_input(), Images(Dtype::float32, 2, 7, 9, 40), Dtype::bfloat16);
}

// Padding is with real zeros, whatever integer stands for zero: the same as zeros in the input.
void test_padding() {
  for (const InputFormat& input_format : input_formats()) {
    Layer padded = linear(20, 18), plain;
    padded.kernel_h = padded.kernel_w = 3, padded.pad_top = 1, padded.pad_left = 2, padded.pad_bottom = 3, padded.pad_right = 1;
    plain = padded, plain.pad_top = plain.pad_left = plain.pad_bottom = plain.pad_right = 0;
    const Images images(Dtype::float32, 2, 5, 6, 20, 0, 0, false);
    std::vector<float> wider(2 * 9 * 9 * 20);
    for (int64_t i = 0; i < 2 * 5 * 6 * 20; i++) {
      const int64_t image = i / 600, y = i / 120 % 5, x = i / 20 % 6;
      wider[static_cast<size_t>(((image * 9 + y + 1) * 9 + x + 2) * 20 + i % 20)] = load(images.input.data, Dtype::float32, i);
    }
    Input input = {wider.data(), Dtype::float32, 2, 9, 9, 20, 9 * 9 * 20, 9 * 20, 20};
    Weights w = random_weights(padded, {Grid::lzs4, 4, 16});
    const auto expected = run_layer(Run{}, padded, w, images.input, input_format, Dtype::float32, true);
    w.packed.assign(packed_bytes(plain, {Grid::lzs4, 4, 16}), 0);
    pack_weights(plain, {Grid::lzs4, 4, 16}, w.codes.data(), w.multipliers.data(), w.packed.data());
    // a zero that is no level of its table rounds to a neighbour inside an image, but not in the padding
    const GridTable& grid = table_of(input_format.grid);
    if (grid.is_signed || (grid.contiguous && !rounds_twice(input_format)))
      check(same(run_layer(Run{}, plain, w, input, input_format, Dtype::float32, true), expected, Dtype::float32),
            "padding is zeros for " + describe(input_format));
  }
}

void test_shapes_of_models() {  // large enough for several panels and tasks
  const WeightFormat lzs{Grid::lzs4, 4, 16}, bytes{Grid::int8, 0, 16};
  for (const WeightFormat& format : {lzs, bytes}) {
    compare(linear(1152, 1000), format, input_formats()[1], Images(Dtype::bfloat16, 150, 1, 1, 1152), Dtype::bfloat16);
    Layer layer = linear(320, 330);
    layer.kernel_h = layer.kernel_w = 3, layer.pad_top = layer.pad_bottom = layer.pad_left = layer.pad_right = 1;
    compare(layer, format, input_formats()[1], Images(Dtype::bfloat16, 2, 16, 16, 320), Dtype::bfloat16);
  }
}

void test_zero_sizes() {
  const WeightFormat format{Grid::lzs4, 4, 16};
  for (Isa isa : fast_isas()) {
    const Layer layer = linear(64, 32), none = linear(64, 0);
    check(run_layer(Run{isa, 2, parallel_for}, layer, random_weights(layer, format), Images(Dtype::float32, 0, 1, 1, 64).input,
                    any_input(), Dtype::float32, true)
              .empty(),
          "no rows");
    check(run_layer(Run{isa, 2, parallel_for}, none, random_weights(none, format), Images(Dtype::float32, 3, 1, 1, 64).input,
                    any_input(), Dtype::float32, true)
              .empty(),
          "no outputs");
    Layer conv = linear(64, 32);
    conv.kernel_h = conv.kernel_w = 3;
    check(run_layer(Run{isa, 2, parallel_for}, conv, random_weights(conv, format), Images(Dtype::float32, 3, 2, 0, 64).input,
                    any_input(), Dtype::float32, true)
              .empty(),
          "no pixels");
    check_throws(
        [&] {
          run_layer(Run{isa, 1, parallel_for}, layer, random_weights(layer, format), Images(Dtype::float32, 1, 1, 1, 63).input,
                    any_input(), Dtype::float32, true);
        },
        "wrong channels");
  }
}

void test_misaligned() {  // packed weights and outputs at odd addresses
  const Layer layer = linear(192, 50);
  for (const WeightFormat& format : weight_formats()) {
    Weights w = random_weights(layer, format);
    const Images images(Dtype::float32, 40, 1, 1, 192);
    const InputFormat& input_format = any_input();
    const auto expected = run_layer(Run{}, layer, w, images.input, input_format, Dtype::bfloat16, true);
    for (Isa isa : fast_isas())
      for (size_t skew : {1, 2, 33}) {
        std::vector<uint8_t> moved(w.packed.size() + skew), out(expected.size() + 2);
        std::memcpy(moved.data() + skew, w.packed.data(), w.packed.size());
        forward(Run{isa, 1, parallel_for}, images.input, input_format, moved.data() + skew, w.scale.data(), w.bias.data(),
                {out.data() + 2, Dtype::bfloat16, 50});
        check(same({out.begin() + 2, out.end()}, expected, Dtype::bfloat16),
              std::string(isa_name(isa)) + " reads weights at odd addresses");
      }
  }
}

void test_concurrent_callers() {
  const Layer layer = linear(320, 96);
  const WeightFormat format{Grid::lzs4, 4, 16};
  const Weights w = random_weights(layer, format);
  const InputFormat input_format = input_formats()[1];
  const Isa isa = default_isa();
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int t = 0; t < 8; t++)
    callers.emplace_back([&, t] {
      for (int i = 0; i < 20; i++) {
        const Images images(Dtype::bfloat16, 20 + 17 * t, 1, 1, 320);
        const auto expected = run_layer(Run{}, layer, w, images.input, input_format, Dtype::bfloat16, true);
        wrong += !same(run_layer(Run{isa, 1 + t % 3, parallel_for}, layer, w, images.input, input_format, Dtype::bfloat16, true),
                       expected, Dtype::bfloat16);
      }
      release_scratch();
    });
  for (std::thread& caller : callers) caller.join();
  check(wrong == 0, "8 callers at once get what one gets");
}

}  // namespace halfbyte
