#include "safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <stdexcept>
#include <system_error>
#include <utility>

#include "compact.h"

namespace hfprune {
namespace {

// What is read, looked at and handed to the system at once: it stays in the second-level cache.
constexpr std::size_t kBlockBytes = 256 * 1024;
// Writing to the disk starts this often, so that little is left to do at the end.
constexpr std::size_t kWritebackBytes = 16 * 1024 * 1024;

[[noreturn]] void fail(const std::string& path) {
  throw std::system_error(errno, std::generic_category(), path);
}

class FileDescriptor {
 public:
  explicit FileDescriptor(int value) : value_(value) {}
  ~FileDescriptor() {
    if (value_ >= 0) ::close(value_);
  }
  FileDescriptor(const FileDescriptor&) = delete;
  FileDescriptor& operator=(const FileDescriptor&) = delete;
  int get() const { return value_; }
  int release() { return std::exchange(value_, -1); }

 private:
  int value_;
};

// A value is NaN or infinite when all bits of its exponent are set.
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

bool all_finite(const std::string& dtype, const std::uint8_t* bytes, std::size_t count) {
  if (dtype == "BF16") return all_finite<std::uint16_t>(bytes, count, 0x7F80);
  if (dtype == "F16") return all_finite<std::uint16_t>(bytes, count, 0x7C00);
  if (dtype == "F32") return all_finite<std::uint32_t>(bytes, count, 0x7F800000);
  if (dtype == "F64") return all_finite<std::uint64_t>(bytes, count, 0x7FF0000000000000);
  return true;
}

}  // namespace

MappedFile::MappedFile(const std::string& path) {
  const FileDescriptor file(::open(path.c_str(), O_RDONLY | O_NONBLOCK | O_CLOEXEC));
  struct stat status{};
  if (file.get() < 0 || ::fstat(file.get(), &status) != 0) fail(path);
  if (!S_ISREG(status.st_mode)) throw Malformed("no regular file behind its name");
  bytes_ = static_cast<std::size_t>(status.st_size);
  if (bytes_ < 8) throw Malformed("only " + std::to_string(bytes_) + " bytes");
  void* mapped = ::mmap(nullptr, bytes_, PROT_READ, MAP_SHARED, file.get(), 0);
  if (mapped == MAP_FAILED) fail(path);
  data_ = static_cast<std::uint8_t*>(mapped);
  try {
    header_ = parse_header(data_, bytes_);
  } catch (...) {
    ::munmap(data_, bytes_);
    throw;
  }
}

MappedFile::~MappedFile() { ::munmap(data_, bytes_); }

void MappedFile::will_need(std::size_t begin, std::size_t end) const {
  advise(begin, end, MADV_WILLNEED, false);
}

void MappedFile::done_with(std::size_t begin, std::size_t end) const {
  advise(begin, end, MADV_DONTNEED, true);
}

void MappedFile::advise(std::size_t begin, std::size_t end, int advice, bool whole_pages) const {
  const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
  end = std::min(end, bytes_);
  begin = (whole_pages ? begin + page - 1 : begin) / page * page;
  if (whole_pages && end < bytes_) end = end / page * page;
  if (begin < end) (void)::madvise(data_ + begin, end - begin, advice);
}

Writer::Writer(const std::string& path, const Metadata& metadata, std::vector<TensorInfo> tensors)
    : path_(path) {
  const std::string header = format_header(metadata, &tensors);
  const std::uint64_t bytes = tensors.empty() ? header.size() : tensors.back().end;
  for (TensorInfo& tensor : tensors) {
    const std::string name = tensor.name;
    if (name == "__metadata__" || slots_.count(name) != 0) {
      throw Malformed("two entries for " + printable(name));
    }
    slots_[name].info = std::move(tensor);
  }
  FileDescriptor file(::open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (file.get() < 0) fail(path);
#ifdef __linux__
  // A full disk is told now rather than after minutes; file systems that cannot reserve say so.
  int result = 0;
  do {
    result = ::fallocate(file.get(), 0, 0, static_cast<off_t>(bytes));
  } while (result != 0 && errno == EINTR);
  const int refused = result == 0 || errno == EOPNOTSUPP || errno == ENOSYS ? 0 : errno;
#else
  const int refused = 0;
#endif
  file_ = file.get();
  try {
    if (refused != 0) throw std::system_error(refused, std::generic_category(), path);
    put(reinterpret_cast<const std::uint8_t*>(header.data()), header.size(), 0);
  } catch (const std::system_error&) {
    ::unlink(path.c_str());
    throw;
  }
  file.release();
}

Writer::~Writer() { discard(); }

void Writer::discard() {
  if (file_ >= 0) ::close(std::exchange(file_, -1));
}

bool Writer::write(const std::string& name, const std::uint8_t* source, std::size_t source_bytes) {
  Claim claim(this, name);
  const TensorInfo& info = claim.info();
  if (source_bytes != info.end - info.begin) {
    throw std::invalid_argument("tensor " + printable(name) + " takes " +
                                std::to_string(info.end - info.begin) + " bytes, got " +
                                std::to_string(source_bytes));
  }
  bool finite = true;
  for (std::size_t at = 0; at < source_bytes; at += kBlockBytes) {
    const std::size_t bytes = std::min(kBlockBytes, source_bytes - at);
    finite &= all_finite(info.dtype, source + at, bytes);
    put(source + at, bytes, info.begin + at);
    if ((at + bytes) % kWritebackBytes == 0) {
      start_writeback(info.begin + at + bytes - kWritebackBytes, info.begin + at + bytes);
    }
  }
  start_writeback(info.begin, info.end);
  claim.keep();
  return finite;
}

bool Writer::write(const std::string& name, const std::uint8_t* source, std::size_t source_bytes,
                   int axis, const std::int64_t* keep, std::size_t count) {
  Claim claim(this, name);
  const TensorInfo& info = claim.info();
  const std::size_t item = item_bytes(info.dtype), rank = info.shape.size();
  if (item == 0 || axis < 0 || axis > 1 || rank < 1 || rank > 2 ||
      static_cast<std::size_t>(axis) >= rank ||
      info.shape[static_cast<std::size_t>(axis)] != count) {
    throw std::invalid_argument("tensor " + printable(name) + " has no axis " +
                                std::to_string(axis) + " of " + std::to_string(count) +
                                " whole items");
  }
  // The length of the axis that is not cut is the same before and after.
  const std::size_t other = rank == 2 ? info.shape[1 - static_cast<std::size_t>(axis)] : 1;
  const std::size_t index_bytes = other * item;
  if (index_bytes == 0 ? source_bytes != 0 : source_bytes % index_bytes != 0) {
    throw std::invalid_argument("tensor " + printable(name) + " cannot be cut from " +
                                std::to_string(source_bytes) + " bytes");
  }
  bool finite = true;
  if (index_bytes > 0) {
    const std::size_t indices = source_bytes / index_bytes;
    const Selection selection =
        axis == 0 ? Selection::of_rows(indices, index_bytes, keep, count, kBlockBytes)
                  : Selection::of_columns(other, indices, item, keep, count, kBlockBytes);
    std::vector<std::uint8_t> staged(selection.staging_bytes());
    std::uint64_t on_its_way = info.begin;
    for (std::size_t piece = 0; piece < selection.pieces(); ++piece) {
      const std::size_t bytes = selection.piece_bytes(piece);
      const std::uint64_t offset = info.begin + selection.piece_begin(piece);
      selection.gather(piece, source, staged.data());
      finite &= all_finite(info.dtype, staged.data(), bytes);
      put(staged.data(), bytes, offset);
      if (offset + bytes - on_its_way >= kWritebackBytes) {
        start_writeback(on_its_way, offset + bytes);
        on_its_way = offset + bytes;
      }
    }
    start_writeback(on_its_way, info.end);
  }
  claim.keep();
  return finite;
}

void Writer::close() {
  std::vector<std::string> missing;
  for (const auto& [name, slot] : slots_) {
    if (!slot.written) missing.push_back(name);
  }
  if (!missing.empty()) {
    throw std::invalid_argument("tensor " +
                                printable(*std::min_element(missing.begin(), missing.end())) +
                                " was not written");
  }
  if (file_ >= 0 && ::close(std::exchange(file_, -1)) != 0) fail(path_);
}

Writer::Claim::Claim(Writer* writer, const std::string& name) {
  const auto found = writer->slots_.find(name);
  if (found == writer->slots_.end()) {
    throw std::invalid_argument("no tensor " + printable(name));
  }
  if (writer->file_ < 0) throw std::invalid_argument("the file is closed");
  if (found->second.written.exchange(true)) {
    throw std::invalid_argument("tensor " + printable(name) + " was written already");
  }
  slot_ = &found->second;
}

Writer::Claim::~Claim() {
  if (!kept_) slot_->written = false;
}

void Writer::put(const std::uint8_t* bytes, std::size_t count, std::uint64_t offset) const {
  while (count > 0) {
    const ssize_t done = ::pwrite(file_, bytes, count, static_cast<off_t>(offset));
    if (done < 0) {
      if (errno == EINTR) continue;
      fail(path_);
    }
    bytes += done;
    count -= static_cast<std::size_t>(done);
    offset += static_cast<std::uint64_t>(done);
  }
}

void Writer::start_writeback([[maybe_unused]] std::uint64_t begin,
                             [[maybe_unused]] std::uint64_t end) const {
#ifdef __linux__
  if (begin < end) {
    (void)::sync_file_range(file_, static_cast<off_t>(begin), static_cast<off_t>(end - begin),
                            SYNC_FILE_RANGE_WRITE);
  }
#endif
}

}  // namespace hfprune
