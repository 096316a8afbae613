// A C++17 wrapper of continual_transformers.h. It is header-only, throws errors as exceptions, and
// frees what it makes. See that header for what each call does.
//
//   ct::Session session("model.safetensors");
//   ct::Stream stream = session.OpenStream();
//   std::vector<float> x(session.inputs()[0].elements), y(session.outputs()[0].elements);
//   while (Read(x.data())) stream.Step(x.data(), y.data());
//
// A model with several inputs or outputs takes a list of pointers for each:
//
//   stream.Step({a.data(), b.data()}, {y.data()});

#ifndef CONTINUAL_TRANSFORMERS_HPP_
#define CONTINUAL_TRANSFORMERS_HPP_

#include <continual_transformers.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace ct {

class Error : public std::runtime_error {
 public:
  Error(ct_status status, const std::string& sentence)
      : std::runtime_error(sentence), status_(status) {}
  ct_status status() const { return status_; }

 private:
  ct_status status_;
};

// Throws the error of a C function.
inline void Check(ct_status status) {
  if (status != CT_OK) throw Error(status, ct_last_error());
}

// Returns CT_FLOAT32 for float, and so on. 16-bit floats have no type in C++17: pass void pointers.
template <typename T>
constexpr ct_dtype DtypeOf() {
  if constexpr (std::is_same_v<T, float>) {
    return CT_FLOAT32;
  } else if constexpr (std::is_same_v<T, double>) {
    return CT_FLOAT64;
  } else if constexpr (std::is_same_v<T, int32_t>) {
    return CT_INT32;
  } else if constexpr (std::is_same_v<T, int64_t>) {
    return CT_INT64;
  } else {
    static_assert(std::is_same_v<T, bool>, "a model has no values of this type");
    return CT_BOOL;
  }
}

inline const char* NameOf(ct_dtype dtype) {
  constexpr const char* kNames[] = {"as in the file", "float32", "float64", "bfloat16",
                                    "float16",        "int32",   "int64",   "bool"};
  return kNames[dtype];
}

// An input or output of the model.
struct Value {
  std::string name;
  ct_dtype dtype;
  std::vector<int64_t> shape;  // of one step of one stream, like `elements` and `bytes`
  int64_t elements;
  int64_t bytes;
};

struct Options {
  int64_t streams = 0;  // the most streams open at once; 0: no limit
  int64_t threads = 1;
  ct_dtype cache_dtype = CT_DTYPE_OF_FILE;
  ct_dtype weights_dtype = CT_DTYPE_OF_FILE;
  std::string device = "cpu";  // or "cuda:0" and so on
};

class Stream;

// A model and its streams. Several threads may use one session at once.
class Session {
 public:
  // Loads a model file.
  explicit Session(const std::string& path, const Options& options = {}) : Session() {
    const ct_options c = COptions(options);
    Check(ct_session_load(path.c_str(), &c, &session_));
    Describe();
  }
  // Copies a model file's bytes.
  static Session FromMemory(const void* data, size_t bytes, const Options& options = {}) {
    const ct_options c = COptions(options);
    Session session;
    Check(ct_session_load_memory(data, bytes, &c, &session.session_));
    session.Describe();
    return session;
  }
  ~Session() { ct_session_free(session_); }

  Session(Session&& other) noexcept
      : session_(std::exchange(other.session_, nullptr)),
        inputs_(std::move(other.inputs_)),
        outputs_(std::move(other.outputs_)) {}
  Session& operator=(Session&& other) noexcept {
    std::swap(session_, other.session_);
    std::swap(inputs_, other.inputs_);
    std::swap(outputs_, other.outputs_);
    return *this;
  }
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  // The C session, for functions that this class does not wrap.
  ct_session* get() const { return session_; }

  void Save(const std::string& path) const { Check(ct_session_save(session_, path.c_str())); }
  void LoadWeights(const std::string& path) {
    Check(ct_session_load_weights(session_, path.c_str()));
  }

  const std::vector<Value>& inputs() const { return inputs_; }
  const std::vector<Value>& outputs() const { return outputs_; }
  std::string name() const { return ct_session_name(session_); }
  int64_t receptive_field() const { return ct_session_receptive_field(session_); }
  int64_t delay() const { return ct_session_delay(session_); }
  int64_t open_streams() const { return ct_session_open_streams(session_); }
  ct_memory memory() const {
    ct_memory memory;
    Check(ct_session_memory(session_, &memory, sizeof(memory)));
    return memory;
  }

  // Opens a stream that closes itself. The session must outlive it.
  Stream OpenStream();

  // Streams by id, as in the C interface.
  ct_stream Open() { return Open(1)[0]; }
  std::vector<ct_stream> Open(int64_t count) {
    std::vector<ct_stream> streams(count > 0 ? count : 0);
    Check(ct_session_open(session_, count, streams.data()));
    return streams;
  }
  void Close(ct_stream stream) { Check(ct_session_close(session_, &stream, 1)); }
  void Close(const std::vector<ct_stream>& streams) {
    Check(ct_session_close(session_, streams.data(), Count(streams)));
  }
  void Clean(ct_stream stream) { Check(ct_session_clean(session_, &stream, 1)); }
  void Clean(const std::vector<ct_stream>& streams) {
    Check(ct_session_clean(session_, streams.data(), Count(streams)));
  }
  void CleanAll() { Check(ct_session_clean_all(session_)); }

  int64_t Position(ct_stream stream) const {
    int64_t position;
    Check(ct_session_positions(session_, &stream, 1, &position));
    return position;
  }
  std::vector<int64_t> Positions(const std::vector<ct_stream>& streams) const {
    std::vector<int64_t> positions(streams.size());
    if (streams.empty()) return positions;
    Check(ct_session_positions(session_, streams.data(), Count(streams), positions.data()));
    return positions;
  }
  bool Ready(ct_stream stream) const {
    bool ready;
    Check(ct_session_ready(session_, &stream, 1, &ready));
    return ready;
  }

  // Takes one step of streams, for a model with one input and one output: both are [M, ...].
  // key_mask: [M], false for a gap: no query attends to that step, now or later. NULL: no gaps.
  template <typename X, typename Y>
  void Step(const std::vector<ct_stream>& streams, const X* x, Y* y,
            const bool* key_mask = nullptr) {
    Steps(streams.data(), Count(streams), 1, x, y, key_mask);
  }
  // Takes T steps: arrays are [M, T, ...], and key_mask is [M, T].
  template <typename X, typename Y>
  void Steps(const ct_stream* streams, int64_t count, int64_t steps, const X* x, Y* y,
             const bool* key_mask = nullptr) {
    CheckOnly<X>(inputs_, "input");
    CheckOnly<Y>(outputs_, "output");
    const void* const inputs[] = {x};
    void* const outputs[] = {y};
    Check(ct_session_steps(session_, streams, count, steps, inputs, outputs, key_mask));
  }
  // The same for any model: one pointer per input and output, in the order of inputs() and
  // outputs(). Their dtypes are not checked. NULL: this output is not wanted.
  void Step(const std::vector<ct_stream>& streams, const std::vector<const void*>& inputs,
            const std::vector<void*>& outputs, const bool* key_mask = nullptr) {
    Steps(streams.data(), Count(streams), 1, inputs, outputs, key_mask);
  }
  void Steps(const ct_stream* streams, int64_t count, int64_t steps,
             const std::vector<const void*>& inputs, const std::vector<void*>& outputs,
             const bool* key_mask = nullptr) {
    CheckNumber(inputs.size(), inputs_, "input");
    CheckNumber(outputs.size(), outputs_, "output");
    Check(
        ct_session_steps(session_, streams, count, steps, inputs.data(), outputs.data(), key_mask));
  }

  // Copies a stream, and restores a copy.
  std::vector<std::byte> GetState(ct_stream stream) const {
    std::vector<std::byte> state(ct_session_state_bytes(session_));
    Check(ct_session_get_state(session_, stream, state.data(), static_cast<int64_t>(state.size())));
    return state;
  }
  void SetState(ct_stream stream, const std::vector<std::byte>& state, bool other_weights = false) {
    Check(ct_session_set_state(session_, stream, state.data(), static_cast<int64_t>(state.size()),
                               other_weights));
  }

 private:
  Session() = default;

  static ct_options COptions(const Options& options) {
    ct_options c = CT_OPTIONS_DEFAULT;
    c.streams = options.streams;
    c.threads = options.threads;
    c.cache_dtype = options.cache_dtype;
    c.weights_dtype = options.weights_dtype;
    c.device = options.device.c_str();
    return c;
  }

  static int64_t Count(const std::vector<ct_stream>& streams) {
    return static_cast<int64_t>(streams.size());
  }

  static Value ValueOf(const ct_value& c) {
    return {c.name, c.dtype, {c.shape, c.shape + c.rank}, c.elements, c.bytes};
  }

  void Describe() {
    ct_value value;
    for (int64_t i = 0; i < ct_session_inputs(session_); ++i) {
      Check(ct_session_input(session_, i, &value));
      inputs_.push_back(ValueOf(value));
    }
    for (int64_t i = 0; i < ct_session_outputs(session_); ++i) {
      Check(ct_session_output(session_, i, &value));
      outputs_.push_back(ValueOf(value));
    }
  }

  template <typename T>
  static void CheckOnly(const std::vector<Value>& values, const char* what) {
    CheckNumber(1, values, what);
    if constexpr (!std::is_void_v<T>) {
      if (values[0].dtype != DtypeOf<T>()) {
        throw Error(CT_INVALID_ARGUMENT, std::string("the model's ") + what + " is " +
                                             NameOf(values[0].dtype) + ", got " +
                                             NameOf(DtypeOf<T>()));
      }
    }
  }

  static void CheckNumber(size_t got, const std::vector<Value>& expected, const char* what) {
    if (got == expected.size()) return;
    std::string names;
    for (const Value& value : expected) names += (names.empty() ? "" : ", ") + value.name;
    throw Error(CT_INVALID_ARGUMENT, "the model has " + std::to_string(expected.size()) + " " +
                                         what + (expected.size() == 1 ? "" : "s") + " (" + names +
                                         "), got " + std::to_string(got) +
                                         ": pass a vector with a pointer for each " + what);
  }

  ct_session* session_ = nullptr;
  std::vector<Value> inputs_, outputs_;
};

// An open stream. The destructor closes it.
class Stream {
 public:
  explicit Stream(Session* session) : session_(session), id_(session->Open()) {}
  ~Stream() {
    if (session_ != nullptr) ct_session_close(session_->get(), &id_, 1);
  }
  Stream(Stream&& other) noexcept
      : session_(std::exchange(other.session_, nullptr)), id_(other.id_) {}
  Stream& operator=(Stream&& other) noexcept {
    std::swap(session_, other.session_);
    std::swap(id_, other.id_);
    return *this;
  }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  ct_stream id() const { return id_; }

  // Takes one step, for a model with one input and one output. key_mask: false for a gap.
  template <typename X, typename Y>
  void Step(const X* x, Y* y, bool key_mask = true) {
    session_->Steps(&id_, 1, 1, x, y, key_mask ? nullptr : &key_mask);
  }
  // The same for any model: one pointer per input and output, in the session's order.
  void Step(const std::vector<const void*>& inputs, const std::vector<void*>& outputs,
            bool key_mask = true) {
    session_->Steps(&id_, 1, 1, inputs, outputs, key_mask ? nullptr : &key_mask);
  }
  // One stream has one flag. A pointer, as the session's Step takes it, would be read as true.
  template <typename X, typename Y>
  void Step(const X* x, Y* y, const bool* key_mask) = delete;
  void Step(const std::vector<const void*>& inputs, const std::vector<void*>& outputs,
            const bool* key_mask) = delete;

  int64_t position() const { return session_->Position(id_); }
  bool ready() const { return session_->Ready(id_); }
  void Clean() { session_->Clean(id_); }
  std::vector<std::byte> GetState() const { return session_->GetState(id_); }
  void SetState(const std::vector<std::byte>& state, bool other_weights = false) {
    session_->SetState(id_, state, other_weights);
  }

 private:
  Session* session_;
  ct_stream id_;
};

inline Stream Session::OpenStream() { return Stream(this); }

}  // namespace ct

#endif  // CONTINUAL_TRANSFORMERS_HPP_
