// A connection to Redis, with hiredis.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_REDIS_H_
#define CONTINUAL_TRANSFORMERS_SERVER_REDIS_H_

#include <hiredis/hiredis.h>

#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace continual_transformers::server {

struct RedisAddress {
  std::string host, password;
  int port = 6379, database = 0;

  // Reads redis://[:password@]host[:port][/database]. Throws Error (kInvalidArgument).
  static RedisAddress Parse(const std::string& url);
  std::string text() const;  // without the password
};

struct FreeRedisReply {
  void operator()(redisReply* reply) const { freeReplyObject(reply); }
};
using RedisReply = std::unique_ptr<redisReply, FreeRedisReply>;

// One thread at a time uses it; its SIGPIPE should be blocked. After an Error (kIo) the connection
// is of no use any more.
class RedisConnection {
 public:
  // Throws Error if there is no Redis, or it does not want to talk.
  explicit RedisConnection(const RedisAddress& address);

  // Sends a command with the next Read or when there is enough to send. Replies come in the order
  // of the commands.
  void Append(const std::vector<std::string_view>& arguments);
  // Throws Error if there is no reply within some seconds, or it is an error.
  RedisReply Read();
  // The same in two parts, for who expects an error: ReadAny returns it (REDIS_REPLY_ERROR), and
  // Check throws it.
  RedisReply ReadAny();
  void Check(const redisReply& reply) const;
  RedisReply Call(const std::vector<std::string_view>& arguments);
  // Changes when Redis is started again, and so may have lost what it had.
  std::string RunId();

 private:
  struct Free {
    void operator()(redisContext* context) const { redisFree(context); }
  };

  const std::string address_;
  std::unique_ptr<redisContext, Free> context_;
  std::vector<const char*> pointers_;
  std::vector<size_t> sizes_;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_REDIS_H_
