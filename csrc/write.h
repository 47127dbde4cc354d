// Writes a tensor, or the rows or columns of it that are kept, into an open file. POSIX.
#pragma once

#include <cstddef>
#include <cstdint>

#include "compact.h"

namespace hfprune {

// Where a tensor goes, and which of its values are finite. A value of `item_bytes` bytes is NaN or
// infinite when all bits of `exponent` are set in it; with exponent 0 no value is looked at.
struct Destination {
  int file;
  std::uint64_t offset;
  std::size_t item_bytes;
  std::uint64_t exponent;
};

// The piece size for a Selection that is written: it stays in the second-level cache between being
// gathered, checked and handed to the system.
constexpr std::size_t kWriteBytes = 256 * 1024;

// Write `bytes` bytes at `source`, or what `selection` keeps of it, to the destination. Returns
// false if a value written is NaN or infinite. Several threads may write to one file at once.
// The bytes are on their way to the disk, not yet sure to be there: fsync is the caller's.
// Extra memory for a selection: its staging_bytes().
// Throws std::invalid_argument before anything is written (an exponent for items that are not of 2,
// 4 or 8 bytes, an end beyond what a file can hold); std::system_error if the system refuses.
bool write(const Destination& to, const std::uint8_t* source, std::size_t bytes);
bool write(const Destination& to, const std::uint8_t* source, const Selection& selection);

}  // namespace hfprune
