// compact() and Selection against a byte-by-byte reference. Built by csrc/CMakeLists.txt and run
// under sanitizers by test_csrc.py; prints the case and exits 1 at the first difference.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "compact.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#else
#define ASAN_POISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#define ASAN_UNPOISON_MEMORY_REGION(address, bytes) ((void)(address), (void)(bytes))
#endif

namespace {

using Bytes = std::vector<std::uint8_t>;
using Keep = std::vector<std::int64_t>;

constexpr std::uint8_t kGuardByte = 0xA5;

struct Case {
  bool columns;
  std::size_t rows, indices_in_row, item;  // rows: indices_in_row is 1, item the bytes of a row
  Keep keep;
  std::size_t piece_bytes;
  bool portable;

  std::string text() const {
    std::ostringstream out;
    out << (columns ? "columns" : "rows") << " of " << rows << " x " << indices_in_row << " x "
        << item << " bytes, keep " << keep.size() << " [";
    for (std::size_t i = 0; i < std::min<std::size_t>(keep.size(), 12); ++i) out << keep[i] << ' ';
    out << "], piece_bytes " << piece_bytes << (portable ? ", portable" : "");
    return out.str();
  }
};

std::size_t cases = 0;
std::mt19937_64 rng(20240607);

std::size_t below(std::size_t n) { return static_cast<std::size_t>(rng() % n); }

[[noreturn]] void fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

// Where a buffer ends: at its heap block's end, which ASan watches; before guard bytes; or before a
// page that cannot be touched, which stops the masked vector loads and stores that ASan cannot see.
enum class Edge { kHeap, kGuard, kPage };

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
    std::memset(data_ - before_, kGuardByte, before_);
    std::memset(data_ + bytes, kGuardByte, after_);
  }
  ~Buffer() {
    if (mapped_ != nullptr) ::munmap(mapped_, mapped_bytes_);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::uint8_t* data() { return data_; }
  std::size_t bytes() const { return bytes_; }

  bool guards_intact() const {
    static const Bytes guards(1 << 17, kGuardByte);  // a page is smaller everywhere
    return std::memcmp(guards.data(), data_ - before_, before_) == 0 &&
           std::memcmp(guards.data(), data_ + bytes_, after_) == 0;
  }

 private:
  std::size_t bytes_, before_ = 0, after_ = 0, mapped_bytes_ = 0;
  std::unique_ptr<std::uint8_t[]> block_;
  std::uint8_t* mapped_ = nullptr;
  std::uint8_t* data_ = nullptr;
};

Bytes random_bytes(std::size_t count) {
  Bytes result(count);
  std::size_t at = 0;
  for (; at + 8 <= count; at += 8) {
    const std::uint64_t word = rng();
    std::memcpy(result.data() + at, &word, 8);
  }
  for (; at < count; ++at) result[at] = static_cast<std::uint8_t>(rng());
  return result;
}

Bytes reference(const Case& c, const Bytes& source) {
  Bytes result;
  const std::size_t periods = c.columns ? c.rows : 1;
  const std::size_t period_bytes = source.size() / std::max<std::size_t>(periods, 1);
  result.resize(periods * c.keep.size() * c.item);
  std::uint8_t* to = result.data();
  const std::uint8_t* from = source.data();
  for (std::size_t period = 0; period < periods; ++period) {
    for (const std::int64_t index : c.keep) {
      const std::size_t at = period * period_bytes + static_cast<std::size_t>(index) * c.item;
      for (std::size_t i = 0; i < c.item; ++i) *to++ = from[at + i];
    }
  }
  return result;
}

hfprune::Selection select(const Case& c) {
  return c.columns ? hfprune::Selection::of_columns(c.rows, c.indices_in_row, c.item, c.keep.data(),
                                                    c.keep.size(), c.piece_bytes, c.portable)
                   : hfprune::Selection::of_rows(c.rows, c.item, c.keep.data(), c.keep.size(),
                                                 c.piece_bytes, c.portable);
}

// The end in `source` of the first `kept` kept bytes, and the place of the next one.
std::size_t source_end(const Case& c, std::size_t kept) {
  const std::size_t row = c.keep.size() * c.item, at = kept - 1;
  const std::size_t period = c.columns ? at / row : 0, within = c.columns ? at % row : at;
  const auto index = static_cast<std::size_t>(c.keep[within / c.item]);
  return period * c.indices_in_row * c.item + index * c.item + within % c.item + 1;
}

bool same(const Bytes& expected, const std::uint8_t* found) {
  return expected.empty() || std::memcmp(expected.data(), found, expected.size()) == 0;
}

// The pieces are what the header promises: they tile the kept bytes, obey the limit, and are
// gathered from their own part of the source into staging_bytes().
void check_pieces(const Case& c, const hfprune::Selection& selection, const Bytes& source,
                  const Bytes& expected) {
  Buffer from(source.size(), below(9), below(2) == 0 ? Edge::kHeap : Edge::kPage);
  Buffer staged(selection.staging_bytes(), below(9), below(2) == 0 ? Edge::kHeap : Edge::kPage);
  if (!source.empty()) std::memcpy(from.data(), source.data(), source.size());
  std::size_t begin = 0;
  for (std::size_t piece = 0; piece < selection.pieces(); ++piece) {
    const std::size_t bytes = selection.piece_bytes(piece);
    const auto failed = [&](const char* how) {
      fail(c.text() + ", piece " + std::to_string(piece) + ": " + how);
    };
    if (selection.piece_begin(piece) != begin) failed("piece_begin");
    const std::size_t granule = c.columns || c.item <= 8 ? c.item : 1;
    if (bytes == 0 || bytes > std::max(c.piece_bytes, granule)) failed("piece_bytes");
    if (begin + bytes > expected.size()) failed("beyond the kept bytes");
    const std::size_t first = source_end(c, begin + 1) - 1;
    const std::size_t end =
        std::min(source.size(), source_end(c, begin + bytes) + hfprune::kSlackBytes);
    ASAN_POISON_MEMORY_REGION(from.data(), first);
    ASAN_POISON_MEMORY_REGION(from.data() + end, source.size() - end);
    selection.gather(piece, from.data(), staged.data());
    ASAN_UNPOISON_MEMORY_REGION(from.data(), source.size());
    if (std::memcmp(staged.data(), expected.data() + begin, bytes) != 0) failed("gather");
    if (!staged.guards_intact()) failed("gather wrote outside its buffer");
    begin += bytes;
  }
  if (begin != expected.size()) fail(c.text() + ": the pieces are not all kept bytes");
  ++cases;
}

void check_compact(const Case& c, const hfprune::Selection& selection, const Bytes& source,
                   const Bytes& expected, unsigned threads, bool in_place, std::size_t offset,
                   Edge edge) {
  const auto failed = [&](const char* how) {
    fail(c.text() + ", " + std::to_string(threads) + " threads" + (in_place ? ", in place" : "") +
         ", offset " + std::to_string(offset) + ", edge " + std::to_string(static_cast<int>(edge)) +
         ": " + how);
  };
  Buffer from(source.size(), offset, edge);
  if (!source.empty()) std::memcpy(from.data(), source.data(), source.size());
  if (in_place) {
    hfprune::compact(selection, from.data(), from.data(), threads);
    if (!same(expected, from.data())) failed("other bytes");
  } else {
    Buffer to(expected.size(), offset / 2 + below(4), edge);
    std::memset(to.data(), 0xEE, to.bytes());
    hfprune::compact(selection, from.data(), to.data(), threads);
    if (!same(expected, to.data())) failed("other bytes");
    if (!to.guards_intact()) failed("wrote outside the result");
    if (!same(source, from.data())) failed("changed the source");
  }
  if (!from.guards_intact()) failed("wrote outside the source");
  ++cases;
}

enum class Pattern { kNone, kOne, kAll, kEveryOther, kRuns, k5, k50, k80, k95 };
constexpr Pattern kPatterns[] = {Pattern::kNone,       Pattern::kOne,  Pattern::kAll,
                                 Pattern::kEveryOther, Pattern::kRuns, Pattern::k5,
                                 Pattern::k50,         Pattern::k80,   Pattern::k95};

Keep keep_of(Pattern pattern, std::size_t indices) {
  Keep keep;
  if (indices == 0 || pattern == Pattern::kNone) return keep;
  if (pattern == Pattern::kOne) return {static_cast<std::int64_t>(below(indices))};
  bool in_run = true;
  for (std::size_t i = 0; i < indices; ++i) {
    bool kept = true;
    switch (pattern) {
      case Pattern::kEveryOther:
        kept = i % 2 == 1;
        break;
      case Pattern::kRuns:
        if (below(40) == 0) in_run = !in_run;
        kept = in_run;
        break;
      case Pattern::k5:
        kept = below(100) < 5;
        break;
      case Pattern::k50:
        kept = below(100) < 50;
        break;
      case Pattern::k80:
        kept = below(100) < 80;
        break;
      case Pattern::k95:
        kept = below(100) < 95;
        break;
      default:
        break;
    }
    if (kept) keep.push_back(static_cast<std::int64_t>(i));
  }
  return keep;
}

Case make_case(bool columns, std::size_t rows, std::size_t length, std::size_t item,
               Pattern pattern, std::size_t piece_bytes, bool portable) {
  return {
      columns,     rows,    columns ? length : 1, item, keep_of(pattern, columns ? length : rows),
      piece_bytes, portable};
}

void check_small(const Case& c) {
  const Bytes source = random_bytes(c.rows * c.indices_in_row * c.item);
  const Bytes expected = reference(c, source);
  const hfprune::Selection selection = select(c);
  if (selection.source_bytes() != source.size()) fail(c.text() + ": source_bytes");
  if (selection.kept_bytes() != expected.size()) fail(c.text() + ": kept_bytes");
  check_pieces(c, selection, source, expected);
  const auto edge = [&] { return static_cast<Edge>(below(3)); };
  const auto threads = [&] { return static_cast<unsigned>(1 + below(4)); };
  check_compact(c, selection, source, expected, threads(), true, cases % 4, edge());
  check_compact(c, selection, source, expected, threads(), false, below(70), edge());
}

void check_shapes() {
  constexpr std::size_t lengths[] = {1, 3, 16, 17, 33, 63, 65, 129, 1001};
  constexpr std::size_t row_bytes[] = {1, 2, 3, 4, 5, 7, 8, 9, 31, 64, 65, 300, 1001};
  for (const bool portable : {false, true}) {
    for (const Pattern pattern : kPatterns) {
      for (const std::size_t length : lengths) {
        for (const std::size_t item : {1, 2, 3, 4, 8}) {
          for (const std::size_t rows : {1, 4}) {
            const std::size_t piece =
                below(2) == 0 ? 64 : hfprune::piece_bytes_for(static_cast<unsigned>(1 + below(4)));
            check_small(make_case(true, rows, length, item, pattern, piece, portable));
          }
        }
      }
      for (const std::size_t bytes : row_bytes) {
        for (const std::size_t rows : {1, 6, 65, 200}) {
          const std::size_t piece = below(2) == 0 ? 64 : hfprune::piece_bytes_for(2);
          check_small(make_case(false, rows, 1, bytes, pattern, piece, portable));
        }
      }
    }
  }
}

void check_random(std::size_t count) {
  constexpr std::size_t pieces[] = {0, 1, 5, 16, 64, 100, 1000, 4096, 65536};
  for (std::size_t i = 0; i < count; ++i) {
    const bool columns = below(3) != 0;
    const std::size_t item = columns || below(2) == 0 ? 1 + below(9) : 1 + below(2000);
    const std::size_t rows = columns ? below(9) : below(600 / item + 60);
    const std::size_t length = below(below(4) == 0 ? 2500 : 150);
    const Pattern pattern = kPatterns[below(std::size(kPatterns))];
    const std::size_t piece = pieces[below(std::size(pieces))];
    check_small(make_case(columns, rows, length, item, pattern, piece, below(2) == 0));
  }
}

// A thread is started for every MiB kept, and results of 8 MiB and more go past the cache.
void check_large() {
  struct Large {
    bool columns;
    std::size_t rows, length, item;
    Pattern pattern;
    std::size_t piece_bytes;  // 0: piece_bytes_for(threads)
  };
  const Large large[] = {
      {true, 1501, 4099, 2, Pattern::k80, 0},            // 9.8 MB kept: streamed
      {false, 2503, 4097, 1, Pattern::k95, 0},           // 9.7 MB kept: streamed
      {true, 3, 600'011, 4, Pattern::k50, 0},            // rows longer than a piece
      {true, 2, 1'500'007, 1, Pattern::kEveryOther, 0},  //
      {true, 1031, 1027, 4, Pattern::k95, 8192},         // many pieces, much waiting
      {true, 701, 2053, 2, Pattern::kEveryOther, 4096},  //
      {true, 97, 20'011, 3, Pattern::k50, 1024},         // no compress instructions
      {true, 31, 20'011, 8, Pattern::k80, 0},            //
      {false, 3'000'001, 1, 1, Pattern::k50, 4096},      // a long bias
      {false, 900'001, 4, 1, Pattern::k80, 0},           //
      {false, 411, 11'003, 1, Pattern::k80, 16384},      //
  };
  for (const Large& l : large) {
    const std::size_t item = l.columns ? l.item : l.length;
    Case c = make_case(l.columns, l.rows, l.length, item, l.pattern, l.piece_bytes, false);
    const Bytes source = random_bytes(c.rows * c.indices_in_row * c.item);
    const Bytes expected = reference(c, source);
    for (unsigned threads = 1; threads <= 4; ++threads) {
      if (l.piece_bytes == 0) c.piece_bytes = hfprune::piece_bytes_for(threads);
      c.portable = !c.portable;
      const bool in_place_portable = c.portable;
      for (const bool in_place : {true, false}) {
        c.portable = in_place ? in_place_portable : threads > 2;
        check_compact(c, select(c), source, expected, threads, in_place, threads - 1,
                      static_cast<Edge>(threads % 3));
      }
    }
  }
}

void must_throw(const char* what, const std::function<void()>& call) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    if (*error.what() == '\0') fail(std::string(what) + ": an empty message");
    ++cases;
    return;
  } catch (const std::exception& error) {
    fail(std::string(what) + ": not std::invalid_argument but " + error.what());
  }
  fail(std::string(what) + " was accepted");
}

void check_bad_arguments() {
  struct Bad {
    const char* what;
    std::size_t rows, columns, item;
    Keep keep;
  };
  constexpr std::size_t kHuge = std::size_t{1} << 62;
  const Bad bad[] = {
      {"unsorted", 9, 9, 2, {2, 1}},
      {"unsorted at the end", 9, 9, 2, {0, 1, 2, 8, 7}},
      {"duplicate", 9, 9, 2, {1, 1}},
      {"negative", 9, 9, 2, {-1}},
      {"negative behind a good one", 9, 9, 2, {3, -4}},
      {"most negative", 9, 9, 2, {INT64_MIN}},
      {"one too large", 9, 9, 2, {8, 9}},
      {"largest", 9, 9, 4, {INT64_MAX}},
      {"an index of an empty buffer", 0, 0, 4, {0}},
      {"a size that overflows", kHuge, kHuge, 8, {}},
      {"a size that wraps to 0", kHuge, kHuge, 4, {0}},
      {"a size above PTRDIFF_MAX", kHuge, kHuge, 2, {}},
  };
  for (const Bad& b : bad) {
    must_throw(b.what, [&] {
      hfprune::Selection::of_rows(b.rows, b.item, b.keep.data(), b.keep.size(), 64);
    });
    must_throw(b.what, [&] {
      hfprune::Selection::of_columns(2, b.columns, b.item, b.keep.data(), b.keep.size(), 64);
    });
  }
  must_throw("rows that overflow",
             [] { hfprune::Selection::of_columns(kHuge, 4, 2, nullptr, 0, 64); });
  must_throw("rows that wrap to 0",
             [] { hfprune::Selection::of_columns(kHuge * 2, 2, 1, nullptr, 0, 64); });
}

void check_empty() {
  const Keep keep = {0, 1};
  const hfprune::Selection empty[] = {
      hfprune::Selection::of_rows(0, 8, nullptr, 0, 64),
      hfprune::Selection::of_rows(2, 0, keep.data(), 2, 64),
      hfprune::Selection::of_columns(0, 5, 4, keep.data(), 2, 64),
      hfprune::Selection::of_columns(3, 0, 4, nullptr, 0, 64),
  };
  for (const hfprune::Selection& selection : empty) {
    if (selection.kept_bytes() != 0 || selection.pieces() != 0)
      fail("an empty selection keeps bytes");
    hfprune::compact(selection, nullptr, nullptr, 4);
    ++cases;
  }
}

}  // namespace

int main() {
  for (unsigned threads = 0; threads < 40; ++threads) {
    const std::size_t bytes = hfprune::piece_bytes_for(threads);
    if (bytes == 0 || bytes * std::min(std::max(threads, 1u), 8u) > hfprune::kStagingBytes) {
      fail("piece_bytes_for(" + std::to_string(threads) + ")");
    }
  }
  check_bad_arguments();
  check_empty();
  check_shapes();
  check_random(1000);
  check_large();
  std::printf("%zu cases agree (%s)\n", cases, hfprune::instructions());
  return 0;
}
