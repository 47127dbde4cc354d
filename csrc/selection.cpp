#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "compact.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HFPRUNE_X86 1
#include <immintrin.h>
#else
#define HFPRUNE_X86 0
#endif

namespace hfprune {
namespace {

std::size_t product(std::size_t a, std::size_t b) {
  std::size_t result = 0;
  if (__builtin_mul_overflow(a, b, &result) || result > PTRDIFF_MAX) {
    throw std::invalid_argument("a buffer of " + std::to_string(a) + " x " + std::to_string(b) +
                                " bytes is larger than memory");
  }
  return result;
}

#if HFPRUNE_X86

bool have_avx512f() { return __builtin_cpu_supports("avx512f"); }
bool have_vbmi2() {
  return have_avx512f() && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vbmi2");
}

#define HFPRUNE_AVX512F __attribute__((target("avx512f,popcnt")))
#define HFPRUNE_VBMI2 __attribute__((target("avx512f,avx512bw,avx512vbmi2,popcnt")))

// The register form of the compress instructions: with a memory operand they take over a hundred
// cycles on AMD's Zen 4. What is stored behind the kept items is overwritten by the next store.
// A step is 64 bytes of source; `items` beyond the last whole step are loaded under a mask.
#define HFPRUNE_COMPRESS(NAME, TARGET, MASK, LOAD, COMPRESS, POPCOUNT, ITEM_BYTES)              \
  TARGET std::uint8_t* NAME(const std::uint8_t* source, std::size_t items,                      \
                            const std::uint8_t* masks, std::uint8_t* out) {                     \
    constexpr std::size_t lanes = 64 / ITEM_BYTES;                                              \
    std::size_t item = 0;                                                                       \
    for (; item + lanes <= items; item += lanes) {                                              \
      MASK mask;                                                                                \
      std::memcpy(&mask, masks + item / 8, sizeof mask);                                        \
      _mm512_storeu_si512(out, COMPRESS(mask, _mm512_loadu_si512(source + item * ITEM_BYTES))); \
      out += POPCOUNT(mask) * ITEM_BYTES;                                                       \
    }                                                                                           \
    if (item < items) {                                                                         \
      MASK mask;                                                                                \
      std::memcpy(&mask, masks + item / 8, sizeof mask);                                        \
      const MASK inside = static_cast<MASK>((MASK{1} << (items - item)) - 1);                   \
      _mm512_storeu_si512(out, COMPRESS(mask, LOAD(inside, source + item * ITEM_BYTES)));       \
      out += POPCOUNT(mask) * ITEM_BYTES;                                                       \
    }                                                                                           \
    return out;                                                                                 \
  }

HFPRUNE_COMPRESS(compress_1, HFPRUNE_VBMI2, __mmask64, _mm512_maskz_loadu_epi8,
                 _mm512_maskz_compress_epi8, __builtin_popcountll, 1)
HFPRUNE_COMPRESS(compress_2, HFPRUNE_VBMI2, __mmask32, _mm512_maskz_loadu_epi16,
                 _mm512_maskz_compress_epi16, __builtin_popcount, 2)
HFPRUNE_COMPRESS(compress_4, HFPRUNE_AVX512F, __mmask16, _mm512_maskz_loadu_epi32,
                 _mm512_maskz_compress_epi32, __builtin_popcount, 4)

#undef HFPRUNE_COMPRESS

#endif

// Runs of a few items are copied in steps of a fixed size, which may write beyond the run (the next
// one overwrites that) and read beyond it, but not beyond `readable_bytes` of the source.
std::uint8_t* copy_run(const std::uint8_t* from, std::size_t bytes, std::size_t readable_bytes,
                       std::uint8_t* out) {
  constexpr std::size_t step = 16;
  if (bytes > 16 * step || readable_bytes < bytes + 2 * step) {
    std::memcpy(out, from, bytes);
    return out + bytes;
  }
  std::memcpy(out, from, step);
  std::memcpy(out + step, from + step, step);
  for (std::size_t at = 2 * step; at < bytes; at += step) {
    std::memcpy(out + at, from + at, step);
  }
  return out + bytes;
}

}  // namespace

const char* instructions() {
#if HFPRUNE_X86
  if (have_vbmi2()) return "avx512_vbmi2";
  if (have_avx512f()) return "avx512f";
#endif
  return "portable";
}

Selection::Selection(int axis, std::size_t rows, std::size_t columns, std::size_t item_bytes,
                     const std::int64_t* keep, std::size_t count, std::size_t piece_bytes,
                     bool portable)
    : periods_(axis == 0 ? 1 : rows), period_bytes_(product(columns, item_bytes)) {
  if (axis != 0 && axis != 1) {
    throw std::invalid_argument("axis must be 0 or 1, got " + std::to_string(axis));
  }
  const std::size_t index_bytes = axis == 0 ? period_bytes_ : item_bytes;
  if (axis == 0) period_bytes_ = product(rows, index_bytes);
  product(period_bytes_, periods_);
  find_runs(axis == 0 ? rows : columns, index_bytes, keep, count);
  // Rows of a few bytes (a bias) are the columns of one row; large ones are cut anywhere.
  cut(piece_bytes, axis == 1 || index_bytes <= 8 ? index_bytes : 1);
  if (!portable) choose_instructions(index_bytes);
}

// Join kept neighbours into runs.
void Selection::find_runs(std::size_t indices, std::size_t index_bytes, const std::int64_t* keep,
                          std::size_t count) {
  for (std::size_t i = 0; i < count; ++i) {
    const std::int64_t index = keep[i];
    if (index < 0 || static_cast<std::uint64_t>(index) >= indices) {
      throw std::invalid_argument("keep must hold indices in 0.." + std::to_string(indices) +
                                  " (exclusive), got " + std::to_string(index));
    }
    if (i > 0 && index <= keep[i - 1]) {
      throw std::invalid_argument("keep must be sorted and distinct, got " +
                                  std::to_string(keep[i - 1]) + " before " + std::to_string(index));
    }
    if (index_bytes == 0) continue;
    const std::size_t begin = static_cast<std::size_t>(index) * index_bytes;
    if (!runs_.empty() && runs_.back().begin + runs_.back().bytes == begin) {
      runs_.back().bytes += index_bytes;
    } else {
      runs_.push_back({begin, index_bytes});
    }
    kept_bytes_ += index_bytes;
  }
}

// Split the runs of a period into segments of at most piece_bytes, at multiples of granule_bytes.
void Selection::cut(std::size_t piece_bytes, std::size_t granule_bytes) {
  if (kept_bytes_ == 0) return;
  const std::size_t largest = std::max(piece_bytes / granule_bytes * granule_bytes, granule_bytes);
  std::vector<Run> runs;
  runs.reserve(runs_.size() + kept_bytes_ / largest);
  segments_.push_back({0, 0, 0, 0, 0});
  for (Run run : runs_) {
    while (run.bytes > 0) {
      if (segments_.back().kept_bytes == largest) {
        const Segment& full = segments_.back();
        segments_.push_back({runs.size(), runs.size(), full.kept_begin + largest, 0, 0});
      }
      Segment& segment = segments_.back();
      const std::size_t bytes = std::min(run.bytes, largest - segment.kept_bytes);
      runs.push_back({run.begin, bytes});
      segment.end_run = runs.size();
      segment.kept_bytes += bytes;
      run.begin += bytes;
      run.bytes -= bytes;
    }
  }
  runs_ = std::move(runs);
  if (segments_.size() == 1) {
    grouped_ =
        std::clamp<std::size_t>(piece_bytes / kept_bytes_, 1, std::max<std::size_t>(periods_, 1));
  }
}

// Use the compress instructions where this CPU has them and neighbours are few.
void Selection::choose_instructions([[maybe_unused]] std::size_t item_bytes) {
#if HFPRUNE_X86
  const bool possible =
      item_bytes == 4 ? have_avx512f() : (item_bytes == 1 || item_bytes == 2) && have_vbmi2();
  if (!possible || kept_bytes_ / std::max<std::size_t>(runs_.size(), 1) >= 4 * 64) return;
  compressed_item_ = item_bytes;
  for (Segment& segment : segments_) {
    segment.masks_begin = masks_.size();
    const std::size_t first = runs_[segment.first_run].begin;
    const Run& last = runs_[segment.end_run - 1];
    const std::size_t items = (last.begin + last.bytes - first) / item_bytes;
    masks_.resize(masks_.size() + (items + 63) / 64 * 8);
    for (std::size_t r = segment.first_run; r < segment.end_run; ++r) {
      const std::size_t begin = (runs_[r].begin - first) / item_bytes;
      for (std::size_t i = begin; i < begin + runs_[r].bytes / item_bytes; ++i) {
        masks_[segment.masks_begin + i / 8] |= static_cast<std::uint8_t>(1u << i % 8);
      }
    }
  }
#endif
}

std::size_t Selection::pieces() const {
  if (kept_bytes() == 0) return 0;
  return segments_.size() > 1 ? segments_.size() * periods_ : (periods_ + grouped_ - 1) / grouped_;
}

std::size_t Selection::piece_begin(std::size_t piece) const {
  if (segments_.size() == 1) return piece * grouped_ * kept_bytes_;
  return piece / segments_.size() * kept_bytes_ + segments_[piece % segments_.size()].kept_begin;
}

std::size_t Selection::piece_bytes(std::size_t piece) const {
  if (segments_.size() > 1) return segments_[piece % segments_.size()].kept_bytes;
  return std::min(grouped_, periods_ - piece * grouped_) * kept_bytes_;
}

std::size_t Selection::piece_source(std::size_t piece) const {
  const bool whole = segments_.size() == 1;
  const std::size_t period = whole ? piece * grouped_ : piece / segments_.size();
  const Segment& segment = segments_[whole ? 0 : piece % segments_.size()];
  return period * period_bytes_ + runs_[segment.first_run].begin;
}

std::size_t Selection::staging_bytes() const {
  return pieces() == 0 ? 0 : piece_bytes(0) + kSlackBytes;  // the first is the largest
}

void Selection::gather(std::size_t piece, const std::uint8_t* source, std::uint8_t* out) const {
  const bool whole = segments_.size() == 1;
  const std::size_t first = whole ? piece * grouped_ : piece / segments_.size();
  const std::size_t end = whole ? std::min(first + grouped_, periods_) : first + 1;
  const Segment& segment = segments_[whole ? 0 : piece % segments_.size()];
  for (std::size_t period = first; period < end; ++period) {
    const std::size_t begin = period * period_bytes_;
    out = gather_segment(segment, source + begin, source_bytes() - begin, out);
  }
}

std::uint8_t* Selection::gather_segment(const Segment& segment, const std::uint8_t* period,
                                        std::size_t readable_bytes, std::uint8_t* out) const {
#if HFPRUNE_X86
  if (compressed_item_ != 0) {
    const std::size_t first = runs_[segment.first_run].begin;
    const Run& last = runs_[segment.end_run - 1];
    const std::size_t items = (last.begin + last.bytes - first) / compressed_item_;
    const std::uint8_t* masks = masks_.data() + segment.masks_begin;
    if (compressed_item_ == 1) return compress_1(period + first, items, masks, out);
    if (compressed_item_ == 2) return compress_2(period + first, items, masks, out);
    return compress_4(period + first, items, masks, out);
  }
#endif
  for (std::size_t r = segment.first_run; r < segment.end_run; ++r) {
    const Run& run = runs_[r];
    out = copy_run(period + run.begin, run.bytes, readable_bytes - run.begin, out);
  }
  return out;
}

}  // namespace hfprune
