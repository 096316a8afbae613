// A Redis for tests, on a free port.
#ifndef CONTINUAL_TRANSFORMERS_TESTS_CC_REDIS_CASE_H_
#define CONTINUAL_TRANSFORMERS_TESTS_CC_REDIS_CASE_H_

#include <arpa/inet.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>

#include "cc/server/redis.h"
#include "cc/session/error.h"
#include "gtest/gtest.h"

namespace continual_transformers::server {

// A Redis of its own, without persistence. It ends with the test.
class Redis {
 public:
  Redis() : port_(FreePort()) { Start(); }
  ~Redis() { Stop(SIGKILL); }

  static bool Exists() { return std::system("command -v redis-server > /dev/null") == 0; }

  void Start() {
    child_ = fork();
    if (child_ == 0) {
      prctl(PR_SET_PDEATHSIG, SIGKILL);
      const std::string port = std::to_string(port_);
      if (std::freopen("/dev/null", "w", stdout) == nullptr) _exit(1);
      execlp("redis-server", "redis-server", "--port", port.c_str(), "--bind", "127.0.0.1",
             "--save", "", "--appendonly", "no", nullptr);
      _exit(1);
    }
    for (int i = 0; i < 500; ++i) {
      try {
        RedisConnection connection(RedisAddress::Parse(url()));
        connection.Call({"PING"});
        return;
      } catch (const Error&) {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
      }
    }
    FAIL() << "redis-server does not answer";
  }

  void Stop(int signal) {
    if (child_ <= 0) return;
    kill(child_, signal);
    waitpid(child_, nullptr, 0);
    child_ = 0;
  }

  std::string url() const { return "redis://127.0.0.1:" + std::to_string(port_) + "/1"; }
  pid_t pid() const { return child_; }

 private:
  static int FreePort() {
    const int file = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in address = {};
    address.sin_family = AF_INET;
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    socklen_t size = sizeof(address);
    bind(file, reinterpret_cast<sockaddr*>(&address), size);
    getsockname(file, reinterpret_cast<sockaddr*>(&address), &size);
    close(file);
    return ntohs(address.sin_port);
  }

  const int port_;
  pid_t child_ = 0;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_TESTS_CC_REDIS_CASE_H_
