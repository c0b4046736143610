// A parallel for over the OpenMP pool that the process has anyway, or over threads of its own, and scratch memory.
#include <dlfcn.h>
#if defined(__linux__)
#include <link.h>
#include <sys/mman.h>
#endif

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <new>
#include <thread>
#include <vector>

#include "internal.h"

namespace halfbyte {
namespace {

using Gomp = void (*)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel; LLVM's and Intel's runtimes have it too

#if defined(__linux__)
int find_openmp(dl_phdr_info* info, size_t, void* found) {
  if (!std::strstr(info->dlpi_name, "libgomp") && !std::strstr(info->dlpi_name, "libomp") &&
      !std::strstr(info->dlpi_name, "libiomp5"))
    return 0;
  if (void* library = dlopen(info->dlpi_name, RTLD_LAZY | RTLD_NOLOAD))
    *static_cast<void**>(found) = dlsym(library, "GOMP_parallel");
  return *static_cast<void**>(found) != nullptr;
}
#endif

Gomp gomp() {
  static const Gomp entry = [] {
    void* symbol = dlsym(RTLD_DEFAULT, "GOMP_parallel");
#if defined(__linux__)
    if (!symbol) dl_iterate_phdr(find_openmp, &symbol);  // loaded, but not for everyone to see
#endif
    return reinterpret_cast<Gomp>(symbol);
  }();
  return entry;
}

struct Loop {
  int tasks;
  void (*task)(void*, int);
  void* context;
  std::atomic<int> next{0};

  static void work(void* raw) {
    auto& loop = *static_cast<Loop*>(raw);
    for (int index; (index = loop.next.fetch_add(1, std::memory_order_relaxed)) < loop.tasks;) loop.task(loop.context, index);
  }
};

}  // namespace

void parallel_for(int tasks, int threads, void (*task)(void*, int), void* context) {
  Loop loop{tasks, task, context};
  threads = threads < tasks ? threads : tasks;
  if (threads <= 1) return Loop::work(&loop);
  if (gomp()) return gomp()(Loop::work, &loop, static_cast<unsigned>(threads), 0);
  std::vector<std::thread> others;
  for (int i = 1; i < threads; i++) others.emplace_back(Loop::work, &loop);
  Loop::work(&loop);
  for (std::thread& other : others) other.join();
}

const char* parallel_runtime() { return gomp() ? "GOMP" : "std::thread"; }

namespace {

struct Arena {
  void* memory = nullptr;
  size_t size = 0;
  ~Arena() { release(); }
  void release() {
    std::free(memory);
    memory = nullptr, size = 0;
  }
};

thread_local Arena arenas[slot_count];

}  // namespace

uint8_t* scratch(Slot slot, size_t bytes) {
  Arena& arena = arenas[static_cast<int>(slot)];
  if (arena.size < bytes) {
    arena.release();
    const size_t rounded = (bytes + bytes / 8 + 4095) / 4096 * 4096;
    arena.memory = std::aligned_alloc(4096, rounded);
    if (!arena.memory) throw std::bad_alloc();
    arena.size = rounded;
  }
  return static_cast<uint8_t*>(arena.memory);
}

void expect_writes(void* data, size_t bytes) {
#if defined(__linux__)
  constexpr uintptr_t large = 2 << 20;
  const auto start = reinterpret_cast<uintptr_t>(data), first = (start + large - 1) / large * large, last = (start + bytes) / large * large;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

void release_scratch() {
  for (Arena& arena : arenas) arena.release();
}

}  // namespace halfbyte
