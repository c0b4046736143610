// AVX-VNNI: the dot product instruction on 256-bit registers, for processors without AVX-512.
#include "avx2.h"
#include "dispatch.h"

#if defined(__AVXVNNI__)

#include <immintrin.h>

namespace halfbyte {
namespace {

constexpr int tile_rows = 6;

template <int R>
void tile(const uint8_t* const* row, const Walk& walk, const uint8_t* panel, int32_t* sums) {
  __m256i sum[R][2];
  for (int r = 0; r < R; r++)
    for (int b = 0; b < 2; b++)
      sum[r][b] = walk.first ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sums + r * 16 + b * 8)) : _mm256_setzero_si256();
  for (int64_t i = walk.first; i < walk.last; i++) {
    const uint8_t* from[R];
    for (int r = 0; r < R; r++) from[r] = row[r] + walk.offsets[i];
    const uint8_t* weights = panel + i * panel_chunk;
    for (int64_t k = 0; k < walk.quads[i] * 4; k += 4) {
      const __m256i first = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + k * 16));
      const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + k * 16 + 32));
      for (int r = 0; r < R; r++) {
        int32_t four;
        std::memcpy(&four, from[r] + k, 4);
        const __m256i x = _mm256_set1_epi32(four);
        sum[r][0] = _mm256_dpbusd_avx_epi32(sum[r][0], x, first), sum[r][1] = _mm256_dpbusd_avx_epi32(sum[r][1], x, second);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int b = 0; b < 2; b++) _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + r * 16 + b * 8), sum[r][b]);
}

using Tile = void (*)(const uint8_t* const*, const Walk&, const uint8_t*, int32_t*);
constexpr Tile tiles[tile_rows] = {tile<1>, tile<2>, tile<3>, tile<4>, tile<5>, tile<6>};

void any_tile(const uint8_t* const* row, int count, const Walk& walk, const uint8_t* panel, int64_t, int, int32_t* sums) {
  tiles[count - 1](row, walk, panel, sums);
}

}  // namespace

const Kernels* avx_vnni_kernels() {
  static const Kernels kernels = [] {
    Kernels k = avx2_steps();
    k.rows = tile_rows, k.panel_budget = 512 * 1024, k.tile = any_tile;
    return k;
  }();
  return &kernels;
}

double avx_vnni_rounds(int64_t rounds) {
  const __m256i x = _mm256_set1_epi8(3), w = _mm256_set1_epi8(1);
  __m256i a = _mm256_setzero_si256(), b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a, k = a, l = a;
  for (int64_t round = 0; round < rounds; round++) {  // 12 independent sums hide the latency
    a = _mm256_dpbusd_avx_epi32(a, x, w), b = _mm256_dpbusd_avx_epi32(b, x, w), c = _mm256_dpbusd_avx_epi32(c, x, w);
    d = _mm256_dpbusd_avx_epi32(d, x, w), e = _mm256_dpbusd_avx_epi32(e, x, w), f = _mm256_dpbusd_avx_epi32(f, x, w);
    g = _mm256_dpbusd_avx_epi32(g, x, w), h = _mm256_dpbusd_avx_epi32(h, x, w), i = _mm256_dpbusd_avx_epi32(i, x, w);
    j = _mm256_dpbusd_avx_epi32(j, x, w), k = _mm256_dpbusd_avx_epi32(k, x, w), l = _mm256_dpbusd_avx_epi32(l, x, w);
    __asm__ volatile(""
                     : "+x"(a), "+x"(b), "+x"(c), "+x"(d), "+x"(e), "+x"(f), "+x"(g), "+x"(h), "+x"(i), "+x"(j), "+x"(k), "+x"(l));
  }
  return static_cast<double>(rounds) * 12 * 32;
}

}  // namespace halfbyte

#else

namespace halfbyte {
const Kernels* avx_vnni_kernels() { return nullptr; }
double avx_vnni_rounds(int64_t) { return 0; }
}  // namespace halfbyte

#endif
