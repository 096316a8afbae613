#include "cc/python/python_session.h"

#include <algorithm>
#include <new>
#include <nlohmann/json.hpp>
#include <set>

#include "cc/session/device.h"

namespace continual_transformers {
namespace {

// A step that takes longer than this releases the GIL. Releasing it costs 0.07 us, but taking it
// back from a thread that computes costs 80 us on average and up to 5 ms, the interpreter's switch
// interval. While a step keeps the GIL, other Python threads wait for it.
constexpr int64_t kShortNanoseconds = 100'000;
constexpr int64_t kMostRows = int64_t{1} << 24;

int TypeNumberOf(DType dtype) {
  switch (dtype) {
    case DType::kFloat32:
      return NPY_FLOAT32;
    case DType::kFloat64:
      return NPY_FLOAT64;
    case DType::kInt32:
      return NPY_INT32;
    case DType::kInt64:
      return NPY_INT64;
    case DType::kBool:
      return NPY_BOOL;
    case DType::kFloat16:
      return NPY_FLOAT16;
    case DType::kInt8:
      return NPY_INT8;
    case DType::kBFloat16:
      break;
  }
  throw Error(ErrorCode::kBadModelFile,
              std::string("An input or output of the plan is ") + NameOf(dtype) +
                  ", which NumPy does not have. Expected float32, float64, int32, int64 or bool.");
}

std::vector<ArraySpec> SpecsOf(const Plan& plan, const std::vector<Port>& ports, const char* single,
                               const char* one_of) {
  std::vector<ArraySpec> specs;
  for (const Port& port : ports) {
    const Value& value = plan.values[port.value];
    if (value.shape.size() + 2 > kMostAxes) {
      throw Error(ErrorCode::kBadModelFile,
                  "'" + port.name + "' has " + std::to_string(value.shape.size()) +
                      " axes, but a NumPy array has at most " + std::to_string(kMostAxes) +
                      ", and two of them are for streams and steps.");
    }
    ArraySpec spec;
    spec.name = port.name;
    spec.label = ports.size() == 1 ? single : one_of + (" '" + port.name + "'");
    spec.type_number = TypeNumberOf(value.dtype);
    spec.dtype = PyArray_DescrFromType(spec.type_number);
    spec.shape.assign(value.shape.begin(), value.shape.end());
    spec.bytes = value.size * SizeOf(value.dtype);
    spec.is_integer = value.dtype == DType::kInt32 || value.dtype == DType::kInt64;
    specs.push_back(std::move(spec));
  }
  return specs;
}

PyObject* Interned(const std::string& text) {
  PyObject* string = PyUnicode_InternFromString(text.c_str());
  if (!string) throw PythonError();
  return string;
}

Structure StructureOf(const nlohmann::ordered_json& json) {
  Structure structure;
  if (json.is_array()) {
    structure.kind = Structure::kList;
    for (const nlohmann::ordered_json& child : json)
      structure.children.push_back(StructureOf(child));
  } else if (json.is_object()) {
    structure.kind = Structure::kDict;
    for (const auto& [key, child] : json.items()) {
      structure.keys.push_back(Interned(key));
      structure.children.push_back(StructureOf(child));
    }
  } else if (json.is_number_integer()) {
    structure.place = json.get<int>();
  } else {
    throw Error(ErrorCode::kBadModelFile, "The plan's structure of inputs or outputs holds " +
                                              json.dump() +
                                              ". Expected whole numbers, lists and objects.");
  }
  return structure;
}

void CheckPlaces(const Structure& structure, const char* key, std::vector<bool>* seen) {
  for (const Structure& child : structure.children) CheckPlaces(child, key, seen);
  if (structure.kind != Structure::kLeaf) return;
  const int place = structure.place;
  if (place < 0 || place >= static_cast<int>(seen->size()) || (*seen)[place]) {
    throw Error(ErrorCode::kBadModelFile, std::string("The plan's ") + key + " names place " +
                                              std::to_string(place) +
                                              " out of range or twice. Expected each of 0 to " +
                                              std::to_string(seen->size() - 1) + " once.");
  }
  (*seen)[place] = true;
}

void CheckStructure(const Structure& structure, const char* key, size_t count) {
  std::vector<bool> seen(count);
  CheckPlaces(structure, key, &seen);
  for (size_t i = 0; i < count; ++i) {
    if (!seen[i]) {
      throw Error(ErrorCode::kBadModelFile,
                  std::string("The plan's ") + key + " has no place " + std::to_string(i) + ".");
    }
  }
}

// Gives leaves their names, and lists of leaves their keys. The places have been checked.
void SetNames(Structure* structure, const std::vector<ArraySpec>& specs) {
  if (structure->kind == Structure::kLeaf) {
    structure->name = specs[structure->place].name;
    return;
  }
  std::set<std::string> names;
  for (Structure& child : structure->children) {
    SetNames(&child, specs);
    if (child.kind == Structure::kLeaf) names.insert(child.name);
  }
  const bool has_names = names.size() == structure->children.size();
  if (structure->kind != Structure::kList || !has_names) return;
  for (const Structure& child : structure->children) {
    structure->keys.push_back(Interned(child.name));
  }
}

std::string TypeName(PyObject* object) { return Py_TYPE(object)->tp_name; }

constexpr char kExpectedIds[] =
    "Expected an int, a list or tuple of ints, or an array of int64, as Session.open returns. "
    "For an array of another integer type, give streams.astype(np.int64).";

StreamId IdOf(PyObject* item) {
  long long id = -1;
  if (PyLong_CheckExact(item)) {
    id = PyLong_AsLongLong(item);
  } else {
    if (!PyIndex_Check(item) || PyBool_Check(item) || PyArray_Check(item)) {
      Raise(PyExc_TypeError, "A stream id is of type " + TypeName(item) + ". " + kExpectedIds);
    }
    PyObject* index = PyNumber_Index(item);
    if (!index) throw PythonError();
    id = PyLong_AsLongLong(index);
    Py_DECREF(index);
  }
  if (id == -1 && PyErr_Occurred()) {
    // The id has more than 64 bits, so no session made it.
    PyErr_Clear();
    Raise(exceptions.unknown_stream,
          std::string("A stream id has more than 64 bits. ") + kExpectedIds);
  }
  return id;
}

}  // namespace

Exceptions exceptions;

void Raise(PyObject* type, const std::string& sentence) {
  PyErr_SetString(type, sentence.c_str());
  throw PythonError();
}

void SetPythonError() {
  try {
    throw;
  } catch (const PythonError&) {
  } catch (const Error& error) {
    PyObject* type = PyExc_RuntimeError;
    switch (error.code()) {
      case ErrorCode::kInvalidArgument:
        type = PyExc_ValueError;
        break;
      case ErrorCode::kBadModelFile:
        type = exceptions.model_file;
        break;
      case ErrorCode::kUnknownStream:
        type = exceptions.unknown_stream;
        break;
      case ErrorCode::kTooManyStreams:
        type = exceptions.too_many_streams;
        break;
      case ErrorCode::kOtherModel:
        type = exceptions.other_model;
        break;
      case ErrorCode::kIo:
        type = PyExc_OSError;
        break;
      case ErrorCode::kInternal:
        break;
    }
    PyErr_SetString(type, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
}

Structure Structure::Parse(const std::string& plan_json, const char* key,
                           const std::vector<ArraySpec>& specs) {
  // ParsePlan has already checked that it is JSON.
  const auto plan = nlohmann::ordered_json::parse(plan_json);
  Structure structure = StructureOf(plan.at(key));
  CheckStructure(structure, key, specs.size());
  SetNames(&structure, specs);
  return structure;
}

std::string Structure::Text() const {
  if (kind == kLeaf) return "one NumPy array";
  std::string text =
      kind == kDict ? "a dict with the keys " : "a list of " + std::to_string(children.size());
  for (size_t i = 0; i < children.size(); ++i) {
    if (kind == kDict) {
      const char* key = PyUnicode_AsUTF8(keys[i]);
      text += (i ? ", '" : "'") + std::string(key ? key : "?") + "'";
    } else {
      const Structure& child = children[i];
      text += (i ? ", " : ": ") + (child.kind == kLeaf ? child.name : "(" + child.Text() + ")");
    }
  }
  return text;
}

StreamIds::StreamIds(PyObject* streams) {
  if (PyList_CheckExact(streams) || PyTuple_CheckExact(streams)) {
    ReadSequence(streams);
  } else if (PyArray_Check(streams)) {
    ReadArray(reinterpret_cast<PyArrayObject*>(streams));
  } else if (PyList_Check(streams) || PyTuple_Check(streams)) {
    ReadSequence(streams);
  } else if (PyIndex_Check(streams) && !PyBool_Check(streams)) {
    is_scalar_ = true;
    ids_.push_back(IdOf(streams));
  } else {
    Raise(PyExc_TypeError, "streams is of type " + TypeName(streams) + ". " + kExpectedIds);
  }
}

void StreamIds::ReadSequence(PyObject* streams) {
  // Read the size each time: a user's __index__ could change the list.
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(streams); ++i) {
    PyObject* item = PySequence_Fast_GET_ITEM(streams, i);
    if (PyLong_CheckExact(item)) {
      ids_.push_back(IdOf(item));
      continue;
    }
    Py_INCREF(item);
    try {
      ids_.push_back(IdOf(item));
    } catch (...) {
      Py_DECREF(item);
      throw;
    }
    Py_DECREF(item);
  }
}

void StreamIds::ReadArray(PyArrayObject* streams) {
  const int ndim = PyArray_NDIM(streams);
  if (ndim > 1) {
    Raise(PyExc_ValueError,
          "streams has " + std::to_string(ndim) + " axes. Expected one: an id for each row of x.");
  }
  PyArrayObject* array = streams;
  const bool is_int64 = PyArray_TYPE(streams) == NPY_INT64 && PyArray_ISNOTSWAPPED(streams);
  if (!is_int64) {
    // Ids need more than 32 bits, so narrower integers are refused.
    if (!PyArray_EquivTypenums(PyArray_TYPE(streams), NPY_INT64)) {
      PyObject* name = PyObject_Str(reinterpret_cast<PyObject*>(PyArray_DESCR(streams)));
      const char* text = name ? PyUnicode_AsUTF8(name) : nullptr;
      const std::string got = text ? text : "another type";
      Py_XDECREF(name);
      Raise(PyExc_TypeError, "streams is an array of " + got + ". " + kExpectedIds);
    }
    array = reinterpret_cast<PyArrayObject*>(PyArray_FromArray(
        streams, PyArray_DescrFromType(NPY_INT64), NPY_ARRAY_DEFAULT | NPY_ARRAY_NOTSWAPPED));
    if (!array) throw PythonError();
  }
  is_scalar_ = ndim == 0;
  const npy_intp count = is_scalar_ ? 1 : PyArray_DIM(array, 0);
  const npy_intp stride = is_scalar_ ? 0 : PyArray_STRIDE(array, 0);
  const char* data = PyArray_BYTES(array);
  ids_.resize(count);
  // memcpy, as the data may be unaligned.
  for (npy_intp i = 0; i < count; ++i) std::memcpy(&ids_[i], data + i * stride, sizeof(StreamId));
  if (array != streams) Py_DECREF(array);
}

PythonSession::PythonSession(std::shared_ptr<const ModelFile> file, const SessionOptions& options)
    : options_(options) {
  const Plan& plan = file->plan();
  inputs_ = SpecsOf(plan, plan.inputs, "x", "input");
  outputs_ = SpecsOf(plan, plan.outputs, "out", "output");
  input_structure_ = Structure::Parse(plan.json, "input_structure", inputs_);
  output_structure_ = Structure::Parse(plan.json, "output_structure", outputs_);
  {
    GilRelease release(true);  // packing weights takes milliseconds to seconds
    session_ = std::make_unique<Session>(std::move(file), options);
    // Finds the most rows of a short step. Estimates grow with rows.
    const std::shared_ptr<const Executor> executor = session_->executor();
    int64_t fits = 0, too_many = kMostRows;
    while (fits + 1 < too_many) {
      const int64_t rows = (fits + too_many) / 2;
      (executor->EstimatedNanoseconds(rows, 1) <= kShortNanoseconds ? fits : too_many) = rows;
    }
    short_rows_ = fits;
  }
  gpu_ = CudaNumber(options.device);
}

bool PythonSession::ReleasesForNanoseconds(double nanoseconds) const {
  if (release != Release::kByEstimate) return release == Release::kAlways;
  return gpu_ >= 0 || nanoseconds > kShortNanoseconds;
}

}  // namespace continual_transformers
