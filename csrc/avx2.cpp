// AVX2 without VNNI: the micro-kernels. vpmaddubsw multiplies bytes u8 x s8 and adds neighbours in 16 bits, with saturation, so:
//
// - Levels of a 4-bit table before their shift are at most 16 in magnitude: four such sums, a sixteenth of 16 along K, stay below
//   4 * 2 * 255 * 16 = 32640 and cannot saturate. One vpmaddwd then applies the weights' multipliers and widens. A panel of this
//   "narrow" kind holds, for every 16 along K, 4 quads of levels and a row of multipliers.
// - Other weights (int8, e3m0) take the wide way: bytes to 16 bits first, twice the instructions.
// - Attention's panels and rows have 16 bits from the start, in pairs along K: one vpmaddwd, one addition.
#include "avx2.h"

#include "dispatch.h"

#if defined(__AVX2__)

#include <immintrin.h>

namespace halfbyte {
namespace {

constexpr int narrow_sixteenth = 4 * 64 + 64;  // bytes: quads, multipliers

static inline __m256i four_of_a_row(const uint8_t* bytes) {
  int32_t four;
  std::memcpy(&four, bytes, 4);
  return _mm256_set1_epi32(four);
}

static inline __m256i load(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
static inline void store(void* to, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(to), v); }

// ---- decoding ---------------------------------------------------------------------------------------------------------------

struct Decoder {
  __m256i levels;

  explicit Decoder(const GridTable& grid)
      : levels(_mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(grid.levels)))) {}

  // Half a quad (8 channels) from 32 bytes of nibbles: the early one, or the late one.
  __m256i operator()(const uint8_t* codes, bool late) const {
    const __m256i pairs = load(codes);
    return _mm256_shuffle_epi8(levels, _mm256_and_si256(late ? _mm256_srli_epi32(pairs, 4) : pairs, _mm256_set1_epi8(15)));
  }
};

// Multipliers of 8 channels in 16 bits, twice each.
static inline __m256i multipliers_of(const Nibbles& from, int64_t sixteenth, int half) {
  const __m256i ones = _mm256_set1_epi16(1);
  if (!from.multipliers) return ones;
  const __m128i own = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from.multipliers + sixteenth / 2 * 16 + half * 8));
  const __m256i pairs = _mm256_cvtepu8_epi32(own);
  const __m256i nibbles = sixteenth % 2 ? _mm256_srli_epi32(pairs, 4) : _mm256_and_si256(pairs, _mm256_set1_epi32(15));
  if (!from.multiples) return _mm256_sllv_epi32(ones, nibbles);
  return _mm256_add_epi16(_mm256_or_si256(nibbles, _mm256_slli_epi32(nibbles, 16)), ones);
}

void decode_narrow(const Nibbles& from, uint8_t* panel) {
  const Decoder decoder(*from.grid);
  for (int64_t i = 0; i < from.chunks * 4; i++, panel += narrow_sixteenth) {
    const uint8_t* codes = from.codes + i * 128;
    for (int half = 0; half < 2; half++) {
      for (int q = 0; q < 4; q++) store(panel + q * 64 + half * 32, decoder(codes + q / 2 * 64 + half * 32, q % 2));
      store(panel + 256 + half * 32, multipliers_of(from, i, half));
    }
  }
}

// ---- tiles ------------------------------------------------------------------------------------------------------------------

template <int R>
static inline void start(const Walk& walk, const int32_t* sums, __m256i (&sum)[R][2]) {
  for (int r = 0; r < R; r++)
    for (int b = 0; b < 2; b++)
      sum[r][b] = walk.first ? load(reinterpret_cast<const uint8_t*>(sums + r * 16 + b * 8)) : _mm256_setzero_si256();
}

template <int R>
static inline void finish(const __m256i (&sum)[R][2], int32_t* sums) {
  for (int r = 0; r < R; r++)
    for (int b = 0; b < 2; b++) store(sums + r * 16 + b * 8, sum[r][b]);
}

template <int R>
void narrow_tile(const uint8_t* const* row, const Walk& walk, const uint8_t* panel, int32_t* sums) {
  __m256i sum[R][2];
  start(walk, sums, sum);
  for (int64_t i = walk.first; i < walk.last; i++) {
    const uint8_t* from[R];
    for (int r = 0; r < R; r++) from[r] = row[r] + walk.offsets[i];
    const uint8_t* weights = panel + i * 4 * narrow_sixteenth;
    for (int64_t k = 0; k < walk.quads[i] * 4; k += 16, weights += narrow_sixteenth) {
      __m256i small[R][2];
      for (int q = 0; q < 4; q++) {
        const __m256i first = load(weights + q * 64), second = load(weights + q * 64 + 32);
        for (int r = 0; r < R; r++) {
          const __m256i x = four_of_a_row(from[r] + k + q * 4);
          const __m256i a = _mm256_maddubs_epi16(x, first), b = _mm256_maddubs_epi16(x, second);
          small[r][0] = q ? _mm256_add_epi16(small[r][0], a) : a, small[r][1] = q ? _mm256_add_epi16(small[r][1], b) : b;
          __asm__("" : "+x"(small[r][0]), "+x"(small[r][1]));  // keeps the order: reordered, the sums outnumber the registers
        }
      }
      for (int r = 0; r < R; r++)
        for (int b = 0; b < 2; b++)
          sum[r][b] = _mm256_add_epi32(sum[r][b], _mm256_madd_epi16(small[r][b], load(weights + 256 + b * 32)));
    }
  }
  finish(sum, sums);
}

template <int R>
void wide_tile(const uint8_t* const* row, const Walk& walk, const uint8_t* panel, int32_t* sums) {
  __m256i sum[R][2];
  start(walk, sums, sum);
  for (int64_t i = walk.first; i < walk.last; i++) {
    const uint8_t* from[R];
    for (int r = 0; r < R; r++) from[r] = row[r] + walk.offsets[i];
    const uint8_t* weights = panel + i * panel_chunk;
    for (int64_t k = 0; k < walk.quads[i] * 4; k += 4, weights += 64) {
      __m256i even[2], odd[2];
      for (int b = 0; b < 2; b++) {
        const __m256i w = load(weights + b * 32);
        even[b] = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), odd[b] = _mm256_srai_epi16(w, 8);
      }
      for (int r = 0; r < R; r++) {
        const __m256i x = four_of_a_row(from[r] + k);
        const __m256i x_even = _mm256_and_si256(x, _mm256_set1_epi16(255)), x_odd = _mm256_srli_epi16(x, 8);
        for (int b = 0; b < 2; b++) {
          const __m256i products = _mm256_add_epi32(_mm256_madd_epi16(x_even, even[b]), _mm256_madd_epi16(x_odd, odd[b]));
          sum[r][b] = _mm256_add_epi32(sum[r][b], products);
        }
      }
    }
  }
  finish(sum, sums);
}

constexpr int pair_rows = 6, pair_blocks = 4;

// V vectors of 8 channels.
template <int R, int V>
void pair_tile(const uint8_t* const* row, const Walk& walk, const uint8_t* panel, int32_t* sums) {
  __m256i sum[R][V];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) sum[r][v] = _mm256_setzero_si256();
  for (int64_t i = walk.first; i < walk.last; i++) {
    const uint8_t* from[R];
    for (int r = 0; r < R; r++) from[r] = row[r] + walk.offsets[i];
    const uint8_t* weights = panel + i * 2 * panel_chunk;
    for (int64_t k = 0; k < walk.quads[i] * 8; k += 4, weights += 64) {
      __m256i w[V];
      for (int v = 0; v < V; v++) w[v] = load(weights + v * 32);
#pragma GCC unroll 6
      for (int r = 0; r < R; r++) {
        const __m256i x = four_of_a_row(from[r] + k);
        for (int v = 0; v < V; v++) {
          sum[r][v] = _mm256_add_epi32(sum[r][v], _mm256_madd_epi16(x, w[v]));
          __asm__("" : "+x"(sum[r][v]));  // keeps the order: reordered, the products outnumber the registers
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
    for (int v = 0; v < V; v++) store(sums + r * pair_blocks * block_channels + v * 8, sum[r][v]);
}

using Tile = void (*)(const uint8_t* const*, const Walk&, const uint8_t*, int32_t*);
template <int V>
constexpr Tile pair_tiles[] = {pair_tile<1, V>, pair_tile<2, V>, pair_tile<3, V>, pair_tile<4, V>, pair_tile<5, V>, pair_tile<6, V>};

void any_pair(const uint8_t* const* row, int count, const Walk& walk, const uint8_t* panel, int64_t stride, int channels,
              int32_t* sums) {
  for (; channels > 0; channels -= block_channels, panel += stride, sums += block_channels)
    (channels > 8 ? pair_tiles<2> : pair_tiles<1>)[count - 1](row, walk, panel, sums);
}

constexpr Tile narrow_tiles[] = {narrow_tile<1>, narrow_tile<2>, narrow_tile<3>};
constexpr Tile wide_tiles[] = {wide_tile<1>, wide_tile<2>, wide_tile<3>};

void any_narrow(const uint8_t* const* row, int count, const Walk& walk, const uint8_t* panel, int64_t, int, int32_t* sums) {
  narrow_tiles[count - 1](row, walk, panel, sums);
}

void any_wide(const uint8_t* const* row, int count, const Walk& walk, const uint8_t* panel, int64_t, int, int32_t* sums) {
  wide_tiles[count - 1](row, walk, panel, sums);
}

}  // namespace

// The low bytes of products in 16 bits: those of even bytes as they are, those of odd bytes with the even ones out of their way.
void avx2_decode(const Nibbles& from, uint8_t* panel) {
  const Decoder decoder(*from.grid);
  for (int64_t i = 0; i < from.chunks * 4; i++, panel += 256)
    for (int half = 0; half < 2; half++) {
      const __m256i own = multipliers_of(from, i, half), even = _mm256_set1_epi16(255);
      for (int q = 0; q < 4; q++) {
        const __m256i levels = decoder(from.codes + i * 128 + q / 2 * 64 + half * 32, q % 2);
        const __m256i low = _mm256_and_si256(_mm256_mullo_epi16(levels, own), even);
        store(panel + q * 64 + half * 32, _mm256_or_si256(low, _mm256_mullo_epi16(_mm256_andnot_si256(even, levels), own)));
      }
    }
}

Kernels avx2_steps() {
  return {
      .chunk_bytes = panel_chunk,
      .panel_budget = 256 * 1024,
      .range = avx2_range,
      .encode = avx2_encode,
      .decode = avx2_decode,
      .finish = avx2_finish,
      .search = avx2_search,
      .round = avx2_round,
      .soften = avx2_soften,
      .gather = avx2_gather,
      .gelu = avx2_gelu,
      .geglu = avx2_geglu,
      .sum_pixels = avx2_sum_pixels,
      .scale_pixels = avx2_scale_pixels,
  };
}

const Kernels* avx2_kernels() {
  static const Kernels narrow = [] {
    Kernels k = avx2_steps();
    k.rows = 3, k.chunk_bytes = 4 * narrow_sixteenth, k.decode = decode_narrow, k.tile = any_narrow;
    return k;
  }();
  static const Kernels attention = [] {
    Kernels k = avx2_steps();
    k.rows = pair_rows, k.blocks = pair_blocks, k.code_bytes = 2, k.tile = any_pair, k.soften = avx2_soften_pairs;
    return k;
  }();
  static const Kernels kernels = [] {
    Kernels k = avx2_steps();
    k.rows = 3, k.tile = any_wide, k.narrow = &narrow, k.attention = &attention;
    return k;
  }();
  return &kernels;
}

double avx2_rounds(int64_t rounds) {  // the narrow way: four sums of bytes, one widening
  const __m256i x = _mm256_set1_epi8(3), w = _mm256_set1_epi8(1);
  __m256i sum[6];
  for (__m256i& s : sum) s = _mm256_setzero_si256();
  for (int64_t round = 0; round < rounds; round++)
#pragma GCC unroll 6
    for (int i = 0; i < 6; i++) {
      __m256i small = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (int q = 0; q < 4; q++) {
        __m256i row = x;
        __asm__ volatile("" : "+x"(row));  // or the products would be computed once
        const __m256i product = _mm256_maddubs_epi16(row, w);
        small = q ? _mm256_add_epi16(small, product) : product;
      }
      sum[i] = _mm256_add_epi32(sum[i], _mm256_madd_epi16(small, w));
      __asm__ volatile("" : "+x"(sum[i]));
    }
  return static_cast<double>(rounds) * 6 * 4 * 32;
}

}  // namespace halfbyte

#else

namespace halfbyte {
const Kernels* avx2_kernels() { return nullptr; }
double avx2_rounds(int64_t) { return 0; }
}  // namespace halfbyte

#endif
