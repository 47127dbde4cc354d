#include "compact.h"

#include <algorithm>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <thread>

#ifdef __linux__
#include <pthread.h>
#include <sched.h>
#endif

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#endif

namespace hfprune {
namespace {

constexpr unsigned kMaxThreads = 8;  // memory is no faster for more
// A thread is not worth its start for less.
constexpr std::size_t kBytesPerThread = 1024 * 1024;
// Larger results do not stay in the cache anyway, and storing past it saves reading them first.
constexpr std::size_t kStreamedBytes = 8 * 1024 * 1024;

#if defined(__x86_64__) && defined(__GNUC__)

// Like memmove for `out` before `from`, but past the cache; the caller fences.
void stream(std::uint8_t* out, const std::uint8_t* from, std::size_t bytes) {
  const std::size_t head =
      std::min(bytes, static_cast<std::size_t>(-reinterpret_cast<std::uintptr_t>(out)) % 64);
  std::memmove(out, from, head);
  std::size_t at = head;
  for (; at + 64 <= bytes; at += 64) {
    for (std::size_t part = at; part < at + 64; part += 16) {
      const auto value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + part));
      _mm_stream_si128(reinterpret_cast<__m128i*>(out + part), value);
    }
  }
  std::memmove(out + at, from + at, bytes - at);
}

void fence() { _mm_sfence(); }

#else

void stream(std::uint8_t* out, const std::uint8_t* from, std::size_t bytes) {
  std::memmove(out, from, bytes);
}

void fence() {}

#endif

// Hands out pieces in order. In place, a piece may only be written where everything has been read.
class PieceQueue {
 public:
  explicit PieceQueue(const Selection& selection)
      : selection_(selection), read_(selection.pieces(), false) {}

  bool take(std::size_t* piece) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (next_ == read_.size()) return false;
    *piece = next_++;
    return true;
  }

  void has_been_read(std::size_t piece) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      read_[piece] = true;
      while (all_read_ < read_.size() && read_[all_read_]) ++all_read_;
    }
    changed_.notify_all();
  }

  // Return when the place of `piece` holds no bytes of an earlier one that are still to be read; it
  // holds none of a later one. Some pieces from the start, those are far behind.
  void wait_for_place(std::size_t piece) {
    const std::size_t end = selection_.piece_begin(piece) + selection_.piece_bytes(piece);
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait(lock,
                  [&] { return all_read_ >= piece || selection_.piece_source(all_read_) >= end; });
  }

 private:
  const Selection& selection_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<bool> read_;
  std::size_t next_ = 0, all_read_ = 0;
};

// A new thread begins on the processor of the one that made it, where some schedulers leave it for
// longer than all of this takes.
void move_away([[maybe_unused]] std::thread* thread) {
#ifdef __linux__
  cpu_set_t allowed;
  const int here = sched_getcpu();
  if (here < 0 || sched_getaffinity(0, sizeof allowed, &allowed) != 0) return;
  CPU_CLR(static_cast<std::size_t>(here), &allowed);
  if (CPU_COUNT(&allowed) > 0) {
    (void)pthread_setaffinity_np(thread->native_handle(), sizeof allowed, &allowed);
  }
#endif
}

}  // namespace

std::size_t piece_bytes_for(unsigned threads) {
  return std::min(kStagingBytes / 2, kStagingBytes / std::clamp(threads, 1u, kMaxThreads)) / 64 *
         64;
}

void compact(const Selection& selection, const std::uint8_t* source, std::uint8_t* out,
             unsigned threads) {
  const std::size_t pieces = selection.pieces(), bytes = selection.kept_bytes();
  if (pieces == 0 || (source == out && bytes == selection.source_bytes())) return;
  const std::size_t useful =
      std::min({static_cast<std::size_t>(std::clamp(threads, 1u, kMaxThreads)), pieces,
                bytes / kBytesPerThread + 1});
  const bool in_place = source == out, streamed = bytes >= kStreamedBytes;
  const bool staged = !selection.long_runs();
  PieceQueue queue(selection);
  // All that can fail for want of memory comes before the first byte is moved.
  std::vector<std::vector<std::uint8_t>> staging(
      useful, std::vector<std::uint8_t>(staged ? selection.staging_bytes() : 0));
  std::vector<std::thread> others;
  others.reserve(useful);

  const auto put = [&](std::size_t place, const std::uint8_t* from, std::size_t size) {
    if (streamed) {
      stream(out + place, from, size);
    } else {
      std::memmove(out + place, from, size);
    }
  };
  const auto work = [&](std::uint8_t* buffer) {
    std::size_t piece = 0;
    while (queue.take(&piece)) {
      if (staged) {
        selection.gather(piece, source, buffer);
        if (in_place) {
          queue.has_been_read(piece);
          queue.wait_for_place(piece);
        }
        put(selection.piece_begin(piece), buffer, selection.piece_bytes(piece));
      } else {
        if (in_place) queue.wait_for_place(piece);
        selection.each_run(piece, [&](std::size_t begin, std::size_t place, std::size_t size) {
          put(place, source + begin, size);
        });
        if (in_place) queue.has_been_read(piece);
      }
    }
    if (streamed) fence();
  };
  for (std::size_t i = 1; i < useful; ++i) {
    try {
      others.emplace_back(work, staging[i].data());
      move_away(&others.back());
    } catch (const std::exception&) {
      break;  // fewer threads do the same
    }
  }
  work(staging[0].data());
  for (std::thread& thread : others) thread.join();
}

}  // namespace hfprune
