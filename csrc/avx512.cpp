// AVX512-VNNI: the micro-kernels. A dot product instruction takes 4 neighbours along K of 16 output channels from the panel, and
// the same 4 of one input row, repeated.
#include "dispatch.h"

#if defined(__AVX512VNNI__)

#include <immintrin.h>

#include "avx512.h"

namespace halfbyte {
namespace {

constexpr int tile_rows = 12, tile_blocks = 2;

static inline __m512i four_of_a_row(const uint8_t* bytes) {
  int32_t four;
  std::memcpy(&four, bytes, 4);
  return _mm512_set1_epi32(four);
}

template <int R, int B>
void tile(const uint8_t* const* row, const Walk& walk, const uint8_t* panel, int64_t panel_stride, int32_t* sums) {
  __m512i sum[R][B];
  for (int r = 0; r < R; r++)
    for (int b = 0; b < B; b++)
      sum[r][b] = walk.first ? _mm512_loadu_si512(sums + (r * tile_blocks + b) * 16) : _mm512_setzero_si512();
  for (int64_t i = walk.first; i < walk.last; i++) {
    const uint8_t* from[R];
    for (int r = 0; r < R; r++) from[r] = row[r] + walk.offsets[i];
    const uint8_t* weights = panel + i * panel_chunk;
    for (int64_t k = 0; k < walk.quads[i] * 4; k += 4) {
      __m512i w[B];
      for (int b = 0; b < B; b++) w[b] = _mm512_loadu_si512(weights + k * 16 + b * panel_stride);
      for (int r = 0; r < R; r++) {
        const __m512i x = four_of_a_row(from[r] + k);
        for (int b = 0; b < B; b++) sum[r][b] = _mm512_dpbusd_epi32(sum[r][b], x, w[b]);
      }
    }
  }
  for (int r = 0; r < R; r++)
    for (int b = 0; b < B; b++) _mm512_storeu_si512(sums + (r * tile_blocks + b) * 16, sum[r][b]);
}

using Tile = void (*)(const uint8_t* const*, const Walk&, const uint8_t*, int64_t, int32_t*);

template <int B>
constexpr Tile tiles[tile_rows] = {tile<1, B>, tile<2, B>, tile<3, B>, tile<4, B>,  tile<5, B>,  tile<6, B>,
                                   tile<7, B>, tile<8, B>, tile<9, B>, tile<10, B>, tile<11, B>, tile<12, B>};

void any_tile(const uint8_t* const* row, int count, const Walk& walk, const uint8_t* panel, int64_t panel_stride, int channels,
              int32_t* sums) {
  (channels > block_channels ? tiles<2> : tiles<1>)[count - 1](row, walk, panel, panel_stride, sums);
}

// ---- decoding ---------------------------------------------------------------------------------------------------------------

struct Decoder {
  __m512i levels;

  explicit Decoder(const GridTable& grid)
      : levels(_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(grid.levels)))) {}

  // Two quads from 64 bytes of nibbles.
  void split(const uint8_t* codes, __m512i* early, __m512i* late) const {
    const __m512i low = _mm512_set1_epi8(15), pairs = _mm512_loadu_si512(codes);
    *early = _mm512_shuffle_epi8(levels, _mm512_and_si512(pairs, low));
    *late = _mm512_shuffle_epi8(levels, _mm512_and_si512(_mm512_srli_epi32(pairs, 4), low));
  }
};

// The nibbles of 16 channels in 32-bit lanes.
static inline __m512i nibbles_of(const uint8_t* multipliers, int64_t sixteenth) {
  const __m128i pairs = _mm_loadu_si128(reinterpret_cast<const __m128i*>(multipliers + sixteenth / 2 * 16));
  const __m512i wide = _mm512_cvtepu8_epi32(pairs);
  return sixteenth % 2 ? _mm512_srli_epi32(wide, 4) : _mm512_and_si512(wide, _mm512_set1_epi32(15));
}

// Shifts of 16 channels as left shifts of 32-bit lanes, and the bits that stay in each byte.
struct Shift {
  __m512i count, kept;

  Shift(const uint8_t* multipliers, int64_t sixteenth) : count(nibbles_of(multipliers, sixteenth)) {
    const __m128i masks = _mm_setr_epi8(-1, -2, -4, -8, -16, -32, -64, -128, 0, 0, 0, 0, 0, 0, 0, 0);  // 0xff << shift
    const __m512i spread =
        _mm512_shuffle_epi8(count, _mm512_broadcast_i32x4(_mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12)));
    kept = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(masks), spread);
  }
  __m512i operator()(__m512i levels) const { return _mm512_and_si512(_mm512_sllv_epi32(levels, count), kept); }
};

// Multiples of 16 channels. Products of even bytes and of odd ones apart, in 16 bits: their low bytes are those of the whole.
struct Multiple {
  __m512i own;

  Multiple(const uint8_t* multipliers, int64_t sixteenth) {
    const __m512i less = nibbles_of(multipliers, sixteenth);
    own = _mm512_add_epi16(_mm512_or_si512(less, _mm512_slli_epi32(less, 16)), _mm512_set1_epi16(1));
  }
  __m512i operator()(__m512i levels) const {
    const __m512i odd = _mm512_mullo_epi16(_mm512_andnot_si512(_mm512_set1_epi16(255), levels), own);
    return _mm512_mask_mov_epi8(odd, 0x5555555555555555, _mm512_mullo_epi16(levels, own));
  }
};

struct One {
  One(const uint8_t*, int64_t) {}
  __m512i operator()(__m512i levels) const { return levels; }
};

template <typename Multiplier>
void decode_as(const Nibbles& from, uint8_t* panel) {
  const Decoder decoder(*from.grid);
  for (int64_t i = 0; i < from.chunks; i++) {
    const uint8_t* codes = from.codes + i * (panel_chunk / 2);
    for (int sixteenth = 0; sixteenth < 4; sixteenth++, codes += 128, panel += 256) {
      __m512i quad[4];
      decoder.split(codes, &quad[0], &quad[1]);
      decoder.split(codes + 64, &quad[2], &quad[3]);
      const Multiplier times(from.multipliers, i * 4 + sixteenth);
      for (int q = 0; q < 4; q++) _mm512_storeu_si512(panel + q * 64, times(quad[q]));
    }
  }
}

void decode(const Nibbles& from, uint8_t* panel) {
  (!from.multipliers ? decode_as<One> : from.multiples ? decode_as<Multiple> : decode_as<Shift>)(from, panel);
}

// ---- few rows: bound by reading the weights, decoded in registers -----------------------------------------------------------

template <int R, typename Multiplier>
void thin_block(const uint8_t* const* row, const Walk& walk, const Nibbles& from, int32_t* sums, int stride) {
  const Decoder decoder(*from.grid);
  __m512i sum[R][2];
  for (int r = 0; r < R; r++) sum[r][0] = sum[r][1] = _mm512_setzero_si512();
  const uint8_t* codes = from.codes;
  for (int64_t i = 0; i < from.chunks; i++) {
    const int64_t offset = walk.offsets[i];
    for (int sixteenth = 0; sixteenth < 4; sixteenth++, codes += 128) {
      __m512i quad[4];
      decoder.split(codes, &quad[0], &quad[1]);
      decoder.split(codes + 64, &quad[2], &quad[3]);
      _mm_prefetch(reinterpret_cast<const char*>(codes + 2048), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(codes + 2048 + 64), _MM_HINT_T0);
      const Multiplier times(from.multipliers, i * 4 + sixteenth);
      for (__m512i& levels : quad) levels = times(levels);
      for (int r = 0; r < R; r++)
        for (int q = 0; q < 4; q++)
          sum[r][q % 2] = _mm512_dpbusd_epi32(sum[r][q % 2], four_of_a_row(row[r] + offset + sixteenth * 16 + q * 4), quad[q]);
    }
  }
  for (int r = 0; r < R; r++) _mm512_storeu_si512(sums + r * stride, _mm512_add_epi32(sum[r][0], sum[r][1]));
}

using Thin = void (*)(const uint8_t* const*, const Walk&, const Nibbles&, int32_t*, int);

template <typename M>
constexpr Thin thins[tile_rows] = {thin_block<1, M>, thin_block<2, M>,  thin_block<3, M>,  thin_block<4, M>,
                                   thin_block<5, M>, thin_block<6, M>,  thin_block<7, M>,  thin_block<8, M>,
                                   thin_block<9, M>, thin_block<10, M>, thin_block<11, M>, thin_block<12, M>};

void thin(const uint8_t* const* row, int count, const Walk& walk, const Nibbles& from, int blocks, int32_t* sums) {
  const auto* table = !from.multipliers ? thins<One> : from.multiples ? thins<Multiple> : thins<Shift>;
  Nibbles one = from;
  for (int b = 0; b < blocks; b++, sums += block_channels) {
    table[count - 1](row, walk, one, sums, tile_blocks * block_channels);
    one.codes += from.chunks * (panel_chunk / 2);
    if (one.multipliers) one.multipliers += from.chunks * multiplier_chunk;
  }
}

}  // namespace

const Kernels* avx512_kernels() {
  static const Kernels kernels = {
      .rows = tile_rows,
      .blocks = tile_blocks,
      .thin_rows = tile_rows,
      .chunk_bytes = panel_chunk,
      .panel_budget = 512 * 1024,
      .range = avx512_range,
      .encode = avx512_encode,
      .decode = decode,
      .tile = any_tile,
      .thin = thin,
      .finish = avx512_finish,
      .search = avx512_search,
      .round = avx512_round,
      .soften = avx512_soften,
      .gather = avx512_gather,
      .gelu = avx512_gelu,
      .geglu = avx512_geglu,
      .sum_pixels = avx512_sum_pixels,
      .scale_pixels = avx512_scale_pixels,
  };
  return &kernels;
}

double avx512_rounds(int64_t rounds) {
  const __m512i x = _mm512_set1_epi8(3), w = _mm512_set1_epi8(1);
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a, e = a, f = a, g = a, h = a, i = a, j = a, k = a, l = a;
  for (int64_t round = 0; round < rounds; round++) {  // 12 independent sums hide the latency
    a = _mm512_dpbusd_epi32(a, x, w), b = _mm512_dpbusd_epi32(b, x, w), c = _mm512_dpbusd_epi32(c, x, w);
    d = _mm512_dpbusd_epi32(d, x, w), e = _mm512_dpbusd_epi32(e, x, w), f = _mm512_dpbusd_epi32(f, x, w);
    g = _mm512_dpbusd_epi32(g, x, w), h = _mm512_dpbusd_epi32(h, x, w), i = _mm512_dpbusd_epi32(i, x, w);
    j = _mm512_dpbusd_epi32(j, x, w), k = _mm512_dpbusd_epi32(k, x, w), l = _mm512_dpbusd_epi32(l, x, w);
    __asm__ volatile(""
                     : "+v"(a), "+v"(b), "+v"(c), "+v"(d), "+v"(e), "+v"(f), "+v"(g), "+v"(h), "+v"(i), "+v"(j), "+v"(k), "+v"(l));
  }
  return static_cast<double>(rounds) * 12 * 64;
}

}  // namespace halfbyte

#else

namespace halfbyte {
const Kernels* avx512_kernels() { return nullptr; }
double avx512_rounds(int64_t) { return 0; }
}  // namespace halfbyte

#endif
