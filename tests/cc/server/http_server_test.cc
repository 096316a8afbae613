#include "cc/server/http_server.h"

#include <atomic>
#include <string>
#include <thread>
#include <vector>

#include "cc/server/log.h"
#include "cc/session/error.h"
#include "tests/cc/server/http_case.h"
#include "tests/cc/server/http_client.h"

namespace continual_transformers::server {
namespace {

std::string StepMessage(const std::string& stream, int64_t step, double x) {
  const Json body = {
      {"parameters", {{"sequence_id", stream}, {"step", step}}},
      {"inputs",
       {{{"name", "x"}, {"datatype", "FP32"}, {"shape", {3}}, {"data", {x, x + 1, x + 2}}}}}};
  return Message("POST /v2/models/m/infer", body.dump());
}

class HttpServerTest : public ::testing::Test {
 protected:
  HttpServerTest() {
    SetLogLevel(LogLevel::kOff);
    options_.port = 0;
  }
  ~HttpServerTest() override { SetLogLevel(LogLevel::kInfo); }

  HttpServer* Start() {
    server_ = std::make_unique<HttpServer>(options_, Security(), ServerParts{&one_.repository});
    return server_.get();
  }
  int port() const { return server_->port(); }

  OneModel one_;
  HttpOptions options_;
  std::unique_ptr<HttpServer> server_;
};

TEST_F(HttpServerTest, PipelinedRequestsAreAnsweredInOrder) {
  Start();
  HttpClient client(port());
  std::string all;
  for (int i = 0; i < 50; ++i) all += StepMessage("a", i, i);
  client.Send(all);
  for (int i = 0; i < 50; ++i) {
    std::string body;
    ASSERT_EQ(client.Receive(&body), 200) << body;
    const Json answer = Json::parse(body);
    EXPECT_EQ(answer["parameters"]["next_step"], i + 1);
    EXPECT_EQ(answer["outputs"][0]["data"][0], std::max(i - 1, 0));
  }
}

TEST_F(HttpServerTest, ChunksAndExpectations) {
  Start();
  HttpClient client(port());
  const std::string message = StepMessage("a", 0, 1);
  const std::string body = message.substr(message.find("\r\n\r\n") + 4);
  client.Send("POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n");
  for (const char c : body) client.Send(std::string("1\r\n") + c + "\r\n");
  client.Send("0\r\n\r\n");
  EXPECT_EQ(client.Receive(), 200);
  client.Send(
      "POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: " +
      std::to_string(body.size()) + "\r\n\r\n");
  EXPECT_EQ(client.Receive(), 100);
  client.Send(body);
  EXPECT_EQ(client.Receive(), 200);
}

TEST_F(HttpServerTest, HeadHasNoBody) {
  Start();
  HttpClient client(port());
  client.Send("HEAD /v2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  // Its Content-Length is that of GET, and nothing follows.
  EXPECT_EQ(client.Receive(), 0);
  EXPECT_EQ(client.head().substr(0, 15), "HTTP/1.1 200 OK");
  EXPECT_TRUE(client.Ended());
}

TEST_F(HttpServerTest, RefusesBadMessages) {
  options_.max_header_bytes = 2000;
  options_.max_body_bytes = 1000;
  Start();
  const auto refused = [this](const std::string& text) {
    HttpClient client(port());
    client.Send(text);
    client.EndSending();
    std::string body;
    const int status = client.Receive(&body);
    if (status != 0) {
      EXPECT_NE(Json::parse(body).value("error", ""), "");
    }
    EXPECT_TRUE(client.Ended()) << text.substr(0, 100);
    return status;
  };
  EXPECT_EQ(refused("hello\r\n\r\n"), 400);
  EXPECT_EQ(refused(std::string("\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", 15)), 400);
  EXPECT_EQ(refused("GET /v2 HTTP/3.7\r\nHost: x\r\n\r\n"), 400);
  EXPECT_EQ(refused("GET /v2 HTTP/1.1\r\n\r\n"), 400);  // no Host
  EXPECT_EQ(refused("GET /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n"), 400);
  EXPECT_EQ(refused("GET /v2 HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n"), 400);
  EXPECT_EQ(refused("POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n"
                    "Transfer-Encoding: chunked\r\n\r\nabc"),
            400);
  EXPECT_EQ(refused("POST /v2 HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"),
            400);
  EXPECT_EQ(refused("GET /v2 HTTP/1.1\r\nHost: x\r\nX: " + std::string(3000, 'x') + "\r\n\r\n"),
            431);
  EXPECT_EQ(refused(Message("POST /v2/models/m/infer", std::string(1001, ' '))), 413);
  EXPECT_EQ(refused("POST /v2 HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999\r\n\r\n"),
            400);
  // Cut off: no one is left to answer.
  EXPECT_EQ(refused("GET /v2 HT"), 0);
  EXPECT_EQ(refused("POST /v2/models/m/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{"),
            0);
  EXPECT_EQ(refused(""), 0);
  // It goes on.
  HttpClient client(port());
  client.Send(StepMessage("a", 0, 1));
  EXPECT_EQ(client.Receive(), 200);
}

// The head of a request, whose body does not come.
std::string HalfMessage() {
  return "POST /v2/models/m/infer HTTP/1.1\r\nHost: test\r\nExpect: 100-continue\r\n"
         "Content-Length: 10\r\n\r\n";
}

TEST_F(HttpServerTest, ConnectionsAreLimited) {
  options_.max_connections = 2;
  Start();
  auto first = std::make_unique<HttpClient>(port());
  HttpClient second(port());
  for (HttpClient* const client : {first.get(), &second}) {
    client->Send(HalfMessage());
    EXPECT_EQ(client->Receive(), 100);
  }
  HttpClient third(port());
  EXPECT_EQ(third.Receive(), 503);
  EXPECT_TRUE(third.Ended());
  first.reset();
  // The server may learn of it a moment later.
  int status = 0;
  while (status != 200) {
    HttpClient again(port());
    again.Send(Message("GET /v2"));
    status = again.Receive();
  }
}

TEST_F(HttpServerTest, IdleConnectionsLockNobodyOut) {
  options_.max_connections = 3;
  Start();
  HttpClient busy(port());
  busy.Send(HalfMessage());
  EXPECT_EQ(busy.Receive(), 100);
  // One has sent half a line, one has had its answer. The one that has waited longest goes.
  HttpClient half(port()), answered(port());
  half.Send("GET");
  answered.Send(Message("GET /v2"));
  EXPECT_EQ(answered.Receive(), 200);
  HttpClient next(port());
  next.Send(Message("GET /v2"));
  EXPECT_EQ(next.Receive(), 200);
  EXPECT_TRUE(half.Ended());
  std::vector<std::unique_ptr<HttpClient>> idle;
  for (int i = 0; i < 20; ++i) idle.push_back(std::make_unique<HttpClient>(port()));
  HttpClient last(port());
  last.Send(Message("GET /v2"));
  EXPECT_EQ(last.Receive(), 200);
  EXPECT_TRUE(answered.Ended());
  EXPECT_TRUE(idle[0]->Ended());
  // Requests are not cut off.
  busy.Send("{        }");
  EXPECT_EQ(busy.Receive(), 400);
}

TEST_F(HttpServerTest, TheConnectionStaysOrEndsAsTheClientAsks) {
  Start();
  HttpClient client(port());
  client.Send("GET /v2 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n");
  EXPECT_EQ(client.Receive(), 200);
  EXPECT_NE(client.head().find("Connection: keep-alive"), std::string::npos);
  client.Send(Message("GET /v2", "", "Connection: close\r\n"));
  EXPECT_EQ(client.Receive(), 200);
  EXPECT_TRUE(client.Ended());
}

TEST_F(HttpServerTest, IdleConnectionsEnd) {
  options_.idle_seconds = 1;
  Start();
  HttpClient client(port());
  client.Send("GET /v2 HTTP/1.1\r\nHo");
  EXPECT_TRUE(client.Ended());
}

TEST_F(HttpServerTest, APortIsForOneServer) {
  Start();
  options_.port = port();
  try {
    const HttpServer other(options_, Security(), ServerParts{&one_.repository});
    FAIL() << "two servers have one port";
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kIo);
    EXPECT_NE(std::string(error.what()).find("--http-port"), std::string::npos);
  }
  options_.port = 0;
  Security security;
  security.certificate = security.key = "not PEM";
  EXPECT_THROW(HttpServer(options_, security, {&one_.repository}), Error);
}

TEST_F(HttpServerTest, EventsEndWithTheServer) {
  Start();
  HttpClient client(port());
  client.Send(Message("GET /v2/models/m/streams/a/outputs"));
  EXPECT_EQ(client.Receive(), 200);
  EXPECT_NE(client.head().find("text/event-stream"), std::string::npos);
  one_.repository.Drain();
  server_->Stop(60000);
  // Perhaps after some events.
  while (!client.Ended()) client.Receive();
}

// Each client has its own streams and checks every answer; in between others come and go, read
// statistics, watch streams and reload the model.
TEST_F(HttpServerTest, ManyClientsAtOnce) {
  options_.threads = 3;
  Start();
  constexpr int kClients = 6;
  constexpr int kSteps = 150;
  std::atomic<int> running{kClients};
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int k = 0; k < kClients; ++k) {
    threads.emplace_back([&, k] {
      HttpClient client(port());
      for (int i = 0; i < kSteps; ++i) {
        const std::string stream = "s" + std::to_string(k);
        client.Send(StepMessage(stream, i, 1000.0 * k + i));
        std::string body;
        if (client.Receive(&body) != 200) {
          ++wrong;
          break;
        }
        const double expected = i == 0 ? 0 : 1000.0 * k + i - 1;
        if (Json::parse(body)["outputs"][0]["data"][0] != expected) ++wrong;
      }
      --running;
    });
  }
  threads.emplace_back([&] {
    while (running > 0) {
      HttpClient client(port());
      client.Send(StepMessage("gone", 0, 1));  // It goes without its answer.
      HttpClient watcher(port());
      watcher.Send(Message("GET /v2/models/m/streams/s0/outputs"));
      watcher.Receive();
    }
  });
  threads.emplace_back([&] {
    HttpClient client(port());
    while (running > 0) {
      for (const char* const path : {"/metrics", "/status", "/v2/models/stats"}) {
        client.Send(Message(std::string("GET ") + path));
        if (client.Receive() != 200) ++wrong;
      }
      client.Send(Message("POST /v2/repository/models/m/load"));
      if (client.Receive() != 200) ++wrong;
    }
  });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

// Every request that was taken gets its answer, whenever the server is stopped.
TEST_F(HttpServerTest, StopsUnderLoad) {
  for (int round = 0; round < 5; ++round) {
    Start();
    std::atomic<int> answered{0};
    std::vector<std::thread> clients;
    for (int k = 0; k < 4; ++k) {
      clients.emplace_back([&, k] {
        const std::string stream = std::to_string(round) + "_" + std::to_string(k);
        while (true) {
          HttpClient client(port());
          if (!client.connected()) return;
          for (int i = 0;; ++i) {
            client.Send(StepMessage(stream, i, i));
            if (client.Receive() == 0) break;
            ++answered;
          }
        }
      });
    }
    while (answered < 50) std::this_thread::yield();
    server_->Stop(60000);
    for (std::thread& client : clients) client.join();
  }
}

}  // namespace
}  // namespace continual_transformers::server
