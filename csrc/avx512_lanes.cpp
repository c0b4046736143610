// AVX-512: softmax between attention's products, and what stands between layers.
#include "avx512.h"

#if defined(__AVX512VNNI__)

#include "pointwise.h"
#include "softmax.h"

namespace halfbyte {

void avx512_soften(const Softening& softening) { Softmax<16>::soften(softening); }
void avx512_gather(const Gathering& gathering) { Softmax<16>::gather(gathering); }
void avx512_gelu(Dtype dtype, const char* x, int64_t count, char* y) { Pointwise<16>::gelu(dtype, x, count, y); }
void avx512_sum_pixels(const Pixels& pixels, float* sums, float* squares) { Pointwise<16>::sum_pixels(pixels, sums, squares); }
void avx512_scale_pixels(const Pixels& pixels, const float* gain, const float* offset, bool silu, char* y) {
  Pointwise<16>::scale_pixels(pixels, gain, offset, silu, y);
}
void avx512_geglu(Dtype dtype, const char* values, const char* gates, int64_t count, char* y) {
  Pointwise<16>::geglu(dtype, values, gates, count, y);
}

}  // namespace halfbyte

#endif
