// Instruction sets: which this machine has, and which one is asked for.
#include "dispatch.h"

#include <chrono>
#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace halfbyte {
namespace {

const char* const names[isa_count] = {"scalar", "avx2", "avxvnni", "avx512", "amx", "neon"};

#if defined(__x86_64__)

struct Features {
  bool avx2 = false, avx_vnni = false, avx512 = false, amx = false;
};

#if !HALFBYTE_EMULATE_AMX
// AMX state is 8 KB a thread; Linux hands it out on request, once for the process.
bool request_amx() {
  constexpr long arch_req_xcomp_perm = 0x1023, xfeature_xtiledata = 18;
  return syscall(SYS_arch_prctl, arch_req_xcomp_perm, xfeature_xtiledata) == 0;
}
#endif

Features detect() {
  unsigned a, b, c, d, b7 = 0, c7 = 0, d7 = 0, a71 = 0;
  Features found;
  if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return found;  // OSXSAVE
  const bool fma = c >> 12 & 1, f16c = c >> 29 & 1;
  unsigned low, high;
  __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  if (__get_cpuid_count(7, 0, &a, &b7, &c7, &d7) && a >= 1) __get_cpuid_count(7, 1, &a71, &b, &c, &d);
  const bool ymm = (low & 0x06) == 0x06, zmm = (low & 0xe6) == 0xe6;
  found.avx2 = ymm && (b7 >> 5 & 1) && fma && f16c;
  found.avx_vnni = found.avx2 && (a71 >> 4 & 1);
  const bool foundation = (b7 >> 16 & 1) && (b7 >> 17 & 1) && (b7 >> 30 & 1) && (b7 >> 31 & 1);  // F, DQ, BW, VL
  found.avx512 = found.avx2 && zmm && foundation && (c7 >> 11 & 1);                              // VNNI
#if HALFBYTE_EMULATE_AMX
  found.amx = found.avx512;
#else
  const bool tiles = (low & 0x60000) == 0x60000;
  found.amx = found.avx512 && tiles && (d7 >> 24 & 1) && (d7 >> 25 & 1) && request_amx();  // TILE, INT8
#endif
  return found;
}

bool in_processor(Isa isa) {
  static const Features found = detect();
  const bool has[isa_count] = {true, found.avx2, found.avx_vnni, found.avx512, found.amx, false};
  return has[static_cast<int>(isa)];
}

#else

bool in_processor(Isa isa) {
#if defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long dot_products = 1ul << 20;  // HWCAP_ASIMDDP
  static const bool neon = getauxval(AT_HWCAP) & dot_products;
#else
  constexpr bool neon = true;  // where the build has them: Apple's processors all do
#endif
  return isa == Isa::scalar || (isa == Isa::neon && neon);
}

#endif

const Kernels* in_build(Isa isa) {
  switch (isa) {
    case Isa::scalar: return &scalar_kernels;
    case Isa::avx2: return avx2_kernels();
    case Isa::avx_vnni: return avx_vnni_kernels();
    case Isa::avx512: return avx512_kernels();
    case Isa::amx: return amx_kernels();
    case Isa::neon: return neon_kernels();
  }
  return nullptr;
}

double scalar_rounds(int64_t rounds) {
  volatile int32_t sum = 0;
  for (int64_t i = 0; i < rounds; i++) sum = sum + static_cast<int32_t>(i) * 3;
  return static_cast<double>(rounds);
}

double run_rounds(Isa isa, int64_t rounds) {
  switch (isa) {
    case Isa::scalar: break;
    case Isa::avx2: return avx2_rounds(rounds);
    case Isa::avx_vnni: return avx_vnni_rounds(rounds);
    case Isa::avx512: return avx512_rounds(rounds);
    case Isa::amx: return amx_rounds(rounds);
    case Isa::neon: return neon_rounds(rounds);
  }
  return scalar_rounds(rounds);
}

}  // namespace

const Kernels scalar_kernels = {
    .range = scalar_range, .encode = scalar_encode, .finish = scalar_finish, .search = scalar_search, .round = scalar_round,
    .gelu = scalar_gelu, .geglu = scalar_geglu, .sum_pixels = scalar_sum_pixels, .scale_pixels = scalar_scale_pixels};

const char* isa_name(Isa isa) { return names[static_cast<int>(isa)]; }

bool isa_available(Isa isa) { return in_processor(isa) && in_build(isa); }

const Kernels& kernels_of(Isa isa) {
  if (!isa_available(isa))
    throw std::invalid_argument(std::string("this processor or this build of the engine has no ") + isa_name(isa) +
                                " instructions");
  return *in_build(isa);
}

Isa choose_isa(const char* name) {
  std::string here;
  Isa best = Isa::scalar;
  for (int i = 0; i < isa_count; i++) {
    const Isa isa = static_cast<Isa>(i);
    const bool available = isa_available(isa);
    if (name && name[0] && std::string(name) == names[i] && available) return isa;
    if (available) best = isa, here += std::string(here.empty() ? "" : ", ") + names[i];
  }
  if (!name || !name[0]) return best;
  throw std::invalid_argument(std::string("HALFBYTE_ISA='") + name + "' is not available; on this processor there are " + here);
}

Isa default_isa() { return choose_isa(std::getenv("HALFBYTE_ISA")); }

double integer_limit(Isa isa, double seconds) {
  kernels_of(isa);
  using Clock = std::chrono::steady_clock;
  double best = 0;
  for (const auto end = Clock::now() + std::chrono::duration<double>(seconds); Clock::now() < end;) {
    const auto start = Clock::now();
    const double done = run_rounds(isa, 20000);
    const double rate = done / std::chrono::duration<double>(Clock::now() - start).count();
    best = rate > best ? rate : best;
  }
  return best;
}

}  // namespace halfbyte
