// The server's HTTP port: connections of HTTP/1.1, with TLS if Security has a certificate. HttpApi
// has the routes.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_HTTP_SERVER_H_
#define CONTINUAL_TRANSFORMERS_SERVER_HTTP_SERVER_H_

#include <cstdint>
#include <memory>
#include <string>

#include "cc/server/infer_call.h"
#include "cc/server/security.h"
#include "cc/server/server_parts.h"

namespace continual_transformers::server {

struct HttpOptions {
  std::string host = "127.0.0.1";
  int port = 8000;  // 0: any free one
  // That read requests and run batches. While one runs batches, another reads.
  int threads = 2;
  int64_t max_body_bytes = 64 << 20;    // of a request
  int64_t max_header_bytes = 16 << 10;  // of a request
  // When one more comes, the one that has been idle longest is closed. If none is idle, the new one
  // is refused.
  int64_t max_connections = 1024;
  // How long a connection may be idle, and how long a request or an answer may take on the wire.
  int64_t idle_seconds = 60;
  InferLimits limits;
};

class HttpServer {
 public:
  // Listens at once. Throws Error: kIo if it cannot, kInvalidArgument if the certificate or key is
  // none.
  HttpServer(const HttpOptions& options, const Security& security, const ServerParts& parts);
  ~HttpServer();
  HttpServer(const HttpServer&) = delete;
  HttpServer& operator=(const HttpServer&) = delete;

  int port() const;
  // Accepts no more requests. Requests in progress get their answers, if their clients take them
  // within so long. To be called after ModelRepository::Drain.
  void Stop(int64_t milliseconds);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_HTTP_SERVER_H_
