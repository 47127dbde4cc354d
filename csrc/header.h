// The header of a safetensors file: text that nobody vouches for, and its counterpart for writing.
//
//     8 bytes   N, little-endian
//     N bytes   {"__metadata__": {"key": "text", ...},
//                "name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}
//     the rest  the tensors' data, which offsets count from, without holes or overlaps
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace hfprune {

// What is wrong with a file: a clause that names the tensor, to follow the file's name.
struct Malformed : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct TensorInfo {
  std::string name, dtype;
  std::vector<std::uint64_t> shape;
  std::uint64_t begin, end;  // bytes from the start of the file
};

using Metadata = std::optional<std::map<std::string, std::string>>;

struct Header {
  Metadata metadata;
  std::vector<TensorInfo> tensors;  // in the order of their data
};

// Parse and check the header of a file of `file_bytes` bytes at `file`. Afterwards each tensor lies
// inside the file, has exactly the bytes that its dtype and shape call for, and shares none.
// Throws Malformed.
Header parse_header(const std::uint8_t* file, std::uint64_t file_bytes);

// The first 8 + N bytes of a file with these tensors, whose begin and end are set, in their order.
// N is padded with spaces so that the data start at a multiple of 64 bytes.
// Throws Malformed for an unknown dtype, a size that overflows or a name that is not UTF-8.
std::string format_header(const Metadata& metadata, std::vector<TensorInfo>* tensors);

// Bytes of one item of a dtype; 0 for those of less than a byte. Throws Malformed if unknown.
std::size_t item_bytes(const std::string& dtype);

// A name as part of an error message: one line of printable characters, not too long.
std::string printable(const std::string& name);

}  // namespace hfprune
