// Which of several servers has which shard.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_SHARD_TABLE_H_
#define CONTINUAL_TRANSFORMERS_SERVER_SHARD_TABLE_H_

#include <array>
#include <bitset>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "cc/server/shards.h"

namespace continual_transformers::server {

using ShardSet = std::bitset<kShards>;

// As JSON: {"epoch": 3, "servers": {"n1": {"grpc": "host:port", "http": "host:port"}},
// "shards": ["n1", "n1", null, ...], "since": [1, 3, 0, ...]}, and for one server also "self":
// "n1".
struct ShardTable {
  struct Addresses {
    std::string grpc, http;
  };

  int64_t epoch = 0;                          // its version: grows with every change
  std::map<std::string, Addresses> servers;   // by name
  std::array<std::string, kShards> shards{};  // the server's name; empty: no server has the shard
  // The epoch in which the shard got its server. Who had a shard before that has lost it meanwhile,
  // even if it has it again now.
  std::array<int64_t, kShards> since{};
  std::string self;  // the server that has this table; empty: not known

  // Throws Refusal if the text is not a table.
  static ShardTable Parse(std::string_view json);
  std::string Json(bool with_self) const;

  // The shards of `self`.
  ShardSet Own() const;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_SHARD_TABLE_H_
