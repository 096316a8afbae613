#include "cc/session/strict_json.h"

#include <limits>
#include <utility>
#include <vector>

namespace continual_transformers {
namespace {

using nlohmann::json;

constexpr size_t kDeepest = 64;

}  // namespace

json ParseJson(const char* text, size_t bytes, const std::string& what) {
  // One set for each object or list that is open; a list's stays empty.
  std::vector<std::set<std::string>> open;
  const auto check = [&](int, json::parse_event_t event, json& parsed) {
    switch (event) {
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        if (open.size() == kDeepest) {
          Refuse(what + " has values nested deeper than " + std::to_string(kDeepest));
        }
        open.emplace_back();
        break;
      case json::parse_event_t::object_end:
      case json::parse_event_t::array_end:
        open.pop_back();
        break;
      case json::parse_event_t::key:
        if (!open.back().insert(parsed.get<std::string>()).second) {
          Refuse(what + " has the key " + Quoted(parsed.get<std::string>()) + " twice");
        }
        break;
      case json::parse_event_t::value:
        break;
    }
    return true;
  };
  try {
    return json::parse(text, text + bytes, check);
  } catch (const json::parse_error& error) {
    Refuse(what + " is not JSON at byte " + std::to_string(error.byte) +
           " (JSON has no NaN and no Infinity)");
  } catch (const json::exception&) {
    // A number beyond double: the parser's only other complaint.
    Refuse(what + " has a number that is too large");
  }
}

std::string Quoted(const std::string& name) {
  constexpr size_t kLongest = 120;
  std::string quoted = "\"";
  for (size_t i = 0; i < name.size(); ++i) {
    const unsigned char c = static_cast<unsigned char>(name[i]);
    // Cut before a character, not inside one: bytes 10xxxxxx continue one in UTF-8.
    if (i >= kLongest && (c & 0xc0) != 0x80) return quoted + "...\"";
    quoted += c < 0x20 || c == 0x7f ? '?' : name[i];
  }
  return quoted + "\"";
}

std::string Shown(const json& value) {
  if (value.is_string()) return Quoted(value.get<std::string>());
  if (value.is_object()) return "an object";
  if (value.is_array() && value.size() > 8) {
    return "a list of " + std::to_string(value.size());
  }
  const std::string text = value.dump(-1, ' ', false, json::error_handler_t::replace);
  return text.size() <= 60 ? text : "a list";
}

bool IsWhole(const json& value, int64_t* whole) {
  if (!value.is_number_integer()) return false;
  if (value.is_number_unsigned() &&
      value.get<uint64_t>() > static_cast<uint64_t>(std::numeric_limits<int64_t>::max())) {
    return false;
  }
  *whole = value.get<int64_t>();
  return true;
}

void Refuse(const std::string& sentence) {
  throw Error(
      ErrorCode::kBadModelFile,
      sentence + ". Write the file again: session.save(...), or `continual-transformers pack`");
}

void RefuseAsNewer(const std::string& sentence) {
  throw Error(ErrorCode::kBadModelFile,
              sentence +
                  ". The file was written by a newer version of continual-transformers-tf: upgrade "
                  "it to read this file");
}

ObjectReader::ObjectReader(const json& object, std::string where)
    : object_(object), where_(std::move(where)) {
  if (!object_.is_object()) Refuse(where_ + " is " + Shown(object_) + ", expected a JSON object");
}

const json* ObjectReader::Find(const char* key) {
  known_.insert(key);
  const auto found = object_.find(key);
  return found == object_.end() ? nullptr : &*found;
}

const json& ObjectReader::Need(const char* key) {
  const json* value = Find(key);
  if (value == nullptr) Refuse(where_ + " has no " + Quoted(key));
  return *value;
}

std::string ObjectReader::Text(const char* key) {
  const json& value = Need(key);
  if (!value.is_string()) {
    Refuse(where_ + ": " + Quoted(key) + " is " + Shown(value) + ", expected a string");
  }
  return value.get<std::string>();
}

int64_t ObjectReader::Whole(const char* key, int64_t least, int64_t most) {
  const json& value = Need(key);
  int64_t whole;
  if (!IsWhole(value, &whole) || whole < least || whole > most) {
    Refuse(where_ + ": " + Quoted(key) + " is " + Shown(value) + ", expected a whole number from " +
           std::to_string(least) + " to " + std::to_string(most));
  }
  return whole;
}

const json& ObjectReader::List(const char* key) {
  const json& value = Need(key);
  if (!value.is_array()) {
    Refuse(where_ + ": " + Quoted(key) + " is " + Shown(value) + ", expected a list");
  }
  return value;
}

void ObjectReader::RefuseOthers() const {
  for (const auto& member : object_.items()) {
    if (known_.count(member.key()) == 0) {
      RefuseAsNewer(where_ + " has " + Quoted(member.key()) + ", which this version does not know");
    }
  }
}

}  // namespace continual_transformers
