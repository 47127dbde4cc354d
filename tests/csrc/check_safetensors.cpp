// The safetensors reader against hostile files, and the writer against naive bytes. Built by
// csrc/CMakeLists.txt and run under sanitizers by test_csrc.py: check_safetensors FOLDER [FILES]
#include <algorithm>
#include <cctype>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "header.h"
#include "safetensors.h"

namespace {

using hfprune::Header;
using hfprune::Malformed;
using hfprune::MappedFile;
using hfprune::Metadata;
using hfprune::TensorInfo;
using hfprune::Writer;

std::mt19937_64 rng(20240608);

std::size_t below(std::size_t n) { return static_cast<std::size_t>(rng() % n); }

template <typename Items>
auto any_of_these(const Items& items) {
  return items[below(std::size(items))];
}

[[noreturn]] void fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  std::exit(1);
}

void require(bool good, const std::string& what) {
  if (!good) fail(what);
}

std::string le64(std::uint64_t value) {
  std::string result;
  for (int i = 0; i < 8; ++i) result.push_back(static_cast<char>(value >> 8 * i & 0xFF));
  return result;
}

const std::map<std::string, unsigned> kBits = {
    {"BOOL", 8},    {"U8", 8},      {"I8", 8},      {"F4", 4},      {"F6_E2M3", 6},
    {"F6_E3M2", 6}, {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"I16", 16},    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"F8_E5M2FNUZ", 8},
    {"I32", 32},    {"U32", 32},    {"F32", 32},    {"C64", 64},    {"F64", 64},
    {"I64", 64},    {"U64", 64}};

// The code points of UTF-8 text; false if it is none.
bool decode(const std::string& text, std::vector<std::uint32_t>* codes) {
  for (std::size_t at = 0; at < text.size();) {
    const auto lead = static_cast<unsigned char>(text[at++]);
    const int more = lead < 0x80   ? 0
                     : lead < 0xC0 ? -1
                     : lead < 0xE0 ? 1
                     : lead < 0xF0 ? 2
                     : lead < 0xF8 ? 3
                                   : -1;
    if (more < 0) return false;
    std::uint32_t code = more == 0 ? lead : lead & (0x3Fu >> more);
    for (int i = 0; i < more; ++i) {
      if (at == text.size() || (static_cast<unsigned char>(text[at]) & 0xC0) != 0x80) return false;
      code = code << 6 | (static_cast<unsigned char>(text[at++]) & 0x3Fu);
    }
    constexpr std::uint32_t smallest[] = {0, 0x80, 0x800, 0x10000};
    if (code < smallest[more] || code > 0x10FFFF || (code >= 0xD800 && code <= 0xDFFF))
      return false;
    codes->push_back(code);
  }
  return true;
}

bool is_utf8(const std::string& text) {
  std::vector<std::uint32_t> codes;
  return decode(text, &codes);
}

// No control characters (C1 as well: U+009B starts a terminal's escape sequence) and no line ends.
bool is_printable_line(const std::string& text) {
  std::vector<std::uint32_t> codes;
  return decode(text, &codes) && std::all_of(codes.begin(), codes.end(), [](std::uint32_t code) {
           return code >= 0x20 && (code < 0x7F || code >= 0xA0) && code != 0x2028 && code != 0x2029;
         });
}

bool same(const Header& a, const Header& b) {
  return a.metadata == b.metadata && a.tensors.size() == b.tensors.size() &&
         std::equal(a.tensors.begin(), a.tensors.end(), b.tensors.begin(),
                    [](const TensorInfo& x, const TensorInfo& y) {
                      return x.name == y.name && x.dtype == y.dtype && x.shape == y.shape &&
                             x.begin == y.begin && x.end == y.end;
                    });
}

// What parse_header promises of a file that it accepts.
void check_accepted(const Header& header, const std::string& file, const std::string& where) {
  std::uint64_t expected = 0;
  for (int i = 7; i >= 0; --i)
    expected = expected << 8 | static_cast<unsigned char>(file[static_cast<std::size_t>(i)]);
  expected += 8;
  std::set<std::string> names;
  for (const TensorInfo& tensor : header.tensors) {
    require(tensor.begin == expected && tensor.end >= tensor.begin && tensor.end <= file.size(),
            where + ": a tensor's place");
    expected = tensor.end;
    require(names.insert(tensor.name).second && tensor.name != "__metadata__", where + ": names");
    require(is_utf8(tensor.name), where + ": a name that is not UTF-8");
    require(kBits.count(tensor.dtype) == 1, where + ": a dtype");
    const bool empty = std::count(tensor.shape.begin(), tensor.shape.end(), 0u) > 0;
    std::uint64_t bits = kBits.at(tensor.dtype);
    for (const std::uint64_t size : tensor.shape) {
      require(empty || bits <= UINT64_MAX / size, where + ": a shape that overflows");
      bits *= size;
    }
    require(empty ? tensor.end == tensor.begin : bits == (tensor.end - tensor.begin) * 8,
            where + ": a tensor's size");
  }
  require(expected == file.size(), where + ": bytes behind the last tensor");
  if (header.metadata) {
    for (const auto& [key, value] : *header.metadata) {
      require(is_utf8(key) && is_utf8(value), where + ": metadata that are not UTF-8");
    }
  }
  // What was read can be written, and reads the same.
  std::vector<TensorInfo> tensors = header.tensors;
  std::string again = hfprune::format_header(header.metadata, &tensors);
  again.resize(tensors.empty() ? again.size() : tensors.back().end, '\0');
  const Header reread =
      hfprune::parse_header(reinterpret_cast<const std::uint8_t*>(again.data()), again.size());
  require(same(reread, {header.metadata, tensors}), where + ": format_header");
}

void save(const std::string& path, const std::string& bytes) {
  std::ofstream out(path, std::ios::binary | std::ios::trunc);
  out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
  require(static_cast<bool>(out.flush()), "cannot write " + path);
}

// Whether the file is accepted; fails unless it is that or Malformed.
bool open_hostile(const std::string& path, const std::string& file) {
  save(path, file);
  // A mapping ends in readable zeros; a heap block of the exact size ends where ASan looks.
  const std::unique_ptr<std::uint8_t[]> block(new std::uint8_t[file.size()]);
  std::memcpy(block.get(), file.data(), file.size());
  bool parsed = true;
  Header header;
  try {
    header = hfprune::parse_header(block.get(), file.size());
  } catch (const Malformed&) {
    parsed = false;
  }
  try {
    const MappedFile mapped(path);
    require(parsed && same(header, mapped.header()), path + ": mapped and parsed differ");
    require(mapped.bytes() == file.size(), path + ": bytes()");
    require(std::memcmp(mapped.data(), file.data(), file.size()) == 0, path + ": data()");
    mapped.will_need(0, file.size());
    mapped.done_with(below(file.size()), file.size());
    check_accepted(mapped.header(), file, path);
    return true;
  } catch (const Malformed& error) {
    const std::string what = error.what();
    require(!parsed, path + ": mapped and parsed differ");
    require(!what.empty() && what.size() < 1000,
            path + ": a message of " + std::to_string(what.size()) + " bytes");
    require(is_printable_line(what), path + ": a message that is not one printable line");
    return false;
  } catch (const std::exception& error) {
    fail(path + ": " + error.what());
  }
}

struct Parts {
  std::string header, data;
  std::string file() const { return le64(header.size()) + header + data; }
};

Parts valid(const Metadata& metadata, std::vector<TensorInfo> tensors) {
  const std::string header = hfprune::format_header(metadata, &tensors);
  std::string data(tensors.empty() ? 0 : tensors.back().end - header.size(), '\0');
  for (char& byte : data) byte = static_cast<char>(rng());
  return {header.substr(8), data};
}

std::vector<Parts> valid_files() {
  const std::string odd = "quote\" slash\\ tab\t \x01 \xC3\xA9 \xE2\x82\xAC \xF0\x9F\x98\x80";
  std::vector<Parts> files = {
      valid({}, {}),
      valid(std::map<std::string, std::string>{}, {{"a", "U8", {3}, 0, 0}}),
      valid(std::map<std::string, std::string>{{"format", "pt"}, {odd, odd}},
            {{"model.layers.0.mlp.up_proj.weight", "BF16", {4, 3}, 0, 0},
             {odd, "F32", {2}, 0, 0},
             {"scalar", "F64", {}, 0, 0}}),
      valid({}, {{"empty", "F32", {0, 7}, 0, 0},
                 {"x", "F16", {2, 2}, 0, 0},
                 {"none", "I64", {0}, 0, 0},
                 {"y", "F4", {6}, 0, 0},
                 {"z", "F6_E2M3", {4}, 0, 0},
                 {"end", "BOOL", {1, 0}, 0, 0}}),
      {R"( { "b" : {"shape":[2],"data_offsets":[1,3],"dtype":"I8"}, "\ud83d\ude00\u00e9\/\b":
          {"dtype":"U8","data_offsets":[0,1],"shape":[1,1]} , "__metadata__" : { } } )",
       "abc"},
      {"{}", ""}};
  std::vector<TensorInfo> many;
  for (int i = 0; i < 20; ++i) many.push_back({"t" + std::to_string(i), "I16", {1, 2}, 0, 0});
  files.push_back(valid({}, many));
  return files;
}

// Offsets of the header's tokens, as a lexer that does not mind errors sees them, and its end.
std::vector<std::size_t> tokens(const std::string& text) {
  std::vector<std::size_t> result;
  for (std::size_t at = 0; at < text.size();) {
    result.push_back(at);
    const char c = text[at++];
    if (c == '"') {
      while (at < text.size() && text[at] != '"') at += text[at] == '\\' ? 2 : 1;
      at = std::min(at + 1, text.size());
    } else if (std::isalnum(static_cast<unsigned char>(c))) {
      while (at < text.size() && std::isalnum(static_cast<unsigned char>(text[at]))) ++at;
    }
  }
  result.push_back(text.size());
  return result;
}

const std::vector<std::string> kNumbers = {"0",
                                           "1",
                                           "2",
                                           "3",
                                           "4",
                                           "8",
                                           "-1",
                                           "-0",
                                           "00",
                                           "01",
                                           "+1",
                                           "1.0",
                                           "1e3",
                                           "1e400",
                                           "0x10",
                                           "",
                                           "null",
                                           "true",
                                           "9223372036854775807",
                                           "9223372036854775808",
                                           "18446744073709551615",
                                           "18446744073709551616",
                                           "4294967296",
                                           "2305843009213693952",
                                           "4611686018427387904",
                                           "99999999999999999999999999999999"};
const std::vector<std::string> kStrings = {"\"F32\"",
                                           "\"BF16\"",
                                           "\"I16\"",
                                           "\"U8\"",
                                           "\"F4\"",
                                           "\"F99\"",
                                           "\"f32\"",
                                           "\"\"",
                                           "\"dtype\"",
                                           "\"shape\"",
                                           "\"data_offsets\"",
                                           "\"__metadata__\"",
                                           "\"a\"",
                                           "\"x\"",
                                           "\"\\ud800\"",
                                           "\"\\udc00\\ud800\"",
                                           "\"\\ud800\\u0041\"",
                                           "\"\\u12\"",
                                           "\"\\x41\"",
                                           "\"\\u0000\"",
                                           "\"\\u000a\"",
                                           "\"\\u009b31m\"",
                                           "\"\\u2028\"",
                                           "\"\xC2\x85\"",
                                           "\"\xFF\"",
                                           "\"\xC0\xAF\"",
                                           "\"\xED\xA0\x80\"",
                                           "\"\xF4\x90\x80\x80\"",
                                           "\"\xE2\x82\"",
                                           "\"\n\"",
                                           "\"",
                                           "\"\\",
                                           "nul",
                                           "[]",
                                           "{}",
                                           "[1]",
                                           "{\"a\":1}",
                                           ",",
                                           ":",
                                           "\xEF\xBB\xBF"};

// Names in an object whose faults the tokens' mutations would seldom meet.
Parts faulty_layout() {
  const std::vector<std::string> dtypes = {"U8", "BF16", "F32", "F64", "F4", "Q8", "F6_E3M2"};
  std::string header = "{";
  std::uint64_t end = 0;
  const std::size_t count = 1 + below(5);
  for (std::size_t i = 0; i < count; ++i) {
    const std::string dtype = dtypes[below(4)];
    std::uint64_t rows = below(4), columns = 1 + below(4), begin = end;
    end += rows * columns * kBits.at(dtype) / 8;
    std::uint64_t said = end;
    std::string shown = dtype, name = "t" + std::to_string(i);
    switch (below(16)) {
      case 0:
        begin += 1;
        break;  // a hole
      case 1:
        begin -= std::min<std::uint64_t>(begin, 1 + below(4));
        break;  // an overlap
      case 2:
        said += 1 + below(1000);
        break;  // out of the file
      case 3:
        said = INT64_MAX;
        break;
      case 4:
        rows = std::uint64_t{1} << 62;
        break;  // a product that wraps to 0
      case 5:
        rows = columns = std::uint64_t{1} << 32;
        break;
      case 6:
        std::swap(begin, said);
        break;
      case 7:
        shown = any_of_these(dtypes);
        break;
      case 8:
        name = "t0";
        break;
      case 9:
        name = std::string(below(3000), 'n') + "\\u00e9\xC2\x9B";
        break;
      default:
        break;
    }
    header += (i == 0 ? "\"" : ",\"") + name + R"(":{"dtype":")" + shown + R"(","shape":[)" +
              std::to_string(rows) + "," + std::to_string(columns) + R"(],"data_offsets":[)" +
              std::to_string(begin) + "," + std::to_string(said) + "]}";
  }
  return {header + "}", std::string(end, 'd')};
}

std::string deep_header() {
  const std::size_t depth = below(4) == 0 ? 100'000 : 1 + below(3000);
  const std::vector<std::string> openings = {"[", "{\"a\":", "{\"a\":{\"shape\":[",
                                             "[{\"__metadata__\":"};
  const std::string opening = any_of_these(openings);
  std::string result = below(2) == 0 ? "" : R"({"t":{"dtype":"U8","shape":)";
  for (std::size_t i = 0; i < depth; ++i) result += opening;
  return below(2) == 0 ? result : result + std::string(depth, ']');
}

void splice(std::string* text, std::size_t begin, std::size_t end, std::size_t to) {
  const std::string slice = text->substr(begin, end - begin);
  switch (below(3)) {
    case 0:
      text->erase(begin, end - begin);
      break;
    case 1:
      text->insert(to, slice);
      break;
    default:
      text->erase(begin, end - begin);
      text->insert(std::min(to, text->size()), slice);
  }
}

// Replace a token that starts with one of `first`.
void replace_token(std::string* text, const char* first, const std::string& with) {
  const std::vector<std::size_t> at = tokens(*text);
  for (int attempt = 0; attempt < 60 && at.size() > 1; ++attempt) {
    const std::size_t i = below(at.size() - 1);
    if (std::strchr(first, (*text)[at[i]]) == nullptr || (*text)[at[i]] == '\0') continue;
    text->replace(at[i], at[i + 1] - at[i], with);
    return;
  }
}

void mutate(Parts* parts) {
  std::string& header = parts->header;
  if (header.empty()) return;
  const char* digits = "0123456789";
  switch (below(9)) {
    case 0:  // bit flips
      for (std::size_t i = 1 + below(4); i > 0; --i) {
        char& byte = header[below(header.size())];
        byte = static_cast<char>(byte ^ (1 << below(8)));
      }
      break;
    case 1:
      header[below(header.size())] = static_cast<char>(rng());
      break;
    case 2:
      header[below(header.size())] = "\"\\{}[]:,0 \n\0"[below(12)];
      break;
    case 3:
      replace_token(&header, digits, any_of_these(kNumbers));
      break;
    case 4:
      replace_token(&header, "\"", any_of_these(kStrings));
      break;
    case 5: {
      const std::vector<std::size_t> at = tokens(header);
      const std::size_t first = below(at.size()), last = std::min(first + below(14), at.size() - 1);
      splice(&header, at[first], at[last], any_of_these(at));
      break;
    }
    case 6: {
      const std::size_t begin = below(header.size());
      splice(&header, begin, begin + below(header.size() - begin + 1), below(header.size() + 1));
      break;
    }
    case 7:
      header.insert(below(header.size() + 1), any_of_these(kStrings));
      break;
    default:
      parts->data.resize(
          parts->data.size() + 8 - std::min<std::size_t>(below(17), 8 + parts->data.size()), 'x');
  }
}

std::string hostile_file(const std::vector<Parts>& seeds) {
  Parts parts = any_of_these(seeds);
  if (below(150) == 0) return Parts{deep_header(), parts.data}.file();
  if (below(6) == 0) {
    parts = faulty_layout();
    if (below(2) == 0) return parts.file();
  }
  for (std::size_t i = below(4); i > 0; --i) mutate(&parts);
  std::string file = parts.file();
  switch (below(12)) {
    case 0:
      file.resize(below(file.size() + 1));
      break;
    case 1: {
      const std::uint64_t lengths[] = {0,
                                       1,
                                       parts.header.size() - 1,
                                       parts.header.size() + 1,
                                       file.size(),
                                       file.size() - 8,
                                       file.size() - 7,
                                       100'000'000,
                                       100'000'001,
                                       1ull << 32,
                                       1ull << 63,
                                       ~0ull,
                                       ~0ull - 7,
                                       below(1000)};
      file.replace(0, 8, le64(any_of_these(lengths)));
      break;
    }
    case 2: {
      char& byte = file[below(file.size())];
      byte = static_cast<char>(byte ^ (1 << below(8)));
      break;
    }
    default:
      break;
  }
  return file;
}

void check_hostile(const std::string& folder, std::size_t count) {
  const std::string path = folder + "/hostile.safetensors";
  const std::vector<Parts> seeds = valid_files();
  for (const Parts& seed : seeds)
    require(open_hostile(path, seed.file()), "a valid file was rejected");
  std::size_t accepted = 0;
  for (std::size_t i = 0; i < count; ++i) accepted += open_hostile(path, hostile_file(seeds));
  std::printf("%zu hostile files: %zu accepted, %zu rejected\n", count, accepted, count - accepted);
  require(count < 1000 || (accepted > 100 && count - accepted > 100), "one kind is missing");
}

struct Part {
  TensorInfo info;
  int axis;  // -1: whole
  std::vector<std::int64_t> keep;
  std::string source, expected;
};

// As the C library sees it, where it knows the type.
bool finite(const std::string& dtype, const char* item) {
  if (dtype == "F64") {
    double value;
    std::memcpy(&value, item, sizeof value);
    return std::isfinite(value);
  }
  if (dtype == "F32" || dtype == "BF16") {
    char wide[4] = {0, 0, 0, 0};
    const std::size_t size = dtype == "F32" ? 4 : 2;
    std::memcpy(wide + 4 - size, item, size);
    float value;
    std::memcpy(&value, wide, sizeof value);
    return std::isfinite(value);
  }
  return dtype != "F16" || (static_cast<unsigned char>(item[1]) & 0x7C) != 0x7C;
}

Part part(const std::string& name, const std::string& dtype, std::size_t rows, std::size_t columns,
          int axis) {
  Part result{{name, dtype, {rows, columns}, 0, 0}, axis, {}, "", ""};
  const std::size_t item = kBits.at(dtype) / 8;
  result.source.resize((rows * columns * item + 7) / 8 * 8);
  for (std::size_t at = 0; at < result.source.size(); at += 8) {
    const std::uint64_t word = rng() & 0xBF7FBF7FBF7FBF7Full;  // most exponents are not full
    std::memcpy(&result.source[at], &word, 8);
  }
  result.source.resize(rows * columns * item);
  for (std::size_t at = 0; at < result.source.size(); at += item) {
    if (!finite(dtype, &result.source[at])) std::memset(&result.source[at], 0, item);
  }
  if (axis < 0) {
    result.expected = result.source;
    return result;
  }
  const std::size_t indices = axis == 0 ? rows : columns;
  for (std::size_t i = 0; i < indices; ++i) {
    if (i != 1 && below(5) != 0)
      result.keep.push_back(static_cast<std::int64_t>(i));  // 1 is dropped
  }
  result.info.shape[static_cast<std::size_t>(axis)] = result.keep.size();
  const std::size_t outer = axis == 0 ? 1 : rows, inner = axis == 0 ? columns * item : item;
  for (std::size_t i = 0; i < outer; ++i) {
    for (const std::int64_t index : result.keep) {
      result.expected.append(result.source, (i * indices + static_cast<std::size_t>(index)) * inner,
                             inner);
    }
  }
  return result;
}

const std::uint8_t* bytes_of(const std::string& text) {
  return reinterpret_cast<const std::uint8_t*>(text.data());
}

bool write(Writer* writer, const Part& part) {
  if (part.axis < 0)
    return writer->write(part.info.name, bytes_of(part.source), part.source.size());
  return writer->write(part.info.name, bytes_of(part.source), part.source.size(), part.axis,
                       part.keep.data(), part.keep.size());
}

std::vector<TensorInfo> infos(const std::vector<Part>& parts) {
  std::vector<TensorInfo> result;
  for (const Part& part : parts) result.push_back(part.info);
  return result;
}

void check_round_trip(const std::string& path) {
  const Metadata metadata =
      std::map<std::string, std::string>{{"format", "pt"}, {"\xE2\x82\xAC\n", "\"\\"}};
  std::vector<Part> parts = {part("long", "F32", 1100, 4003, -1),
                             part("cut", "BF16", 1003, 4099, 1)};
  const std::vector<std::string> dtypes = {"F64", "F32", "BF16", "F16", "I8", "U64"};
  for (const std::string& dtype : dtypes) {
    for (const int axis : {-1, 0, 1}) {
      parts.push_back(part(dtype + std::to_string(axis) + "\xC3\xA9\"\t", dtype, 37, 53, axis));
      parts.push_back(part(dtype + std::to_string(axis) + " wide", dtype, 301, 517, axis));
      parts.push_back(
          part(dtype + std::to_string(axis) + " column", dtype, 999, axis == 1 ? 3 : 1, axis));
    }
  }
  parts.push_back(part("empty", "F32", 0, 5, -1));
  parts.push_back(part("vector", "F16", 4001, 1, 0));
  parts.back().info.shape.pop_back();
  std::remove(path.c_str());
  Writer writer(path, metadata, infos(parts));
  std::vector<std::thread> threads;
  for (std::size_t first = 0; first < 4; ++first) {
    threads.emplace_back([&, first] {
      for (std::size_t i = first; i < parts.size(); i += 4) {
        require(write(&writer, parts[i]), parts[i].info.name + ": all values are finite");
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  writer.close();
  const MappedFile file(path);
  require(file.header().metadata == metadata, "round trip: metadata");
  require(file.header().tensors.size() == parts.size(), "round trip: tensors");
  for (std::size_t i = 0; i < parts.size(); ++i) {
    const TensorInfo& info = file.header().tensors[i];
    const std::string& expected = parts[i].expected;
    require(info.name == parts[i].info.name && info.dtype == parts[i].info.dtype &&
                info.shape == parts[i].info.shape && info.end - info.begin == expected.size(),
            "round trip: header of " + info.name);
    require(std::memcmp(file.data() + info.begin, expected.data(), expected.size()) == 0,
            "round trip: bytes of " + info.name);
  }
  std::printf("%zu tensors made the round trip\n", parts.size());
}

// A value that is not finite is told wherever it is kept, and nowhere else.
void check_finite(const std::string& path) {
  struct Value {
    const char* dtype;
    std::uint64_t bits;
    bool finite;
  };
  const Value values[] = {{"F64", 0x7FF0000000000000, false},
                          {"F64", 0xFFF0000000000000, false},
                          {"F64", 0x7FF0000000000001, false},
                          {"F64", 0x7FEFFFFFFFFFFFFF, true},
                          {"F32", 0x7F800000, false},
                          {"F32", 0xFF800000, false},
                          {"F32", 0x7FC00000, false},
                          {"F32", 0xFF7FFFFF, true},
                          {"BF16", 0x7F80, false},
                          {"BF16", 0xFFC1, false},
                          {"BF16", 0x7F7F, true},
                          {"F16", 0x7C00, false},
                          {"F16", 0xFE00, false},
                          {"F16", 0x7BFF, true},
                          {"I32", 0x7F800000, true},
                          {"U8", 0xFF, true},
                          {"I16", 0x7C00, true}};
  std::size_t cases = 0;
  for (const Value& value : values) {
    for (const int axis : {-1, 0, 1}) {
      const std::size_t rows = 401, columns = 703, item = kBits.at(value.dtype) / 8;
      Part plain = part("w", value.dtype, rows, columns, axis);
      // The first, one behind the first block, the last kept, and one that a cut drops.
      const std::size_t last_row =
          axis == 0 ? static_cast<std::size_t>(plain.keep.back()) : rows - 1;
      const std::size_t last_column =
          axis == 1 ? static_cast<std::size_t>(plain.keep.back()) : columns - 1;
      const std::size_t first = axis < 0 ? 0 : static_cast<std::size_t>(plain.keep[0]);
      const std::size_t places[] = {axis == 0   ? first * columns
                                    : axis == 1 ? first
                                                : 0,
                                    last_row * columns + last_column, columns + 1};
      for (std::size_t p = 0; p < 3; ++p) {
        Part changed = plain;
        std::memcpy(&changed.source[places[p] * item], &value.bits, item);
        std::remove(path.c_str());
        Writer writer(path, {}, infos({changed}));
        const bool dropped = p == 2 && axis >= 0;
        require(write(&writer, changed) == (value.finite || dropped),
                std::string(value.dtype) + " axis " + std::to_string(axis) + " place " +
                    std::to_string(p));
        ++cases;
      }
    }
  }
  std::printf("%zu values were told finite or not\n", cases);
}

template <typename Error>
void must_throw(const std::string& what, const std::function<void()>& call) {
  try {
    call();
  } catch (const Error& error) {
    require(*error.what() != '\0', what + ": an empty message");
    return;
  } catch (const std::exception& error) {
    fail(what + ": another exception, " + error.what());
  }
  fail(what + " was accepted");
}

void check_errors(const std::string& folder) {
  using Bad = std::invalid_argument;
  const std::string path = folder + "/errors.safetensors";
  std::remove(path.c_str());
  const TensorInfo a{"a", "F32", {2, 3}, 0, 0}, b{"b", "U8", {4}, 0, 0},
      half{"half", "F4", {2, 2}, 0, 0};
  const std::string bytes(1000, '\0');
  const std::uint8_t* data = bytes_of(bytes);
  {
    Writer writer(path, {}, {a, b, half});
    must_throw<std::system_error>("an existing file", [&] { Writer(path, {}, {b}); });
    must_throw<Bad>("an unknown name", [&] { writer.write("c", data, 4); });
    must_throw<Bad>("too few bytes", [&] { writer.write("a", data, 23); });
    must_throw<Bad>("too many bytes", [&] { writer.write("a", data, 25); });
    const std::vector<std::int64_t> good = {0, 2};
    const std::vector<std::vector<std::int64_t>> bad = {
        {2, 0}, {1, 1}, {-1, 0}, {0, 5}, {0, INT64_MAX}};
    for (const auto& keep : bad) {
      must_throw<Bad>("bad rows", [&] { writer.write("a", data, 5 * 12, 0, keep.data(), 2); });
    }
    const std::vector<std::int64_t> three = {0, 2, 4}, wrong = {0, 4, 2};
    must_throw<Bad>("bad columns", [&] { writer.write("a", data, 2 * 5 * 4, 1, wrong.data(), 3); });
    must_throw<Bad>("too few rows kept",
                    [&] { writer.write("a", data, 5 * 12, 0, good.data(), 1); });
    must_throw<Bad>("part of a row",
                    [&] { writer.write("a", data, 5 * 12 + 4, 0, good.data(), 2); });
    must_throw<Bad>("part of a column",
                    [&] { writer.write("a", data, 2 * 5 * 4 + 4, 1, three.data(), 3); });
    must_throw<Bad>("axis 2", [&] { writer.write("a", data, 60, 2, good.data(), 2); });
    must_throw<Bad>("axis -1", [&] { writer.write("a", data, 60, -1, good.data(), 2); });
    must_throw<Bad>("axis 1 of a vector", [&] { writer.write("b", data, 8, 1, good.data(), 2); });
    must_throw<Bad>("half bytes", [&] { writer.write("half", data, 3, 0, good.data(), 2); });
    must_throw<Bad>("a missing tensor", [&] { writer.close(); });
    writer.write("a", data, 2 * 5 * 4, 1, three.data(), 3);
    must_throw<Bad>("a second write", [&] { writer.write("a", data, 24); });
    must_throw<Bad>("a second write, cut", [&] { writer.write("a", data, 60, 0, good.data(), 2); });
    must_throw<Bad>("two missing tensors", [&] { writer.close(); });
    writer.write("b", data, 4);
    writer.write("half", data, 2);
    writer.close();
    must_throw<Bad>("a write behind close", [&] { writer.write("b", data, 4); });
  }
  require(MappedFile(path).header().tensors.size() == 3, "errors: the file is good in the end");
  const std::string other = folder + "/none.safetensors";
  must_throw<Malformed>("an unknown dtype", [&] { Writer(other, {}, {{"a", "F99", {1}, 0, 0}}); });
  must_throw<Malformed>("two of a name", [&] { Writer(other, {}, {b, b}); });
  must_throw<Malformed>("a reserved name",
                        [&] { Writer(other, {}, {{"__metadata__", "U8", {1}, 0, 0}}); });
  must_throw<Malformed>("a huge shape",
                        [&] { Writer(other, {}, {{"a", "U8", {1ull << 62, 8}, 0, 0}}); });
  must_throw<std::system_error>("no file", [&] { MappedFile{other}; });
  must_throw<Malformed>("a folder", [&] { MappedFile{folder}; });
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) fail("usage: check_safetensors FOLDER [FILES]");
  const std::string folder = argv[1];
  check_hostile(folder, argc > 2 ? std::strtoul(argv[2], nullptr, 10) : 12'000);
  check_round_trip(folder + "/round.safetensors");
  check_finite(folder + "/finite.safetensors");
  check_errors(folder);
  return 0;
}
