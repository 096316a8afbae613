// The Python class's Session, and what its methods share: stream ids, structures, errors, the GIL.

#ifndef CONTINUAL_TRANSFORMERS_PYTHON_PYTHON_SESSION_H_
#define CONTINUAL_TRANSFORMERS_PYTHON_PYTHON_SESSION_H_

#include "cc/python/numpy_api.h"
// NumPy's header comes first: it includes Python.h.
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "cc/python/small_vector.h"
#include "cc/session/error.h"
#include "cc/session/session.h"

namespace continual_transformers {

// Thrown through C++ up to the function that Python called. Python's exception is already set.
struct PythonError {};

// Sets a Python exception and throws PythonError.
[[noreturn]] void Raise(PyObject* type, const std::string& sentence);

// The Python exception classes for a session's errors. The module creates them.
struct Exceptions {
  PyObject* unknown_stream;    // ValueError
  PyObject* too_many_streams;  // RuntimeError
  PyObject* model_file;        // ValueError
  PyObject* other_model;       // ValueError
};
extern Exceptions exceptions;

// Sets the Python exception for the current C++ exception. Call it in a catch block.
void SetPythonError();

// Releases the GIL during its lifetime if `release` is true. No code that runs meanwhile may touch
// a Python object.
class GilRelease {
 public:
  explicit GilRelease(bool release) : state_(release ? PyEval_SaveThread() : nullptr) {}
  ~GilRelease() {
    if (state_) PyEval_RestoreThread(state_);
  }
  GilRelease(const GilRelease&) = delete;
  GilRelease& operator=(const GilRelease&) = delete;

 private:
  PyThreadState* state_;
};

// NumPy's limit before version 2.0.
constexpr int kMostAxes = 32;

// An input or output of the plan.
struct ArraySpec {
  std::string name;
  std::string label;  // its name in error messages
  PyArray_Descr* dtype;
  int type_number;
  std::vector<npy_intp> shape;  // of one step of one stream
  npy_intp bytes;               // of one step of one stream
  bool is_integer;
};

// The structure of a model's inputs or outputs: an index in the plan's list, a list, or a dict.
struct Structure {
  enum Kind { kLeaf, kList, kDict };
  Kind kind = kLeaf;
  int place = 0;                    // of a leaf
  std::string name;                 // of a leaf
  std::vector<Structure> children;  // of a list or dict
  // One for each child of a dict. A list has keys too, if its children are leaves and no two have
  // the same name. They are interned strings, which are never freed.
  std::vector<PyObject*> keys;

  // `specs`: the plan's inputs or outputs, which are the leaves.
  static Structure Parse(const std::string& plan_json, const char* key,
                         const std::vector<ArraySpec>& specs);
  // "a dict with the keys 'audio', 'video'", "a list of 2: audio, video"
  std::string Text() const;
};

// Stream ids as the caller passed them.
class StreamIds {
 public:
  // `streams`: an int, a list or tuple of ints, or an array of int64. Throws PythonError.
  explicit StreamIds(PyObject* streams);
  explicit StreamIds(int64_t count) { ids_.resize(count); }
  const StreamId* data() const { return ids_.data(); }
  StreamId* data() { return ids_.data(); }
  int64_t count() const { return static_cast<int64_t>(ids_.size()); }
  bool is_scalar() const { return is_scalar_; }

 private:
  void ReadSequence(PyObject* streams);
  void ReadArray(PyArrayObject* streams);

  SmallVector<StreamId, 64> ids_;
  bool is_scalar_ = false;
};

class PythonSession {
 public:
  PythonSession(std::shared_ptr<const ModelFile> file, const SessionOptions& options);

  Session& session() { return *session_; }
  const SessionOptions& options() const { return options_; }
  // The number of the GPU that it runs on; -1: it runs on the CPU.
  int gpu() const { return gpu_; }
  const std::vector<ArraySpec>& inputs() const { return inputs_; }
  const std::vector<ArraySpec>& outputs() const { return outputs_; }
  const Structure& input_structure() const { return input_structure_; }
  const Structure& output_structure() const { return output_structure_; }

  enum class Release { kByEstimate, kNever, kAlways };
  Release release = Release::kByEstimate;

  // Returns whether a step of `rows` rows (M * T) releases the GIL: if it is long, or waits for a
  // GPU. What it waits for may be a Python function on the GPU's default stream.
  bool ReleasesFor(int64_t rows) const {
    if (release != Release::kByEstimate) return release == Release::kAlways;
    return gpu_ >= 0 || rows > short_rows_;
  }
  // The same for other work with a time estimate.
  bool ReleasesForNanoseconds(double nanoseconds) const;

 private:
  std::unique_ptr<Session> session_;
  SessionOptions options_;
  std::vector<ArraySpec> inputs_, outputs_;
  Structure input_structure_, output_structure_;
  int64_t short_rows_ = 0;
  int gpu_ = -1;
};

// Returns the PythonSession of a Python instance. Throws PythonError if it has none.
PythonSession& FromPython(PyObject* self);

// The methods `step` and `steps`, for PyDescr_NewMethod.
extern PyMethodDef step_method, steps_method;
// Prepares these methods. Call it once. Returns false with Python's exception set.
bool InitStepMethods();

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_PYTHON_PYTHON_SESSION_H_
