#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <system_error>
#include <thread>
#include <vector>

#ifdef __linux__
#include <dlfcn.h>
#include <link.h>

#include <cstring>
#endif

namespace hfprune {
namespace {

// The entry point of `#pragma omp parallel` in libgomp's interface, which LLVM's library has too.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

#ifdef __linux__

// A library that Python loaded is not in the global scope: it is found by its file name.
int find_in(dl_phdr_info* library, std::size_t, void* found) {
  const char* path = library->dlpi_name;
  const char* slash = std::strrchr(path, '/');
  const char* name = slash == nullptr ? path : slash + 1;
  const bool is_openmp = std::strncmp(name, "libgomp", 7) == 0 ||
                         std::strncmp(name, "libomp", 6) == 0 ||
                         std::strncmp(name, "libiomp", 7) == 0;
  if (!is_openmp) return 0;
  void* handle = dlopen(path, RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return 0;
  void* entry = dlsym(handle, "GOMP_parallel");
  dlclose(handle);  // it stays loaded: torch uses it
  *static_cast<void**>(found) = entry;
  return entry != nullptr;
}

GompParallel find_openmp() {
  void* entry = nullptr;
  dl_iterate_phdr(find_in, &entry);
  return reinterpret_cast<GompParallel>(entry);
}

#else

GompParallel find_openmp() { return nullptr; }

#endif

struct Work {
  const std::function<void(std::size_t)>& piece;
  std::size_t pieces;
  std::atomic<std::size_t> next{0};
};

void take_pieces(void* pointer) {
  Work& work = *static_cast<Work*>(pointer);
  for (std::size_t i = work.next++; i < work.pieces; i = work.next++) work.piece(i);
}

void in_own_threads(unsigned threads, Work& work) {
  std::vector<std::thread> helpers;
  try {
    helpers.reserve(threads - 1);
    while (helpers.size() + 1 < threads) helpers.emplace_back(take_pieces, &work);
  } catch (const std::system_error&) {  // no more threads: those that there are do the work
  }
  take_pieces(&work);
  for (std::thread& helper : helpers) helper.join();
}

}  // namespace

void in_parallel(unsigned threads, std::size_t pieces,
                 const std::function<void(std::size_t)>& piece) {
  static const GompParallel openmp = find_openmp();
  Work work{piece, pieces};
  if (std::min<std::size_t>(threads, pieces) <= 1) {
    take_pieces(&work);
  } else if (openmp != nullptr) {
    // All of them, also for few pieces: a smaller team would end the threads that it leaves out,
    // which torch would have to start again.
    openmp(take_pieces, &work, threads, 0);
  } else {
    in_own_threads(static_cast<unsigned>(std::min<std::size_t>(threads, pieces)), work);
  }
}

}  // namespace hfprune
