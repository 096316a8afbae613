#include "cc/server/redis.h"

#include <sys/time.h>

#include <cstdlib>

#include "cc/session/error.h"

namespace continual_transformers::server {
namespace {

constexpr timeval kConnectWithin = {1, 0};
// A Redis that hangs for longer is as good as gone.
constexpr timeval kReplyWithin = {5, 0};

// Returns whether `text` is a number of at most `most`.
bool ReadNumber(const std::string& text, int most, int* number) {
  if (text.empty() || text.size() > 6 ||
      text.find_first_not_of("0123456789") != std::string::npos) {
    return false;
  }
  *number = static_cast<int>(std::strtol(text.c_str(), nullptr, 10));
  return *number <= most;
}

}  // namespace

RedisAddress RedisAddress::Parse(const std::string& url) {
  RedisAddress address;
  const std::string scheme = "redis://";
  bool good = url.compare(0, scheme.size(), scheme) == 0;
  std::string rest = good ? url.substr(scheme.size()) : "";
  const size_t at = rest.rfind('@');
  if (at != std::string::npos) {
    good = good && rest[0] == ':';
    address.password = rest.substr(1, at - 1);
    rest = rest.substr(at + 1);
  }
  const size_t slash = rest.find('/');
  if (slash != std::string::npos) {
    constexpr int kMostDatabases = 100000;
    if (slash + 1 < rest.size()) {
      good = ReadNumber(rest.substr(slash + 1), kMostDatabases, &address.database) && good;
    }
    rest = rest.substr(0, slash);
  }
  const size_t colon = rest.rfind(':');
  // An IPv6 address is in brackets.
  if (colon != std::string::npos && rest.find(']', colon) == std::string::npos) {
    good = ReadNumber(rest.substr(colon + 1), 65535, &address.port) && address.port > 0 && good;
    rest = rest.substr(0, colon);
  }
  if (rest.size() > 2 && rest.front() == '[' && rest.back() == ']') {
    rest = rest.substr(1, rest.size() - 2);
  }
  address.host = rest;
  if (!good || rest.empty()) {
    // Without what was got, as it may have a password.
    throw Error(ErrorCode::kInvalidArgument,
                "--journal expects redis://host:port, with :password@ before the host and "
                "/database after the port if they are needed");
  }
  return address;
}

std::string RedisAddress::text() const {
  return "redis://" + host + ":" + std::to_string(port) + "/" + std::to_string(database);
}

RedisConnection::RedisConnection(const RedisAddress& address)
    : address_(address.text()),
      context_(redisConnectWithTimeout(address.host.c_str(), address.port, kConnectWithin)) {
  if (context_ == nullptr || context_->err != 0) {
    throw Error(ErrorCode::kIo,
                "cannot connect to " + address_ + ": " +
                    (context_ == nullptr ? "no memory" : std::string(context_->errstr)));
  }
  redisSetTimeout(context_.get(), kReplyWithin);
  redisEnableKeepAlive(context_.get());
  if (!address.password.empty()) Call({"AUTH", address.password});
  if (address.database != 0) Call({"SELECT", std::to_string(address.database)});
}

void RedisConnection::Append(const std::vector<std::string_view>& arguments) {
  pointers_.clear();
  sizes_.clear();
  for (const std::string_view argument : arguments) {
    pointers_.push_back(argument.data());
    sizes_.push_back(argument.size());
  }
  if (redisAppendCommandArgv(context_.get(), static_cast<int>(arguments.size()), pointers_.data(),
                             sizes_.data()) != REDIS_OK) {
    throw Error(ErrorCode::kIo, address_ + ": " + context_->errstr);
  }
}

RedisReply RedisConnection::ReadAny() {
  void* got = nullptr;
  if (redisGetReply(context_.get(), &got) != REDIS_OK || got == nullptr) {
    throw Error(ErrorCode::kIo, address_ + ": " + context_->errstr);
  }
  return RedisReply(static_cast<redisReply*>(got));
}

RedisReply RedisConnection::Read() {
  RedisReply reply = ReadAny();
  Check(*reply);
  return reply;
}

void RedisConnection::Check(const redisReply& reply) const {
  if (reply.type != REDIS_REPLY_ERROR) return;
  throw Error(ErrorCode::kIo, address_ + " answers: " + std::string(reply.str, reply.len));
}

RedisReply RedisConnection::Call(const std::vector<std::string_view>& arguments) {
  Append(arguments);
  return Read();
}

std::string RedisConnection::RunId() {
  const RedisReply reply = Call({"INFO", "server"});
  const std::string text(reply->str == nullptr ? "" : reply->str, reply->len);
  const auto value = [&text](const std::string& key) -> std::string {
    const size_t at = text.find(key);
    if (at == std::string::npos) return "";
    return text.substr(at + key.size(), text.find('\r', at) - at - key.size());
  };
  // Older ones do not take an id of which they are to find the second half.
  constexpr int kOldest = 7;
  const std::string version = value("redis_version:");
  if (!version.empty() && std::strtol(version.c_str(), nullptr, 10) < kOldest) {
    throw Error(ErrorCode::kIo, "Redis is of version " + version + ", expected " +
                                    std::to_string(kOldest) + ".0 or newer");
  }
  return value("run_id:");
}

}  // namespace continual_transformers::server
