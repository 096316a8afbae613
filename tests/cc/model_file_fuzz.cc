// Loads wrong files: nothing in a file may make the loader read or write out of bounds, run into
// undefined behaviour, or throw anything but Error.
//
// With libFuzzer (clang++ -fsanitize=fuzzer,address,undefined) it is a fuzz target. With
// -DCONTINUAL_TRANSFORMERS_FUZZ_MAIN it has a main, which changes a number of files at random, the
// same way on every run:
//
//   model_file_fuzz [files] [seed]
//   model_file_fuzz --corpus FOLDER    writes the initial files, for libFuzzer

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <fstream>
#include <iostream>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cc/session/cpu_executor.h"
#include "cc/session/error.h"
#include "cc/session/model_file.h"
#include "cc/session/state_layout.h"
#include "tests/cc/model_file_case.h"
#include "tests/cc/mutator.h"

namespace continual_transformers {
namespace {

// Reads every byte that the executor may read, so that AddressSanitizer catches one out of bounds.
uint64_t SumOf(const ModelFile& file) {
  uint64_t sum = file.weights_fingerprint() + file.plan().fingerprint;
  for (const Node& node : file.plan().nodes) {
    for (const auto& weight : node.weights) {
      const Tensor& tensor = file.tensor(weight.second);
      if (tensor.bytes != tensor.elements() * SizeOf(tensor.dtype)) std::abort();
      const unsigned char* bytes = static_cast<const unsigned char*>(tensor.data);
      for (int64_t i = 0; i < tensor.bytes; ++i) sum += bytes[i];
    }
    for (int value : node.inputs) sum += file.plan().values.at(value).size;
    for (int value : node.outputs) sum += file.plan().values.at(value).size;
    for (const auto& mask : node.masks) sum += file.plan().values.at(mask.second).size;
  }
  for (const Port& port : file.plan().inputs) sum += file.plan().values.at(port.value).size;
  for (const Port& port : file.plan().outputs) sum += file.plan().values.at(port.value).size;
  return sum;
}

// Larger models would take too long to step.
constexpr int64_t kMostBlockBytes = 1 << 20;
constexpr int64_t kMostValueBytes = 1 << 14;

// A buffer of exactly `bytes` bytes, so that AddressSanitizer catches accesses past its end.
class Buffer {
 public:
  explicit Buffer(int64_t bytes) {
    if (posix_memalign(&data_, 64, bytes > 0 ? static_cast<size_t>(bytes) : 1) != 0) std::abort();
  }
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  ~Buffer() { std::free(data_); }
  char* get() const { return static_cast<char*>(data_); }

 private:
  void* data_ = nullptr;
};

// Fills in numbers that an input may have: any bits for a float, tokens from -1 to 6, true and
// false.
void Fill(DType dtype, int64_t elements, std::mt19937* random, char* data) {
  for (int64_t i = 0; i < elements; ++i, data += SizeOf(dtype)) {
    const uint32_t bits = (*random)();
    const bool any = bits % 16 == 0;
    const double number = static_cast<int32_t>(bits) * 1e-9;
    const float single = static_cast<float>(number);
    const uint64_t wide = uint64_t{bits} * 0x9E3779B97F4A7C15;
    const int64_t token = bits % 64 == 0 ? static_cast<int64_t>(bits / 64 % 8) - 1 : bits % 2;
    const int32_t small_token = static_cast<int32_t>(token);
    switch (dtype) {
      case DType::kFloat32:
        std::memcpy(data, any ? static_cast<const void*>(&bits) : &single, sizeof(single));
        break;
      case DType::kFloat64:
        std::memcpy(data, any ? static_cast<const void*>(&wide) : &number, sizeof(number));
        break;
      case DType::kInt32:
        std::memcpy(data, &small_token, sizeof(small_token));
        break;
      case DType::kInt64:
        std::memcpy(data, &token, sizeof(token));
        break;
      case DType::kBool:
        *data = static_cast<char>(bits % 2);
        break;
      default:
        std::abort();  // no value has another dtype
    }
  }
}

// Takes steps of two streams if the model is small. Returns whether it did.
bool TakeSteps(const std::shared_ptr<const ModelFile>& file) {
  const Plan& plan = file->plan();
  int64_t bytes = 0;
  for (const Value& value : plan.values) bytes += value.size * SizeOf(value.dtype);
  if (bytes > kMostValueBytes) return false;
  if (LayOut(plan, plan.cache_dtype).block_bytes > kMostBlockBytes) return false;

  HostMemory memory;
  const CpuExecutor executor(file, {plan.cache_dtype, plan.weights_dtype, 1});
  const std::unique_ptr<Arena> arena = executor.NewArena();
  constexpr int64_t kStreams = 2;
  std::vector<Buffer> blocks;
  std::vector<char*> block_pointers;
  for (int64_t m = 0; m < kStreams; ++m) {
    blocks.emplace_back(executor.block_bytes());
    block_pointers.push_back(blocks.back().get());
    std::memset(block_pointers[m], 0xff, static_cast<size_t>(executor.block_bytes()));
    executor.InitBlock(block_pointers[m], &memory);
  }
  std::mt19937 random(1);
  std::vector<int64_t> positions(kStreams, 0);
  for (int64_t steps : {1, 4, 2}) {
    const int64_t rows = kStreams * steps;
    std::vector<Buffer> buffers;
    std::vector<const void*> inputs;
    std::vector<void*> outputs;
    for (const Port& port : plan.inputs) {
      const Value& value = plan.values[port.value];
      buffers.emplace_back(rows * value.size * SizeOf(value.dtype));
      Fill(value.dtype, rows * value.size, &random, buffers.back().get());
      inputs.push_back(buffers.back().get());
    }
    for (const Port& port : plan.outputs) {
      const Value& value = plan.values[port.value];
      buffers.emplace_back(rows * value.size * SizeOf(value.dtype));
      outputs.push_back(buffers.back().get());
    }
    const bool key_mask[] = {true, false, true, true, true, true, false, true};
    const StepCall call = {inputs.data(),   outputs.data(), steps == 1 ? nullptr : key_mask,
                           kStreams,        steps,          block_pointers.data(),
                           positions.data()};
    try {
      executor.Check(call);
    } catch (const Error& error) {
      if (error.code() != ErrorCode::kInvalidArgument) std::abort();
      continue;  // a token outside the table
    }
    executor.Step(call, arena.get());
    for (int64_t& position : positions) position += steps;
  }
  return true;
}

// Files that were accepted, and those of them that took steps.
int files_taken = 0, files_stepped = 0;

void Load(const std::string& bytes) {
  try {
    const std::shared_ptr<const ModelFile> file = ModelFile::Copy(bytes.data(), bytes.size());
    volatile uint64_t sum = SumOf(*file);
    (void)sum;
    ++files_taken;
    files_stepped += TakeSteps(file);
  } catch (const Error& error) {
    if (error.code() != ErrorCode::kBadModelFile || error.what()[0] == '\0') std::abort();
  }
}

}  // namespace
}  // namespace continual_transformers

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  continual_transformers::Load(std::string(reinterpret_cast<const char*>(data), size));
  return 0;
}

#ifdef CONTINUAL_TRANSFORMERS_FUZZ_MAIN

namespace continual_transformers {
namespace {

// Small plans with a few ops each, and one with all ops.
std::vector<PlanBuilder> Corpus() {
  std::vector<PlanBuilder> corpus = {EveryOp(), EveryOp("float64")};
  {
    PlanBuilder b;
    b.plan["weights_dtype"] = b.plan["cache_dtype"] = "bfloat16";
    int y = b.Dense(b.Input("x", {3}), {4}, "bfloat16");
    y = b.Node("softmax", {b.Attention(y, y, y, 2, 3)}, {4},
               {{"function", "sparsemax"}, {"axis", 0}});
    b.Output("y", y);
    corpus.push_back(b);
  }
  {
    PlanBuilder b;
    const int x = b.Input("x", {2, 3}), y = b.Input("y", {2, 3});
    const int z = b.Node("concat", {x, y, x}, {2, 9}, {{"axis", 1}});
    const int t = b.Node("strided", {z}, {9, 2}, {{"offset", 0}, {"strides", {1, 9}}});
    b.Output("z", b.Node("reduce", {t}, {2}, {{"function", "max"}, {"axis", 0}}));
    b.plan["input_structure"] = {{"x", 0}, {"y", Json::array({1})}};
    corpus.push_back(b);
  }
  {
    PlanBuilder b;
    const int x = b.Input("x", {2}, "int64");
    b.Output("y", b.Node("embedding", {x}, {2, 3}, {}, {{"table", b.Random({4, 3})}}));
    corpus.push_back(b);
  }
  {
    PlanBuilder b;
    const int x = b.Input("x", {4});
    const int all = b.Node("retroactive_attention", {x, x, x}, {3, 4},
                           {{"heads", 2}, {"window", 3}, {"scale", 1}, {"algorithm", "update"}});
    b.Output("y", b.Node("window_attention", {all, all, all}, {3, 4},
                         {{"heads", 1}, {"scale", 1}, {"band", 2}, {"causal", false}}));
    corpus.push_back(b);
  }
  return corpus;
}

// Makes model files with one to four errors.
class FileMutator {
 public:
  FileMutator(std::vector<PlanBuilder> corpus, uint32_t seed)
      : corpus_(std::move(corpus)), mutator_(seed) {}

  // In its bytes, its header or its plan.
  std::string Next() {
    PlanBuilder builder = corpus_[mutator_.Below(corpus_.size())];
    const size_t changes = mutator_.Below(3) == 0 ? 1 + mutator_.Below(4) : 1;
    const size_t kind = mutator_.Below(8);
    if (kind < 5) {
      for (size_t i = 0; i < changes; ++i) mutator_.Change(&builder.plan);
      return builder.Bytes();
    }
    if (kind < 7) {
      Json header = builder.Header();
      if (kind == 5) header["__metadata__"].erase("plan");
      for (size_t i = 0; i < changes; ++i) mutator_.Change(&header);
      const bool has_metadata = header.is_object() && header["__metadata__"].is_object();
      if (kind == 5 && has_metadata) header["__metadata__"]["plan"] = builder.plan.dump();
      return SafetensorsFile(TextOf(header), builder.Data());
    }
    std::string bytes = builder.Bytes();
    for (size_t i = 0; i < changes; ++i) {
      if (mutator_.Below(5) == 0) {  // in the header's length
        bytes[mutator_.Below(std::min<size_t>(8, bytes.size()))] = mutator_.Byte();
      } else {
        mutator_.ChangeBytes(&bytes);
      }
      if (bytes.empty()) break;
    }
    return bytes;
  }

 private:
  static std::string TextOf(const Json& json) {
    return json.dump(-1, ' ', false, Json::error_handler_t::replace);
  }

  const std::vector<PlanBuilder> corpus_;
  Mutator mutator_;
};

int Main(int arguments, char** values) {
  const std::vector<PlanBuilder> corpus = Corpus();
  if (arguments == 3 && values[1] == std::string("--corpus")) {
    for (size_t i = 0; i < corpus.size(); ++i) {
      std::ofstream(std::string(values[2]) + "/" + std::to_string(i), std::ios::binary)
          << corpus[i].Bytes();
    }
    return 0;
  }
  const int files = arguments > 1 ? std::atoi(values[1]) : 10000;
  const uint32_t seed = arguments > 2 ? static_cast<uint32_t>(std::atoi(values[2])) : 1;
  for (const PlanBuilder& builder : corpus) {
    Load(builder.Bytes());
  }
  if (files_stepped != static_cast<int>(corpus.size())) {
    std::cerr << "a file that is right was refused\n";
    return 1;
  }
  files_taken = files_stepped = 0;
  FileMutator mutator(corpus, seed);
  for (int i = 0; i < files; ++i) {
    const std::string bytes = mutator.Next();
    try {
      Load(bytes);
    } catch (const std::exception& error) {
      std::cerr << "file " << i << " of seed " << seed << ": " << error.what() << "\n";
      std::ofstream("model_file_fuzz_failure", std::ios::binary) << bytes;
      return 1;
    }
  }
  std::cout << files << " files: " << files_taken << " taken, " << files_stepped
            << " of them took steps\n";
  // The test is useless if all files are accepted, or all are refused.
  const bool sound = files_stepped > files / 200 && files_taken < files / 2;
  return files < 1000 || sound ? 0 : 1;
}

}  // namespace
}  // namespace continual_transformers

int main(int arguments, char** values) { return continual_transformers::Main(arguments, values); }

#endif  // CONTINUAL_TRANSFORMERS_FUZZ_MAIN
