#include "cc/session/strict_json.h"

#include <limits>
#include <utility>
#include <vector>

namespace continual_transformers {
namespace {

using nlohmann::json;

constexpr size_t kDeepest = 64;

// Checks a text before its values are built, so that a refused text costs no memory. (A callback of
// json::parse could do the same, but makes parsing quadratic in the length of lists.)
class Checker : public nlohmann::json_sax<json> {
 public:
  explicit Checker(const std::string& what) : what_(what) {}

  bool start_object(size_t) override { return Open(); }
  bool start_array(size_t) override { return Open(); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(std::string& key) override {
    if (!open_.back().insert(key).second) Refuse(what_ + " has the key " + Quoted(key) + " twice");
    return true;
  }
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(int64_t) override { return true; }
  bool number_unsigned(uint64_t) override { return true; }
  bool number_float(double, const std::string&) override { return true; }
  bool string(std::string&) override { return true; }
  bool binary(json::binary_t&) override { return true; }
  bool parse_error(size_t byte, const std::string&, const json::exception& error) override {
    if (dynamic_cast<const json::out_of_range*>(&error) != nullptr) {
      Refuse(what_ + " has a number that is too large");
    }
    Refuse(what_ + " is not JSON at byte " + std::to_string(byte) +
           " (JSON has no NaN and no Infinity)");
  }

 private:
  bool Open() {
    if (open_.size() == kDeepest) {
      Refuse(what_ + " has values nested deeper than " + std::to_string(kDeepest));
    }
    open_.emplace_back();
    return true;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }

  const std::string& what_;
  std::vector<std::set<std::string>> open_;  // keys of each open object; a list has none
};

}  // namespace

json ParseJson(const char* text, size_t bytes, const std::string& what) {
  Checker checker(what);
  json::sax_parse(text, text + bytes, &checker);  // throws if the text is refused
  return json::parse(text, text + bytes);
}

std::string Quoted(const std::string& name) {
  constexpr size_t kLongest = 120;
  std::string quoted = "\"";
  for (size_t i = 0; i < name.size(); ++i) {
    const unsigned char c = static_cast<unsigned char>(name[i]);
    // Cut before a character, not inside one: bytes 10xxxxxx continue a UTF-8 character.
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
                  ". A newer version of continual-transformers-tf wrote the file: upgrade the "
                  "package to read it");
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
