// The target of an HTTP request: its path and its query.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_HTTP_TARGET_H_
#define CONTINUAL_TRANSFORMERS_SERVER_HTTP_TARGET_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace continual_transformers::server {

struct HttpTarget {
  std::vector<std::string> path;  // between the slashes
  std::vector<std::pair<std::string, std::string>> query;

  // Throws Refusal.
  explicit HttpTarget(std::string_view text);

  const std::string* Find(const std::string& key) const;  // null: it is not in the query
  // Throw Refusal for another value.
  int64_t Whole(const std::string& key, int64_t otherwise, int64_t least, int64_t most) const;
  bool Flag(const std::string& key) const;
};

// Writes a part of a path with percent signs, so that it may hold any byte.
std::string EncodePathPart(const std::string& text);

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_HTTP_TARGET_H_
