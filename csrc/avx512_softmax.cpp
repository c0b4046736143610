// AVX-512: softmax between attention's products.
#include "avx512.h"

#if defined(__AVX512VNNI__)

#include "softmax.h"

namespace halfbyte {

void avx512_soften(const Softening& softening) { Softmax<16>::soften(softening); }
void avx512_gather(const Gathering& gathering) { Softmax<16>::gather(gathering); }

}  // namespace halfbyte

#endif
