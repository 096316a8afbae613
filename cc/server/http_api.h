// The routes of the HTTP port: KServe V2 with Triton's additions, the operator's calls, /metrics
// and the page.
//
// Without a token everyone may read health, metrics and the page's files. Everything else needs the
// token if the server has one. Loading and unloading need the operator's token if the server has
// any token. Lists and copies of streams and changes of the table need a server with a token.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_HTTP_API_H_
#define CONTINUAL_TRANSFORMERS_SERVER_HTTP_API_H_

#include <memory>
#include <optional>

#include "cc/server/history.h"
#include "cc/server/http_message.h"
#include "cc/server/infer_call.h"
#include "cc/server/outcome.h"
#include "cc/server/security.h"
#include "cc/server/server_parts.h"

namespace continual_transformers::server {

int HttpStatusOf(Reason reason);

// {"error": ..., "reason": ..., "expected": [{"stream": ..., "step": ...}]}
HttpResponse ErrorResponse(const Outcome& outcome);
HttpResponse ErrorResponse(int status, Reason reason, const std::string& message);

// Any thread may call any method.
class HttpApi {
 public:
  HttpApi(const Security& security, const ServerParts& parts, const InferLimits& limits = {});
  ~HttpApi();
  HttpApi(const HttpApi&) = delete;
  HttpApi& operator=(const HttpApi&) = delete;

  // The refusal of a request of which only the line and the headers have been read, so that no one
  // reads the body of a request that may not pass.
  std::optional<HttpResponse> Refuse(const HttpRequest& head) const;
  // Answers a request, now or later.
  void Handle(HttpRequest request, const std::shared_ptr<HttpExchange>& exchange);
  // Takes a sample for the history that the page shows. To be called every History::kSeconds.
  void Sample();

 private:
  class Routes;
  std::unique_ptr<Routes> routes_;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_HTTP_API_H_
