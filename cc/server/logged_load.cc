#include "cc/server/logged_load.h"

#include "cc/server/log.h"
#include "cc/session/error.h"

namespace continual_transformers::server {
namespace {

template <typename F>
void LogFailure(const char* event, const std::string& name, const F& f) {
  try {
    f();
  } catch (const Error& error) {
    Log(LogLevel::kWarning, event, {{"model", name}, {"error", error.what()}});
    // The operator's file cannot be read.
    if (error.code() == ErrorCode::kIo) throw Refusal(Reason::kInvalidArgument, error.what());
    throw;
  }
}

}  // namespace

void LoadAndLog(ModelRepository* repository, const std::string& name) {
  LogFailure("model_not_loaded", name, [&] { repository->Load(name); });
  const auto model = repository->Find(name);
  Log(LogLevel::kInfo, "model_loaded",
      {{"model", name},
       {"path", model->path()},
       {"receptive_field", model->plan().receptive_field},
       {"stream_bytes", model->session().state_bytes()}});
}

void UnloadAndLog(ModelRepository* repository, const std::string& name) {
  LogFailure("model_not_unloaded", name, [&] { repository->Unload(name); });
  Log(LogLevel::kInfo, "model_unloaded", {{"model", name}});
}

}  // namespace continual_transformers::server
