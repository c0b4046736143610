// AVX2: softmax between attention's products, and what stands between layers.
#include "avx2.h"

#if defined(__AVX2__)

#include "pointwise.h"
#include "softmax.h"

namespace halfbyte {

void avx2_soften(const Softening& softening) { Softmax<8>::soften(softening); }
void avx2_soften_pairs(const Softening& softening) { Softmax<8>::soften<true>(softening); }
void avx2_gather(const Gathering& gathering) { Softmax<8>::gather(gathering); }
void avx2_gelu(Dtype dtype, const char* x, int64_t count, char* y) { Pointwise<8>::gelu(dtype, x, count, y); }
void avx2_sum_pixels(const Pixels& pixels, float* sums, float* squares) { Pointwise<8>::sum_pixels(pixels, sums, squares); }
void avx2_scale_pixels(const Pixels& pixels, const float* gain, const float* offset, bool silu, char* y) {
  Pointwise<8>::scale_pixels(pixels, gain, offset, silu, y);
}
void avx2_geglu(Dtype dtype, const char* values, const char* gates, int64_t count, char* y) {
  Pointwise<8>::geglu(dtype, values, gates, count, y);
}

}  // namespace halfbyte

#endif
