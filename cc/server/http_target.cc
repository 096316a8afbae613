#include "cc/server/http_target.h"

#include <algorithm>
#include <charconv>
#include <cstring>
#include <system_error>

#include "cc/server/outcome.h"

namespace continual_transformers::server {
namespace {

// A part of a target without its percent signs. Returns false if it is malformed.
bool Decode(std::string_view text, std::string* decoded) {
  decoded->clear();
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '%') {
      *decoded += text[i];
      continue;
    }
    unsigned char byte = 0;
    if (i + 2 >= text.size()) return false;
    const char* const end = text.data() + i + 3;
    if (std::from_chars(text.data() + i + 1, end, byte, 16).ptr != end) return false;
    *decoded += static_cast<char>(byte);
    i += 2;
  }
  return true;
}

}  // namespace

HttpTarget::HttpTarget(std::string_view text) {
  const auto part = [](std::string_view encoded) {
    std::string decoded;
    if (!Decode(encoded, &decoded)) {
      throw Refusal(Reason::kInvalidArgument,
                    "the path has a % that two hexadecimal digits do not follow");
    }
    return decoded;
  };
  text = text.substr(0, text.find('#'));
  const size_t question = text.find('?');
  std::string_view rest = text.substr(0, question);
  // "http://host/path", as a proxy is asked.
  const size_t scheme = rest.find("://");
  if (scheme != std::string_view::npos && rest.substr(0, 4) == "http") {
    const size_t slash = rest.find('/', scheme + 3);
    rest = slash == std::string_view::npos ? "" : rest.substr(slash);
  }
  while (!rest.empty()) {
    rest.remove_prefix(1);  // the slash
    const size_t slash = std::min(rest.find('/'), rest.size());
    if (slash > 0 || slash < rest.size()) path.push_back(part(rest.substr(0, slash)));
    rest.remove_prefix(slash);
  }
  rest = question == std::string_view::npos ? "" : text.substr(question + 1);
  while (!rest.empty()) {
    const size_t end = std::min(rest.find('&'), rest.size());
    const std::string_view pair = rest.substr(0, end);
    const size_t equals = std::min(pair.find('='), pair.size());
    query.emplace_back(part(pair.substr(0, equals)),
                       part(pair.substr(std::min(equals + 1, pair.size()))));
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
}

const std::string* HttpTarget::Find(const std::string& key) const {
  for (const auto& [name, value] : query) {
    if (name == key) return &value;
  }
  return nullptr;
}

int64_t HttpTarget::Whole(const std::string& key, int64_t otherwise, int64_t least,
                          int64_t most) const {
  const std::string* const text = Find(key);
  if (text == nullptr) return otherwise;
  int64_t value = 0;
  const char* const end = text->data() + text->size();
  const auto [at, error] = std::from_chars(text->data(), end, value);
  if (error != std::errc() || at != end || value < least || value > most) {
    throw Refusal(Reason::kInvalidArgument,
                  "the query has a bad " + key + ", expected a whole number from " +
                      std::to_string(least) + " to " + std::to_string(most));
  }
  return value;
}

bool HttpTarget::Flag(const std::string& key) const {
  const std::string* const text = Find(key);
  if (text == nullptr || *text == "false") return false;
  if (*text == "true") return true;
  throw Refusal(Reason::kInvalidArgument,
                "the query has a bad " + key + ", expected true or false");
}

std::string EncodePathPart(const std::string& text) {
  constexpr char kDigits[] = "0123456789ABCDEF";
  std::string encoded;
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    const bool plain = (c >= '0' && c <= '9') || (c >= 'A' && c <= 'Z') || (c >= 'a' && c <= 'z') ||
                       (c != '\0' && std::strchr("-._~", c) != nullptr);
    if (plain) {
      encoded += c;
    } else {
      encoded += {'%', kDigits[byte >> 4], kDigits[byte & 15]};
    }
  }
  return encoded;
}

}  // namespace continual_transformers::server
