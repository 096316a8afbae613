#include "cc/server/shard_table.h"

#include <nlohmann/json.hpp>

#include "cc/server/outcome.h"

namespace continual_transformers::server {
namespace {

using nlohmann::ordered_json;

[[noreturn]] void Refuse(const std::string& message) {
  throw Refusal(Reason::kInvalidArgument, "the table of shards " + message);
}

std::string TextAt(const ordered_json& object, const char* key, const std::string& where) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_string()) {
    Refuse("has no text \"" + std::string(key) + "\" " + where);
  }
  return found->get<std::string>();
}

bool IsEpoch(const ordered_json& value) {
  return value.is_number_unsigned() && value.get<uint64_t>() <= uint64_t{1} << 53;
}

// A list with an entry for each shard.
const ordered_json& ListAt(const ordered_json& object, const char* key) {
  const auto found = object.find(key);
  if (found == object.end() || !found->is_array() || found->size() != kShards) {
    Refuse("has no list \"" + std::string(key) + "\" with " + std::to_string(kShards) + " entries");
  }
  return *found;
}

}  // namespace

ShardTable ShardTable::Parse(std::string_view json) {
  const auto parsed = ordered_json::parse(json, nullptr, false);
  if (!parsed.is_object()) Refuse("is not a JSON object");
  ShardTable table;
  const auto epoch = parsed.find("epoch");
  if (epoch == parsed.end() || !IsEpoch(*epoch)) {
    Refuse("has no \"epoch\", a whole number from 0 to 2^53");
  }
  table.epoch = epoch->get<int64_t>();
  const auto servers = parsed.find("servers");
  if (servers == parsed.end() || !servers->is_object()) Refuse("has no object \"servers\"");
  for (const auto& [name, addresses] : servers->items()) {
    if (name.empty() || !addresses.is_object()) Refuse("has a server without a name or addresses");
    const std::string where = "for the server " + Quoted(name);
    table.servers[name] = {TextAt(addresses, "grpc", where), TextAt(addresses, "http", where)};
  }
  const ordered_json& shards = ListAt(parsed, "shards");
  const ordered_json& since = ListAt(parsed, "since");
  for (int shard = 0; shard < kShards; ++shard) {
    if (!IsEpoch(since[shard]) || since[shard].get<int64_t>() > table.epoch) {
      Refuse("says that shard " + std::to_string(shard) +
             " has its server since an epoch that is none, or comes later");
    }
    table.since[shard] = since[shard].get<int64_t>();
    const ordered_json& name = shards[shard];
    if (name.is_null()) continue;
    if (!name.is_string() || table.servers.count(name.get<std::string>()) == 0) {
      Refuse("gives shard " + std::to_string(shard) + " to a server that it does not list");
    }
    table.shards[shard] = name.get<std::string>();
  }
  if (parsed.contains("self") && !parsed["self"].is_null()) {
    table.self = TextAt(parsed, "self", "for the server that gets it");
  }
  return table;
}

std::string ShardTable::Json(bool with_self) const {
  ordered_json json = {{"epoch", epoch}, {"servers", ordered_json::object()}};
  for (const auto& [name, addresses] : servers) {
    json["servers"][name] = {{"grpc", addresses.grpc}, {"http", addresses.http}};
  }
  ordered_json list = ordered_json::array();
  for (const std::string& name : shards) {
    list.push_back(name.empty() ? ordered_json() : ordered_json(name));
  }
  json["shards"] = std::move(list);
  json["since"] = since;
  if (with_self) json["self"] = self.empty() ? ordered_json() : ordered_json(self);
  return json.dump(-1, ' ', false, ordered_json::error_handler_t::replace);
}

ShardSet ShardTable::Own() const {
  ShardSet own;
  for (int shard = 0; shard < kShards && !self.empty(); ++shard) own[shard] = shards[shard] == self;
  return own;
}

}  // namespace continual_transformers::server
