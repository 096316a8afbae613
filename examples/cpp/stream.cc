// Streams a packed model: takes one step per row of a recording, and prints the time of a step.
//
//   stream MODEL.safetensors [STEPS.npy [OUTPUTS.npy]]
//
// STEPS.npy has one step per row, in the dtype of the model's input. Without it, the input is a
// thousand steps of noise. The outputs are written to OUTPUTS.npy, one row per step. The model must
// have one input and one output, as most have; for others see ct::Stream::Step. The README beside
// this file says how to build it.

#include <algorithm>
#include <chrono>
#include <continual_transformers.hpp>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <iterator>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// A NumPy array with any number of rows.
struct Rows {
  int64_t rows = 0;
  std::vector<char> bytes;
};

// Returns NumPy's name of a dtype.
std::string Descr(ct_dtype dtype) {
  const std::map<ct_dtype, std::string> names = {{CT_FLOAT32, "<f4"},
                                                 {CT_FLOAT64, "<f8"},
                                                 {CT_INT32, "<i4"},
                                                 {CT_INT64, "<i8"},
                                                 {CT_BOOL, "|b1"}};
  return names.at(dtype);
}

// Returns "(rows, 3, 4)" for rows of shape (3, 4).
std::string Shape(int64_t rows, const std::vector<int64_t>& shape) {
  std::string text = "(" + std::to_string(rows) + ",";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += (i == 0 ? " " : ", ") + std::to_string(shape[i]);
  }
  return text + ")";
}

// Returns the value of a key in a .npy file's header, up to the next comma outside brackets.
std::string Field(const std::string& header, const std::string& key) {
  const size_t begin = header.find("'" + key + "':");
  if (begin == std::string::npos) throw std::runtime_error("the .npy file has no " + key);
  size_t end = header.find_first_not_of(' ', begin + key.size() + 3);
  const size_t first = end;
  for (int depth = 0; end < header.size() && (depth > 0 || header[end] != ','); ++end) {
    depth += header[end] == '(';
    depth -= header[end] == ')';
  }
  return header.substr(first, end - first);
}

// Reads rows of the model's input. Throws if the file has another dtype or shape.
Rows ReadNpy(const std::string& path, const ct::Value& input) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  const std::string all((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  const bool is_npy = all.size() >= 12 && all.compare(0, 6, "\x93NUMPY") == 0;
  if (!is_npy) throw std::runtime_error(path + " is not a .npy file");
  const auto byte = [&](int i) { return static_cast<unsigned char>(all[i]); };
  // The length has two bytes in version 1, four in later versions.
  const size_t two_bytes = byte(8) + 256u * byte(9);
  const size_t length =
      all[6] == 1 ? two_bytes : two_bytes + 65536u * byte(10) + 16777216u * byte(11);
  const size_t data = (all[6] == 1 ? 10 : 12) + length;
  const std::string header = all.substr(0, std::min(data, all.size()));
  const std::string shape = Field(header, "shape");
  Rows result;
  result.rows = std::strtoll(shape.c_str() + 1, nullptr, 10);
  const std::string expected = Shape(result.rows, input.shape);
  if (shape != expected) {
    throw std::runtime_error(path + " has the shape " + shape + ", the model takes rows of " +
                             expected);
  }
  const std::string dtype = "'" + Descr(input.dtype) + "'";
  if (Field(header, "descr") != dtype) {
    throw std::runtime_error(path + " has the dtype " + Field(header, "descr") +
                             ", the model takes " + dtype);
  }
  if (Field(header, "fortran_order") != "False") {
    throw std::runtime_error(path + " is in Fortran order: save np.ascontiguousarray(array)");
  }
  if (all.size() != data + result.rows * input.bytes) {
    throw std::runtime_error(path + " is cut off");
  }
  result.bytes.assign(all.begin() + data, all.end());
  return result;
}

void WriteNpy(const std::string& path, const ct::Value& output, const Rows& rows) {
  std::string header = "{'descr': '" + Descr(output.dtype) +
                       "', 'fortran_order': False, 'shape': " + Shape(rows.rows, output.shape) +
                       ", }";
  // The data begins at a multiple of 64 bytes, after a newline.
  header.append(63 - (10 + header.size()) % 64, ' ');
  header += '\n';
  std::ofstream file(path, std::ios::binary);
  file << std::string("\x93NUMPY\x01\x00", 8) << static_cast<char>(header.size() & 255)
       << static_cast<char>(header.size() >> 8) << header;
  file.write(rows.bytes.data(), rows.bytes.size());
  if (!file) throw std::runtime_error("cannot write " + path);
}

// Returns a thousand rows of noise. Tokens are all 0.
Rows Noise(const ct::Value& input) {
  Rows rows;
  rows.rows = 1000;
  rows.bytes.resize(rows.rows * input.bytes);
  std::mt19937 random(1);
  std::normal_distribution<double> normal;
  const int64_t count = rows.rows * input.elements;
  if (input.dtype == CT_FLOAT32) {
    std::generate_n(reinterpret_cast<float*>(rows.bytes.data()), count,
                    [&] { return normal(random); });
  } else if (input.dtype == CT_FLOAT64) {
    std::generate_n(reinterpret_cast<double*>(rows.bytes.data()), count,
                    [&] { return normal(random); });
  }
  return rows;
}

void Run(const std::string& model, const std::string& steps, const std::string& outputs) {
  ct::Session session(model);
  if (session.inputs().size() != 1 || session.outputs().size() != 1) {
    throw std::runtime_error(session.name() + " has " + std::to_string(session.inputs().size()) +
                             " inputs and " + std::to_string(session.outputs().size()) +
                             " outputs; this example needs a model with one of each");
  }
  const ct::Value& input = session.inputs()[0];
  const ct::Value& output = session.outputs()[0];
  std::printf("%s: %s %s -> %s %s; receptive field %lld steps, %lld bytes a stream\n",
              session.name().c_str(), ct::NameOf(input.dtype), Shape(1, input.shape).c_str(),
              ct::NameOf(output.dtype), Shape(1, output.shape).c_str(),
              static_cast<long long>(session.receptive_field()),
              static_cast<long long>(ct_session_state_bytes(session.get())));

  const Rows x = steps.empty() ? Noise(input) : ReadNpy(steps, input);
  Rows y;
  y.rows = x.rows;
  y.bytes.resize(y.rows * output.bytes);
  // The stream closes itself at the end of this function.
  ct::Stream stream = session.OpenStream();
  std::vector<double> microseconds;
  microseconds.reserve(x.rows);
  int64_t warming = 0;
  for (int64_t i = 0; i < x.rows; ++i) {
    const void* const row = x.bytes.data() + i * input.bytes;
    void* const result = y.bytes.data() + i * output.bytes;
    const auto before = std::chrono::steady_clock::now();
    stream.Step(row, result);
    const std::chrono::duration<double, std::micro> took =
        std::chrono::steady_clock::now() - before;
    microseconds.push_back(took.count());
    warming += !stream.ready();
  }
  std::printf("%lld steps, %lld of them before the window was full\n",
              static_cast<long long>(stream.position()), static_cast<long long>(warming));
  if (!microseconds.empty()) {
    std::sort(microseconds.begin(), microseconds.end());
    std::printf("a step took %.2f microseconds (median), %.2f (99 of 100)\n",
                microseconds[microseconds.size() / 2],
                microseconds[microseconds.size() * 99 / 100]);
  }
  if (!outputs.empty()) WriteNpy(outputs, output, y);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2 || argc > 4) {
    std::fprintf(stderr, "usage: %s MODEL.safetensors [STEPS.npy [OUTPUTS.npy]]\n", argv[0]);
    return 2;
  }
  try {
    Run(argv[1], argc > 2 ? argv[2] : "", argc > 3 ? argv[3] : "");
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
