#include "cc/server/stream_copy.h"

#include <cstdint>
#include <cstring>

#include "cc/session/fingerprint.h"

namespace continual_transformers::server {
namespace {

constexpr char kMagic[] = "CTSTREAM";
constexpr size_t kMagicBytes = sizeof(kMagic) - 1;
constexpr uint32_t kVersion = 1;
constexpr uint32_t kMayLag = 1;  // a flag

// model_file.cc does not compile on a big-endian machine, so this is the order in memory.
struct Header {
  char magic[kMagicBytes];
  uint32_t version, flags;
  uint64_t name_bytes, state_bytes, answer_bytes;
  int64_t last_first, last_steps;
  uint64_t last_inputs;
};
static_assert(sizeof(Header) == 64, "the header has no padding");

constexpr size_t kHashBytes = sizeof(uint64_t);

[[noreturn]] void Refuse(const std::string& sentence) {
  throw Refusal(Reason::kInvalidArgument, sentence);
}

}  // namespace

std::string EncodeStreamCopy(const StreamCopy& copy) {
  Header header;
  std::memcpy(header.magic, kMagic, kMagicBytes);
  header.version = kVersion;
  header.flags = copy.may_lag ? kMayLag : 0;
  header.name_bytes = copy.name.size();
  header.state_bytes = copy.state.size();
  header.answer_bytes = copy.answer.size();
  header.last_first = copy.last_first;
  header.last_steps = copy.last_steps;
  header.last_inputs = copy.last_inputs;
  std::string bytes;
  bytes.reserve(sizeof(header) + copy.name.size() + copy.state.size() + copy.answer.size() +
                kHashBytes);
  bytes.append(reinterpret_cast<const char*>(&header), sizeof(header));
  bytes += copy.name;
  bytes += copy.state;
  bytes += copy.answer;
  const uint64_t hash = Xxh64(bytes.data(), bytes.size());
  return bytes.append(reinterpret_cast<const char*>(&hash), kHashBytes);
}

StreamCopy DecodeStreamCopy(std::string_view bytes) {
  if (bytes.substr(0, kMagicBytes) != kMagic) {
    Refuse("this is not a copy of a stream: it does not begin with " + std::string(kMagic));
  }
  Header header;
  if (bytes.size() < sizeof(header) + kHashBytes) {
    Refuse("this copy of a stream is cut off: it has " + std::to_string(bytes.size()) + " bytes");
  }
  std::memcpy(&header, bytes.data(), sizeof(header));
  // A newer version may have its sizes elsewhere.
  if (header.version != kVersion) {
    Refuse("this copy of a stream has version " + std::to_string(header.version) +
           ", and this server reads version " + std::to_string(kVersion) +
           ": use a server of the version that wrote it");
  }
  // One after another, because their sum may overflow.
  size_t rest = bytes.size() - sizeof(header) - kHashBytes;
  for (const uint64_t size : {header.name_bytes, header.state_bytes, header.answer_bytes}) {
    if (size > rest) {
      Refuse("this copy of a stream is cut off: it has " + std::to_string(bytes.size()) +
             " bytes, and its header announces more");
    }
    rest -= size;
  }
  if (rest != 0) {
    Refuse("this copy of a stream is damaged: " + std::to_string(rest) + " bytes follow its end");
  }
  const std::string_view hashed = bytes.substr(0, bytes.size() - kHashBytes);
  uint64_t hash = 0;
  std::memcpy(&hash, bytes.data() + hashed.size(), kHashBytes);
  if (hash != Xxh64(hashed.data(), hashed.size())) {
    Refuse("this copy of a stream is damaged: its checksum does not fit its contents");
  }
  StreamCopy copy;
  size_t at = sizeof(header);
  const auto take = [&](uint64_t size) {
    const std::string part(bytes.substr(at, size));
    at += size;
    return part;
  };
  copy.name = take(header.name_bytes);
  copy.state = take(header.state_bytes);
  copy.answer = take(header.answer_bytes);
  copy.last_first = header.last_first;
  copy.last_steps = header.last_steps;
  copy.last_inputs = header.last_inputs;
  copy.may_lag = (header.flags & kMayLag) != 0;
  return copy;
}

}  // namespace continual_transformers::server
