#include "header.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <set>
#include <string_view>
#include <unordered_set>

namespace hfprune {
namespace {

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // as the format's own library has it
constexpr std::size_t kAlignment = 64;
constexpr const char* kMetadata = "__metadata__";

struct Dtype {
  const char* name;
  unsigned bits;
};
constexpr std::array<Dtype, 22> kDtypes{{
    {"BOOL", 8},    {"U8", 8},      {"I8", 8},          {"F4", 4},      {"F6_E2M3", 6},
    {"F6_E3M2", 6}, {"F8_E5M2", 8}, {"F8_E4M3", 8},     {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
    {"I16", 16},    {"U16", 16},    {"F8_E5M2FNUZ", 8}, {"F16", 16},    {"BF16", 16},
    {"I32", 32},    {"U32", 32},    {"F32", 32},        {"C64", 64},    {"F64", 64},
    {"I64", 64},    {"U64", 64},
}};

unsigned bits_of(const std::string& dtype) {
  for (const Dtype& known : kDtypes) {
    if (dtype == known.name) return known.bits;
  }
  throw Malformed("the unknown dtype " + printable(dtype));
}

std::uint64_t data_bytes(const std::string& dtype, const std::vector<std::uint64_t>& shape) {
  std::uint64_t items = 1, bits = 0;
  for (const std::uint64_t size : shape) {
    if (size > INT64_MAX || __builtin_mul_overflow(items, size, &items))
      throw Malformed("a shape that overflows");
  }
  if (__builtin_mul_overflow(items, bits_of(dtype), &bits) || bits / 8 > INT64_MAX) {
    throw Malformed("a shape that overflows");
  }
  if (bits % 8 != 0) throw Malformed("a shape that ends within a byte");
  return bits / 8;
}

// The bytes of the UTF-8 sequence at `text`, 0 if it is none (overlong and surrogates are not).
std::size_t utf8_length(std::string_view text) {
  const auto byte = [&](std::size_t i) { return static_cast<unsigned char>(text[i]); };
  const auto follows = [&](std::size_t i, unsigned low, unsigned high) {
    return i < text.size() && byte(i) >= low && byte(i) <= high;
  };
  if (text.empty()) return 0;
  const unsigned lead = byte(0);
  if (lead < 0x80) return 1;
  if (lead >= 0xC2 && lead <= 0xDF) return follows(1, 0x80, 0xBF) ? 2 : 0;
  if (lead >= 0xE0 && lead <= 0xEF) {
    const bool second = follows(1, lead == 0xE0 ? 0xA0 : 0x80, lead == 0xED ? 0x9F : 0xBF);
    return second && follows(2, 0x80, 0xBF) ? 3 : 0;
  }
  if (lead >= 0xF0 && lead <= 0xF4) {
    const bool second = follows(1, lead == 0xF0 ? 0x90 : 0x80, lead == 0xF4 ? 0x8F : 0xBF);
    return second && follows(2, 0x80, 0xBF) && follows(3, 0x80, 0xBF) ? 4 : 0;
  }
  return 0;
}

// Reads the one shape of JSON that a header has. It never recurses, whatever the text.
class Parser {
 public:
  explicit Parser(std::string_view text) : text_(text) {}

  Header parse() {
    Header header;
    std::unordered_set<std::string> names;
    object([&](const std::string& name) {
      if (!names.insert(name).second) throw Malformed("two entries for " + printable(name));
      if (name == kMetadata) {
        header.metadata = metadata();
      } else {
        header.tensors.push_back(tensor(name));
      }
    });
    skip_space();
    if (at_ != text_.size()) fail("nothing more");
    return header;
  }

 private:
  std::map<std::string, std::string> metadata() {
    std::map<std::string, std::string> result;
    object([&](const std::string& key) {
      if (!result.emplace(key, string()).second) {
        throw Malformed("two entries for " + printable(key) + " in its metadata");
      }
    });
    return result;
  }

  TensorInfo tensor(const std::string& name) {
    TensorInfo info{name, "", {}, 0, 0};
    std::set<std::string> seen;
    object([&](const std::string& key) {
      if (!seen.insert(key).second) {
        throw Malformed("tensor " + printable(name) + " with two entries for " + printable(key));
      }
      if (key == "dtype") {
        info.dtype = string();
      } else if (key == "shape") {
        info.shape = integers();
      } else if (key == "data_offsets") {
        const std::vector<std::uint64_t> offsets = integers();
        if (offsets.size() != 2) {
          throw Malformed("tensor " + printable(name) + " with " + std::to_string(offsets.size()) +
                          " data_offsets, expected 2");
        }
        info.begin = offsets[0];
        info.end = offsets[1];
      } else {
        throw Malformed("tensor " + printable(name) + " with the unknown entry " + printable(key));
      }
    });
    if (seen.size() != 3) {
      throw Malformed("tensor " + printable(name) + " without dtype, shape or data_offsets");
    }
    return info;
  }

  // { "key": <what `value` reads>, ... }
  template <typename Value>
  void object(const Value& value) {
    expect('{');
    if (accept('}')) return;
    do {
      const std::string key = string();
      expect(':');
      value(key);
    } while (accept(','));
    expect('}');
  }

  std::vector<std::uint64_t> integers() {
    std::vector<std::uint64_t> result;
    expect('[');
    if (accept(']')) return result;
    do {
      result.push_back(integer());
    } while (accept(','));
    expect(']');
    return result;
  }

  std::uint64_t integer() {
    skip_space();
    const std::size_t begin = at_;
    std::uint64_t value = 0;
    while (at_ < text_.size() && text_[at_] >= '0' && text_[at_] <= '9') {
      const auto digit = static_cast<std::uint64_t>(text_[at_] - '0');
      if (value > (INT64_MAX - digit) / 10) fail("an integer below 2^63");
      value = value * 10 + digit;
      ++at_;
    }
    if (at_ == begin || (text_[begin] == '0' && at_ > begin + 1)) {
      at_ = begin;
      fail("an integer that is not negative");
    }
    return value;
  }

  std::string string() {
    expect('"');
    std::string result;
    for (;;) {
      if (at_ == text_.size()) fail("the end of a string");
      const char c = text_[at_];
      if (c == '"') {
        ++at_;
        return result;
      }
      if (c == '\\') {
        ++at_;
        escape(&result);
        continue;
      }
      const std::size_t length = utf8_length(text_.substr(at_));
      if (length == 0 || static_cast<unsigned char>(c) < 0x20) fail("UTF-8 text");
      result.append(text_.substr(at_, length));
      at_ += length;
    }
  }

  void escape(std::string* result) {
    static constexpr std::string_view kFrom = "\"\\/bfnrt", kTo = "\"\\/\b\f\n\r\t";
    const char c = at_ < text_.size() ? text_[at_] : '\0';
    if (const std::size_t found = kFrom.find(c); c != '\0' && found != std::string_view::npos) {
      result->push_back(kTo[found]);
      ++at_;
      return;
    }
    if (c != 'u') fail("an escape sequence");
    ++at_;
    std::uint32_t code = hex4();
    if (code >= 0xD800 && code <= 0xDBFF && text_.substr(at_, 2) == "\\u") {
      at_ += 2;
      const std::uint32_t low = hex4();
      if (low < 0xDC00 || low > 0xDFFF) fail("a pair of surrogates");
      code = 0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00);
    }
    if (code >= 0xD800 && code <= 0xDFFF) fail("a pair of surrogates");
    append_utf8(code, result);
  }

  std::uint32_t hex4() {
    std::uint32_t value = 0;
    for (int i = 0; i < 4; ++i, ++at_) {
      const char c = at_ < text_.size() ? text_[at_] : '\0';
      const int digit = c >= '0' && c <= '9'   ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : -1;
      if (digit < 0) fail("four hexadecimal digits");
      value = value * 16 + static_cast<std::uint32_t>(digit);
    }
    return value;
  }

  static void append_utf8(std::uint32_t code, std::string* result) {
    const auto push = [&](std::uint32_t byte) { result->push_back(static_cast<char>(byte)); };
    if (code < 0x80) {
      push(code);
    } else if (code < 0x800) {
      push(0xC0 | code >> 6);
      push(0x80 | (code & 0x3F));
    } else if (code < 0x10000) {
      push(0xE0 | code >> 12);
      push(0x80 | (code >> 6 & 0x3F));
      push(0x80 | (code & 0x3F));
    } else {
      push(0xF0 | code >> 18);
      push(0x80 | (code >> 12 & 0x3F));
      push(0x80 | (code >> 6 & 0x3F));
      push(0x80 | (code & 0x3F));
    }
  }

  void skip_space() {
    while (at_ < text_.size() && std::strchr(" \t\n\r", text_[at_]) && text_[at_] != '\0') ++at_;
  }

  bool accept(char c) {
    skip_space();
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }

  void expect(char c) {
    if (!accept(c)) fail(std::string("'") + c + "'");
  }

  [[noreturn]] void fail(const std::string& expected) const {
    throw Malformed("a header with no " + expected + " at byte " + std::to_string(at_));
  }

  std::string_view text_;
  std::size_t at_ = 0;
};

void append_quoted(const std::string& text, std::string* result) {
  static constexpr char kHex[] = "0123456789abcdef";
  for (std::size_t at = 0, length = 0; at < text.size(); at += length) {
    length = utf8_length(std::string_view(text).substr(at));
    if (length == 0) throw Malformed("a name that is not UTF-8: " + printable(text));
  }
  result->push_back('"');
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      *result += {'\\', c};
    } else if (byte < 0x20) {
      *result += {'\\', 'u', '0', '0', kHex[byte >> 4], kHex[byte & 15]};
    } else {
      result->push_back(c);
    }
  }
  result->push_back('"');
}

}  // namespace

std::size_t item_bytes(const std::string& dtype) { return bits_of(dtype) / 8; }

std::string printable(const std::string& name) {
  constexpr std::size_t most = 120;
  std::string result;
  std::string_view rest = name;
  while (!rest.empty()) {
    if (result.size() >= most) return result + "...";
    const std::size_t length = utf8_length(rest);
    const std::string_view shown = rest.substr(0, length);
    const auto byte = static_cast<unsigned char>(rest[0]);
    // U+0080..9F are control characters, U+2028 and U+2029 end a line.
    const bool control = byte < 0x20 || byte == 0x7F ||
                         (length == 2 && byte == 0xC2 && shown[1] < '\xA0') ||
                         shown == "\xE2\x80\xA8" || shown == "\xE2\x80\xA9";
    if (length == 0 || control) {
      result.push_back('?');
      rest.remove_prefix(std::max<std::size_t>(length, 1));
    } else {
      result.append(rest.substr(0, length));
      rest.remove_prefix(length);
    }
  }
  return result;
}

Header parse_header(const std::uint8_t* file, std::uint64_t file_bytes) {
  if (file_bytes < 8) throw Malformed("only " + std::to_string(file_bytes) + " bytes");
  std::uint64_t header_bytes = 0;
  for (int i = 7; i >= 0; --i) header_bytes = header_bytes << 8 | file[i];
  if (header_bytes > kMaxHeaderBytes || header_bytes > file_bytes - 8) {
    throw Malformed("a header of " + std::to_string(header_bytes) + " bytes in a file of " +
                    std::to_string(file_bytes));
  }
  const std::uint64_t data_begin = 8 + header_bytes, data_size = file_bytes - data_begin;
  const auto* text = reinterpret_cast<const char*>(file + 8);
  Header header = Parser({text, static_cast<std::size_t>(header_bytes)}).parse();
  std::stable_sort(header.tensors.begin(), header.tensors.end(),
                   [](const TensorInfo& a, const TensorInfo& b) {
                     return a.begin != b.begin ? a.begin < b.begin : a.end < b.end;
                   });
  std::uint64_t expected = 0;
  for (TensorInfo& tensor : header.tensors) {
    const std::string name = "tensor " + printable(tensor.name);
    const std::string place =
        name + " at bytes " + std::to_string(tensor.begin) + ".." + std::to_string(tensor.end);
    if (tensor.end < tensor.begin) throw Malformed(place + ", which ends before it begins");
    if (tensor.end > data_size) {
      throw Malformed(place + " of " + std::to_string(data_size) + " bytes of data");
    }
    if (tensor.begin < expected) throw Malformed(place + ", which overlaps the one before it");
    if (tensor.begin > expected) throw Malformed(place + ", with a hole before it");
    std::uint64_t bytes = 0;
    try {
      bytes = data_bytes(tensor.dtype, tensor.shape);
    } catch (const Malformed& error) {
      throw Malformed(name + " of " + error.what());
    }
    if (bytes != tensor.end - tensor.begin) {
      throw Malformed(place + ", but its dtype and shape call for " + std::to_string(bytes) +
                      " bytes");
    }
    expected = tensor.end;
    tensor.begin += data_begin;
    tensor.end += data_begin;
  }
  if (expected != data_size) {
    throw Malformed(std::to_string(data_size - expected) + " bytes behind the last tensor");
  }
  return header;
}

std::string format_header(const Metadata& metadata, std::vector<TensorInfo>* tensors) {
  std::string text = "{", separator;
  if (metadata) {
    append_quoted(kMetadata, &text);
    text += ":{";
    for (const auto& [key, value] : *metadata) {
      text += separator;
      append_quoted(key, &text);
      text += ':';
      append_quoted(value, &text);
      separator = ",";
    }
    text += '}';
    separator = ",";
  }
  std::uint64_t end = 0;
  for (TensorInfo& tensor : *tensors) {
    tensor.begin = end;
    if (__builtin_add_overflow(end, data_bytes(tensor.dtype, tensor.shape), &end)) {
      throw Malformed("tensors whose sizes overflow");
    }
    tensor.end = end;
    text += separator;
    append_quoted(tensor.name, &text);
    text += ":{\"dtype\":";
    append_quoted(tensor.dtype, &text);
    text += ",\"shape\":[";
    for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
      text += (i == 0 ? "" : ",") + std::to_string(tensor.shape[i]);
    }
    text += "],\"data_offsets\":[" + std::to_string(tensor.begin) + ',' +
            std::to_string(tensor.end) + "]}";
    separator = ",";
  }
  text += '}';
  text.resize((8 + text.size() + kAlignment - 1) / kAlignment * kAlignment - 8, ' ');
  std::string length;
  for (int i = 0; i < 8; ++i) length.push_back(static_cast<char>(text.size() >> 8 * i & 0xFF));
  for (TensorInfo& tensor : *tensors) {
    tensor.begin += 8 + text.size();
    tensor.end += 8 + text.size();
  }
  return length + text;
}

}  // namespace hfprune
