// The C interface: checks the arguments that C cannot check, and turns exceptions into status codes
// and messages.

#include <continual_transformers.h>

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cc/session/error.h"
#include "cc/session/executor.h"
#include "cc/session/model_file.h"
#include "cc/session/plan.h"
#include "cc/session/session.h"
#include "cc/session/stream_store.h"

namespace ct = continual_transformers;

struct ct_session {
  ct_session(std::shared_ptr<const ct::ModelFile> file, const ct::SessionOptions& options)
      : session(std::move(file), options) {}
  ct::Session session;
};

namespace {

#define CT_TEXT(x) #x
#define CT_TEXT_OF(x) CT_TEXT(x)
constexpr char kVersion[] =
    CT_TEXT_OF(CT_VERSION_MAJOR) "." CT_TEXT_OF(CT_VERSION_MINOR) "." CT_TEXT_OF(CT_VERSION_PATCH);

static_assert(static_cast<int>(CT_INTERNAL) == static_cast<int>(ct::ErrorCode::kInternal) &&
                  static_cast<int>(CT_IO) == static_cast<int>(ct::ErrorCode::kIo),
              "error.h and the C interface must have the same codes");

thread_local std::string last_error;

ct_status Fail(ct_status status, const char* text) noexcept {
  try {
    last_error = text;
  } catch (...) {
    last_error.clear();
  }
  return status;
}

// Runs `call`. Returns a status code for what it throws.
template <typename Call>
ct_status Status(const Call& call) noexcept {
  try {
    call();
    return CT_OK;
  } catch (const ct::Error& error) {
    return Fail(static_cast<ct_status>(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    return Fail(CT_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& error) {
    return Fail(CT_INTERNAL, error.what());
  } catch (...) {
    return Fail(CT_INTERNAL, "caught an exception that is not a std::exception");
  }
}

[[noreturn]] void Invalid(const std::string& sentence) {
  throw ct::Error(ct::ErrorCode::kInvalidArgument, sentence);
}

// C types cannot say that a pointer must not be null.
void Check(const void* pointer, const char* name) {
  if (pointer == nullptr) Invalid(std::string(name) + " is NULL, expected a pointer");
}

// An empty array may be null.
void CheckArray(const void* pointer, int64_t count, const char* name) {
  if (count < 0) {
    Invalid("got a count of " + std::to_string(count) + ", expected 0 or more");
  }
  if (count > 0) Check(pointer, name);
}

ct_dtype Dtype(ct::DType dtype) {
  switch (dtype) {
    case ct::DType::kFloat32:
      return CT_FLOAT32;
    case ct::DType::kFloat64:
      return CT_FLOAT64;
    case ct::DType::kBFloat16:
      return CT_BFLOAT16;
    case ct::DType::kFloat16:
      return CT_FLOAT16;
    case ct::DType::kInt32:
      return CT_INT32;
    case ct::DType::kInt64:
      return CT_INT64;
    case ct::DType::kBool:
      return CT_BOOL;
    case ct::DType::kInt8:
      return CT_INT8;
  }
  return CT_DTYPE_OF_FILE;  // not reached: the cases above are all dtypes
}

std::optional<ct::DType> OptionalDtype(const ct_dtype& dtype, const char* name) {
  // A C caller may store any number. Reading it as an enum would be undefined.
  int number;
  static_assert(sizeof(number) == sizeof(dtype));
  std::memcpy(&number, &dtype, sizeof(number));
  switch (number) {
    case CT_DTYPE_OF_FILE:
      return std::nullopt;
    case CT_FLOAT32:
      return ct::DType::kFloat32;
    case CT_FLOAT64:
      return ct::DType::kFloat64;
    case CT_BFLOAT16:
      return ct::DType::kBFloat16;
    case CT_FLOAT16:
      return ct::DType::kFloat16;
    case CT_INT8:
      return ct::DType::kInt8;
    default:
      Invalid(std::string(name) + " is " + std::to_string(number) +
              ", expected CT_FLOAT32, CT_FLOAT64, CT_BFLOAT16, CT_FLOAT16, CT_INT8 or "
              "CT_DTYPE_OF_FILE");
  }
}

ct::SessionOptions Options(const ct_options* options) {
  if (options == nullptr) return {};
  // The fields of the first version. An older caller has no more, a newer header may have a larger
  // struct than this one.
  constexpr size_t kFirst = offsetof(ct_options, device);
  if (options->size < kFirst || (options->size > kFirst && options->size < sizeof(ct_options))) {
    Invalid("the `size` of ct_options is " + std::to_string(options->size) + ", expected " +
            std::to_string(sizeof(ct_options)) +
            ": initialize the options with CT_OPTIONS_DEFAULT");
  }
  const char* const bytes = reinterpret_cast<const char*>(options);
  if (options->size > sizeof(ct_options) &&
      std::any_of(bytes + sizeof(ct_options), bytes + options->size,
                  [](char byte) { return byte != 0; })) {
    Invalid("ct_options has fields that library version " + std::string(kVersion) +
            " does not know, and they are not zero: use a newer library");
  }
  ct::SessionOptions result;
  result.streams = options->streams;
  result.threads = options->threads;
  result.cache_dtype = OptionalDtype(options->cache_dtype, "cache_dtype");
  result.weights_dtype = OptionalDtype(options->weights_dtype, "weights_dtype");
  if (options->size >= sizeof(ct_options) && options->device != nullptr) {
    result.device = options->device;
  }
  return result;
}

template <typename File>
ct_status Load(const File& file, const ct_options* options, ct_session** session) noexcept {
  return Status([&] {
    Check(session, "session");
    *session = nullptr;
    const ct::SessionOptions checked = Options(options);
    *session = new ct_session(file(), checked);
  });
}

std::shared_ptr<const ct::ModelFile> Map(const char* path) {
  Check(path, "path");
  return ct::ModelFile::Map(path);
}

std::shared_ptr<const ct::ModelFile> Copy(const void* data, size_t bytes) {
  CheckArray(data, bytes != 0, "data");
  return ct::ModelFile::Copy(data, bytes);
}

ct_status Describe(const ct_session* session, bool is_input, int64_t i, ct_value* value) noexcept {
  return Status([&] {
    Check(session, "session");
    Check(value, "value");
    const ct::Plan& plan = session->session.plan();
    const std::vector<ct::Port>& ports = is_input ? plan.inputs : plan.outputs;
    if (i < 0 || i >= static_cast<int64_t>(ports.size())) {
      Invalid("the model has " + std::to_string(ports.size()) +
              (is_input ? " inputs" : " outputs") + ", counted from 0, got number " +
              std::to_string(i));
    }
    const ct::Value& of = plan.values[ports[i].value];
    *value = {ports[i].name.c_str(), Dtype(of.dtype), static_cast<int64_t>(of.shape.size()),
              of.shape.data(),       of.size,         of.size * ct::SizeOf(of.dtype)};
  });
}

}  // namespace

extern "C" {

const char* ct_version(void) { return kVersion; }

const char* ct_last_error(void) { return last_error.c_str(); }

ct_status ct_session_load(const char* path, const ct_options* options, ct_session** session) {
  return Load([&] { return Map(path); }, options, session);
}

ct_status ct_session_load_memory(const void* data, size_t bytes, const ct_options* options,
                                 ct_session** session) {
  return Load([&] { return Copy(data, bytes); }, options, session);
}

void ct_session_free(ct_session* session) { delete session; }

ct_status ct_session_save(const ct_session* session, const char* path) {
  return Status([&] {
    Check(session, "session");
    Check(path, "path");
    session->session.executor()->file().Save(path);
  });
}

ct_status ct_session_load_weights(ct_session* session, const char* path) {
  return Status([&] {
    Check(session, "session");
    session->session.LoadWeights(Map(path));
  });
}

ct_status ct_session_load_weights_memory(ct_session* session, const void* data, size_t bytes) {
  return Status([&] {
    Check(session, "session");
    session->session.LoadWeights(Copy(data, bytes));
  });
}

ct_status ct_session_open(ct_session* session, int64_t count, ct_stream* streams) {
  return Status([&] {
    Check(session, "session");
    CheckArray(streams, count, "streams");
    session->session.Open(count, streams);
  });
}

ct_status ct_session_close(ct_session* session, const ct_stream* streams, int64_t count) {
  return Status([&] {
    Check(session, "session");
    CheckArray(streams, count, "streams");
    session->session.Close(streams, count);
  });
}

ct_status ct_session_step(ct_session* session, const ct_stream* streams, int64_t count,
                          const void* const* inputs, void* const* outputs) {
  return ct_session_steps(session, streams, count, 1, inputs, outputs, nullptr);
}

ct_status ct_session_steps(ct_session* session, const ct_stream* streams, int64_t count,
                           int64_t steps, const void* const* inputs, void* const* outputs,
                           const bool* key_mask) {
  return Status([&] {
    Check(session, "session");
    if (count > 0 && steps > 0) {
      const ct::Plan& plan = session->session.plan();
      CheckArray(inputs, plan.inputs.size(), "inputs");
      CheckArray(outputs, plan.outputs.size(), "outputs");
      for (size_t i = 0; i < plan.inputs.size(); ++i) {
        if (inputs[i] == nullptr) {
          Invalid("inputs[" + std::to_string(i) + "], \"" + plan.inputs[i].name +
                  "\", is NULL, expected a pointer");
        }
      }
    }
    session->session.Step(streams, count, steps, inputs, outputs, key_mask);
  });
}

ct_status ct_session_clean(ct_session* session, const ct_stream* streams, int64_t count) {
  return Status([&] {
    Check(session, "session");
    CheckArray(streams, count, "streams");
    // A null pointer would clean all streams.
    if (count != 0) session->session.Clean(streams, count);
  });
}

ct_status ct_session_clean_all(ct_session* session) {
  return Status([&] {
    Check(session, "session");
    session->session.Clean(nullptr, 0);
  });
}

ct_status ct_session_positions(const ct_session* session, const ct_stream* streams, int64_t count,
                               int64_t* positions) {
  return Status([&] {
    Check(session, "session");
    CheckArray(positions, count, "positions");
    session->session.Positions(streams, count, positions);
    const int64_t block = session->session.plan().block;
    for (int64_t i = 0; i < count; ++i) positions[i] *= block;
  });
}

ct_status ct_session_ready(const ct_session* session, const ct_stream* streams, int64_t count,
                           bool* ready) {
  return Status([&] {
    Check(session, "session");
    CheckArray(ready, count, "ready");
    std::vector<int64_t> positions(count);
    session->session.Positions(streams, count, positions.data());
    for (int64_t i = 0; i < count; ++i) ready[i] = session->session.plan().IsReadyAt(positions[i]);
  });
}

int64_t ct_session_open_streams(const ct_session* session) {
  return session->session.store()->open_streams();
}

int64_t ct_session_state_bytes(const ct_session* session) { return session->session.state_bytes(); }

ct_status ct_session_get_state(const ct_session* session, ct_stream stream, void* state,
                               int64_t bytes) {
  return Status([&] {
    Check(session, "session");
    Check(state, "state");
    if (bytes != session->session.state_bytes()) {
      Invalid("a copy of a stream has " + std::to_string(session->session.state_bytes()) +
              " bytes, got room for " + std::to_string(bytes) +
              ": pass ct_session_state_bytes(session)");
    }
    session->session.GetState(stream, state);
  });
}

ct_status ct_session_set_states(ct_session* session, const ct_stream* streams, int64_t count,
                                const void* const* states, const int64_t* bytes,
                                bool other_weights) {
  return Status([&] {
    Check(session, "session");
    CheckArray(streams, count, "streams");
    CheckArray(states, count, "states");
    CheckArray(bytes, count, "bytes");
    for (int64_t i = 0; i < count; ++i) CheckArray(states[i], bytes[i], "a state");
    session->session.SetStates(streams, count, states, bytes, other_weights);
  });
}

ct_status ct_session_set_state(ct_session* session, ct_stream stream, const void* state,
                               int64_t bytes, bool other_weights) {
  return ct_session_set_states(session, &stream, 1, &state, &bytes, other_weights);
}

int64_t ct_session_inputs(const ct_session* session) {
  return session->session.plan().inputs.size();
}

int64_t ct_session_outputs(const ct_session* session) {
  return session->session.plan().outputs.size();
}

ct_status ct_session_input(const ct_session* session, int64_t i, ct_value* value) {
  return Describe(session, true, i, value);
}

ct_status ct_session_output(const ct_session* session, int64_t i, ct_value* value) {
  return Describe(session, false, i, value);
}

const char* ct_session_name(const ct_session* session) {
  return session->session.plan().name.c_str();
}

const char* ct_session_plan(const ct_session* session) {
  return session->session.plan().json.c_str();
}

int64_t ct_session_receptive_field(const ct_session* session) {
  return session->session.plan().receptive_field;
}

int64_t ct_session_delay(const ct_session* session) { return session->session.plan().delay; }

ct_dtype ct_session_cache_dtype(const ct_session* session) {
  return Dtype(session->session.executor()->options().cache_dtype);
}

ct_dtype ct_session_weights_dtype(const ct_session* session) {
  return Dtype(session->session.executor()->options().weights_dtype);
}

uint64_t ct_session_plan_fingerprint(const ct_session* session) {
  return session->session.plan_fingerprint();
}

uint64_t ct_session_weights_fingerprint(const ct_session* session) {
  return session->session.weights_fingerprint();
}

int64_t ct_session_estimate(const ct_session* session, int64_t streams, int64_t steps) {
  return session->session.executor()->EstimatedNanoseconds(streams, steps);
}

ct_status ct_session_memory(const ct_session* session, ct_memory* memory, size_t size) {
  return Status([&] {
    Check(session, "session");
    Check(memory, "memory");
    if (size < sizeof(ct_memory)) {
      Invalid("a ct_memory has " + std::to_string(sizeof(ct_memory)) + " bytes, got room for " +
              std::to_string(size) + ": pass sizeof(ct_memory)");
    }
    const ct::Session::Memory now = session->session.memory();
    // Fields that only a newer header has are zero.
    std::memset(memory, 0, size);
    *memory = {now.weights, now.model_file, now.streams, now.streams_overhead, now.arenas};
  });
}

}  // extern "C"
