// The shard of a stream: the unit in which streams move between servers.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_SHARDS_H_
#define CONTINUAL_TRANSFORMERS_SERVER_SHARDS_H_

#include <array>
#include <cstdint>
#include <string_view>

namespace continual_transformers::server {

constexpr int kShards = 256;

// Returns the CRC-32 of the name's bytes (that of zlib and Ethernet), mod 256. Servers, clients and
// proxies must agree, and this is at hand everywhere: `zlib.crc32(name) % 256` in Python, and
// `crc32,mod(256)` in HAProxy. XXH64, which sessions use, needs a package in Python. Of 10,000
// numbers as names, a shard has 33 to 44.
inline int ShardOf(std::string_view name) {
  static constexpr std::array<uint32_t, 256> kTable = [] {
    std::array<uint32_t, 256> table = {};
    for (uint32_t i = 0; i < 256; ++i) {
      uint32_t crc = i;
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
      table[i] = crc;
    }
    return table;
  }();
  uint32_t crc = 0xffffffffu;
  for (const char c : name) crc = kTable[(crc ^ static_cast<unsigned char>(c)) & 0xff] ^ crc >> 8;
  return static_cast<int>(~crc % kShards);
}

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_SHARDS_H_
