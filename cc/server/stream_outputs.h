// The newest outputs of one stream as server-sent events, for whoever looks at it on the page.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_STREAM_OUTPUTS_H_
#define CONTINUAL_TRANSFORMERS_SERVER_STREAM_OUTPUTS_H_

#include <atomic>
#include <memory>
#include <string>

#include "cc/server/http_message.h"
#include "cc/server/model_repository.h"
#include "cc/server/served_model.h"

namespace continual_transformers::server {

class StreamOutputs : public HttpEvents {
 public:
  // Adds one to `watching` for as long as it lives.
  StreamOutputs(const std::shared_ptr<ServedModel>& model, const std::string& stream,
                const ModelRepository* repository, std::atomic<int>* watching);
  ~StreamOutputs() override;

  std::string Next() override;
  bool ended() const override;  // the model was unloaded

 private:
  class Watcher;

  const std::shared_ptr<ServedModel> model_;
  const ModelRepository* const repository_;
  std::atomic<int>* const watching_;
  const std::shared_ptr<Watcher> watcher_;
  int quiet_ = 0;
};

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_STREAM_OUTPUTS_H_
