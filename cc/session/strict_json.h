// Reads JSON that no one has checked. Only for .cc files of cc/session: its headers do not need
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

// Returns the value of a JSON text. Throws Error (kBadModelFile) for anything that is not exactly
// JSON, for an object that has a key twice (readers do not agree on which one counts), and for
// values nested deeper than 64 (what reads them calls itself). `what` begins the sentence.
nlohmann::json ParseJson(const char* text, size_t bytes, const std::string& what);

// Names that come from a file, as a sentence may hold them: in quotes, without control characters,
// and not longer than a line.
std::string Quoted(const std::string& name);

// A JSON value as a sentence may hold it.
std::string Shown(const nlohmann::json& value);

// Reads the members of one object, and refuses what it has beyond those that were asked for.
class ObjectReader {
 public:
  // `where` begins every sentence: "the plan", "node 3 ("query", dense)".
  ObjectReader(const nlohmann::json& object, std::string where);

  const nlohmann::json* Find(const char* key);  // Null where it is left out.
  const nlohmann::json& Need(const char* key);
  std::string Text(const char* key);
  int64_t Whole(const char* key, int64_t least, int64_t most);
  const nlohmann::json& List(const char* key);
  // Throws where the object has a member that no one has asked for.
  void RefuseOthers() const;

  const std::string& where() const { return where_; }
  void set_where(const std::string& where) { where_ = where; }

 private:
  const nlohmann::json& object_;
  std::string where_;
  std::set<std::string> known_;
};

// Whether `value` is a whole number of int64, written as one, and if so which.
bool IsWhole(const nlohmann::json& value, int64_t* whole);

// Both throw Error (kBadModelFile): the sentence, and what to do about it.
[[noreturn]] void Refuse(const std::string& sentence);
[[noreturn]] void RefuseAsNewer(const std::string& sentence);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_STRICT_JSON_H_
