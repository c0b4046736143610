// The oracle of what stands between layers: a value at a time.
#include <cmath>

#include "floats.h"
#include "internal.h"

namespace halfbyte {
namespace {

float power(float x) {
  const float bounded = x > -125.0f ? (x < 128.0f ? x : 128.0f) : -125.0f, whole = std::nearbyint(bounded);
  const float fraction = bounded - whole;
  float found = power_series[0];
  for (int i = 1; i < 5; i++) found = found * fraction + power_series[i];
  return float_of_bits(bits_of_float(found) + (static_cast<uint32_t>(static_cast<int32_t>(whole)) << 23));
}

}  // namespace

void scalar_gelu(Dtype dtype, const char* x, int64_t count, char* y) {
  for (int64_t i = 0; i < count; i++) {
    const float value = load(x, dtype, i), inner = value * value * 0x1.6e4e26p-5f + 1.0f;
    store(y, dtype, i, value / (power(value * -0x1.26aec2p+1f * inner) + 1.0f));
  }
}

void scalar_geglu(Dtype dtype, const char* values, const char* gates, int64_t count, char* y) {
  for (int64_t i = 0; i < count; i++) {
    const float gate = load(gates, dtype, i), size = gate < 0 ? -gate : gate, part = 1.0f / (size * 0.3125f + 1.0f);
    float tail = part * tail_series[0] + tail_series[1];
    for (int j = 2; j < 6; j++) tail = tail * part + tail_series[j];
    tail = tail * part * power(gate * gate * -0x1.715476p-1f);
    store(y, dtype, i, load(values, dtype, i) * ((gate < 0 ? 0 : gate) - size * tail));
  }
}

void scalar_sum_pixels(const Pixels& pixels, float* sums, float* squares) {
  for (int64_t c = 0; c < pixels.channels; c++) {
    float sum = 0, square = 0;
    for (int64_t p = 0; p < pixels.count; p++) {
      const float value = load(pixels.x, pixels.dtype, p * pixels.channels + c);
      sum += value, square += value * value;
    }
    sums[c] = sum, squares[c] = square;
  }
}

void scalar_scale_pixels(const Pixels& pixels, const float* gain, const float* offset, bool silu, char* y) {
  for (int64_t p = 0; p < pixels.count; p++)
    for (int64_t c = 0; c < pixels.channels; c++) {
      const int64_t at = p * pixels.channels + c;
      const float scaled = load(pixels.x, pixels.dtype, at) * gain[c] + offset[c];
      store(y, pixels.dtype, at, silu ? scaled / (power(scaled * -0x1.715476p+0f) + 1.0f) : scaled);
    }
}

}  // namespace halfbyte
