#include "write.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <vector>

namespace hfprune {
namespace {

// Writing to the disk starts this often, so that little is left to do at the end.
constexpr std::size_t kWritebackBytes = 16 * 1024 * 1024;

template <typename Bits>
bool all_finite(const std::uint8_t* bytes, std::size_t count, Bits exponent) {
  bool found = false;
  for (std::size_t at = 0; at + sizeof(Bits) <= count; at += sizeof(Bits)) {
    Bits value;
    std::memcpy(&value, bytes + at, sizeof value);
    found |= (value & exponent) == exponent;
  }
  return !found;
}

// Checks blocks and writes them one behind the other.
class Stream {
 public:
  Stream(const Destination& to, std::size_t bytes) : to_(to), at_(to.offset), started_(to.offset) {
    const bool known = to.item_bytes == 2 || to.item_bytes == 4 || to.item_bytes == 8;
    if (to.exponent != 0 && !known) {
      throw std::invalid_argument("values of " + std::to_string(to.item_bytes) +
                                  " bytes cannot be checked for NaN and inf");
    }
    if (to.offset > INT64_MAX || bytes > INT64_MAX - to.offset) {
      throw std::invalid_argument("the file would be larger than a file can be");
    }
  }

  void put(const std::uint8_t* bytes, std::size_t count) {
    finite_ = finite_ && all_finite_values(bytes, count);
    while (count > 0) {
      const ssize_t done = ::pwrite(to_.file, bytes, count, static_cast<off_t>(at_));
      if (done < 0) {
        if (errno == EINTR) continue;
        throw std::system_error(errno, std::generic_category());
      }
      bytes += done;
      count -= static_cast<std::size_t>(done);
      at_ += static_cast<std::uint64_t>(done);
    }
    if (at_ - started_ >= kWritebackBytes) start_writeback();
  }

  bool finish() {
    if (at_ > started_) start_writeback();
    return finite_;
  }

 private:
  bool all_finite_values(const std::uint8_t* bytes, std::size_t count) const {
    if (to_.exponent == 0) return true;
    if (to_.item_bytes == 2) {
      return all_finite(bytes, count, static_cast<std::uint16_t>(to_.exponent));
    }
    if (to_.item_bytes == 4) {
      return all_finite(bytes, count, static_cast<std::uint32_t>(to_.exponent));
    }
    return all_finite(bytes, count, to_.exponent);
  }

  void start_writeback() {
#ifdef __linux__
    (void)::sync_file_range(to_.file, static_cast<off_t>(started_),
                            static_cast<off_t>(at_ - started_), SYNC_FILE_RANGE_WRITE);
#endif
    started_ = at_;
  }

  const Destination to_;
  std::uint64_t at_, started_;
  bool finite_ = true;
};

}  // namespace

bool write(const Destination& to, const std::uint8_t* source, std::size_t bytes) {
  Stream stream(to, bytes);
  for (std::size_t at = 0; at < bytes; at += kWriteBytes) {
    stream.put(source + at, std::min(kWriteBytes, bytes - at));
  }
  return stream.finish();
}

bool write(const Destination& to, const std::uint8_t* source, const Selection& selection) {
  Stream stream(to, selection.kept_bytes());
  std::vector<std::uint8_t> staged(selection.staging_bytes());
  for (std::size_t piece = 0; piece < selection.pieces(); ++piece) {
    selection.gather(piece, source, staged.data());
    stream.put(staged.data(), selection.piece_bytes(piece));
  }
  return stream.finish();
}

}  // namespace hfprune
