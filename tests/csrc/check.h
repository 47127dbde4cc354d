// What the checks share: cases with a byte-by-byte reference, and buffers with guarded edges.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "compact.h"

using hfprune::Selection;
using Bytes = std::vector<std::uint8_t>;
using Keep = std::vector<std::int64_t>;

constexpr std::uint8_t kGuardByte = 0xA5;
inline std::size_t cases = 0;
inline std::mt19937_64 rng(20240607);

inline std::size_t below(std::size_t n) { return static_cast<std::size_t>(rng() % n); }

[[noreturn]] inline void fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

template <typename Error, typename Call>
void must_throw(const std::string& what, const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    if (*error.what() == '\0') fail(what + ": an empty message");
    ++cases;
    return;
  } catch (const std::exception& error) {
    fail(what + ": another exception: " + error.what());
  }
  fail(what + " was accepted");
}

struct Case {
  int axis;
  std::size_t rows, columns, item;
  Keep keep;
  std::size_t piece_bytes;
  bool portable;

  std::string text(const std::string& problem) const {
    std::string kept;
    for (std::size_t i = 0; i < std::min<std::size_t>(keep.size(), 12); ++i) {
      kept += ' ' + std::to_string(keep[i]);
    }
    return problem + ", axis " + std::to_string(axis) + " of " + std::to_string(rows) + " x " +
           std::to_string(columns) + " x " + std::to_string(item) + " bytes, keep " +
           std::to_string(keep.size()) + " [" + kept + " ], piece_bytes " +
           std::to_string(piece_bytes) + (portable ? ", portable" : "");
  }
  Selection selection() const {
    return {axis, rows, columns, item, keep.data(), keep.size(), piece_bytes, portable};
  }
  // The offset in the source of each kept byte, in order.
  std::vector<std::size_t> kept_offsets() const {
    std::vector<std::size_t> result;
    const std::size_t index_bytes = axis == 0 ? columns * item : item;
    for (std::size_t outer = 0; outer < (axis == 0 ? 1 : rows); ++outer) {
      for (const std::int64_t index : keep) {
        const std::size_t at =
            outer * columns * item + static_cast<std::size_t>(index) * index_bytes;
        for (std::size_t i = 0; i < index_bytes; ++i) result.push_back(at + i);
      }
    }
    return result;
  }
};

// Where a buffer ends: at its heap block's end, which ASan watches, or before a page that cannot be
// touched, which stops the masked vector loads and stores that ASan cannot see.
enum class Edge { kHeap, kPage };
inline Edge any_edge() { return static_cast<Edge>(below(2)); }

class Buffer {
 public:
  Buffer(std::size_t bytes, std::size_t offset, Edge edge) {
    if (edge == Edge::kPage) {
      const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
      const std::size_t inside = std::max(page, (bytes + page - 1) / page * page);
      mapped_bytes_ = inside + 2 * page;
      void* mapped = ::mmap(nullptr, mapped_bytes_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (mapped == MAP_FAILED) fail("no memory for a buffer");
      mapped_ = static_cast<std::uint8_t*>(mapped);
      if (::mprotect(mapped_ + page, inside, PROT_READ | PROT_WRITE) != 0) fail("mprotect");
      data_ = mapped_ + page + inside - bytes;
      before_ = inside - bytes;
    } else {
      before_ = offset;
      block_.reset(new std::uint8_t[before_ + bytes]);
      data_ = block_.get() + before_;
    }
    std::memset(data_ - before_, kGuardByte, before_ + bytes);
  }
  Buffer(const Bytes& content, std::size_t offset, Edge edge)
      : Buffer(content.size(), offset, edge) {
    std::copy(content.begin(), content.end(), data_);
  }
  ~Buffer() {
    if (mapped_ != nullptr) ::munmap(mapped_, mapped_bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::uint8_t* data() { return data_; }
  bool starts_with(const Bytes& expected) const {
    return expected.empty() || std::memcmp(expected.data(), data_, expected.size()) == 0;
  }
  bool guards_intact() const {  // the first is, and each is the one before: fast unoptimised, too
    const std::uint8_t* first = data_ - before_;
    return before_ == 0 ||
           (*first == kGuardByte && std::memcmp(first, first + 1, before_ - 1) == 0);
  }

 private:
  std::size_t before_ = 0, mapped_bytes_ = 0;
  std::unique_ptr<std::uint8_t[]> block_;
  std::uint8_t* mapped_ = nullptr;
  std::uint8_t* data_ = nullptr;
};

inline Bytes random_bytes(std::size_t count) {
  Bytes result((count + 7) / 8 * 8);
  for (std::size_t at = 0; at < result.size(); at += 8) {
    const std::uint64_t word = rng();
    std::memcpy(result.data() + at, &word, 8);
  }
  result.resize(count);
  return result;
}

inline Bytes taken(const Bytes& source, const std::vector<std::size_t>& offsets) {
  Bytes result;
  result.reserve(offsets.size());
  for (const std::size_t offset : offsets) result.push_back(source[offset]);
  return result;
}

void check_write(const std::string& path);
void check_kernels();
