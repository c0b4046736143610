// What stands between layers: every instruction set against the oracle, bit for bit, and the oracle against double.
#include <algorithm>

#include "harness.h"

namespace halfbyte {
namespace {

constexpr Dtype dtypes[] = {Dtype::float32, Dtype::bfloat16, Dtype::float16};

// Of a type, from a byte that is no multiple of its size.
struct Some {
  Dtype dtype;
  std::vector<uint8_t> bytes;

  Some(Dtype type, int64_t count, float spread)
      : dtype(type), bytes(static_cast<size_t>(count * size_of(type)) + 1) {
    std::normal_distribution<float> normal(0.1f, spread);
    for (int64_t i = 0; i < count; i++) store(data(), dtype, i, normal(generator()));
  }
  uint8_t* data() { return bytes.data() + 1; }
};

std::vector<uint8_t> gelus(Isa isa, int threads, Some& x, int64_t count) {
  std::vector<uint8_t> y(static_cast<size_t>(count * size_of(x.dtype)) + 1, 0xaa);
  gelu({isa, threads, parallel_for}, x.dtype, x.data(), count, y.data() + 1);
  return y;
}

std::vector<uint8_t> geglus(Isa isa, int threads, Some& x, int64_t rows, int64_t width) {
  std::vector<uint8_t> y(static_cast<size_t>(rows * width * size_of(x.dtype)) + 1, 0xaa);
  geglu({isa, threads, parallel_for}, x.dtype, x.data(), rows, width, y.data() + 1);
  y.erase(y.begin());
  return y;
}

std::vector<uint8_t> normed(Isa isa, int threads, GroupNorm call) {
  std::vector<uint8_t> y(static_cast<size_t>(call.images * call.pixels * call.channels * size_of(call.dtype)) + 1, 0xaa);
  call.y = y.data() + 1;
  group_norm({isa, threads, parallel_for}, call);
  return y;
}

// Of the oracle, as a share of the output's energy.
double error_of(GroupNorm call, Some& x) {
  const std::vector<uint8_t> found = normed(Isa::scalar, 1, call);
  const int64_t width = call.channels / call.groups;
  double noise = 0, signal = 0;
  for (int64_t image = 0; image < call.images; image++)
    for (int64_t group = 0; group < call.groups; group++) {
      double sum = 0, square = 0;
      const auto each = [&](auto look) {
        for (int64_t p = 0; p < call.pixels; p++)
          for (int64_t c = group * width; c < (group + 1) * width; c++) look((image * call.pixels + p) * call.channels + c, c);
      };
      const auto value = [&](int64_t at, int64_t c) {
        return load(x.data(), call.dtype, at) + (call.shift ? double{call.shift[image * call.channels + c]} : 0.0);
      };
      each([&](int64_t at, int64_t c) { sum += value(at, c); });
      const double count = static_cast<double>(call.pixels * width), mean = sum / count;
      each([&](int64_t at, int64_t c) { square += std::pow(value(at, c) - mean, 2); });
      each([&](int64_t at, int64_t c) {
        const double plain = (value(at, c) - mean) / std::sqrt(square / count + call.epsilon);
        const double affine = plain * call.gain[c] + call.offset[c], exact = call.silu ? affine / (1 + std::exp(-affine)) : affine;
        noise += std::pow(load(found.data() + 1, call.dtype, at) - exact, 2), signal += exact * exact;
      });
    }
  return noise / signal;
}

}  // namespace

void test_gelu() {
  for (Dtype dtype : dtypes)
    for (float spread : {0.0f, 1.0f, 8.0f, 1000.0f})
      for (int64_t count : {0, 1, 7, 16, 33, 1280, 40000}) {
        Some x(dtype, count, spread);
        if (count == 33)
          for (float odd : {std::nanf(""), INFINITY, -INFINITY, -0.0f, 1e-40f, -88.5f}) store(x.data(), dtype, uniform(0, 32), odd);
        const std::vector<uint8_t> expected = gelus(Isa::scalar, 1, x, count);
        for (Isa isa : fast_isas()) check(gelus(isa, 2, x, count) == expected, std::string("GELU on ") + isa_name(isa));
      }
  for (int i = -2000; i <= 2000; i++) {
    const float x = static_cast<float>(i) / 100;
    float y;
    gelu({Isa::scalar, 1, parallel_for}, Dtype::float32, &x, 1, &y);
    const double cubic = std::sqrt(2 / 3.14159265358979323846) * (x + 0.044715 * x * x * x), exact = 0.5 * x * (1 + std::tanh(cubic));
    check(std::fabs(y - exact) <= 4e-6 * std::fabs(exact) + 1e-7, "GELU of " + std::to_string(x));
  }
}

void test_expected_writes() {  // any stretch of memory, which keeps what it holds
  std::vector<uint8_t> memory(9 << 20, 0x5a);
  for (int64_t from : {0, 1, 4095, 1 << 20})
    for (int64_t bytes : {0, 1, 4096, (2 << 20) + 1, 8 << 20}) expect_writes(memory.data() + from, static_cast<size_t>(bytes));
  check(std::count(memory.begin(), memory.end(), 0x5a) == static_cast<int64_t>(memory.size()), "memory keeps what it holds");
}

void test_geglu() {
  for (Dtype dtype : dtypes)
    for (float spread : {0.0f, 1.0f, 8.0f, 1000.0f})
      for (int64_t width : {0, 1, 7, 16, 33, 1280})
        for (int64_t rows : {0, 1, 40}) {
          Some x(dtype, rows * width * 2, spread);
          if (width == 33 && rows)
            for (float odd : {std::nanf(""), INFINITY, -INFINITY, -0.0f, 1e-40f, -88.5f}) store(x.data(), dtype, uniform(0, 65), odd);
          const std::vector<uint8_t> expected = geglus(Isa::scalar, 1, x, rows, width);
          for (Isa isa : fast_isas())  // a product of two NaNs has the sign of either
            check(same(geglus(isa, 2, x, rows, width), expected, dtype), std::string("GEGLU on ") + isa_name(isa));
        }
  for (int i = -1300; i <= 1300; i++) {
    const float x[] = {3.0f, static_cast<float>(i) / 100};
    float y;
    geglu({Isa::scalar, 1, parallel_for}, Dtype::float32, x, 1, 1, &y);
    const double exact = 3 * 0.5 * x[1] * std::erfc(-x[1] / std::sqrt(2.0));
    check(std::fabs(y - exact) <= 1.2e-5 * std::fabs(exact) + 1e-30, "GEGLU of " + std::to_string(x[1]));
  }
}

void test_group_norms() {
  for (Dtype dtype : dtypes)
    for (int trial = 0; trial < 60; trial++) {
      const int64_t groups = uniform(1, 5), width = uniform(1, trial % 3 ? 40 : 3);
      GroupNorm call{dtype, uniform(1, 3), uniform(1, 300), groups * width, groups, 1e-5, trial % 2 == 1};
      const int64_t count = call.images * call.pixels * call.channels;
      Some x(dtype, count, trial % 4 ? 2.0f : 0.0f);
      if (trial % 5 == 4) store(x.data(), dtype, uniform(0, count - 1), trial % 2 ? std::nanf("") : INFINITY);
      std::vector<float> gain(static_cast<size_t>(call.channels)), offset(gain), shift(static_cast<size_t>(call.images * call.channels));
      for (float& value : shift) value = 0.01f * static_cast<float>(uniform(-300, 300));
      if (trial % 3 == 1) call.shift = shift.data();
      for (float& value : gain) value = 0.01f * static_cast<float>(uniform(-200, 200));
      for (float& value : offset) value = 0.01f * static_cast<float>(uniform(-200, 200));
      call.x = x.data();
      if (trial % 7) call.gain = gain.data(), call.offset = offset.data();
      const std::vector<uint8_t> expected = normed(Isa::scalar, 1, call);
      for (Isa isa : fast_isas()) check(normed(isa, 2, call) == expected, std::string("group norm on ") + isa_name(isa));
      if (trial % 7 && trial % 5 != 4 && trial % 4)
        check(error_of(call, x) < (dtype == Dtype::float32 ? 1e-9 : dtype == Dtype::bfloat16 ? 1e-5 : 1e-6), "group norm is near");
    }
  check_throws([] { group_norm({}, {Dtype::float32, 1, 1, 7, 2}); }, "groups that do not share the channels");
}

}  // namespace halfbyte
