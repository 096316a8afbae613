#include "cc/tensorflow/session_resource.h"

#include <cstring>
#include <exception>
#include <limits>
#include <new>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "cc/session/error.h"
#include "cc/session/model_file.h"
#include "cc/tensorflow/expect.h"

namespace continual_transformers {
namespace {

using absl::Status;

Status StatusOfError(const Error& error) {
  switch (error.code()) {
    case ErrorCode::kTooManyStreams:
      return absl::ResourceExhaustedError(error.what());
    case ErrorCode::kIo:
      return absl::FailedPreconditionError(error.what());
    case ErrorCode::kInternal:
      return absl::InternalError(error.what());
    default:
      return absl::InvalidArgumentError(error.what());
  }
}

// A file on a local file system is mapped. TensorFlow reads others ("gs://").
Status ReadModel(tensorflow::Env* env, const std::string& path,
                 std::shared_ptr<const ModelFile>* model) {
  if (!absl::StrContains(path, "://")) {
    return StatusOf([&] { *model = ModelFile::Map(path); });
  }
  std::string data;
  TF_RETURN_IF_ERROR(tensorflow::ReadFileToString(env, path, &data));
  return StatusOf([&] { *model = ModelFile::Copy(data.data(), data.size()); });
}

}  // namespace

Status StatusOf(absl::FunctionRef<void()> call) {
  try {
    call();
    return absl::OkStatus();
  } catch (const Error& error) {
    return StatusOfError(error);
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError("out of memory");
  } catch (const std::exception& error) {
    return absl::InternalError(error.what());
  }
}

Status SessionResource::Initialize(tensorflow::Env* env, const std::string& model_file,
                                   const std::string& states, int64_t streams) {
  std::lock_guard<std::mutex> growing(growing_);
  if (session_.load() != nullptr) return absl::OkStatus();

  std::shared_ptr<const ModelFile> model;
  TF_RETURN_IF_ERROR(ReadModel(env, model_file, &model));
  std::string data;
  if (!states.empty()) TF_RETURN_IF_ERROR(tensorflow::ReadFileToString(env, states, &data));
  std::unique_ptr<Session> session;
  std::vector<StreamId> ids;
  TF_RETURN_IF_ERROR(StatusOf([&] {
    ids.resize(streams);
    // One thread: TensorFlow runs steps in parallel on its own threads.
    session = std::make_unique<Session>(std::move(model), SessionOptions());
    session->store()->Defaults(streams, ids.data());
  }));
  const int64_t bytes = session->state_bytes(), size = data.size();
  if (size % bytes != 0 || size / bytes > streams) {
    return InvalidArgument("expected '", states, "' to hold the states of at most ", streams,
                           " streams, ", bytes, " bytes each, but got ", size,
                           " bytes: it belongs to another model, or was damaged; export the model "
                           "again");
  }
  TF_RETURN_IF_ERROR(StatusOf([&] {
    for (int64_t i = 0; i < size / bytes; ++i) {
      session->SetState(ids[i], data.data() + i * bytes, bytes);
    }
  }));
  std::unique_lock<std::shared_mutex> lock(ids_mutex_);
  ids_ = std::move(ids);
  owner_ = std::move(session);
  session_ = owner_.get();
  return absl::OkStatus();
}

Status SessionResource::EnsureStreams(int64_t count, int64_t* held) {
  if (count < 0) return InvalidArgument("expected count >= 0, but got ", count);
  Session* session;
  TF_RETURN_IF_ERROR(Get(&session));
  std::lock_guard<std::mutex> growing(growing_);
  *held = ids_.size();
  if (count <= *held) return absl::OkStatus();
  std::vector<StreamId> ids;
  TF_RETURN_IF_ERROR(StatusOf([&] {
    ids.resize(count);
    session->store()->Defaults(count, ids.data());
  }));
  *held = count;
  std::unique_lock<std::shared_mutex> lock(ids_mutex_);
  ids_ = std::move(ids);
  return absl::OkStatus();
}

Status SessionResource::Ids(absl::Span<const int32_t> streams, StreamIds* ids) const {
  ids->resize(streams.size());
  std::shared_lock<std::shared_mutex> lock(ids_mutex_);
  const int64_t held = ids_.size();
  for (size_t m = 0; m < streams.size(); ++m) {
    if (streams[m] < 0 || streams[m] >= held) return StreamNotHeld(streams[m], m, held);
    (*ids)[m] = ids_[streams[m]];
  }
  return absl::OkStatus();
}

Status SessionResource::Get(Session** session) const {
  *session = session_.load();
  if (*session != nullptr) return absl::OkStatus();
  return absl::FailedPreconditionError(
      "the session has no model yet: load the SavedModel by tf.saved_model.load or by "
      "TF_LoadSessionFromSavedModel, which run its initializer, or run that first");
}

std::string SessionResource::DebugString() const {
  const Session* const session = session_.load();
  if (session == nullptr) return "a session that is not initialized";
  return absl::StrCat("a session of the model ", session->plan().name, " with ",
                      session->store()->open_streams(), " streams");
}

}  // namespace continual_transformers
