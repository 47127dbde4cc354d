// write() from several threads at once, against the same reference.
#include <fcntl.h>

#include <system_error>
#include <thread>

#include "check.h"
#include "write.h"

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
