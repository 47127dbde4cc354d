// Selection, compact() and write() against a byte-by-byte reference. Built by csrc/CMakeLists.txt
// and run under sanitizers by test_csrc.py: check FOLDER. Exits with 1 at the first difference.
#include "check.h"

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

// The pieces are what the header promises: they tile the kept bytes, obey the limit, and are
// gathered from their own part of the source into staging_bytes().
void check_pieces(const Case& c, const Bytes& source, const std::vector<std::size_t>& offsets) {
  const Selection selection = c.selection();
  const Bytes expected = taken(source, offsets);
  Buffer from(source, below(9), any_edge());
  Buffer staged(selection.staging_bytes(), below(9), any_edge());
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
  check_kernels();
  std::printf("%zu cases agree (%s)\n", cases, hfprune::instructions());
  return 0;
}
