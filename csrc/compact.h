// Keeps some rows, or some columns, of a 2-D buffer. It moves bytes: any dtype, by its items' size.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace hfprune {

// The kept bytes of a buffer, in order, cut into pieces that are gathered independently.
//
// Both kinds of cut are a pattern of runs of bytes with a period: kept columns are the runs of one
// row, repeated for every row; kept rows are the runs of one period as long as the buffer. Kept
// bytes never change their order, so piece i of the result is made of bytes that lie behind all
// those of piece i - 1, and its place in the result is never behind its place in the source.
class Selection {
 public:
  // `keep` holds `count` sorted, distinct indices into the rows (axis 0) or columns (axis 1). A
  // piece has at most `piece_bytes` bytes, but one item at least. `portable` leaves the compress
  // instructions aside. Throws std::invalid_argument for another axis, indices out of order or
  // range, and sizes that overflow.
  Selection(int axis, std::size_t rows, std::size_t columns, std::size_t item_bytes,
            const std::int64_t* keep, std::size_t count, std::size_t piece_bytes,
            bool portable = false);

  std::size_t source_bytes() const { return period_bytes_ * periods_; }
  std::size_t kept_bytes() const { return kept_bytes_ * periods_; }

  std::size_t pieces() const;
  std::size_t piece_begin(std::size_t piece) const;  // among the kept bytes
  std::size_t piece_bytes(std::size_t piece) const;

  // Where in the source the first kept byte of a piece lies.
  std::size_t piece_source(std::size_t piece) const;

  // Whether the runs are so long that a piece is better moved than gathered and then moved.
  bool long_runs() const { return compressed_item_ == 0 && kept_bytes_ >= 2048 * runs_.size(); }

  // Call move(offset in the source, offset among the kept bytes, bytes) for each run of a piece.
  template <typename Move>
  void each_run(std::size_t piece, const Move& move) const {
    const bool whole = segments_.size() == 1;
    const std::size_t first = whole ? piece * grouped_ : piece / segments_.size();
    const std::size_t end = whole ? std::min(first + grouped_, periods_) : first + 1;
    const Segment& segment = segments_[whole ? 0 : piece % segments_.size()];
    std::size_t kept = piece_begin(piece);
    for (std::size_t period = first; period < end; ++period) {
      for (std::size_t r = segment.first_run; r < segment.end_run; ++r) {
        move(period * period_bytes_ + runs_[r].begin, kept, runs_[r].bytes);
        kept += runs_[r].bytes;
      }
    }
  }

  // What a buffer for gather() must hold: the largest piece, and what is written beyond its end.
  std::size_t staging_bytes() const;

  // Write a piece to `out`. Reads `source` from the first kept byte of the piece to at most
  // kSlackBytes behind the last, and never outside the buffer.
  void gather(std::size_t piece, const std::uint8_t* source, std::uint8_t* out) const;

 private:
  struct Run {  // kept bytes that are neighbours, as an offset into the period
    std::size_t begin, bytes;
  };
  struct Segment {  // a part of a period's runs that is one piece, or the whole of them
    std::size_t first_run, end_run, kept_begin, kept_bytes, masks_begin;
  };

  void find_runs(std::size_t indices, std::size_t index_bytes, const std::int64_t* keep,
                 std::size_t count);
  void cut(std::size_t piece_bytes, std::size_t granule_bytes);
  void choose_instructions(std::size_t item_bytes);
  std::uint8_t* gather_segment(const Segment& segment, const std::uint8_t* period,
                               std::size_t readable_bytes, std::uint8_t* out) const;

  std::size_t periods_, period_bytes_, kept_bytes_ = 0;
  std::size_t grouped_ = 1;          // periods in a piece
  std::size_t compressed_item_ = 0;  // item size of the compress instructions in use, 0 for none
  std::vector<Run> runs_;
  std::vector<Segment> segments_;
  std::vector<std::uint8_t> masks_;  // a bit an item from each segment's first, 1 = kept
};

// Move the selected bytes of `source` to the front of `out`, which is `source` itself (in place) or
// does not overlap it. Extra memory: kStagingBytes and the selection.
// Throws std::bad_alloc before anything was moved.
void compact(const Selection& selection, const std::uint8_t* source, std::uint8_t* out,
             unsigned threads);

// The piece size that gives `threads` threads their share of kStagingBytes.
std::size_t piece_bytes_for(unsigned threads);

// The best of "avx512_vbmi2" (1, 2 and 4-byte items), "avx512f" (4-byte items) and "portable" here.
const char* instructions();

constexpr std::size_t kStagingBytes = 512 * 1024;
constexpr std::size_t kSlackBytes = 64;

}  // namespace hfprune
