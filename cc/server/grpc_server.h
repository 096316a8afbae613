// The server's gRPC port: KServe V2 with Triton's additions (inference.proto), health and
// reflection.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_GRPC_SERVER_H_
#define CONTINUAL_TRANSFORMERS_SERVER_GRPC_SERVER_H_

#include <cstdint>
#include <memory>
#include <string>

#include "cc/server/infer_call.h"
#include "cc/server/security.h"
#include "cc/server/server_parts.h"

namespace continual_transformers::server {

struct GrpcOptions {
  std::string host = "127.0.0.1";
  int port = 8001;                          // 0: any free one
  int64_t max_message_bytes = 64 << 20;     // of a request
  int64_t max_header_bytes = 16 << 10;      // of a request's metadata
  int64_t max_calls_per_connection = 1024;  // in progress at once
  InferLimits limits;
};

class GrpcServer {
 public:
  // Listens at once. Throws Error (kIo) if it cannot.
  GrpcServer(const GrpcOptions& options, const Security& security, const ServerParts& parts);
  ~GrpcServer();
  GrpcServer(const GrpcServer&) = delete;
  GrpcServer& operator=(const GrpcServer&) = delete;

  int port() const;
  // For gRPC's health service: whether the server takes steps.
  void SetServing(bool serving);
  // Accepts no more calls, and ends those that are not done after `milliseconds`.
  void Stop(int64_t milliseconds);

 private:
  class Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_GRPC_SERVER_H_
