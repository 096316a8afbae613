// An HTTP request and its response, between the connections (HttpServer) and the routes (HttpApi).

#ifndef CONTINUAL_TRANSFORMERS_SERVER_HTTP_MESSAGE_H_
#define CONTINUAL_TRANSFORMERS_SERVER_HTTP_MESSAGE_H_

#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

namespace continual_transformers::server {

struct HttpRequest {
  std::string method;  // "GET"
  std::string target;  // the path and the query, as they were sent
  // Headers; empty if the request has none.
  std::string host, origin, authorization, content_encoding, accept;
  std::string inference_header_content_length;
  std::string body;
};

// Events for a client that stays, each sent when it happens.
class HttpEvents {
 public:
  virtual ~HttpEvents() = default;
  // Returns the text to send now, in the format of server-sent events, or "" for none. It is called
  // a few times a second, by one thread at a time, until the client has gone.
  virtual std::string Next() = 0;
  virtual bool ended() const = 0;
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::vector<std::pair<std::string, std::string>> headers;  // more headers
  std::string body;
  std::vector<std::string> tensors;    // bytes that follow the body
  std::shared_ptr<HttpEvents> events;  // follow instead of a body
};

// The one request of a connection that waits for its answer.
class HttpExchange {
 public:
  virtual ~HttpExchange() = default;
  // To be called once, by any thread; does not block. `make` makes the response, on a thread of the
  // server that may take its time.
  virtual void Answer(std::function<HttpResponse()> make) = 0;
  // Whether the client has gone. Any thread.
  virtual bool gone() const = 0;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_HTTP_MESSAGE_H_
