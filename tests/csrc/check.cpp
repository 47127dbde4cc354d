// Selection, compact() and write() against a byte-by-byte reference. Built by csrc/CMakeLists.txt
// and run under sanitizers by test_csrc.py: check FOLDER. Exits with 1 at the first difference.
#include <fcntl.h>
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
#include <system_error>
#include <thread>
#include <vector>

#include "compact.h"
#include "write.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

#if defined(__SANITIZE_THREAD__)
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

namespace {

using hfprune::Selection;
using Bytes = std::vector<std::uint8_t>;
using Keep = std::vector<std::int64_t>;

constexpr std::uint8_t kGuardByte = 0xA5;
std::size_t cases = 0;
std::mt19937_64 rng(20240607);

std::size_t below(std::size_t n) { return static_cast<std::size_t>(rng() % n); }

[[noreturn]] void fail(const std::string& what) {
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

// Where a buffer ends: at its heap block's end, which ASan watches; before guard bytes; or before a
// page that cannot be touched, which stops the masked vector loads and stores that ASan cannot see.
enum class Edge { kHeap, kGuard, kPage };
Edge any_edge() { return static_cast<Edge>(below(3)); }

class Buffer {
 public:
  Buffer(std::size_t bytes, std::size_t offset, Edge edge) : bytes_(bytes) {
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
      after_ = edge == Edge::kGuard ? 80 : 0;
      block_.reset(new std::uint8_t[before_ + bytes + after_]);
      data_ = block_.get() + before_;
    }
    std::memset(data_ - before_, kGuardByte, before_ + bytes + after_);
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
  bool guards_intact() const {
    const auto guard = [](std::uint8_t byte) { return byte == kGuardByte; };
    return std::all_of(data_ - before_, data_, guard) &&
           std::all_of(data_ + bytes_, data_ + bytes_ + after_, guard);
  }

 private:
  std::size_t bytes_, before_ = 0, after_ = 0, mapped_bytes_ = 0;
  std::unique_ptr<std::uint8_t[]> block_;
  std::uint8_t* mapped_ = nullptr;
  std::uint8_t* data_ = nullptr;
};

Bytes random_bytes(std::size_t count) {
  Bytes result((count + 7) / 8 * 8);
  for (std::size_t at = 0; at < result.size(); at += 8) {
    const std::uint64_t word = rng();
    std::memcpy(result.data() + at, &word, 8);
  }
  result.resize(count);
  return result;
}

Bytes taken(const Bytes& source, const std::vector<std::size_t>& offsets) {
  Bytes result;
  result.reserve(offsets.size());
  for (const std::size_t offset : offsets) result.push_back(source[offset]);
  return result;
}

// The pieces are what the header promises: they tile the kept bytes, obey the limit, and are
// gathered from their own part of the source into staging_bytes().
void check_pieces(const Case& c, const Bytes& source, const std::vector<std::size_t>& offsets) {
  const Selection selection = c.selection();
  const Bytes expected = taken(source, offsets);
  Buffer from(source, below(9), below(2) == 0 ? Edge::kHeap : Edge::kPage);
  Buffer staged(selection.staging_bytes(), below(9), below(2) == 0 ? Edge::kHeap : Edge::kPage);
  const std::size_t index_bytes = c.axis == 0 ? c.columns * c.item : c.item;
  const std::size_t granule = c.axis == 1 || index_bytes <= 8 ? index_bytes : 1;
  std::size_t begin = 0;
  for (std::size_t piece = 0; piece < selection.pieces(); ++piece) {
    const std::size_t bytes = selection.piece_bytes(piece);
    if (selection.piece_begin(piece) != begin) fail(c.text("piece_begin"));
    if (bytes == 0 || bytes > std::max(c.piece_bytes, granule)) fail(c.text("piece_bytes"));
    if (begin + bytes > expected.size()) fail(c.text("beyond the kept bytes"));
    if (selection.piece_source(piece) != offsets[begin]) fail(c.text("piece_source"));
    const std::size_t end =
        std::min(source.size(), offsets[begin + bytes - 1] + 1 + hfprune::kSlackBytes);
    ASAN_POISON_MEMORY_REGION(from.data(), offsets[begin]);
    ASAN_POISON_MEMORY_REGION(from.data() + end, source.size() - end);
    selection.gather(piece, from.data(), staged.data());
    ASAN_UNPOISON_MEMORY_REGION(from.data(), source.size());
    if (std::memcmp(staged.data(), expected.data() + begin, bytes) != 0) fail(c.text("gather"));
    if (!staged.guards_intact()) fail(c.text("gather wrote outside its buffer"));
    begin += bytes;
  }
  if (begin != expected.size()) fail(c.text("the pieces are not all kept bytes"));
  ++cases;
}

void check_compact(const Case& c, const Bytes& source, const Bytes& expected, unsigned threads) {
  const Selection selection = c.selection();
  if (selection.source_bytes() != source.size()) fail(c.text("source_bytes"));
  if (selection.kept_bytes() != expected.size()) fail(c.text("kept_bytes"));
  const std::string with = " with " + std::to_string(threads) + " threads";
  Buffer from(source, below(70), any_edge()), to(expected.size(), below(70), any_edge());
  hfprune::compact(selection, from.data(), to.data(), threads);
  if (!to.starts_with(expected)) fail(c.text("other bytes" + with));
  if (!to.guards_intact()) fail(c.text("wrote outside the result" + with));
  if (!from.starts_with(source)) fail(c.text("changed the source" + with));
  hfprune::compact(selection, from.data(), from.data(), threads);
  if (!from.starts_with(expected)) fail(c.text("other bytes in place" + with));
  if (!from.guards_intact()) fail(c.text("wrote outside the source" + with));
  ++cases;
}

// Percent of the indices that are kept; or one of these patterns.
enum Pattern { kOne = -1, kEveryOther = -2, kRuns = -3 };
constexpr int kPatterns[] = {kOne, kEveryOther, kRuns, 0, 5, 50, 80, 95, 100};

Keep keep_of(int pattern, std::size_t indices) {
  Keep keep;
  if (pattern == kOne && indices > 0) return {static_cast<std::int64_t>(below(indices))};
  bool in_run = true;
  for (std::size_t i = 0; i < indices; ++i) {
    if (below(40) == 0) in_run = !in_run;
    const bool kept = pattern == kRuns         ? in_run
                      : pattern == kEveryOther ? i % 2 == 1
                                               : static_cast<int>(below(100)) < pattern;
    if (kept) keep.push_back(static_cast<std::int64_t>(i));
  }
  return keep;
}

void check_small(int axis, std::size_t rows, std::size_t columns, std::size_t item, int pattern,
                 std::size_t piece_bytes, bool portable) {
  const Case c{axis,        rows,    columns, item, keep_of(pattern, axis == 0 ? rows : columns),
               piece_bytes, portable};
  const Bytes source = random_bytes(rows * columns * item);
  const std::vector<std::size_t> offsets = c.kept_offsets();
  check_pieces(c, source, offsets);
  check_compact(c, source, taken(source, offsets), static_cast<unsigned>(1 + below(4)));
}

void check_shapes() {
  for (const bool portable : {false, true}) {
    for (const int pattern : kPatterns) {
      const std::size_t piece = below(2) == 0 ? 64 : hfprune::piece_bytes_for(2);
      for (const std::size_t item : {1, 2, 3, 4, 8}) {
        for (const std::size_t columns : {1, 3, 16, 17, 33, 63, 65, 129, 1001}) {
          for (const std::size_t rows : {1, 4})
            check_small(1, rows, columns, item, pattern, piece, portable);
        }
      }
      for (const std::size_t row_bytes : {1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 65, 300, 1001}) {
        for (const std::size_t rows : {1, 6, 65, 200})
          check_small(0, rows, row_bytes, 1, pattern, piece, portable);
      }
    }
  }
  constexpr std::size_t pieces[] = {0, 1, 5, 16, 64, 100, 1000, 4096, 65536};
  for (std::size_t i = 0; i < 1000; ++i) {
    const int axis = below(3) != 0;
    const std::size_t item = axis == 1 || below(2) == 0 ? 1 + below(9) : 1 + below(2000);
    check_small(axis, axis == 1 ? below(9) : below(600 / item + 60),
                axis == 0 ? 1 : below(below(4) == 0 ? 2500 : 150), item,
                kPatterns[below(std::size(kPatterns))], pieces[below(std::size(pieces))],
                below(2) == 0);
  }
}

// A thread is started for every MiB kept, and results of 8 MiB and more go past the cache.
void check_large() {
  struct Large {
    int axis;
    std::size_t rows, columns, item;
    int pattern;
    std::size_t piece_bytes;  // 0: piece_bytes_for(threads)
  };
  const Large large[] = {
      {1, 1501, 4099, 2, 80, 0},     // 9.8 MB kept: streamed
      {0, 2503, 4097, 1, 95, 0},     // 9.7 MB kept: streamed
      {1, 3, 600'011, 4, 50, 0},     // rows longer than a piece
      {1, 1031, 1027, 4, 95, 8192},  // many pieces, much waiting
      {1, 701, 2053, 2, kEveryOther, 4096},
      {1, 97, 20'011, 3, 50, 1024},
      {1, 31, 20'011, 8, 80, 0},
      {0, 2'000'001, 1, 1, 50, 4096},  // a long bias
      {0, 411, 11'003, 1, 80, 16384},
  };
  for (const Large& l : large) {
    Case c{l.axis, l.rows, l.columns, l.item, keep_of(l.pattern, l.axis == 0 ? l.rows : l.columns),
           0,      false};
    const Bytes source = random_bytes(c.rows * c.columns * c.item);
    const Bytes expected = taken(source, c.kept_offsets());
    for (unsigned threads = 1; threads <= 4; ++threads) {
      c.piece_bytes = l.piece_bytes == 0 ? hfprune::piece_bytes_for(threads) : l.piece_bytes;
      c.portable = !c.portable;
      check_compact(c, source, expected, threads);
    }
  }
}

void check_bad_selections() {
  constexpr std::size_t kHuge = std::size_t{1} << 62;
  const Case bad[] = {
      {0, 9, 1, 2, {2, 1}, 64, false},
      {1, 2, 9, 2, {0, 1, 8, 7}, 64, false},
      {0, 9, 1, 2, {1, 1}, 64, false},
      {1, 2, 9, 2, {-1}, 64, false},
      {0, 9, 1, 2, {3, -4}, 64, false},
      {1, 2, 9, 2, {INT64_MIN}, 64, false},
      {0, 9, 1, 2, {8, 9}, 64, false},
      {1, 2, 9, 2, {INT64_MAX}, 64, false},
      {0, 0, 1, 4, {0}, 64, false},
      {2, 9, 9, 2, {0}, 64, false},
      {-1, 9, 9, 2, {0}, 64, false},
      {0, kHuge, 1, 8, {}, 64, false},
      {1, 2, kHuge, 4, {0}, 64, false},
      {0, kHuge, 1, 2, {}, 64, false},
      {1, kHuge * 2, 2, 1, {}, 64, false},
      {0, 2, kHuge, 4, {0}, 64, false},
      {1, kHuge, kHuge, kHuge, {0}, 64, false},
  };
  for (const Case& c : bad) {
    must_throw<std::invalid_argument>(c.text("bad"), [&] { return c.selection(); });
  }
  const Case empty[] = {{0, 0, 1, 8, {}, 64, false},
                        {0, 2, 0, 8, {0, 1}, 64, false},
                        {1, 0, 5, 4, {0, 1}, 64, false},
                        {1, 3, 0, 4, {}, 64, false}};
  for (const Case& c : empty) {
    if (c.selection().kept_bytes() != 0) fail(c.text("an empty selection keeps bytes"));
    hfprune::compact(c.selection(), nullptr, nullptr, 4);
  }
}

// One file that several threads write, each its own tensors side by side, 3 bytes behind the start.
void check_write(const std::string& path) {
  struct Kind {
    std::size_t item;
    std::uint64_t exponent, good;  // the largest value that is finite
    std::vector<std::uint64_t> bad;
  };
  constexpr std::uint64_t k64 = 0x7FF0000000000000;
  const Kind kinds[] = {{8, k64, k64 - 1, {k64, ~0ull}},
                        {4, 0x7F800000, 0xFF7FFFFF, {0x7F800000, 0xFFC00000}},
                        {2, 0x7F80, 0x7F7F, {0x7F80, 0xFFC1}},
                        {2, 0x7C00, 0x7BFF, {0x7C00, 0xFE00}},
                        {2, 0, 0xFFFF, {}},
                        {1, 0, 0xFF, {}}};
  struct Part {
    Case c;
    bool whole;
    const Kind& kind;
    hfprune::Destination to;
    Bytes source, written;
  };
  const int file = ::open(path.c_str(), O_RDWR | O_CREAT | O_TRUNC, 0600);
  if (file < 0 || ::pwrite(file, "abc", 3, 0) != 3) fail("cannot write " + path);
  std::vector<Part> parts;
  std::uint64_t offset = 3;
  for (const Kind& kind : kinds) {
    for (const int axis : {-1, 0, 1}) {  // -1: whole
      Case c{axis < 0 ? 0 : axis, 201, 1301, kind.item, {}, hfprune::kWriteBytes, false};
      const std::size_t indices = c.axis == 0 ? c.rows : c.columns;
      for (std::size_t i = 0; i < indices; ++i) {  // 0 is kept, 1 is dropped
        if (axis < 0 || i == 0 || (i > 1 && below(5) != 0)) {
          c.keep.push_back(static_cast<std::int64_t>(i));
        }
      }
      Bytes source = random_bytes(c.rows * c.columns * c.item);
      for (std::uint8_t& byte : source) byte &= 0x3B;  // finite in every kind
      parts.push_back({c, axis < 0, kind, {file, offset, c.item, kind.exponent}, source, {}});
      offset += c.selection().kept_bytes();
    }
  }
  const auto matches = [&](const Part& p) {
    Bytes found(p.written.size());
    const auto at = static_cast<off_t>(p.to.offset);
    return ::pread(file, found.data(), found.size(), at) == static_cast<ssize_t>(found.size()) &&
           found == p.written;
  };
  const auto check = [&](Part* p) {
    const std::vector<std::size_t> kept = p->c.kept_offsets();
    const Bytes expected = taken(p->source, kept);
    const std::size_t item = p->c.item;
    const std::size_t dropped = p->c.axis == 0 ? p->c.columns * item : item;
    // The first and the last that are kept, the first of the second block, and one that is dropped.
    const std::size_t last = kept.size() - item, none = kept.size();
    for (const std::size_t place :
         {std::size_t{0}, std::min(last, hfprune::kWriteBytes), last, none}) {
      if (place == none && p->whole) continue;
      std::vector<std::uint64_t> values = p->kind.bad;
      values.push_back(p->kind.good);
      for (const std::uint64_t value : values) {
        Bytes source = p->source;
        std::memcpy(source.data() + (place == none ? dropped : kept[place]), &value, item);
        p->written = expected;
        if (place != none) std::memcpy(p->written.data() + place, &value, item);
        const bool finite = value == p->kind.good || place == none;
        const bool found = p->whole ? hfprune::write(p->to, source.data(), source.size())
                                    : hfprune::write(p->to, source.data(), p->c.selection());
        if (found != finite) fail(p->c.text(finite ? "not finite" : "finite"));
        if (!matches(*p)) fail(p->c.text("written bytes"));
      }
    }
  };
  std::vector<std::thread> threads;
  for (std::size_t first = 0; first < 3; ++first) {
    threads.emplace_back([&, first] {
      for (std::size_t i = first; i < parts.size(); i += 3) check(&parts[i]);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const Part& p : parts) {
    if (!matches(p)) fail(p.c.text("bytes written by another tensor"));
    ++cases;
  }
  char front[3];
  if (::pread(file, front, 3, 0) != 3 || std::memcmp(front, "abc", 3) != 0) fail("bytes in front");
  if (::lseek(file, 0, SEEK_END) != static_cast<off_t>(offset)) fail("the size of the file");
  ::close(file);
  const Bytes some(64);
  const auto write = [&](const hfprune::Destination& to) {
    return [&some, to] { return hfprune::write(to, some.data(), some.size()); };
  };
  must_throw<std::system_error>("a closed file", write({file, 0, 2, 0}));
  must_throw<std::invalid_argument>("values of 3 bytes", write({file, 0, 3, 0x7F80}));
  must_throw<std::invalid_argument>("beyond all files", write({file, INT64_MAX - 63, 2, 0}));
  must_throw<std::invalid_argument>("an offset that wraps", write({file, ~0ull, 2, 0}));
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) fail("usage: check FOLDER");
  for (unsigned threads = 0; threads < 40; ++threads) {
    const std::size_t bytes = hfprune::piece_bytes_for(threads);
    if (bytes == 0 || bytes * std::min(std::max(threads, 1u), 8u) > hfprune::kStagingBytes) {
      fail("piece_bytes_for(" + std::to_string(threads) + ")");
    }
  }
  check_bad_selections();
  if (!kThreadSanitizer) check_shapes();  // they are too small for a second thread
  check_large();
  check_write(std::string(argv[1]) + "/written");
  std::printf("%zu cases agree (%s)\n", cases, hfprune::instructions());
  return 0;
}
