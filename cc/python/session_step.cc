// Session.step and Session.steps. They read their arguments through the C APIs of Python and NumPy:
// a METH_FASTCALL method costs 0.2 us, where pybind11's array_t costs 1.0 to 1.6. This file or
// Session::Step checks everything before any stream changes.

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "cc/python/gpu_array.h"
#include "cc/python/python_session.h"

namespace continual_transformers {
namespace {

// Interned names of the keyword arguments.
PyObject *x_name, *streams_name, *out_name, *key_mask_name;

constexpr size_t kFew = 8;

// References that are released at the end.
class References {
 public:
  References() = default;
  ~References() {
    for (PyObject* object : objects_) Py_DECREF(object);
  }
  References(const References&) = delete;
  References& operator=(const References&) = delete;

  void Take(PyObject* owned) { objects_.push_back(owned); }
  void Hold(PyObject* borrowed) {
    objects_.push_back(borrowed);
    Py_INCREF(borrowed);
  }

 private:
  SmallVector<PyObject*, 2 * kFew> objects_;
};

std::string DTypeText(PyArrayObject* array) {
  PyObject* name = PyObject_Str(reinterpret_cast<PyObject*>(PyArray_DESCR(array)));
  const char* text = name ? PyUnicode_AsUTF8(name) : nullptr;
  const std::string result = text ? text : "another type";
  Py_XDECREF(name);
  PyErr_Clear();
  return result;
}

std::string DTypeText(const ArraySpec& spec) {
  PyObject* name = PyObject_Str(reinterpret_cast<PyObject*>(spec.dtype));
  const char* text = name ? PyUnicode_AsUTF8(name) : nullptr;
  const std::string result = text ? text : "?";
  Py_XDECREF(name);
  PyErr_Clear();
  return result;
}

template <typename Size>
std::string ShapeText(const char* axes, const Size* sizes, size_t count) {
  std::string text = std::string("(") + axes;
  for (size_t i = 0; i < count; ++i) {
    if (i || *axes) text += ", ";
    text += std::to_string(sizes[i]);
  }
  if (text.size() > 1 && text.find(',') == std::string::npos) text += ',';
  return text + ")";
}

std::string ShapeText(PyArrayObject* array) {
  return ShapeText("", PyArray_DIMS(array), PyArray_NDIM(array));
}

// The number of streams and steps of a call.
struct Rows {
  int axes;             // 1: streams; 2: streams and steps
  int gpu;              // the session's; -1: it is on the CPU
  npy_intp in_a_block;  // steps of the inputs in a step of the plan
  npy_intp streams = -1;
  npy_intp steps = 1;  // of the plan

  npy_intp count() const { return streams * steps; }
  // Whether inputs have an axis of T steps, a multiple of in_a_block, and no axis for the block.
  bool joins() const { return axes == 2 && in_a_block > 1; }
  // "(M, 32)"
  std::string Expected(const ArraySpec& spec, bool is_input = true) const {
    const size_t left_out = is_input && joins() ? 1 : 0;
    return ShapeText(axes == 1 ? "M" : "M, T", spec.shape.data() + left_out,
                     spec.shape.size() - left_out);
  }
  // "(3, 32)"
  std::string ExpectedExactly(const npy_intp* shape, size_t count) const {
    std::vector<npy_intp> sizes = {streams};
    if (axes == 2) sizes.push_back(steps);
    sizes.insert(sizes.end(), shape, shape + count);
    return ShapeText("", sizes.data(), sizes.size());
  }
};

bool HasType(PyArrayObject* array, int type_number) {
  const int type = PyArray_TYPE(array);
  // long and long long are two NumPy types, both of 64 bits.
  return type == type_number || PyArray_EquivTypenums(type, type_number);
}

// Whether an array has these last axes after others, `axes` of them. The first `left_out` of the
// last axes may be missing.
bool HasTail(PyArrayObject* array, int axes, const std::vector<npy_intp>& tail,
             size_t left_out = 0) {
  const size_t count = tail.size() - left_out;
  if (PyArray_NDIM(array) != axes + static_cast<int>(count)) return false;
  return std::equal(tail.begin() + left_out, tail.end(), PyArray_DIMS(array) + axes);
}

constexpr int kPlain = NPY_ARRAY_C_CONTIGUOUS | NPY_ARRAY_ALIGNED;

bool IsPlain(PyArrayObject* array) {
  return (PyArray_FLAGS(array) & kPlain) == kPlain && PyArray_ISNOTSWAPPED(array);
}

// Returns the array itself if the kernels can read it as it is, or else a copy.
PyArrayObject* Plain(PyArrayObject* array, int type_number, References* references) {
  if (IsPlain(array)) return array;
  PyObject* copy = PyArray_FromArray(array, PyArray_DescrFromType(type_number),
                                     NPY_ARRAY_CARRAY_RO | NPY_ARRAY_NOTSWAPPED);
  if (!copy) throw PythonError();
  references->Take(copy);
  return reinterpret_cast<PyArrayObject*>(copy);
}

// Returns an array on the session's GPU as GpuArrayOrNull does, or else what is given.
PyObject* OrGpuArray(const ArraySpec& spec, PyObject* given, const Rows& rows,
                     References* references) {
  if (rows.gpu < 0 || PyArray_Check(given)) return given;
  PyObject* const array = reinterpret_cast<PyObject*>(GpuArrayOrNull(given, rows.gpu, spec.label));
  if (array == nullptr) return given;
  references->Take(array);
  return array;
}

// Checks an input. The first one sets the number of rows.
PyArrayObject* CheckInput(const ArraySpec& spec, PyObject* given, Rows* rows,
                          References* references) {
  // Indices are checked on the host.
  if (!spec.is_integer) given = OrGpuArray(spec, given, *rows, references);
  if (!PyArray_Check(given)) {
    Raise(PyExc_TypeError, spec.label + " is of type " + Py_TYPE(given)->tp_name +
                               ". Expected a NumPy array " + rows->Expected(spec) + " of " +
                               DTypeText(spec) + ": give np.asarray(x, np." + DTypeText(spec) +
                               ").");
  }
  PyArrayObject* array = reinterpret_cast<PyArrayObject*>(given);
  if (!HasType(array, spec.type_number)) {
    Raise(PyExc_ValueError, spec.label + " has dtype " + DTypeText(array) + ". Expected " +
                                DTypeText(spec) + ": give x.astype(np." + DTypeText(spec) + ").");
  }
  const bool joins = rows->joins() && !HasTail(array, 2, spec.shape);
  if (!HasTail(array, rows->axes, spec.shape, joins ? 1 : 0)) {
    std::string hint;
    if (HasTail(array, 0, spec.shape)) {
      hint = " For one stream, give x[np.newaxis].";
    } else if (rows->axes == 1 && HasTail(array, 2, spec.shape)) {
      hint = " Session.steps takes several steps at once.";
    } else if (rows->axes == 2 && !joins && HasTail(array, 1, spec.shape)) {
      hint = " Session.step takes one step.";
    }
    Raise(PyExc_ValueError, spec.label + " has shape " + ShapeText(array) + ". Expected " +
                                rows->Expected(spec) + ", a row for each of M streams" +
                                (rows->axes == 2 ? " and T steps." : ".") + hint);
  }
  const npy_intp streams = PyArray_DIM(array, 0);
  npy_intp steps = rows->axes == 2 ? PyArray_DIM(array, 1) : 1;
  if (joins) {
    if (steps % rows->in_a_block != 0) {
      Raise(PyExc_ValueError, spec.label + " has shape " + ShapeText(array) +
                                  ". Expected a multiple of " + std::to_string(rows->in_a_block) +
                                  " steps, the block of the model.");
    }
    steps /= rows->in_a_block;
  }
  if (rows->streams < 0) {
    rows->streams = streams;
    rows->steps = steps;
  } else if (streams != rows->streams || steps != rows->steps) {
    Raise(PyExc_ValueError, spec.label + " has shape " + ShapeText(array) + ". Expected " +
                                rows->ExpectedExactly(spec.shape.data(), spec.shape.size()) +
                                ", as many streams and steps as the first input has.");
  }
  return Plain(array, spec.type_number, references);
}

constexpr char kMakeOutput[] = ": np.empty makes such an array.";

// Checks an output array.
PyArrayObject* CheckOutput(const ArraySpec& spec, PyObject* given, const Rows& rows,
                           References* references) {
  given = OrGpuArray(spec, given, rows, references);
  if (!PyArray_Check(given)) {
    Raise(PyExc_TypeError, spec.label + " is of type " + Py_TYPE(given)->tp_name +
                               ". Expected a NumPy array " + rows.Expected(spec, false) + " of " +
                               DTypeText(spec) + " to be written, or None.");
  }
  PyArrayObject* array = reinterpret_cast<PyArrayObject*>(given);
  if (!HasType(array, spec.type_number)) {
    Raise(PyExc_ValueError, spec.label + " has dtype " + DTypeText(array) + ". Expected " +
                                DTypeText(spec) + kMakeOutput);
  }
  const bool fits = HasTail(array, rows.axes, spec.shape) &&
                    PyArray_DIM(array, 0) == rows.streams &&
                    (rows.axes == 1 || PyArray_DIM(array, 1) == rows.steps);
  if (!fits) {
    Raise(PyExc_ValueError, spec.label + " has shape " + ShapeText(array) + ". Expected " +
                                rows.ExpectedExactly(spec.shape.data(), spec.shape.size()) +
                                kMakeOutput);
  }
  if (!PyArray_ISWRITEABLE(array)) {
    Raise(PyExc_ValueError,
          spec.label + " is read-only. Expected an array that can be written" + kMakeOutput);
  }
  if (!IsPlain(array)) {
    Raise(PyExc_ValueError,
          spec.label +
              " is not C-contiguous, aligned and in the machine's byte order. Outputs are written "
              "to it without a copy" +
              kMakeOutput);
  }
  return array;
}

bool Overlap(PyArrayObject* a, PyArrayObject* b) {
  // Both arrays are contiguous.
  const char *a_data = PyArray_BYTES(a), *b_data = PyArray_BYTES(b);
  return a_data < b_data + PyArray_NBYTES(b) && b_data < a_data + PyArray_NBYTES(a);
}

std::string Got(PyObject* given) {
  if (PyDict_Check(given)) {
    PyObject* keys = PyDict_Keys(given);
    PyObject* text = keys ? PyObject_Repr(keys) : nullptr;
    const char* characters = text ? PyUnicode_AsUTF8(text) : nullptr;
    const std::string result =
        std::string("a dict with the keys ") + (characters ? characters : "?");
    Py_XDECREF(text);
    Py_XDECREF(keys);
    PyErr_Clear();
    return result;
  }
  if (PyList_Check(given) || PyTuple_Check(given)) {
    return std::string("a ") + Py_TYPE(given)->tp_name + " of " +
           std::to_string(PySequence_Fast_GET_SIZE(given));
  }
  return std::string("an object of type ") + Py_TYPE(given)->tp_name;
}

// Finds the object for each index of the plan's list. The top-level object is borrowed from the
// caller. `references` holds all others, as another thread could remove them meanwhile.
void Flatten(const Structure& structure, PyObject* given, const char* what,
             SmallVector<PyObject*, kFew>* items, References* references) {
  if (structure.kind == Structure::kLeaf) {
    (*items)[structure.place] = given;
    return;
  }
  const size_t count = structure.children.size();
  const bool has_keys = !structure.keys.empty();
  const bool is_dict = PyDict_Check(given) && has_keys;
  const bool is_list =
      (PyList_Check(given) || PyTuple_Check(given)) && structure.kind == Structure::kList;
  for (size_t i = 0; i < count; ++i) {
    PyObject* child = nullptr;
    if (is_dict && static_cast<size_t>(PyDict_GET_SIZE(given)) == count) {
      child = PyDict_GetItemWithError(given, structure.keys[i]);
    } else if (is_list && static_cast<size_t>(PySequence_Fast_GET_SIZE(given)) == count) {
      child = PySequence_Fast_GET_ITEM(given, i);
    }
    if (!child) {
      if (PyErr_Occurred()) throw PythonError();
      const bool is_named_list = structure.kind == Structure::kList && has_keys;
      Raise(PyExc_ValueError, std::string(what) + " is " + Got(given) +
                                  ". Expected the model's own structure, " + structure.Text() +
                                  (is_named_list ? "; or a dict with these names as keys." : "."));
    }
    references->Hold(child);
    Flatten(structure.children[i], child, what, items, references);
  }
}

// Returns a new reference to the outputs in their structure.
PyObject* Build(const Structure& structure, PyObject* const* items) {
  if (structure.kind == Structure::kLeaf) {
    Py_INCREF(items[structure.place]);
    return items[structure.place];
  }
  const bool is_dict = structure.kind == Structure::kDict;
  PyObject* result = is_dict ? PyDict_New() : PyList_New(structure.children.size());
  if (!result) throw PythonError();
  for (size_t i = 0; i < structure.children.size(); ++i) {
    PyObject* child = nullptr;
    try {
      child = Build(structure.children[i], items);
    } catch (...) {
      Py_DECREF(result);
      throw;
    }
    if (!is_dict) {
      PyList_SET_ITEM(result, i, child);
      continue;
    }
    const int failed = PyDict_SetItem(result, structure.keys[i], child);
    Py_DECREF(child);
    if (failed) {
      Py_DECREF(result);
      throw PythonError();
    }
  }
  return result;
}

struct Arguments {
  PyObject* x = nullptr;
  PyObject* streams = nullptr;
  PyObject* out = nullptr;
  PyObject* key_mask = nullptr;
};

Arguments Parse(const char* method, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  Arguments arguments;
  if (count > 2) {
    Raise(PyExc_TypeError, std::string(method) + " takes x and streams by position, but got " +
                               std::to_string(count) +
                               " positional arguments. Give out= and key_mask= by name.");
  }
  if (count > 0) arguments.x = args[0];
  if (count > 1) arguments.streams = args[1];
  const Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
  for (Py_ssize_t i = 0; i < named; ++i) {
    PyObject* name = PyTuple_GET_ITEM(names, i);
    PyObject** argument = nullptr;
    // Names in source code are interned. Others are compared character by character.
    const auto is = [name](PyObject* known) {
      return name == known || PyUnicode_Compare(name, known) == 0;
    };
    if (name == streams_name) {
      argument = &arguments.streams;
    } else if (name == out_name) {
      argument = &arguments.out;
    } else if (is(x_name)) {
      argument = &arguments.x;
    } else if (is(key_mask_name)) {
      argument = &arguments.key_mask;
    } else if (is(streams_name)) {
      argument = &arguments.streams;
    } else if (is(out_name)) {
      argument = &arguments.out;
    }
    if (!argument || *argument) {
      const char* text = PyUnicode_AsUTF8(name);
      Raise(PyExc_TypeError,
            std::string(method) + (argument ? " got a second '" : " got an unexpected '") +
                (text ? text : "?") + "'. Its arguments are x, streams=, out= and key_mask=.");
    }
    *argument = args[count + i];
  }
  if (!arguments.x) {
    Raise(PyExc_TypeError, std::string(method) + " needs x, the inputs of the step.");
  }
  if (arguments.streams == Py_None) arguments.streams = nullptr;
  if (arguments.out == Py_None) arguments.out = nullptr;
  if (arguments.key_mask == Py_None) arguments.key_mask = nullptr;
  return arguments;
}

PyArrayObject* CheckKeyMask(PyObject* given, const Rows& rows, References* references) {
  const auto expected = [&rows] {
    return ". Expected an array or a list " + rows.ExpectedExactly(nullptr, 0) +
           " of bool: True for a step with a key, False for a gap.";
  };
  if (!PyArray_Check(given)) {
    given = PyArray_FromAny(given, nullptr, 0, 0, 0, nullptr);
    if (!given) throw PythonError();
    references->Take(given);
  }
  PyArrayObject* array = reinterpret_cast<PyArrayObject*>(given);
  // An empty list becomes an array of floats.
  if (PyArray_TYPE(array) != NPY_BOOL && PyArray_SIZE(array) != 0) {
    Raise(PyExc_ValueError, "key_mask has dtype " + DTypeText(array) + expected());
  }
  if (PyArray_NDIM(array) != rows.axes || PyArray_DIM(array, 0) != rows.streams ||
      (rows.axes == 2 && PyArray_DIM(array, 1) != rows.steps)) {
    Raise(PyExc_ValueError, "key_mask has shape " + ShapeText(array) + expected());
  }
  return Plain(array, NPY_BOOL, references);
}

PyObject* TakeSteps(PyObject* self, const Arguments& arguments, int axes) {
  PythonSession& python_session = FromPython(self);
  const std::vector<ArraySpec>& inputs = python_session.inputs();
  const std::vector<ArraySpec>& outputs = python_session.outputs();
  References references;
  Rows rows;
  rows.axes = axes;
  rows.gpu = python_session.gpu();
  rows.in_a_block = python_session.session().plan().block;

  SmallVector<PyObject*, kFew> items;
  items.resize(std::max(inputs.size(), outputs.size()));
  SmallVector<PyArrayObject*, kFew> input_arrays;
  SmallVector<const void*, kFew> input_data;
  Flatten(python_session.input_structure(), arguments.x, "x", &items, &references);
  for (size_t i = 0; i < inputs.size(); ++i) {
    PyArrayObject* array = CheckInput(inputs[i], items[i], &rows, &references);
    input_arrays.push_back(array);
    input_data.push_back(PyArray_DATA(array));
  }

  // Copy the ids: another thread could change the caller's while the GIL is released.
  std::optional<StreamIds> ids;
  if (arguments.streams) {
    ids.emplace(arguments.streams);
    if (ids->count() != rows.streams) {
      Raise(PyExc_ValueError, "streams names " + std::to_string(ids->count()) +
                                  (ids->count() == 1 ? " stream" : " streams") + ", but x has " +
                                  std::to_string(rows.streams) +
                                  (rows.streams == 1 ? " row" : " rows") +
                                  ". Expected a stream for each row. For several steps of one "
                                  "stream, call steps(x[None]).");
    }
  }

  const void* key_mask = nullptr;
  PyArrayObject* key_mask_array = nullptr;
  if (arguments.key_mask) {
    key_mask_array = CheckKeyMask(arguments.key_mask, rows, &references);
    key_mask = PyArray_DATA(key_mask_array);
  }

  // Outputs: the caller's, or new arrays.
  for (size_t i = 0; i < outputs.size(); ++i) items[i] = Py_None;
  if (arguments.out) {
    Flatten(python_session.output_structure(), arguments.out, "out", &items, &references);
  }
  SmallVector<PyArrayObject*, kFew> output_arrays;
  SmallVector<void*, kFew> output_data;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const ArraySpec& spec = outputs[i];
    PyArrayObject* array;
    if (items[i] == Py_None) {
      npy_intp sizes[kMostAxes];
      sizes[0] = rows.streams;
      sizes[1] = rows.steps;
      std::copy(spec.shape.begin(), spec.shape.end(), sizes + axes);
      Py_INCREF(spec.dtype);
      PyObject* made = PyArray_NewFromDescr(&PyArray_Type, spec.dtype,
                                            axes + static_cast<int>(spec.shape.size()), sizes,
                                            nullptr, nullptr, 0, nullptr);
      if (!made) throw PythonError();
      references.Take(made);
      items[i] = made;
      array = reinterpret_cast<PyArrayObject*>(made);
    } else {
      array = CheckOutput(spec, items[i], rows, &references);
      bool overlaps = key_mask_array && Overlap(array, key_mask_array);
      for (PyArrayObject* input : input_arrays) overlaps = overlaps || Overlap(array, input);
      for (PyArrayObject* output : output_arrays) overlaps = overlaps || Overlap(array, output);
      if (overlaps) {
        Raise(PyExc_ValueError, spec.label +
                                    " shares memory with an input or another output. Expected "
                                    "separate memory: np.empty makes such an array.");
      }
    }
    output_arrays.push_back(array);
    output_data.push_back(PyArray_DATA(array));
  }

  const bool release = python_session.ReleasesFor(rows.count());
  if (release) {
    // Copy indices, as they are checked before they are used: another Python thread could change
    // them in between.
    for (size_t i = 0; i < inputs.size(); ++i) {
      if (!inputs[i].is_integer) continue;
      PyObject* copy = PyArray_NewCopy(input_arrays[i], NPY_CORDER);
      if (!copy) throw PythonError();
      references.Take(copy);
      input_data[i] = PyArray_DATA(reinterpret_cast<PyArrayObject*>(copy));
    }
  }
  // Build the result first: nothing may fail once the streams have changed.
  PyObject* result = Build(python_session.output_structure(), items.data());
  try {
    // Even if this call keeps the GIL, it may wait for another thread's step of the same streams.
    // The GIL is released for that wait (kWaitHooks). There is no deadlock: the other thread holds
    // streams only inside Session::Step, which does not touch Python, so they are free before it
    // asks for the GIL.
    GilRelease gil(release);
    python_session.session().Step(ids ? ids->data() : nullptr, rows.streams, rows.steps,
                                  input_data.data(), output_data.data(),
                                  static_cast<const bool*>(key_mask));
  } catch (...) {
    Py_DECREF(result);
    throw;
  }
  return result;
}

template <int axes>
PyObject* Method(PyObject* self, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  try {
    return TakeSteps(self, Parse(axes == 1 ? "step" : "steps", args, count, names), axes);
  } catch (...) {
    SetPythonError();
    return nullptr;
  }
}

constexpr char kStepDoc[] = R"(step($self, x, streams=None, *, out=None, key_mask=None)
--

Take one step of M streams.

Several threads may call one session. Calls that name the same stream run one after the other. A
short step on the CPU keeps Python's global lock, and others release it; see `release_gil`. After an
error every stream is as it was before the call.

Args:
    x: The model's inputs without the time axis: one NumPy array `(M, ...)`, or, if the model has
        layers with strides, its block of steps, `(M, block, ...)`; several in the
        model's own structure (a list, or a dict by name; for a list of named inputs also a dict).
        `inputs` has shapes and dtypes. Dtypes must be exact; an array that is not C-contiguous is
        copied. On a GPU, arrays of numbers that are no indices may lie there: anything with
        `__dlpack__`, contiguous.
    streams: The stream of each row: a list or tuple of ids, an int64 array `(M,)`, or one id if
        M = 1. None: row i is the session's i-th default stream, which the first such step opens.
    out: Arrays to write the outputs to, in the structure of the returned outputs. None, here or
        inside the structure: a new NumPy array. Arrays must be C-contiguous, with the exact shape
        and dtype, and share no memory with the inputs. On a GPU they may lie there.
    key_mask: bool `(M,)`, an array or a list; False marks a gap of all inputs: no query attends to
        that step, now or later.

Returns:
    The model's outputs for the newest step, or for the step `delay` steps before it: `(M, ...)`, in
    the model's own structure (a tuple becomes a list). Until a stream's receptive field is full
    (see `ready`), they are computed from the steps seen so far.

Raises:
    TypeError: If an argument has a type that is not listed above.
    ValueError: If a shape, dtype, index or mask does not fit, or a stream is named twice.
    UnknownStreamError: A ValueError, if a stream is not open.
    TooManyStreamsError: A RuntimeError, if there is no room for the default streams.
)";

constexpr char kStepsDoc[] = R"(steps($self, x, streams=None, *, out=None, key_mask=None)
--

Take T steps of M streams: the same outputs and state as T calls of `step`.

Args:
    x: As in `step`, with the time axis: `(M, T, ...)`. If the model has layers with strides, T is a
        multiple of its `block`; or it is `(M, T / block, block, ...)`.
    streams: As in `step`.
    out: As in `step`, `(M, T / block, ...)`.
    key_mask: bool `(M, T / block)`, as in `step`.

Returns:
    The model's outputs for each of the steps, `(M, T / block, ...)`.

Raises:
    TypeError, ValueError, UnknownStreamError, TooManyStreamsError: As in `step`.
)";

}  // namespace

PyMethodDef step_method = {"step",
                           reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Method<1>)),
                           METH_FASTCALL | METH_KEYWORDS, kStepDoc};
PyMethodDef steps_method = {"steps",
                            reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Method<2>)),
                            METH_FASTCALL | METH_KEYWORDS, kStepsDoc};

bool InitStepMethods() {
  x_name = PyUnicode_InternFromString("x");
  streams_name = PyUnicode_InternFromString("streams");
  out_name = PyUnicode_InternFromString("out");
  key_mask_name = PyUnicode_InternFromString("key_mask");
  return x_name && streams_name && out_name && key_mask_name;
}

}  // namespace continual_transformers
