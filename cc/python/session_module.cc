// The extension module continual_transformers_tf._session: a Session on NumPy arrays.
// continual_transformers_tf/session.py builds the public class on it.

#define CONTINUAL_TRANSFORMERS_IMPORT_NUMPY
#include "cc/python/numpy_api.h"
// NumPy's header comes first: it includes Python.h.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cc/python/python_session.h"

namespace py = pybind11;

namespace continual_transformers {
namespace {

// The estimated cost of copying streams: 10 GB/s, and one lock per stream. It decides whether to
// release the GIL.
constexpr double kNanosecondsPerByte = 0.1;
constexpr double kNanosecondsPerStream = 100;

// The C++ functions throw PythonError with Python's exception set. pybind11 needs its own class.
template <typename F>
auto Translated(F&& f) -> decltype(f()) {
  try {
    return f();
  } catch (...) {
    SetPythonError();
    throw py::error_already_set();
  }
}

std::optional<DType> DTypeOrNone(const std::optional<std::string>& name) {
  if (!name) return std::nullopt;
  return DTypeOf(*name);
}

SessionOptions OptionsOf(int64_t streams, int64_t threads,
                         const std::optional<std::string>& cache_dtype,
                         const std::optional<std::string>& weights_dtype,
                         const std::string& device) {
  SessionOptions options;
  options.streams = streams;
  options.threads = threads;
  options.cache_dtype = DTypeOrNone(cache_dtype);
  options.weights_dtype = DTypeOrNone(weights_dtype);
  options.device = device;
  return options;
}

class ReadBuffer {
 public:
  explicit ReadBuffer(PyObject* object) {
    if (PyObject_GetBuffer(object, &view_, PyBUF_SIMPLE) != 0) throw PythonError();
  }
  ~ReadBuffer() { PyBuffer_Release(&view_); }
  ReadBuffer(const ReadBuffer&) = delete;
  ReadBuffer& operator=(const ReadBuffer&) = delete;
  const void* data() const { return view_.buf; }
  int64_t size() const { return view_.len; }

 private:
  Py_buffer view_;
};

std::shared_ptr<const ModelFile> Map(const std::string& path) {
  GilRelease gil(true);
  return ModelFile::Map(path);
}

std::shared_ptr<const ModelFile> Copy(const py::object& bytes) {
  ReadBuffer buffer(bytes.ptr());
  GilRelease gil(true);
  return ModelFile::Copy(buffer.data(), buffer.size());
}

py::object Int64Array(const int64_t* data, int64_t count) {
  npy_intp size = count;
  PyObject* array = PyArray_SimpleNew(1, &size, NPY_INT64);
  if (!array) throw PythonError();
  if (count) {
    std::memcpy(PyArray_DATA(reinterpret_cast<PyArrayObject*>(array)), data,
                count * sizeof(int64_t));
  }
  return py::reinterpret_steal<py::object>(array);
}

// Returns the given streams, or the open default streams.
std::unique_ptr<StreamIds> IdsOrOpenDefaults(PythonSession& session, const py::object& streams) {
  if (!streams.is_none()) return std::make_unique<StreamIds>(streams.ptr());
  const std::vector<StreamId> open = session.session().store()->OpenDefaults();
  auto ids = std::make_unique<StreamIds>(static_cast<int64_t>(open.size()));
  std::copy(open.begin(), open.end(), ids->data());
  return ids;
}

// Returns the given streams, or all default streams. Opens closed default streams again.
std::unique_ptr<StreamIds> IdsOrDefaults(PythonSession& session, const py::object& streams) {
  if (!streams.is_none()) return std::make_unique<StreamIds>(streams.ptr());
  StreamStore* const store = session.session().store();
  auto ids = std::make_unique<StreamIds>(store->default_streams());
  store->Defaults(ids->count(), ids->data());
  return ids;
}

py::object Open(PythonSession& session, const py::object& count) {
  if (count.is_none()) {
    StreamId id;
    session.session().Open(1, &id);
    return py::int_(id);
  }
  if (!PyIndex_Check(count.ptr()) || PyBool_Check(count.ptr())) {
    Raise(PyExc_TypeError, std::string("count is of type ") + Py_TYPE(count.ptr())->tp_name +
                               ". Expected an int, the number of streams to open.");
  }
  const Py_ssize_t number = PyNumber_AsSsize_t(count.ptr(), nullptr);
  if (number < 0) {
    Raise(PyExc_ValueError, "count is " + std::to_string(number) +
                                ". Expected the number of streams to open, 0 or more.");
  }
  if (number > std::numeric_limits<uint32_t>::max()) {
    Raise(exceptions.too_many_streams,
          "count is " + std::to_string(number) + ". A session holds at most 2^32 - 1 streams.");
  }
  npy_intp size = number;
  PyObject* array = PyArray_SimpleNew(1, &size, NPY_INT64);
  if (!array) throw PythonError();
  py::object result = py::reinterpret_steal<py::object>(array);
  {
    GilRelease gil(session.ReleasesForNanoseconds(kNanosecondsPerStream * size));
    session.session().Open(
        size, static_cast<StreamId*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(array))));
  }
  return result;
}

void Close(PythonSession& session, const py::object& streams) {
  const auto ids = IdsOrOpenDefaults(session, streams);
  {
    GilRelease gil(session.ReleasesForNanoseconds(kNanosecondsPerStream * ids->count()));
    session.session().Close(ids->data(), ids->count());
  }
}

void CleanState(PythonSession& session, const py::object& streams) {
  if (streams.is_none()) {
    GilRelease gil(session.ReleasesForNanoseconds(kNanosecondsPerStream *
                                                  session.session().store()->open_streams()));
    session.session().Clean(nullptr, 0);
    return;
  }
  const StreamIds ids(streams.ptr());
  GilRelease gil(session.ReleasesForNanoseconds(kNanosecondsPerStream * ids.count()));
  session.session().Clean(ids.data(), ids.count());
}

struct PositionList {
  std::vector<int64_t> positions;
  bool is_scalar;
};

// `streams` None: the positions of the default streams. Opens none.
PositionList PositionsOf(PythonSession& session, const py::object& streams) {
  const StreamStore* const store = session.session().store();
  if (streams.is_none()) {
    std::vector<int64_t> positions(store->default_streams());
    store->Positions(nullptr, positions.size(), positions.data());
    return {std::move(positions), false};
  }
  const StreamIds ids(streams.ptr());
  std::vector<int64_t> positions(ids.count());
  store->Positions(ids.data(), ids.count(), positions.data());
  return {std::move(positions), ids.is_scalar()};
}

py::object Position(PythonSession& session, const py::object& streams) {
  auto [positions, is_scalar] = PositionsOf(session, streams);
  for (int64_t& position : positions) position *= session.session().plan().block;
  if (is_scalar) return py::int_(positions[0]);
  return Int64Array(positions.data(), positions.size());
}

py::object Ready(PythonSession& session, const py::object& streams) {
  const auto [positions, is_scalar] = PositionsOf(session, streams);
  const Plan& plan = session.session().plan();
  if (is_scalar) return py::bool_(plan.IsReadyAt(positions[0]));
  npy_intp size = positions.size();
  PyObject* array = PyArray_SimpleNew(1, &size, NPY_BOOL);
  if (!array) throw PythonError();
  npy_bool* data = static_cast<npy_bool*>(PyArray_DATA(reinterpret_cast<PyArrayObject*>(array)));
  for (npy_intp i = 0; i < size; ++i) data[i] = plan.IsReadyAt(positions[i]);
  return py::reinterpret_steal<py::object>(array);
}

py::list GetState(PythonSession& session, const py::object& streams) {
  const auto ids = IdsOrOpenDefaults(session, streams);
  const int64_t bytes = session.session().state_bytes();
  py::list states;
  std::vector<char*> data;
  for (int64_t i = 0; i < ids->count(); ++i) {
    PyObject* state = PyBytes_FromStringAndSize(nullptr, bytes);
    if (!state) throw PythonError();
    states.append(py::reinterpret_steal<py::bytes>(state));
    data.push_back(PyBytes_AS_STRING(state));
  }
  GilRelease gil(session.ReleasesForNanoseconds(
      ids->count() * (kNanosecondsPerStream + kNanosecondsPerByte * bytes)));
  for (int64_t i = 0; i < ids->count(); ++i) {
    session.session().GetState(ids->data()[i], data[i]);
  }
  return states;
}

void SetState(PythonSession& session, const py::sequence& states, const py::object& streams,
              bool other_weights) {
  const auto ids = IdsOrDefaults(session, streams);
  const int64_t count = static_cast<int64_t>(states.size());
  if (count != ids->count()) {
    Raise(PyExc_ValueError, "There are " + std::to_string(count) + " states for " +
                                std::to_string(ids->count()) +
                                " streams. Expected a state for each stream." +
                                (streams.is_none() ? " Name the streams, as in set_state(states, "
                                                     "session.open(n)). Without names the states "
                                                     "go to the default streams."
                                                   : ""));
  }
  std::vector<std::unique_ptr<ReadBuffer>> buffers;
  std::vector<const void*> data;
  std::vector<int64_t> bytes;
  for (const py::handle state : states) {
    buffers.push_back(std::make_unique<ReadBuffer>(state.ptr()));
    data.push_back(buffers.back()->data());
    bytes.push_back(buffers.back()->size());
  }
  GilRelease gil(session.ReleasesForNanoseconds(
      count * (kNanosecondsPerStream + kNanosecondsPerByte * session.session().state_bytes())));
  session.session().SetStates(ids->data(), count, data.data(), bytes.data(), other_weights);
}

py::bytes MakeState(PythonSession& session, const py::object& block, int64_t position) {
  const ReadBuffer buffer(block.ptr());
  const int64_t expected = session.session().executor()->block_bytes();
  if (buffer.size() != expected) {
    Raise(PyExc_ValueError, "The block has " + std::to_string(buffer.size()) + " bytes. Expected " +
                                std::to_string(expected) + ".");
  }
  PyObject* state = PyBytes_FromStringAndSize(nullptr, session.session().state_bytes());
  if (!state) throw PythonError();
  const py::bytes result = py::reinterpret_steal<py::bytes>(state);
  session.session().MakeState(buffer.data(), position, PyBytes_AS_STRING(state));
  return result;
}

py::list StateEntries(PythonSession& session) {
  py::list entries;
  for (const StateEntry& entry : session.session().executor()->state()) {
    entries.append(py::make_tuple(entry.node, entry.name, NameOf(entry.dtype),
                                  py::tuple(py::cast(entry.shape)), entry.offset, entry.ring_rows,
                                  entry.rows_a_step));
  }
  return entries;
}

py::list Specs(const std::vector<ArraySpec>& specs) {
  py::list result;
  for (const ArraySpec& spec : specs) {
    result.append(py::make_tuple(
        spec.name, py::tuple(py::cast(spec.shape)),
        py::reinterpret_borrow<py::object>(reinterpret_cast<PyObject*>(spec.dtype))));
  }
  return result;
}

py::bytes ModelBytes(PythonSession& session) {
  const std::shared_ptr<const Executor> executor = session.session().executor();
  const ModelFile& file = executor->file();
  return py::bytes(static_cast<const char*>(file.data()), file.size());
}

void LoadWeightsBytes(PythonSession& session, const py::object& model) {
  const std::shared_ptr<const ModelFile> file = Copy(model);
  GilRelease gil(true);
  session.session().LoadWeights(file);
}

void LoadWeightsPath(PythonSession& session, const std::string& path) {
  GilRelease gil(true);
  session.session().LoadWeights(ModelFile::Map(path));
}

void Save(PythonSession& session, const std::string& path) {
  GilRelease gil(true);
  session.session().executor()->file().Save(path);
}

py::dict MemoryOf(PythonSession& session) {
  Session::Memory memory;
  {
    GilRelease gil(true);
    memory = session.session().memory();
  }
  py::dict result;
  result["weights"] = memory.weights;
  result["model_file"] = memory.model_file;
  result["streams"] = memory.streams;
  result["streams_overhead"] = memory.streams_overhead;
  result["arenas"] = memory.arenas;
  return result;
}

py::list Profile(PythonSession& session, int64_t streams, int64_t repeat) {
  std::vector<Executor::ProfileEntry> entries;
  {
    GilRelease gil(true);
    entries = session.session().Profile(streams, repeat);
  }
  py::list result;
  for (const Executor::ProfileEntry& entry : entries) {
    result.append(py::make_tuple(entry.name, entry.op, entry.seconds));
  }
  return result;
}

py::object GetReleaseGil(PythonSession& session) {
  if (session.release == PythonSession::Release::kByEstimate) return py::none();
  return py::bool_(session.release == PythonSession::Release::kAlways);
}

void SetReleaseGil(PythonSession& session, const py::object& release) {
  if (release.is_none()) {
    session.release = PythonSession::Release::kByEstimate;
  } else if (PyBool_Check(release.ptr())) {
    session.release =
        release.ptr() == Py_True ? PythonSession::Release::kAlways : PythonSession::Release::kNever;
  } else {
    Raise(PyExc_TypeError, "release_gil is " + std::string(py::repr(release)) +
                               ". Expected True (always), False (never) or None (for long steps).");
  }
}

// Returns the session of an instance. pybind11 would return uninitialized memory if a subclass did
// not call __init__, or __init__ failed.
PythonSession& SessionOf(const py::object& self) {
  if (!py::isinstance<PythonSession>(self)) {
    Raise(PyExc_TypeError, std::string("Expected a Session, but got an object of type ") +
                               Py_TYPE(self.ptr())->tp_name + ".");
  }
  return FromPython(self.ptr());
}

// Wraps a method so that its C++ exceptions become Python's.
template <typename R, typename... Args>
auto Bound(R (*function)(PythonSession&, Args...)) {
  return [function](const py::object& self, std::decay_t<Args>... args) -> R {
    return Translated(
        [&]() -> R { return function(SessionOf(self), std::forward<Args>(args)...); });
  };
}

// Wraps a lambda that reads a property.
template <typename F>
auto Read(F function) {
  return [function](const py::object& self) {
    return Translated([&] { return function(SessionOf(self)); });
  };
}

// A thread that waits for streams of another thread lets other Python threads run, even if its own
// call keeps the GIL: the other thread's step may take long.
void* BeginWait() {
  return Py_IsInitialized() && PyGILState_Check() ? PyEval_SaveThread() : nullptr;
}

void EndWait(void* state) { PyEval_RestoreThread(static_cast<PyThreadState*>(state)); }

constexpr StreamStore::WaitHooks kWaitHooks = {&BeginWait, &EndWait};

PyObject* NewException(py::module_& module, const char* name, const char* doc, PyObject* base) {
  // session.py exports them, so they carry its name.
  const std::string full = std::string("continual_transformers_tf.session.") + name;
  PyObject* type = PyErr_NewExceptionWithDoc(full.c_str(), doc, base, nullptr);
  if (!type) throw py::error_already_set();
  module.add_object(name, py::reinterpret_borrow<py::object>(type));
  return type;
}

void AddMethod(const py::object& type, PyMethodDef* method) {
  PyObject* descriptor = PyDescr_NewMethod(reinterpret_cast<PyTypeObject*>(type.ptr()), method);
  if (!descriptor) throw py::error_already_set();
  type.attr(method->ml_name) = py::reinterpret_steal<py::object>(descriptor);
}

}  // namespace

PythonSession& FromPython(PyObject* self) {
  // PyDescr_NewMethod's descriptor has checked that self is an instance of the class.
  auto* instance = reinterpret_cast<py::detail::instance*>(self);
  void* session =
      instance->simple_layout
          ? instance->simple_value_holder[0]
          : instance->get_value_and_holder(py::detail::get_type_info(typeid(PythonSession)))
                .value_ptr();
  if (!session) Raise(PyExc_RuntimeError, "This Session was not initialized: call its __init__.");
  return *static_cast<PythonSession*>(session);
}

PYBIND11_MODULE(_session, module) {
  if (_import_array() < 0) throw py::error_already_set();
  if (!InitStepMethods()) throw py::error_already_set();
  StreamStore::SetWaitHooks(&kWaitHooks);
  module.doc() = "The native part of continual_transformers_tf.session.";

  exceptions.unknown_stream =
      NewException(module, "UnknownStreamError",
                   "A stream id that was never given out, or was closed.", PyExc_ValueError);
  exceptions.too_many_streams = NewException(
      module, "TooManyStreamsError",
      "There is no room for another stream: the limit `streams=`, or memory.", PyExc_RuntimeError);
  exceptions.model_file = NewException(
      module, "ModelFileError",
      "A model file that is truncated, of another kind, of a newer version, or corrupt.",
      PyExc_ValueError);
  exceptions.other_model = NewException(
      module, "OtherModelError", "State or weights of another model, or state of another training.",
      PyExc_ValueError);

  py::class_<PythonSession> type(module, "NativeSession");
  type.def(py::init([](const py::object& model, bool is_path, int64_t streams, int64_t threads,
                       const std::optional<std::string>& cache_dtype,
                       const std::optional<std::string>& weights_dtype, const std::string& device) {
             return Translated([&] {
               const SessionOptions options =
                   OptionsOf(streams, threads, cache_dtype, weights_dtype, device);
               return std::make_unique<PythonSession>(
                   is_path ? Map(py::cast<std::string>(model)) : Copy(model), options);
             });
           }),
           py::arg("model"), py::kw_only(), py::arg("is_path"), py::arg("streams"),
           py::arg("threads"), py::arg("cache_dtype"), py::arg("weights_dtype"), py::arg("device"));
  AddMethod(type, &step_method);
  AddMethod(type, &steps_method);
  type.def("_open", Bound(&Open), py::arg("count"))
      .def("_close", Bound(&Close), py::arg("streams"))
      .def("_position", Bound(&Position), py::arg("streams"))
      .def("_ready", Bound(&Ready), py::arg("streams"))
      .def("_clean_state", Bound(&CleanState), py::arg("streams"))
      .def("_get_state", Bound(&GetState), py::arg("streams"))
      .def("_set_state", Bound(&SetState), py::arg("states"), py::arg("streams"),
           py::arg("other_weights"))
      .def("_make_state", Bound(&MakeState), py::arg("block"), py::arg("position"))
      .def("_state_entries", Bound(&StateEntries))
      .def("_model_bytes", Bound(&ModelBytes))
      .def("_save", Bound(&Save), py::arg("path"))
      .def("_memory", Bound(&MemoryOf))
      .def("_profile", Bound(&Profile), py::arg("streams"), py::arg("repeat"))
      .def("_load_weights_bytes", Bound(&LoadWeightsBytes), py::arg("model"))
      .def("_load_weights_path", Bound(&LoadWeightsPath), py::arg("path"))
      .def_property_readonly(
          "_plan_json", Read([](PythonSession& session) { return session.session().plan().json; }))
      .def_property_readonly(
          "_name", Read([](PythonSession& session) { return session.session().plan().name; }))
      .def_property_readonly("_inputs",
                             Read([](PythonSession& session) { return Specs(session.inputs()); }))
      .def_property_readonly("_outputs",
                             Read([](PythonSession& session) { return Specs(session.outputs()); }))
      .def_property_readonly("_receptive_field", Read([](PythonSession& session) {
                               return session.session().plan().receptive_field;
                             }))
      .def_property_readonly(
          "_delay", Read([](PythonSession& session) { return session.session().plan().delay; }))
      .def_property_readonly("_goes_on", Read([](PythonSession& session) {
                               return session.session().plan().GoesOn();
                             }))
      .def_property_readonly(
          "_block", Read([](PythonSession& session) { return session.session().plan().block; }))
      .def_property_readonly("_open_streams", Read([](PythonSession& session) {
                               return session.session().store()->open_streams();
                             }))
      .def_property_readonly("_state_bytes", Read([](PythonSession& session) {
                               return session.session().state_bytes();
                             }))
      .def_property_readonly("_cache_dtype", Read([](PythonSession& session) {
                               return NameOf(session.session().executor()->options().cache_dtype);
                             }))
      .def_property_readonly("_weights_dtype", Read([](PythonSession& session) {
                               return NameOf(session.session().executor()->options().weights_dtype);
                             }))
      .def_property_readonly("_device",
                             Read([](PythonSession& session) { return session.options().device; }))
      .def_property_readonly("_limit",
                             Read([](PythonSession& session) { return session.options().streams; }))
      .def_property_readonly("_threads",
                             Read([](PythonSession& session) { return session.options().threads; }))
      .def_property("release_gil", Bound(&GetReleaseGil), Bound(&SetReleaseGil));
}

}  // namespace continual_transformers
