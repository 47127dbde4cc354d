// Safetensors files: mapped for reading, written tensor by tensor in any order. POSIX.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string>
#include <unordered_map>
#include <vector>

#include "header.h"

namespace hfprune {

// A file, mapped read-only, whose header has been checked. A file that another process truncates
// while it is mapped ends this process when the lost part is read (SIGBUS).
class MappedFile {
 public:
  // Throws std::system_error if it cannot be opened or mapped, Malformed if it is no safetensors
  // file.
  explicit MappedFile(const std::string& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  const std::uint8_t* data() const { return data_; }
  std::size_t bytes() const { return bytes_; }
  const Header& header() const { return header_; }

  // Hints: these bytes will be read soon; their pages need not stay in this process's memory.
  void will_need(std::size_t begin, std::size_t end) const;
  void done_with(std::size_t begin, std::size_t end) const;

 private:
  void advise(std::size_t begin, std::size_t end, int advice, bool whole_pages) const;

  std::uint8_t* data_ = nullptr;
  std::size_t bytes_ = 0;
  Header header_;
};

// The file being written. Different tensors may be written by different threads at once.
class Writer {
 public:
  // Makes the file, which must not exist, and reserves its whole size where the system can.
  // `tensors` are name, dtype and shape in the order of their data.
  // Throws std::system_error (no room, no permission), Malformed (dtype, shape or names).
  Writer(const std::string& path, const Metadata& metadata, std::vector<TensorInfo> tensors);
  ~Writer();
  Writer(const Writer&) = delete;
  Writer& operator=(const Writer&) = delete;

  // Write a tensor that is `source`, or what is left of it when along `axis`, 0 or 1, only the
  // `count` indices at `keep` stay. The sizes of `source` follow from the tensor's shape.
  // Returns false if a value written is NaN or infinite (F64, F32, BF16 and F16 are looked at).
  // Throws std::invalid_argument (unknown name, written already, sizes that do not fit, bad keep)
  // before anything is written; std::system_error.
  bool write(const std::string& name, const std::uint8_t* source, std::size_t source_bytes);
  bool write(const std::string& name, const std::uint8_t* source, std::size_t source_bytes,
             int axis, const std::int64_t* keep, std::size_t count);

  // Throws std::invalid_argument if a tensor is missing, std::system_error if the system refuses.
  // The bytes are on their way to the disk, not yet sure to be there: fsync is the caller's.
  void close();

  // Closes the file as it is, after something went wrong.
  void discard();

 private:
  struct Slot {
    TensorInfo info;
    std::atomic<bool> written{false};
  };

  // A tensor that is being written. It counts as written from here on, unless writing fails.
  class Claim {
   public:
    Claim(Writer* writer, const std::string& name);
    ~Claim();
    Claim(const Claim&) = delete;
    Claim& operator=(const Claim&) = delete;
    const TensorInfo& info() const { return slot_->info; }
    void keep() { kept_ = true; }

   private:
    Slot* slot_;
    bool kept_ = false;
  };

  void put(const std::uint8_t* bytes, std::size_t count, std::uint64_t offset) const;
  void start_writeback(std::uint64_t begin, std::uint64_t end) const;

  std::string path_;
  int file_ = -1;
  std::unordered_map<std::string, Slot> slots_;
};

}  // namespace hfprune
