// Reads untrusted JSON. Include it only in .cc files of cc/session: the headers do not need
// nlohmann-json.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_STRICT_JSON_H_
#define CONTINUAL_TRANSFORMERS_SESSION_STRICT_JSON_H_

#include <cstddef>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "cc/session/error.h"

namespace continual_transformers {

// Parses a JSON text. Throws Error (kBadModelFile) if it is not strictly JSON, if an object has a
// key twice (readers disagree on which one counts), or if values are nested deeper than 64 (their
// readers are recursive). `what` begins the error message.
nlohmann::json ParseJson(const char* text, size_t bytes, const std::string& what);

// Formats a name from a file for an error message: in quotes, without control characters, and not
// longer than a line.
std::string Quoted(const std::string& name);

// Formats a JSON value for an error message.
std::string Shown(const nlohmann::json& value);

// Reads the members of one object, and refuses members that were not asked for.
class ObjectReader {
 public:
  // `where` begins every error message: "the plan", "node 3 ("query", dense)".
  ObjectReader(const nlohmann::json& object, std::string where);

  const nlohmann::json* Find(const char* key);  // null if absent
  const nlohmann::json& Need(const char* key);
  std::string Text(const char* key);
  int64_t Whole(const char* key, int64_t least, int64_t most);
  const nlohmann::json& List(const char* key);
  // Throws if the object has a member that was not asked for.
  void RefuseOthers() const;

  const std::string& where() const { return where_; }
  void set_where(const std::string& where) { where_ = where; }

 private:
  const nlohmann::json& object_;
  std::string where_;
  std::set<std::string> known_;
};

// Returns whether `value` is an integer that fits in int64, and stores it.
bool IsWhole(const nlohmann::json& value, int64_t* whole);

// Both throw Error (kBadModelFile) with the message and advice.
[[noreturn]] void Refuse(const std::string& sentence);
[[noreturn]] void RefuseAsNewer(const std::string& sentence);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_STRICT_JSON_H_
