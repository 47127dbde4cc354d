// Runs independent pieces of work in the threads of the process's OpenMP, which torch uses too.
#pragma once

#include <cstddef>
#include <functional>

namespace hfprune {

// Call piece(0), ..., piece(pieces - 1), each once, in at most `threads` threads and in any order.
// The threads are those of the GNU or LLVM OpenMP that is loaded, so that no second pool competes
// with torch's; without one, they are started and joined. `piece` must not throw.
void in_parallel(unsigned threads, std::size_t pieces,
                 const std::function<void(std::size_t)>& piece);

}  // namespace hfprune
