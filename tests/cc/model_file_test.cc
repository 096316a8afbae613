#include "cc/session/model_file.h"

#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>

#include <csignal>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <limits>
#include <memory>
#include <set>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "cc/session/error.h"
#include "cc/session/fingerprint.h"
#include "cc/session/plan_ops.h"
#include "gtest/gtest.h"
#include "tests/cc/model_file_case.h"

namespace continual_transformers {
namespace {

// Returns the message with which a file is refused, or "".
std::string Refusal(const std::string& bytes) {
  try {
    ModelFile::Copy(bytes.data(), bytes.size());
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kBadModelFile) << error.what();
    EXPECT_NE(std::string(error.what()), "");
    return error.what();
  }
  return "";
}

std::string Refusal(const PlanBuilder& builder) { return Refusal(builder.Bytes()); }

void ExpectIn(const std::string& part, const std::string& text) {
  EXPECT_NE(text.find(part), std::string::npos)
      << "expected \"" << part << "\" in \"" << text << "\"";
}

// Returns the index of EveryOp's first node with this op and, if given, this function.
size_t PlaceOf(const PlanBuilder& builder, const std::string& op,
               const std::string& function = "") {
  const Json& nodes = builder.plan["nodes"];
  for (size_t i = 0; i < nodes.size(); ++i) {
    const bool fits = function.empty() || nodes[i]["attributes"].value("function", "") == function;
    if (nodes[i]["op"] == op && fits) return i;
  }
  ADD_FAILURE() << "EveryOp has no " << op;
  return 0;
}

Json& NodeOf(PlanBuilder* builder, const std::string& op, const std::string& function = "") {
  return builder->plan["nodes"][PlaceOf(*builder, op, function)];
}

class Folder {
 public:
  Folder() {
    std::string name = (std::filesystem::temp_directory_path() / "model_file_XXXXXX").string();
    path_ = mkdtemp(name.data());
  }
  ~Folder() { std::filesystem::remove_all(path_); }
  std::string operator/(const std::string& name) const { return (path_ / name).string(); }
  size_t files() const { return std::distance(std::filesystem::directory_iterator(path_), {}); }

 private:
  std::filesystem::path path_;
};

void Write(const std::string& path, const std::string& bytes) {
  std::ofstream(path, std::ios::binary) << bytes;
}

std::string Read(const std::string& path) {
  std::stringstream stream;
  stream << std::ifstream(path, std::ios::binary).rdbuf();
  return stream.str();
}

Error MapError(const std::string& path) {
  try {
    ModelFile::Map(path);
  } catch (const Error& error) {
    return error;
  }
  ADD_FAILURE() << path << " was not refused";
  return Error(ErrorCode::kInternal, "");
}

// ---- Reading.

TEST(ModelFileTest, ReadsWhatWasWritten) {
  for (const char* dtype : {"float32", "float64"}) {
    const PlanBuilder builder = EveryOp(dtype);
    const std::shared_ptr<const ModelFile> file = builder.File();
    const Plan& plan = file->plan();
    EXPECT_EQ(plan.name, "model");
    EXPECT_EQ(plan.producer, "PlanBuilder");
    EXPECT_EQ(plan.compute_dtype, DTypeOf(dtype));
    EXPECT_EQ(plan.cache_dtype, DTypeOf(dtype));
    EXPECT_EQ(plan.weights_dtype, DTypeOf(dtype));
    EXPECT_EQ(plan.receptive_field, 4);
    EXPECT_EQ(plan.delay, 0);
    EXPECT_EQ(plan.block, 1);
    EXPECT_EQ(Json::parse(plan.json), builder.plan);
    ASSERT_EQ(plan.inputs.size(), 3u);
    EXPECT_EQ(plan.inputs[1].name, "tokens");
    EXPECT_EQ(plan.outputs[1].name, "all");
    const Json& json = builder.plan;
    ASSERT_EQ(plan.values.size(), json["values"].size());
    for (size_t i = 0; i < plan.values.size(); ++i) {
      EXPECT_EQ(Json(plan.values[i].shape), json["values"][i]["shape"]);
      EXPECT_EQ(NameOf(plan.values[i].dtype), json["values"][i]["dtype"]);
      EXPECT_EQ(plan.values[i].size, Elements(plan.values[i].shape));
    }
    ASSERT_EQ(plan.nodes.size(), json["nodes"].size());
    for (size_t i = 0; i < plan.nodes.size(); ++i) {
      const Node& node = plan.nodes[i];
      EXPECT_EQ(NameOf(node.op), json["nodes"][i]["op"]);
      EXPECT_EQ(node.name, json["nodes"][i]["name"]);
      EXPECT_EQ(Json(node.inputs), json["nodes"][i]["inputs"]);
      EXPECT_EQ(Json(node.outputs), json["nodes"][i]["outputs"]);
      EXPECT_EQ(Json(node.weights), json["nodes"][i]["weights"]);
      EXPECT_EQ(Json(node.masks), json["nodes"][i].value("masks", Json::object()));
    }
    ASSERT_EQ(file->tensors().size(), builder.tensors.size());
    for (const auto& [name, expected] : builder.tensors) {
      const Tensor& tensor = file->tensor(name);
      EXPECT_EQ(NameOf(tensor.dtype), expected.dtype);
      EXPECT_EQ(tensor.shape, expected.shape);
      EXPECT_EQ(tensor.elements(), Elements(expected.shape));
      EXPECT_EQ(std::string(static_cast<const char*>(tensor.data), tensor.bytes), expected.bytes);
    }
  }
}

TEST(ModelFileTest, HasEveryOpInItsTests) {
  std::set<Op> ops;
  const std::shared_ptr<const ModelFile> file = EveryOp().File();
  for (const Node& node : file->plan().nodes) ops.insert(node.op);
  EXPECT_EQ(ops.size(), OpEntries().size());
  EXPECT_EQ(OpEntries().size(), static_cast<size_t>(Op::kRecurrent) + 1);
}

TEST(ModelFileTest, GivesAttributesByTheirTypes) {
  const PlanBuilder builder = EveryOp();
  const std::shared_ptr<const ModelFile> file = builder.File();
  const auto node = [&](const std::string& op, const std::string& function = "") -> const Node& {
    return file->plan().nodes[PlaceOf(builder, op, function)];
  };
  EXPECT_EQ(node("attention").Int("window"), 4);
  EXPECT_EQ(node("window_attention").Number("scale"), 1.0);  // written as 1
  EXPECT_TRUE(node("window_attention").Bool("causal"));
  EXPECT_EQ(node("retroactive_attention").Text("algorithm"), "auto");
  EXPECT_EQ(node("strided").Ints("strides"), std::vector<int64_t>{-1});
  EXPECT_TRUE(node("activation", "relu").IsNull("max_value"));
  EXPECT_FALSE(node("activation", "relu").IsNull("negative_slope"));
  EXPECT_EQ(node("norm").Number("epsilon"), 1e-6);
  EXPECT_THROW(node("attention").Int("scale"), Error);
  EXPECT_THROW(node("attention").Int("no such"), Error);
}

TEST(ModelFileTest, AnAttributeThatMayBeNullMayBeLeftOut) {
  PlanBuilder builder = EveryOp();
  Json& relu = NodeOf(&builder, "activation", "relu");
  relu["attributes"].erase("max_value");
  EXPECT_TRUE(builder.File()->plan().nodes[PlaceOf(builder, "activation")].IsNull("max_value"));
  relu["attributes"]["max_value"] = 6;
  EXPECT_EQ(builder.File()->plan().nodes[PlaceOf(builder, "activation")].Number("max_value"), 6.0);
}

TEST(ModelFileTest, WhatANodeHasNoneOfMayBeLeftOut) {
  PlanBuilder builder;
  const int x = builder.Input("x", {2});
  builder.Output("y", builder.Node("reshape", {x}, {1, 2}));
  builder.plan["nodes"][0].erase("weights");
  builder.plan["nodes"][0].erase("attributes");
  EXPECT_EQ(Refusal(builder), "");
}

TEST(ModelFileTest, AnInputMayBeAnOutput) {
  PlanBuilder builder;
  const int x = builder.Input("x", {2});
  builder.Output("y", x);
  builder.Output("z", x);
  EXPECT_EQ(Refusal(builder), "");
}

TEST(ModelFileTest, StructuresMayBeNested) {
  PlanBuilder builder = EveryOp();
  builder.plan["input_structure"] = {{"a", Json::array({2, 0})}, {"b", {{"c", 1}}}};
  EXPECT_EQ(Refusal(builder), "");
  PlanBuilder one;
  one.Output("y", one.Input("x", {2}));
  one.plan["input_structure"] = 0;
  one.plan["output_structure"] = 0;
  EXPECT_EQ(Refusal(one), "");
}

TEST(ModelFileTest, KernelsMayBeBfloat16WhereThePlanSaysSo) {
  PlanBuilder builder;
  const int x = builder.Input("x", {3});
  builder.Output("y", builder.Dense(builder.Dense(x, {4}, "bfloat16"), {2}));
  ExpectIn("is bfloat16, expected float32. ", Refusal(builder));
  builder.plan["weights_dtype"] = "bfloat16";
  EXPECT_EQ(Refusal(builder), "");  // each kernel as it is: one is bfloat16, one is not
  TensorBytes& bias = builder.tensors.at("dense_0/bias");
  bias = builder.Weight({4}, {0, 0, 0, 0}, "bfloat16");
  ExpectIn("its weight \"bias\", the tensor \"dense_0/bias\", is bfloat16, expected float32",
           Refusal(builder));
}

TEST(ModelFileTest, TheHeaderMayEndAnywhere) {
  const PlanBuilder builder = EveryOp();
  std::string header = builder.Header().dump();
  for (int i = 0; i < 9; ++i, header += ' ') {
    const std::string bytes = SafetensorsFile(header, builder.Data());
    EXPECT_EQ(Refusal(bytes), "");
  }
}

TEST(ModelFileTest, OthersMayAddToTheFile) {
  PlanBuilder builder = EveryOp();
  builder.tensors["unused"] = builder.Random({3});
  builder.tensors["empty"] = builder.Weight({0, 3}, {});
  Json header = builder.Header();
  header["__metadata__"]["license"] = "any";
  const std::string bytes = SafetensorsFile(header.dump(), builder.Data());
  ASSERT_EQ(Refusal(bytes), "");
  const auto file = ModelFile::Copy(bytes.data(), bytes.size());
  EXPECT_EQ(file->weights_fingerprint(), EveryOp().File()->weights_fingerprint());
}

// ---- Fingerprints.

TEST(FingerprintTest, IsXxh64) {
  std::string data;
  for (int i = 0; i < 200; ++i) data.push_back(static_cast<char>(i * 37 + 11));
  struct Case {
    size_t bytes;
    uint64_t seed, hash;
  };
  // Expected values from the Python package xxhash 4.1.
  for (const Case& c : std::vector<Case>{
           {0, 0, 0xef46db3751d8e999},   {0, 12345678901234567890u, 0x5a165a1e76ab9ee8},
           {1, 0, 0xf592c0c7639c4cb6},   {1, 12345678901234567890u, 0xeb9ed8ef88491a7f},
           {3, 0, 0x22c08528601d4f27},   {3, 12345678901234567890u, 0xd53ae3c052f65730},
           {4, 0, 0xfb1e5cf2f1ae4d95},   {4, 12345678901234567890u, 0xed8e14bbad183e7d},
           {7, 0, 0x5613ac510496c04e},   {7, 12345678901234567890u, 0xd06db2e95a444b7e},
           {8, 0, 0x57cb2b7521f3e21a},   {8, 12345678901234567890u, 0x37b2fdad459331de},
           {15, 0, 0x90a9714eb00e8d29},  {15, 12345678901234567890u, 0x448a5d18b8df2966},
           {31, 0, 0xe4a0e629e519a4ae},  {31, 12345678901234567890u, 0x18f4fd324e0d5d2e},
           {32, 0, 0xcc6b8aaada790b2d},  {32, 12345678901234567890u, 0xff254a0e13bc9120},
           {33, 0, 0x35ec49850475a832},  {33, 12345678901234567890u, 0xde66b32272054f9b},
           {63, 0, 0xbf9f0ba3cf95b28a},  {63, 12345678901234567890u, 0x857a5cfc74cb9fe6},
           {64, 0, 0x155ccce4bf32befc},  {64, 12345678901234567890u, 0xeb59a1b45b1fcf65},
           {100, 0, 0x4826e367566ea023}, {100, 12345678901234567890u, 0xe16ca21af79f4c70},
           {200, 0, 0x2f074b6dd9094e34}, {200, 12345678901234567890u, 0x49bc5b00b8a413b2}}) {
    EXPECT_EQ(Xxh64(data.data(), c.bytes, c.seed), c.hash) << c.bytes;
    // The address may be unaligned.
    const std::string shifted = " " + data;
    EXPECT_EQ(Xxh64(shifted.data() + 1, c.bytes, c.seed), c.hash) << c.bytes;
  }
}

TEST(FingerprintTest, DoesNotDependOnNames) {
  const auto file = EveryOp().File();
  PlanBuilder renamed = EveryOp();
  renamed.plan["name"] = "another";
  renamed.plan["producer"] = "someone else";
  renamed.plan["inputs"][0]["name"] = "u";
  renamed.plan["outputs"][0]["name"] = "v";
  renamed.plan["input_structure"] = {{"a", 0}, {"b", 1}, {"c", 2}};
  renamed.plan["keras_state"] = Json::array({1, "anything"});
  for (Json& node : renamed.plan["nodes"]) {
    node["name"] = "node " + node["name"].get<std::string>();
    for (auto& weight : node["weights"].items()) {
      const std::string name = weight.value();
      // The new name changes the tensors' order in the file.
      const std::string other = std::string(name.rbegin(), name.rend());
      renamed.tensors[other] = renamed.tensors.at(name);
      renamed.tensors.erase(name);
      weight.value() = other;
    }
  }
  EXPECT_EQ(renamed.File()->plan().fingerprint, file->plan().fingerprint);
  EXPECT_EQ(renamed.File()->weights_fingerprint(), file->weights_fingerprint());
}

TEST(FingerprintTest, DoesNotDependOnHowANumberIsWritten) {
  PlanBuilder builder = EveryOp();
  NodeOf(&builder, "window_attention")["attributes"]["scale"] = 1.0;  // was 1
  NodeOf(&builder, "not_equal")["attributes"]["value"] = -0.0;        // was 0
  EXPECT_EQ(builder.File()->plan().fingerprint, EveryOp().File()->plan().fingerprint);
}

TEST(FingerprintTest, DependsOnThePlan) {
  std::set<uint64_t> prints = {EveryOp().File()->plan().fingerprint};
  const auto add = [&](const std::function<void(PlanBuilder*)>& change) {
    PlanBuilder builder = EveryOp();
    change(&builder);
    const auto file = builder.File();
    EXPECT_TRUE(prints.insert(file->plan().fingerprint).second);
    EXPECT_EQ(file->weights_fingerprint(), EveryOp().File()->weights_fingerprint());
  };
  add([](PlanBuilder* b) { NodeOf(b, "attention")["attributes"]["scale"] = 0.25; });
  add([](PlanBuilder* b) { NodeOf(b, "attention")["attributes"]["window"] = 5; });
  add([](PlanBuilder* b) { NodeOf(b, "attention")["masks"].erase("query"); });
  add([](PlanBuilder* b) { NodeOf(b, "binary")["attributes"]["function"] = "subtract"; });
  add([](PlanBuilder* b) { NodeOf(b, "not_equal")["attributes"]["any"] = false; });
  add([](PlanBuilder* b) { b->plan["receptive_field"] = 5; });
  add([](PlanBuilder* b) { b->plan["delay"] = 1; });
  add([](PlanBuilder* b) { b->plan["cache_dtype"] = "bfloat16"; });
  add([](PlanBuilder* b) { std::swap(b->plan["outputs"][0], b->plan["outputs"][1]); });
  add([](PlanBuilder* b) {
    NodeOf(b, "activation")["attributes"]["max_value"] = 0;  // 0 is not null
  });
}

TEST(FingerprintTest, DependsOnTheWeights) {
  std::set<uint64_t> prints = {EveryOp().File()->weights_fingerprint()};
  const std::map<std::string, TensorBytes> tensors = EveryOp().tensors;
  for (const auto& tensor : tensors) {
    PlanBuilder builder = EveryOp();
    std::string& bytes = builder.tensors.at(tensor.first).bytes;
    bytes[0] = static_cast<char>(bytes[0] ^ 1);
    const auto file = builder.File();
    EXPECT_TRUE(prints.insert(file->weights_fingerprint()).second) << tensor.first;
    EXPECT_EQ(file->plan().fingerprint, EveryOp().File()->plan().fingerprint);
  }
}

TEST(FingerprintTest, HasTheSessionsCacheDtype) {
  PlanBuilder builder = EveryOp();
  const auto file = builder.File();
  EXPECT_EQ(file->plan().FingerprintWith(DType::kFloat32), file->plan().fingerprint);
  builder.plan["cache_dtype"] = "float16";
  EXPECT_EQ(file->plan().FingerprintWith(DType::kFloat16), builder.File()->plan().fingerprint);
  EXPECT_NE(file->plan().fingerprint, builder.File()->plan().fingerprint);
}

// Computed by hand from docs/model_file.md. It must not change unnoticed: saved copies of streams
// contain it.
TEST(FingerprintTest, StaysTheSameFromVersionToVersion) {
  PlanBuilder builder;
  const int x = builder.Input("x", {2});
  const int y = builder.Node(
      "dense", {x}, {1}, {},
      {{"kernel", builder.Weight({2, 1}, {0.5, -2})}, {"bias", builder.Weight({1}, {0.25})}});
  const int z = builder.Node("activation", {y}, {1}, {{"function", "elu"}, {"alpha", 1.5}});
  builder.Output("y", builder.Node("delay", {z}, {1}, {{"steps", 3}}));
  const auto file = builder.File();
  EXPECT_EQ(file->plan().architecture, 0x821dda62b7c394fa);
  EXPECT_EQ(file->plan().fingerprint, 0xa53bf222374e7354);
  EXPECT_EQ(file->weights_fingerprint(), 0x1415c541d584012b);
}

// ---- Files.

TEST(ModelFileTest, MapsAndSaves) {
  const Folder folder;
  const std::string bytes = EveryOp().Bytes();
  Write(folder / "a", bytes);
  const auto mapped = ModelFile::Map(folder / "a");
  const auto copied = ModelFile::Copy(bytes.data(), bytes.size());
  EXPECT_EQ(mapped->size(), bytes.size());
  EXPECT_EQ(std::string(static_cast<const char*>(mapped->data()), mapped->size()), bytes);
  EXPECT_EQ(mapped->plan().fingerprint, copied->plan().fingerprint);
  EXPECT_EQ(mapped->weights_fingerprint(), copied->weights_fingerprint());

  copied->Save(folder / "b");
  EXPECT_EQ(Read(folder / "b"), bytes);
  EXPECT_EQ(ModelFile::Map(folder / "b")->plan().fingerprint, copied->plan().fingerprint);
  EXPECT_EQ(folder.files(), 2u);
}

TEST(ModelFileTest, SavesOverTheFileThatItHasMapped) {
  const Folder folder;
  const std::string bytes = EveryOp().Bytes();
  Write(folder / "a", bytes);
  const auto mapped = ModelFile::Map(folder / "a");
  const std::string other = EveryOp("float64").Bytes();
  ModelFile::Copy(other.data(), other.size())->Save(folder / "a");
  // The map still has the old file's contents.
  EXPECT_EQ(std::string(static_cast<const char*>(mapped->data()), mapped->size()), bytes);
  mapped->Save(folder / "a");
  EXPECT_EQ(Read(folder / "a"), bytes);
  EXPECT_EQ(folder.files(), 1u);
}

TEST(ModelFileTest, SavesWithThePermissionsOfANewFile) {
  const Folder folder;
  const mode_t mask = umask(0027);
  EveryOp().File()->Save(folder / "a");
  umask(mask);
  struct stat status;
  ASSERT_EQ(stat((folder / "a").c_str(), &status), 0);
  EXPECT_EQ(status.st_mode & 0777, 0640u);
}

TEST(ModelFileTest, SavesWholeOrNotAtAll) {
  const Folder folder;
  const auto file = EveryOp().File();
  const auto expect_io = [&](const std::string& path, const std::string& part) {
    try {
      file->Save(path);
      ADD_FAILURE() << path;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::kIo);
      ExpectIn(path, error.what());
      ExpectIn(part, error.what());
    }
  };
  expect_io(folder / "no/such/folder", "No such file or directory");
  std::filesystem::create_directory(folder / "folder");
  expect_io(folder / "folder", "Is a directory");
  EXPECT_EQ(folder.files(), 1u);  // no temporary file is left

  // The disk becomes full in the middle of the file.
  Write(folder / "a", "before");
  struct rlimit limit;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &limit), 0);
  const auto old_handler = signal(SIGXFSZ, SIG_IGN);
  struct rlimit low = limit;
  low.rlim_cur = 1000;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &low), 0);
  expect_io(folder / "a", "File too large");
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &limit), 0);
  signal(SIGXFSZ, old_handler);
  EXPECT_EQ(Read(folder / "a"), "before");
  EXPECT_EQ(folder.files(), 2u);
}

TEST(ModelFileTest, SavesFromSeveralThreads) {
  const Folder folder;
  const auto file = EveryOp().File();
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&] {
      for (int k = 0; k < 10; ++k) file->Save(folder / "a");
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(Read(folder / "a"), EveryOp().Bytes());
  EXPECT_EQ(folder.files(), 1u);
}

TEST(ModelFileTest, SaysWhyAFileCannotBeRead) {
  const Folder folder;
  const auto expect = [](const std::string& path, ErrorCode code, const std::string& part) {
    const Error error = MapError(path);
    EXPECT_EQ(error.code(), code);
    ExpectIn(path, error.what());
    ExpectIn(part, error.what());
  };
  expect(folder / "none", ErrorCode::kIo, "No such file or directory");
  std::filesystem::create_directory(folder / "folder");
  expect(folder / "folder", ErrorCode::kIo, "Is a directory");
  ASSERT_EQ(mkfifo((folder / "pipe").c_str(), 0600), 0);
  expect(folder / "pipe", ErrorCode::kIo, "not a regular file");
  Write(folder / "empty", "");
  expect(folder / "empty", ErrorCode::kBadModelFile, "it has only 0 bytes");
  Write(folder / "keras", std::string("PK\x03\x04 and more", 14));
  expect(folder / "keras", ErrorCode::kBadModelFile, "continual-transformers pack");
  Write(folder / "h5", "\x89HDF\r\n\x1a\n and more");
  expect(folder / "h5", ErrorCode::kBadModelFile, "HDF5");
  Write(folder / "text", "This is not a model file, but a text.");
  expect(folder / "text", ErrorCode::kBadModelFile, "not the length of a header");
}

// ---- Wrong safetensors files.

TEST(ModelFileTest, RefusesEveryTruncation) {
  const std::string bytes = EveryOp().Bytes();
  for (size_t size = 0; size < bytes.size(); size += size < 64 ? 1 : 7) {
    ASSERT_NE(Refusal(bytes.substr(0, size)), "") << size;
  }
  ExpectIn("the file is truncated", Refusal(bytes.substr(0, bytes.size() - 1)));
}

// Returns a file with this change to its header.
std::string WithHeader(const std::function<void(Json*)>& change) {
  const PlanBuilder builder = EveryOp();
  Json header = builder.Header();
  change(&header);
  return SafetensorsFile(header.dump(), builder.Data());
}

TEST(ModelFileTest, RefusesTensorsThatAreWrong) {
  const auto expect = [](const std::string& key, const Json& value, const std::string& part) {
    const std::string refusal =
        Refusal(WithHeader([&](Json* header) { (*header)["affine_3/scale"][key] = value; }));
    ExpectIn("the tensor \"affine_3/scale\"", refusal);
    ExpectIn(part, refusal);
  };
  const int64_t most = std::numeric_limits<int64_t>::max();
  const int64_t far = int64_t{1} << 40;
  expect("dtype", "F8_E4M3", "dtype \"F8_E4M3\", which this version does not know");
  expect("dtype", 4, "\"dtype\" is 4, expected a string");
  expect("dtype", "F64", "has 16 bytes, but its shape [4] in float64 has 32");
  expect("shape", 4, "expected a list");
  expect("shape", {5}, "has 16 bytes, but its shape [5] in float32 has 20");
  expect("shape", {-4}, "expected whole numbers");
  expect("shape", {4.0}, "expected whole numbers");
  expect("shape", {"4"}, "expected whole numbers");
  expect("shape", {most, most}, "a size in memory");
  expect("shape", {far, far, 0}, "a size in memory");
  expect("shape", {most / 4, 2}, "a size in memory");
  expect("shape", {uint64_t{1} << 63}, "expected whole numbers");
  expect("data_offsets", {0}, "expected [begin, end]");
  expect("data_offsets", {0, 8, 16}, "expected [begin, end]");
  expect("data_offsets", {-16, 0}, "expected [begin, end]");
  expect("data_offsets", {16, 0}, "expected [begin, end]");
  expect("data_offsets", {0.5, 16.5}, "expected [begin, end]");
  expect("data_offsets", {0, 15}, "has 15 bytes");
  expect("data_offsets", {most - 16, most}, "ends at byte 9223372036854775807");
  expect("data_offsets", {uint64_t{0} - 16, uint64_t{0}}, "expected [begin, end]");
  expect("strides", 1, "has \"strides\", which this version does not know");
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    ExpectIn("has no \"" + std::string(key) + "\"",
             Refusal(WithHeader([&](Json* header) { (*header)["affine_3/scale"].erase(key); })));
  }
  ExpectIn("the tensor \"x\" is 3, expected a JSON object",
           Refusal(WithHeader([&](Json* header) { (*header)["x"] = 3; })));
}

TEST(ModelFileTest, RefusesMetadataThatAreWrong) {
  const auto refusal = [](const std::function<void(Json*)>& change) {
    return Refusal(WithHeader([&](Json* header) { change(&(*header)["__metadata__"]); }));
  };
  ExpectIn("not a model file", refusal([](Json* m) { *m = nullptr; }));
  ExpectIn("not a model file", refusal([](Json* m) { *m = Json::array(); }));
  ExpectIn("not a model file", refusal([](Json* m) { m->erase("format"); }));
  ExpectIn("not a model file", refusal([](Json* m) { (*m)["format"] = "pt"; }));
  ExpectIn("not a model file", refusal([](Json* m) { (*m)["format"] = 1; }));
  ExpectIn("not a model file",
           Refusal(WithHeader([](Json* header) { header->erase("__metadata__"); })));
  ExpectIn("no \"format_version\"", refusal([](Json* m) { m->erase("format_version"); }));
  const std::string newer = refusal([](Json* m) { (*m)["format_version"] = "2"; });
  ExpectIn("its format version is \"2\", this version reads \"1\"", newer);
  ExpectIn("newer version of continual-transformers-tf wrote the file: upgrade", newer);
  ExpectIn("expected a string", refusal([](Json* m) { (*m)["format_version"] = 1; }));
  ExpectIn("no \"plan\"", refusal([](Json* m) { m->erase("plan"); }));
  ExpectIn("expected a string", refusal([](Json* m) { (*m)["plan"] = Json::object(); }));
  ExpectIn("the plan is not JSON at byte", refusal([](Json* m) { (*m)["plan"] = "{"; }));
  ExpectIn("the plan is [], expected a JSON object", refusal([](Json* m) { (*m)["plan"] = "[]"; }));
}

TEST(ModelFileTest, RefusesHeadersThatAreNotExactlyJson) {
  const PlanBuilder builder = EveryOp();
  const std::string good = builder.Header().dump();
  const auto refusal = [&](const std::string& header) {
    return Refusal(SafetensorsFile(header, builder.Data()));
  };
  ASSERT_EQ(refusal(good), "");
  ExpectIn("is not JSON at byte", refusal(""));
  ExpectIn("is not JSON at byte", refusal(good + "}"));
  ExpectIn("is not JSON at byte", refusal(good.substr(1)));
  ExpectIn("is not JSON at byte", refusal("// a comment\n" + good));
  ExpectIn("is not JSON at byte", refusal(good.substr(0, good.size() - 1) + ",}"));
  ExpectIn("is not JSON at byte", refusal("{\"\xff\xfe\": 1," + good.substr(1)));
  ExpectIn("is not JSON at byte", refusal(std::string("{\"a\0b\": 1,", 10) + good.substr(1)));
  ExpectIn("no Infinity", refusal("{\"a\": NaN," + good.substr(1)));
  ExpectIn("a number that is too large", refusal("{\"a\": 1e999," + good.substr(1)));
  ExpectIn("expected a JSON object", refusal("[]"));
  ExpectIn("has the key \"a\" twice", refusal("{\"a\": 1, \"a\": 2," + good.substr(1)));
  ExpectIn("has the key \"a\" twice",
           refusal("{\"b\": [{\"a\": 1, \"\\u0061\": 2}]," + good.substr(1)));
  // The same key in two objects is allowed.
  ExpectIn("the tensor \"b\"", refusal("{\"b\": [{\"a\": 1}, {\"a\": 2}]," + good.substr(1)));
}

TEST(ModelFileTest, RefusesValuesThatAreNestedDeep) {
  const auto nested = [](int depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  PlanBuilder builder;
  builder.Output("y", builder.Input("x", {2}));
  std::string plan = builder.plan.dump();
  const std::string before = "\"keras_state\":[";
  const size_t place = plan.find(before);
  ASSERT_NE(place, std::string::npos);
  const auto refusal = [&](int depth) {
    std::string deep = plan;
    deep.insert(place + before.size(), nested(depth - 2));  // object and list are 2 levels
    Json header = {
        {"__metadata__",
         {{"format", "continual-transformers"}, {"format_version", "1"}, {"plan", deep}}}};
    return Refusal(SafetensorsFile(header.dump(), ""));
  };
  EXPECT_EQ(refusal(64), "");
  ExpectIn("the plan has values nested deeper than 64", refusal(65));
  ExpectIn("the plan has values nested deeper than 64", refusal(1000000));
  const std::string objects = [] {
    std::string text;
    for (int i = 0; i < 100000; ++i) text += "{\"a\":";
    return text;
  }();
  ExpectIn("the safetensors header has values nested deeper",
           Refusal(SafetensorsFile(objects, "")));
}

TEST(ModelFileTest, NamesOfAFileCannotSpoilTheSentence) {
  PlanBuilder builder = EveryOp();
  builder.plan["nodes"][0]["name"] = "bad\n\x1b[31m\xc3\xa9" + std::string(1000, 'x');
  builder.plan["nodes"][0]["op"] = "no such op";
  const std::string refusal = Refusal(builder);
  ExpectIn("node 0 (\"bad??[31m\xc3\xa9xxx", refusal);
  ExpectIn("xxx...\")", refusal);
  EXPECT_LT(refusal.size(), 400u);
  // A name is cut between characters.
  builder.plan["nodes"][0]["name"] = std::string(119, 'x') + "\xc3\xa9\xc3\xa9";
  ExpectIn("xxx\xc3\xa9...\"", Refusal(builder));
}

// ---- Wrong plans.

TEST(PlanTest, RefusesATopLevelThatIsWrong) {
  const auto expect = [](const std::string& pointer, const Json& value, const std::string& part) {
    PlanBuilder builder = EveryOp();
    builder.plan[Json::json_pointer(pointer)] = value;
    ExpectIn(part, Refusal(builder));
  };
  expect("/producer", 1, "the plan: \"producer\" is 1, expected a string");
  expect("/name", nullptr, "\"name\" is null");
  expect("/compute_dtype", "bfloat16", "\"compute_dtype\" is \"bfloat16\", expected one of");
  expect("/compute_dtype", "int8", "\"compute_dtype\" is \"int8\"");
  expect("/compute_dtype", "int4", "newer version");
  expect("/cache_dtype", "float64", "\"cache_dtype\" is \"float64\"");
  expect("/cache_dtype", "int4", "newer version");
  expect("/weights_dtype", "float16", "\"weights_dtype\" is \"float16\"");
  expect("/receptive_field", 0, "\"receptive_field\" is 0, expected a whole number from 1");
  expect("/receptive_field", 1.5, "\"receptive_field\" is 1.5");
  expect("/receptive_field", std::numeric_limits<int64_t>::max(), "\"receptive_field\" is");
  expect("/delay", -1, "\"delay\" is -1");
  expect("/block", 0, "\"block\" is 0");
  expect("/block", "1", "\"block\" is \"1\"");
  expect("/values", Json::object(), "\"values\" is an object, expected a list");
  expect("/values/0", 3, "value 0 is 3, expected a JSON object");
  expect("/values/0/dtype", "float64", "value 0: \"dtype\" is \"float64\", expected one of");
  expect("/values/0/dtype", "bfloat16", "value 0: \"dtype\"");
  expect("/values/0/dtype", "complex64", "newer version");
  expect("/values/0/strides", 1, "value 0 has \"strides\", which this version does not know");
  expect("/values/0/shape", {0}, "value 0 has shape [0]");
  expect("/values/0/shape", {-6}, "value 0 has shape [-6]");
  expect("/values/0/shape", {6.0}, "value 0 has shape [6.0]");
  expect("/values/0/shape", {int64_t{1} << 31}, "at most 2^31 - 1 elements");
  expect("/values/0/shape", {65536, 32768}, "at most 2^31 - 1 elements");
  expect("/values/0/shape", {int64_t{1} << 32, int64_t{1} << 32}, "at most 2^31 - 1 elements");
  expect("/values/0/shape", {1, 1, 1, 1, 1, 1, 1, 1, 6}, "value 0 has 9 axes, expected at most 8");
  expect("/inputs", Json::array(), "the plan has no inputs");
  expect("/outputs", Json::array(), "the plan has no outputs");
  expect("/inputs/0/value", 1000, "input 0 is value 1000, but the plan has");
  expect("/inputs/0/value", -1, "input 0 is value -1");
  expect("/inputs/0/value", 0.0, "input 0 is value 0.0");
  expect("/inputs/1/value", 0,
         "input \"tokens\" is value 0, which an input or an earlier node already makes");
  expect("/inputs/0/dtype", "float32", "input 0 has \"dtype\", which this version does not know");
  expect("/outputs/0/value", 1000, "output 0 is value 1000");
  expect("/input_structure", 0, "\"input_structure\" has 1 leaves, expected 3");
  expect("/input_structure", {0, 1, 1}, "has the leaf 1 twice");
  expect("/input_structure", {0, 1, 3}, "has the leaf 3");
  expect("/input_structure", {0, 1, -1}, "has the leaf -1");
  expect("/input_structure", {0, 1, "x"}, "has the leaf \"x\"");
  expect("/input_structure", {0, 1, nullptr}, "has the leaf null");
  expect("/output_structure", {{"y", 0}}, "\"output_structure\" has 1 leaves, expected 5");
  expect("/nodes", 1, "\"nodes\" is 1, expected a list");
  expect("/nodes/0", 1, "node 0 is 1, expected a JSON object");
  expect("/sampling", 1, "the plan has \"sampling\", which this version does not know");
  const Json every = EveryOp().plan;
  for (const auto& member : every.items()) {
    PlanBuilder builder = EveryOp();
    builder.plan.erase(member.key());
    ExpectIn("the plan has no \"" + member.key() + "\"", Refusal(builder));
  }
}

TEST(PlanTest, Float64HasOtherDtypes) {
  for (const char* key : {"cache_dtype", "weights_dtype"}) {
    PlanBuilder builder = EveryOp("float64");
    builder.plan[key] = "float32";
    ExpectIn("expected one of \"float64\"", Refusal(builder));
  }
}

TEST(PlanTest, RefusesValuesThatNothingMakesOrThatAreMadeTwice) {
  PlanBuilder builder = EveryOp();
  builder.Value({3});
  ExpectIn("no input and no node makes value ", Refusal(builder));

  PlanBuilder twice = EveryOp();
  twice.plan["nodes"].push_back(twice.plan["nodes"][0]);
  ExpectIn("its output is value 3, which an input or an earlier node already makes",
           Refusal(twice));

  PlanBuilder input;
  const int x = input.Input("x", {2});
  const int y = input.Dense(x, {2});
  input.Output("y", y);
  input.plan["nodes"][0]["outputs"][0] = x;
  ExpectIn("already makes", Refusal(input));

  PlanBuilder late = EveryOp();
  std::swap(late.plan["nodes"][0], late.plan["nodes"][1]);
  ExpectIn("but no input of the plan and no earlier node makes it", Refusal(late));
}

TEST(PlanTest, RefusesMoreNodesThanItSays) {
  const auto refusal = [](int nodes) {
    PlanBuilder builder;
    int y = builder.Input("x", {1});
    for (int i = 0; i < nodes; ++i) y = builder.Node("reshape", {y}, {1});
    builder.Output("y", y);
    return Refusal(builder);
  };
  EXPECT_EQ(refusal(65536), "");
  ExpectIn("the plan has 65537 nodes, expected at most 65536", refusal(65537));
}

TEST(PlanTest, RefusesSizesBeyondAnyMemory) {
  const auto attention = [](int64_t features, int64_t window) {
    PlanBuilder builder;
    const int x = builder.Input("x", {features});
    builder.Output("y", builder.Attention(x, x, x, 1, window));
    return Refusal(builder);
  };
  EXPECT_EQ(attention(1 << 10, 1 << 26), "");  // 512 GiB
  ExpectIn("more than 2^40 bytes of state", attention(1 << 10, 1 << 27));
  ExpectIn("more than 2^40 bytes of state", attention(1 << 28, 2147483647));
  ExpectIn("\"window\" is 2147483648", attention(1, int64_t{1} << 31));

  const auto delay = [](int64_t steps) {
    PlanBuilder builder;
    const int x = builder.Input("x", {1 << 20}, "int64");
    builder.Output("y", builder.Node("delay", {x}, {1 << 20}, {{"steps", steps}}, {}, {}, "int64"));
    return Refusal(builder);
  };
  EXPECT_EQ(delay(1 << 16), "");
  ExpectIn("more than 2^40 bytes of state", delay(1 << 17));

  PlanBuilder values;
  int y = values.Input("x", {1});
  for (int i = 0; i < 129; ++i) {
    y = values.Node("strided", {y}, {2147483647}, {{"offset", 0}, {"strides", {0}}});
  }
  values.Output("y", y);
  ExpectIn("the values of one step have more than 2^40 bytes", Refusal(values));
}

// ---- Errors in every op, tested on all nodes of a plan that has every op.

class EveryOpTest : public ::testing::Test {
 protected:
  // Calls `change` for each node of EveryOp, each time on a new plan. Expects that exactly this
  // node is refused, with `part` in the message. Skips nodes for which `change` returns false.
  void ExpectEveryNodeRefused(
      const std::function<bool(PlanBuilder*, Json*, const OpEntry&)>& change,
      const std::string& part) {
    for (const char* dtype : {"float32", "float64"}) {
      const PlanBuilder every = EveryOp(dtype);
      for (size_t i = 0; i < every.plan["nodes"].size(); ++i) {
        PlanBuilder builder = every;
        Json& node = builder.plan["nodes"][i];
        const OpEntry& entry = *FindOpEntry(node["op"]);
        if (change(&builder, &node, entry)) ExpectNodeRefused(builder, i, part);
      }
    }
  }

  std::string ExpectNodeRefused(const PlanBuilder& builder, size_t place, const std::string& part) {
    ++refused_;
    const std::string refusal = Refusal(builder);
    ExpectIn(part, refusal);
    EXPECT_EQ(refusal.rfind("node " + std::to_string(place) + " ", 0), 0u)
        << refusal << builder.plan["nodes"][place];
    return refusal;
  }

  // Guards against a test that changes no node.
  void TearDown() override { EXPECT_GE(refused_, 15); }

 private:
  int refused_ = 0;
};

TEST_F(EveryOpTest, NeedsItsKeys) {
  for (const char* key : {"inputs", "outputs"}) {
    ExpectEveryNodeRefused(
        [&](PlanBuilder*, Json* node, const OpEntry&) {
          (*node)[key] = 3;
          return true;
        },
        "\"" + std::string(key) + "\" is 3, expected a list");
  }
  for (const char* key : {"weights", "attributes", "masks"}) {
    ExpectEveryNodeRefused(
        [&](PlanBuilder*, Json* node, const OpEntry&) {
          (*node)[key] = Json::array();
          return true;
        },
        "expected a JSON object");
  }
}

TEST_F(EveryOpTest, RefusesWhatItDoesNotKnow) {
  const std::string newer = "newer version of continual-transformers-tf";
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry&) {
        (*node)["device"] = "gpu";
        return true;
      },
      newer);
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry&) {
        (*node)["op"] = (*node)["op"].get<std::string>() + "2";
        return true;
      },
      "2\", which this version does not know");
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry&) {
        (*node)["attributes"]["sparsity"] = 1;
        return true;
      },
      "has \"sparsity\", which this version does not know");
  ExpectEveryNodeRefused(
      [](PlanBuilder* builder, Json* node, const OpEntry&) {
        (*node)["weights"]["zero_point"] = "zero_point";
        builder->tensors["zero_point"] = builder->Random({1});
        return true;
      },
      newer);
  ExpectEveryNodeRefused(
      [](PlanBuilder* builder, Json* node, const OpEntry&) {
        (*node)["masks"]["new"] = builder->plan["inputs"][0]["value"];
        return true;
      },
      newer);
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry& entry) {
        (*node)["attributes"]["function"] = "new";
        return !entry.functions.empty();
      },
      newer);
}

TEST_F(EveryOpTest, ChecksEveryInput) {
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry& entry) {
        if (entry.inputs.empty()) return false;
        if (entry.more_inputs) {
          (*node)["inputs"] = Json::array();
        } else {
          (*node)["inputs"].erase(0);
        }
        return true;
      },
      "inputs, expected ");
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry& entry) {
        (*node)["inputs"].push_back(0);
        return !entry.more_inputs;
      },
      "inputs, expected ");
  for (size_t i = 0; i < 3; ++i) {
    const auto put = [&](const std::function<Json(const PlanBuilder&, const Json&)>& value) {
      return [=](PlanBuilder* builder, Json* node, const OpEntry&) {
        if ((*node)["inputs"].size() <= i) return false;
        (*node)["inputs"][i] = value(*builder, *node);
        return true;
      };
    };
    const std::string input = "input " + std::to_string(i) + " is value ";
    ExpectEveryNodeRefused(put([](const PlanBuilder&, const Json&) { return -1; }), input + "-1");
    ExpectEveryNodeRefused(put([](const PlanBuilder&, const Json&) { return 0.0; }), input + "0.0");
    ExpectEveryNodeRefused(put([](const PlanBuilder&, const Json&) { return "x"; }),
                           input + "\"x\"");
    ExpectEveryNodeRefused(
        put([](const PlanBuilder& b, const Json&) { return b.plan["values"].size(); }), input);
    ExpectEveryNodeRefused(
        put([](const PlanBuilder&, const Json& node) { return node["outputs"][0]; }),
        "no earlier node makes it");
    ExpectEveryNodeRefused(put([](const PlanBuilder&, const Json&) { return uint64_t{0} - 1; }),
                           input);
  }
}

TEST_F(EveryOpTest, ChecksTheDtypeOfEveryInput) {
  for (size_t i = 0; i < 3; ++i) {
    for (const char* dtype : {"compute", "int32", "int64", "bool"}) {
      ExpectEveryNodeRefused(
          [&](PlanBuilder* builder, Json* node, const OpEntry& entry) {
            if ((*node)["inputs"].size() <= i) return false;
            const ValueKind kind = entry.inputs[entry.more_inputs ? 0 : i];
            const std::string name =
                dtype == std::string("compute") ? builder->compute_dtype() : dtype;
            const bool fits = kind == ValueKind::kAny ||
                              (kind == ValueKind::kCompute && name == builder->compute_dtype()) ||
                              (kind == ValueKind::kBool && name == "bool") ||
                              (kind == ValueKind::kIndex && (name == "int32" || name == "int64"));
            if (fits) return false;
            // Another input of the plan, with the same shape and this dtype.
            const Shape shape = builder->plan["values"][(*node)["inputs"][i].get<int>()]["shape"];
            (*node)["inputs"][i] = builder->Input("other", shape, name);
            return true;
          },
          ", expected ");
    }
  }
}

TEST_F(EveryOpTest, ChecksItsOutput) {
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry&) {
        (*node)["outputs"] = Json::array();
        return true;
      },
      "has 0 outputs, expected 1");
  ExpectEveryNodeRefused(
      [](PlanBuilder* builder, Json* node, const OpEntry&) {
        (*node)["outputs"].push_back(builder->Value({1}));
        return true;
      },
      "has 2 outputs, expected 1");
  for (const Json& value : {Json(-1), Json(100000), Json("x"), Json(1.0)}) {
    ExpectEveryNodeRefused(
        [&](PlanBuilder*, Json* node, const OpEntry&) {
          (*node)["outputs"][0] = value;
          return true;
        },
        "its output is value ");
  }
  ExpectEveryNodeRefused(
      [](PlanBuilder*, Json* node, const OpEntry&) {
        (*node)["outputs"][0] = 0;
        return true;
      },
      "already makes");
  for (const char* dtype : {"compute", "int32", "bool"}) {
    ExpectEveryNodeRefused(
        [&](PlanBuilder* builder, Json* node, const OpEntry& entry) {
          Json& value = builder->plan["values"][(*node)["outputs"][0].get<int>()];
          const std::string name =
              dtype == std::string("compute") ? builder->compute_dtype() : dtype;
          if (entry.output == OutputKind::kAny || value["dtype"] == name) return false;
          value["dtype"] = name;
          return true;
        },
        "its output is ");
  }
  // Wrong shapes: one more axis, one less, or one more element in an axis.
  const auto shape = [](const std::function<bool(Json*)>& change, bool longer = false) {
    return [=](PlanBuilder* builder, Json* node, const OpEntry& entry) {
      if (longer && entry.op == Op::kPresent) return false;  // Any number of rows is right.
      return change(&builder->plan["values"][(*node)["outputs"][0].get<int>()]["shape"]);
    };
  };
  ExpectEveryNodeRefused(shape([](Json* shape) {
                           shape->push_back(2);
                           return true;
                         }),
                         "");
  ExpectEveryNodeRefused(shape([](Json* shape) {
                           if (shape->empty()) return false;
                           const bool reshaped = shape->back() == 1;
                           shape->erase(shape->size() - 1);
                           return !reshaped;
                         }),
                         "");
  for (size_t axis = 0; axis < 3; ++axis) {
    ExpectEveryNodeRefused(shape(
                               [&](Json* shape) {
                                 if (shape->size() <= axis) return false;
                                 (*shape)[axis] = (*shape)[axis].get<int>() + 1;
                                 return true;
                               },
                               true),
                           "");
  }
}

TEST_F(EveryOpTest, ChecksEveryWeight) {
  for (size_t i = 0; i < 4; ++i) {
    const auto weight = [&](const std::function<bool(PlanBuilder*, Json*, const WeightEntry&,
                                                     TensorBytes*)>& change) {
      return [=](PlanBuilder* builder, Json* node, const OpEntry& entry) {
        if (entry.weights.size() <= i) return false;
        const WeightEntry& weight = entry.weights[i];
        if (!(*node)["weights"].contains(weight.name)) return false;
        const std::string name = (*node)["weights"][weight.name];
        return change(builder, node, weight, &builder->tensors.at(name));
      };
    };
    ExpectEveryNodeRefused(
        weight([](PlanBuilder*, Json* node, const WeightEntry& entry, TensorBytes*) {
          (*node)["weights"].erase(entry.name);
          const bool prelu = (*node)["attributes"].value("function", "") == "prelu";
          return entry.needed || prelu;
        }),
        "has no weight ");
    ExpectEveryNodeRefused(
        weight([](PlanBuilder*, Json* node, const WeightEntry& entry, TensorBytes*) {
          (*node)["weights"][entry.name] = "no such tensor";
          return true;
        }),
        "is the tensor \"no such tensor\", which the file does not have");
    ExpectEveryNodeRefused(
        weight([](PlanBuilder*, Json* node, const WeightEntry& entry, TensorBytes*) {
          (*node)["weights"][entry.name] = 1;
          return true;
        }),
        "is 1, expected a string");
    for (const char* dtype : {"float32", "float64", "bfloat16", "int32", "int64"}) {
      ExpectEveryNodeRefused(
          weight([&](PlanBuilder* builder, Json*, const WeightEntry&, TensorBytes* tensor) {
            if (tensor->dtype == dtype) return false;
            *tensor = builder->Random(tensor->shape, 1, dtype);
            return true;
          }),
          "expected ");
    }
    for (const int change : {-1, 1, 2}) {
      ExpectEveryNodeRefused(
          weight([&](PlanBuilder* builder, Json*, const WeightEntry&, TensorBytes* tensor) {
            Shape shape = tensor->shape;
            if (change == 2) {
              shape.push_back(2);
            } else {
              if (shape.empty()) return false;
              shape.back() += change;
            }
            const std::string dtype = tensor->dtype;
            *tensor = builder->Random(shape, 1, dtype);
            return true;
          }),
          "has shape ");
    }
  }
}

TEST_F(EveryOpTest, ChecksEveryAttribute) {
  const auto check = [&](const Json& value,
                         const std::function<bool(const AttributeEntry&)>& fits) {
    const PlanBuilder every = EveryOp();
    for (size_t i = 0; i < every.plan["nodes"].size(); ++i) {
      const Json& node = every.plan["nodes"][i];
      const OpEntry& entry = *FindOpEntry(node["op"]);
      std::vector<AttributeEntry> entries = entry.attributes;
      for (const FunctionEntry& function : entry.functions) {
        if (function.name != node["attributes"]["function"]) continue;
        entries.insert(entries.end(), function.attributes.begin(), function.attributes.end());
      }
      if (!entry.functions.empty()) {
        entries.push_back(AttributeEntry::Choice("function", {}));
      }
      for (const AttributeEntry& attribute : entries) {
        const bool in_range = attribute.type == AttributeEntry::Type::kWhole &&
                              value.is_number_integer() && value >= attribute.least &&
                              value <= attribute.most;
        if (in_range || fits(attribute)) continue;
        PlanBuilder builder = every;
        Json& changed = builder.plan["nodes"][i]["attributes"];
        if (value.is_discarded()) {
          changed.erase(attribute.name);
        } else {
          changed[attribute.name] = value;
        }
        ExpectNodeRefused(builder, i, "\"" + attribute.name + "\"");
      }
    }
  };
  using Type = AttributeEntry::Type;
  const auto none = [](const AttributeEntry&) { return false; };
  const auto nullable = [](const AttributeEntry& a) { return a.type == Type::kNumberOrNull; };
  const auto number = [](const AttributeEntry& a) {
    return a.type == Type::kNumber || a.type == Type::kNumberOrNull;
  };
  check(Json(Json::value_t::discarded),  // absent
        [&](const AttributeEntry& a) { return nullable(a) || !a.needed; });
  check(nullptr, nullable);
  check(Json::object(), none);
  check({1, "2"}, none);
  check({1, 2.0}, none);
  // Such an attribute `function` is not a known function either, but has another message.
  const auto choice = [](const AttributeEntry& a) {
    return a.type == Type::kChoice && a.name == "function";
  };
  check("", choice);
  check("1", choice);
  check(true, [](const AttributeEntry& a) { return a.type == Type::kBool; });
  check(1.5, number);
  check(-1e300, none);  // beyond float32
  check(-1, [&](const AttributeEntry& a) { return number(a) && a.number_least < 0; });
  check(int64_t{1} << 40, number);
  check(std::numeric_limits<uint64_t>::max(), number);
}

TEST_F(EveryOpTest, ChecksEveryMask) {
  for (const char* op : {"attention", "retroactive_attention"}) {
    for (const char* name : {"key", "query"}) {
      if (op == std::string("retroactive_attention") && name == std::string("query")) continue;
      const auto refusal = [&](const std::function<Json(PlanBuilder*)>& value) {
        PlanBuilder builder = EveryOp();
        const Json number = value(&builder);
        NodeOf(&builder, op)["masks"][name] = number;
        return ExpectNodeRefused(builder, PlaceOf(builder, op),
                                 "the mask \"" + std::string(name) + "\"");
      };
      ExpectIn("is value -1", refusal([](PlanBuilder*) { return -1; }));
      ExpectIn("is value 1000", refusal([](PlanBuilder*) { return 1000; }));
      ExpectIn("no earlier node makes it",
               refusal([](PlanBuilder* b) { return b->plan["values"].size() - 1; }));
      ExpectIn("is float32 [6], expected bool [1]", refusal([](PlanBuilder*) { return 0; }));
      ExpectIn("is bool [2], expected bool [1]",
               refusal([](PlanBuilder* b) { return b->Input("m", {2}, "bool"); }));
      ExpectIn("is bool [], expected bool [1]",
               refusal([](PlanBuilder* b) { return b->Input("m", {}, "bool"); }));
    }
  }
}

// ---- Errors in single ops.

// Returns the refusal of a plan with one node of this op, on inputs of these shapes.
std::string RefusalOfNode(const std::string& op, const std::vector<Shape>& inputs,
                          const Shape& output, const Json& attributes,
                          const std::vector<std::pair<std::string, Shape>>& weights = {}) {
  PlanBuilder builder;
  std::vector<int> values;
  for (size_t i = 0; i < inputs.size(); ++i) {
    values.push_back(builder.Input("x" + std::to_string(i), inputs[i]));
  }
  std::vector<std::pair<std::string, TensorBytes>> tensors;
  for (const auto& [name, shape] : weights) tensors.push_back({name, builder.Random(shape)});
  if (values.empty()) builder.Input("x", {1});
  builder.Output("y", builder.Node(op, values, output, attributes, tensors));
  return Refusal(builder);
}

TEST(DenseTest, TakesAnyLeadingAxes) {
  const auto refusal = [](const Shape& in, const Shape& out, const Shape& kernel) {
    return RefusalOfNode("dense", {in}, out, {}, {{"kernel", kernel}});
  };
  EXPECT_EQ(refusal({3}, {5}, {3, 5}), "");
  EXPECT_EQ(refusal({2, 7, 3}, {2, 7, 5}, {3, 5}), "");
  ExpectIn("expected at least one axis", refusal({}, {5}, {1, 5}));
  ExpectIn("expected [1]", refusal({3}, {}, {3, 1}));
  ExpectIn("expected [2, 5]", refusal({2, 3}, {3, 5}, {3, 5}));
  ExpectIn("has shape [5, 3], expected [3, 5]", refusal({3}, {5}, {5, 3}));
}

TEST(ActivationTest, HasTheNumbersOfItsFunction) {
  const std::vector<std::pair<std::string, Json>> functions = {
      {"celu", {{"alpha", 1}}},
      {"elu", {{"alpha", 1}}},
      {"exponential", {}},
      {"gelu", {}},
      {"gelu_tanh", {}},
      {"hard_shrink", {{"threshold", 0.5}}},
      {"hard_sigmoid", {}},
      {"hard_silu", {}},
      {"hard_tanh", {}},
      {"leaky_relu", {{"negative_slope", 0.2}}},
      {"linear", {}},
      {"log_sigmoid", {}},
      {"mish", {}},
      {"prelu", {}},
      {"relu", {{"negative_slope", 0}, {"max_value", nullptr}, {"threshold", 0}}},
      {"relu6", {}},
      {"selu", {}},
      {"sigmoid", {}},
      {"silu", {}},
      {"soft_shrink", {{"threshold", 0.5}}},
      {"softplus", {}},
      {"softsign", {}},
      {"sparse_plus", {}},
      {"sparse_sigmoid", {}},
      {"squareplus", {{"b", 4}}},
      {"tanh", {}},
      {"tanh_shrink", {}},
      {"threshold", {{"threshold", 0.5}, {"value", -20}}},
      {"absolute", {}},
      {"cos", {}},
      {"log", {}},
      {"log1p", {}},
      {"negative", {}},
      {"reciprocal", {}},
      {"rsqrt", {}},
      {"sign", {}},
      {"sin", {}},
      {"sqrt", {}},
      {"square", {}},
      {"arccos", {}},
      {"arccosh", {}},
      {"arcsin", {}},
      {"arcsinh", {}},
      {"arctan", {}},
      {"arctanh", {}},
      {"cbrt", {}},
      {"ceil", {}},
      {"cosh", {}},
      {"erf", {}},
      {"erfc", {}},
      {"expm1", {}},
      {"floor", {}},
      {"round", {}},
      {"sinc", {}},
      {"sinh", {}},
      {"tan", {}},
      {"trunc", {}},
  };
  EXPECT_EQ(functions.size(), FindOpEntry("activation")->functions.size());
  for (const auto& [name, numbers] : functions) {
    Json attributes = {{"function", name}};
    if (!numbers.is_null()) attributes.update(numbers);
    std::vector<std::pair<std::string, Shape>> weights;
    if (name == "prelu") weights.push_back({"alpha", {2, 3}});
    EXPECT_EQ(RefusalOfNode("activation", {{2, 3}}, {2, 3}, attributes, weights), "") << name;
    EXPECT_EQ(
        RefusalOfNode(
            "activation", {{}}, {}, attributes,
            name == "prelu" ? std::vector<std::pair<std::string, Shape>>{{"alpha", {}}} : weights),
        "")
        << name;
    if (name != "prelu") {
      ExpectIn("which only \"prelu\" has",
               RefusalOfNode("activation", {{2, 3}}, {2, 3}, attributes, {{"alpha", {2, 3}}}));
    }
    for (const auto& number : numbers.items()) {
      if (number.value().is_null()) continue;
      Json less = attributes;
      less.erase(number.key());
      ExpectIn("has no \"" + number.key() + "\"",
               RefusalOfNode("activation", {{2, 3}}, {2, 3}, less, weights));
    }
  }
}

TEST(SoftmaxAndReduceTest, HaveAnAxisOfTheInput) {
  for (const char* function : {"softmax", "log_softmax", "sparsemax"}) {
    const auto refusal = [&](const Shape& shape, int axis) {
      return RefusalOfNode("softmax", {shape}, shape, {{"function", function}, {"axis", axis}});
    };
    EXPECT_EQ(refusal({2, 3}, 0), "");
    EXPECT_EQ(refusal({2, 3}, 1), "");
    ExpectIn("\"axis\" is 2, but input 0 has shape [2, 3]", refusal({2, 3}, 2));
    ExpectIn("\"axis\" is 0, but input 0 has shape []", refusal({}, 0));
    ExpectIn("\"axis\" is -1", refusal({2, 3}, -1));
  }
  for (const char* function : {"sum", "mean", "max", "min", "product", "argmax", "argmin"}) {
    const auto refusal = [&](const Shape& in, const Shape& out, int axis) {
      return RefusalOfNode("reduce", {in}, out, {{"function", function}, {"axis", axis}});
    };
    EXPECT_EQ(refusal({2, 3}, {3}, 0), "");
    EXPECT_EQ(refusal({2, 3}, {2}, 1), "");
    EXPECT_EQ(refusal({2}, {}, 0), "");
    ExpectIn("expected [2]", refusal({2, 3}, {3}, 1));
    ExpectIn("expected [3]", refusal({2, 3}, {1, 3}, 0));
    ExpectIn("\"axis\" is 2", refusal({2, 3}, {2, 3}, 2));
  }
}

TEST(BinaryTest, HasTwoOfOneShape) {
  for (const char* function :
       {"add", "subtract", "multiply", "divide", "maximum", "minimum", "power", "arctan2", "equal",
        "fmod", "greater", "greater_equal", "hypot", "logaddexp", "mod", "not_equal"}) {
    const Json attributes = {{"function", function}};
    EXPECT_EQ(RefusalOfNode("binary", {{2}, {2}}, {2}, attributes), "");
    ExpectIn("input 1 has shape [1], expected [2]",
             RefusalOfNode("binary", {{2}, {1}}, {2}, attributes));
    ExpectIn("its output has shape [3], expected [2]",
             RefusalOfNode("binary", {{2}, {2}}, {3}, attributes));
  }
}

TEST(WhereTest, HasThreeOfOneShape) {
  PlanBuilder builder;
  const int x = builder.Input("x", {3});
  const int condition = builder.Input("c", {3}, "bool"), one = builder.Input("o", {1}, "bool");
  const auto refusal = [&](const std::vector<int>& inputs, const Shape& shape) {
    PlanBuilder with = builder;
    with.Output("y", with.Node("where", inputs, shape));
    return Refusal(with);
  };
  EXPECT_EQ(refusal({condition, x, x}, {3}), "");
  ExpectIn("input 1 has shape [3], expected [1]", refusal({one, x, x}, {3}));
  ExpectIn("expected bool", refusal({x, x, x}, {3}));
  ExpectIn("its output has shape [1], expected [3]", refusal({condition, x, x}, {1}));
}

TEST(CumulativeAndSortTest, HaveAnAxisOfTheInput) {
  const auto refusal = [](const std::string& op, const Json& more, int axis) {
    Json attributes = {{"axis", axis}};
    attributes.update(more);
    return RefusalOfNode(op, {{2, 3}}, {2, 3}, attributes);
  };
  for (const char* function : {"sum", "product"}) {
    EXPECT_EQ(refusal("cumulative", {{"function", function}}, 1), "");
    ExpectIn("\"axis\" is 2", refusal("cumulative", {{"function", function}}, 2));
  }
  for (const char* function : {"values", "indices"}) {
    EXPECT_EQ(refusal("sort", {{"function", function}, {"descending", true}}, 0), "");
    ExpectIn("\"axis\" is 2", refusal("sort", {{"function", function}, {"descending", false}}, 2));
    ExpectIn("has no \"descending\"", refusal("sort", {{"function", function}}, 0));
  }
}

TEST(ConcatTest, JoinsAlongOneAxis) {
  const auto refusal = [](const std::vector<Shape>& inputs, const Shape& out, int axis) {
    return RefusalOfNode("concat", inputs, out, {{"axis", axis}});
  };
  EXPECT_EQ(refusal({{2, 3}}, {2, 3}, 1), "");
  EXPECT_EQ(refusal({{2, 3}, {2, 1}, {2, 4}}, {2, 8}, 1), "");
  EXPECT_EQ(refusal({{1, 3}, {4, 3}}, {5, 3}, 0), "");
  ExpectIn("its output has shape [2, 7], expected [2, 8]", refusal({{2, 3}, {2, 5}}, {2, 7}, 1));
  ExpectIn("input 1 has shape [3, 3], expected [2, 3]", refusal({{2, 3}, {3, 3}}, {2, 6}, 1));
  ExpectIn("input 1 has shape [2], expected", refusal({{2, 3}, {2}}, {2, 4}, 1));
  ExpectIn("input 1 has shape [2, 3, 1], expected", refusal({{2, 3}, {2, 3, 1}}, {2, 6}, 1));
  ExpectIn("\"axis\" is 2", refusal({{2, 3}, {2, 3}}, {2, 6}, 2));
  ExpectIn("\"axis\" is 0", refusal({{}, {}}, {2}, 0));

  PlanBuilder builder;
  const int x = builder.Input("x", {2}), m = builder.Input("m", {2}, "bool");
  builder.Output("y", builder.Node("concat", {m, m}, {4}, {{"axis", 0}}, {}, {}, "bool"));
  EXPECT_EQ(Refusal(builder), "");
  builder.Output("z", builder.Node("concat", {x, m}, {4}, {{"axis", 0}}));
  ExpectIn("input 1 is bool, but input 0 is float32", Refusal(builder));
}

TEST(StridedTest, ReadsOnlyItsInput) {
  const auto refusal = [](const Shape& in, const Shape& out, int64_t offset,
                          const std::vector<int64_t>& strides) {
    return RefusalOfNode("strided", {in}, out, {{"offset", offset}, {"strides", strides}});
  };
  const int64_t most = std::numeric_limits<int64_t>::max();
  const int64_t least = std::numeric_limits<int64_t>::min();
  EXPECT_EQ(refusal({3, 4}, {4, 3}, 0, {1, 4}), "");     // transposed
  EXPECT_EQ(refusal({3, 4}, {3, 4}, 11, {-4, -1}), "");  // flipped
  EXPECT_EQ(refusal({3, 4}, {100, 4}, 8, {0, 1}), "");   // broadcast
  EXPECT_EQ(refusal({3, 4}, {}, 11, {}), "");            // one element
  EXPECT_EQ(refusal({}, {5}, 0, {0}), "");
  EXPECT_EQ(refusal({12}, {1, 1}, 0, {2147483647, -2147483647}), "");  // never taken
  ExpectIn("reads element 12 of its input, which has 12 elements",
           refusal({3, 4}, {3, 4}, 1, {4, 1}));
  ExpectIn("reads element -1 of its input", refusal({3, 4}, {3, 4}, 10, {-4, -1}));
  ExpectIn("reads element 12 of its input", refusal({3, 4}, {}, 12, {}));
  ExpectIn("\"offset\" is -1", refusal({3, 4}, {3, 4}, -1, {4, 1}));
  ExpectIn("\"offset\" is 9223372036854775807", refusal({3, 4}, {3, 4}, most, {4, 1}));
  ExpectIn("has 1 strides, but its output has 2 axes", refusal({3, 4}, {3, 4}, 0, {4}));
  ExpectIn("has the stride 9223372036854775807", refusal({3, 4}, {3, 4}, 0, {most, 1}));
  ExpectIn("has the stride -9223372036854775808", refusal({3, 4}, {3, 4}, 0, {1, least}));
  ExpectIn("reads element", refusal({3, 4}, {3, 715827882}, 0, {0, 2147483647}));
  ExpectIn("reads element -", refusal({3, 4}, {2147483647}, 11, {-2147483647}));
  // Two strides that cancel in the sum: each one must be checked.
  ExpectIn("reads element", refusal({3, 4}, {13, 13}, 0, {1, -1}));

  // Compares every slice of 12 elements with the list of all elements that it reads.
  for (int64_t offset = 0; offset < 13; ++offset) {
    for (int64_t a : {-5, -1, 0, 2, 4}) {
      for (int64_t b : {-3, 0, 1, 6}) {
        bool inside = true;
        for (int64_t i = 0; i < 3; ++i) {
          for (int64_t j = 0; j < 2; ++j) {
            const int64_t place = offset + i * a + j * b;
            inside &= 0 <= place && place < 12;
          }
        }
        EXPECT_EQ(refusal({12}, {3, 2}, offset, {a, b}).empty(), inside)
            << offset << " " << a << " " << b;
      }
    }
  }
}

TEST(ReshapeTest, KeepsTheElements) {
  EXPECT_EQ(RefusalOfNode("reshape", {{2, 6}}, {3, 4}, {}), "");
  EXPECT_EQ(RefusalOfNode("reshape", {{1}}, {}, {}), "");
  ExpectIn("has an output of 11 elements, but an input of 12",
           RefusalOfNode("reshape", {{2, 6}}, {11}, {}));
}

TEST(FeaturesTest, HaveAWeightForEach) {
  EXPECT_EQ(RefusalOfNode("affine", {{2, 3}}, {2, 3}, {}, {{"scale", {3}}, {"offset", {3}}}), "");
  ExpectIn("expected [3]",
           RefusalOfNode("affine", {{2, 3}}, {2, 3}, {}, {{"scale", {2}}, {"offset", {3}}}));
  ExpectIn("at least one axis",
           RefusalOfNode("affine", {{}}, {}, {}, {{"scale", {1}}, {"offset", {1}}}));
  for (const char* function : {"layer", "rms", "unit"}) {
    const Json attributes = {{"function", function}, {"epsilon", 1e-6}};
    EXPECT_EQ(RefusalOfNode("norm", {{2, 3}}, {2, 3}, attributes), "");
    EXPECT_EQ(RefusalOfNode("norm", {{3}}, {3}, attributes, {{"beta", {3}}}), "");
    ExpectIn("expected [3]", RefusalOfNode("norm", {{2, 3}}, {2, 3}, attributes, {{"gamma", {2}}}));
    ExpectIn("at least one axis", RefusalOfNode("norm", {{}}, {}, attributes));
  }
  ExpectIn("a number of at least 0",
           RefusalOfNode("norm", {{3}}, {3}, {{"function", "layer"}, {"epsilon", -1e-6}}));
  EXPECT_EQ(
      RefusalOfNode("batch_norm", {{3}}, {3}, {{"epsilon", 0}}, {{"mean", {3}}, {"variance", {3}}}),
      "");
  ExpectIn("has no weight \"variance\"",
           RefusalOfNode("batch_norm", {{3}}, {3}, {{"epsilon", 0}}, {{"mean", {3}}}));
}

TEST(EmbeddingTest, LooksUpOnlyWhatComesFromAnInput) {
  PlanBuilder builder;
  const int x = builder.Input("x", {2}, "int32");
  const int seen = builder.Node("delay", {x}, {2}, {{"steps", 1}}, {}, {}, "int32");
  const int whole = builder.Node("cast", {builder.Input("f", {2})}, {2}, {}, {}, {}, "int64");
  const int flipped =
      builder.Node("strided", {x}, {2}, {{"offset", 1}, {"strides", {-1}}}, {}, {}, "int32");
  const int shaped = builder.Node("reshape", {flipped}, {2, 1}, {}, {}, {}, "int32");
  const int delayed = builder.Node("reshape", {seen}, {2, 1}, {}, {}, {}, "int32");
  builder.Output("seen", seen);
  builder.Output("whole", whole);
  const auto refusal = [&](int value, const Shape& shape) {
    PlanBuilder with = builder;
    with.Output("y", with.Node("embedding", {value}, shape, {}, {{"table", with.Random({5, 3})}}));
    return Refusal(with);
  };
  EXPECT_EQ(refusal(x, {2, 3}), "");
  EXPECT_EQ(refusal(flipped, {2, 3}), "");
  EXPECT_EQ(refusal(shaped, {2, 1, 3}), "");
  ExpectIn("has indices that another node computes", refusal(seen, {2, 3}));
  ExpectIn("has indices that another node computes", refusal(whole, {2, 3}));
  ExpectIn("has indices that another node computes", refusal(delayed, {2, 1, 3}));
  ExpectIn("has shape [5, 3], expected [5, 4]", refusal(x, {2, 4}));
  ExpectIn("expected [2, 3]", refusal(x, {1, 3}));
  ExpectIn("expected [2, 1]", refusal(x, {}));
}

TEST(EmbeddingTest, HasAtLeastOneRow) {
  PlanBuilder builder;
  const int x = builder.Input("x", {}, "int32");
  builder.Output("y", builder.Node("embedding", {x}, {3}, {}, {{"table", builder.Random({0, 3})}}));
  ExpectIn("has shape [0, 3], expected [1, 3]", Refusal(builder));
}

TEST(PositionalTest, ChecksRowsAndStart) {
  const auto refusal = [](const Shape& rows, int64_t start, const Shape& x = {4}) {
    PlanBuilder builder;
    const int input = builder.Input("x", x);
    TensorBytes starts = {"int64", {}, BytesOf(std::vector<int64_t>{start})};
    builder.Output("y", builder.Node("positional", {input}, x, {},
                                     {{"rows", builder.Random(rows)}, {"start", starts}}));
    return Refusal(builder);
  };
  EXPECT_EQ(refusal({7, 4}, 0), "");
  EXPECT_EQ(refusal({1, 4}, int64_t{1} << 60), "");
  ExpectIn("has shape [0, 4], expected [1, 4]", refusal({0, 4}, 0));
  ExpectIn("has shape [7, 3], expected [7, 4]", refusal({7, 3}, 0));
  ExpectIn("has the start -1", refusal({7, 4}, -1));
  ExpectIn("has the start", refusal({7, 4}, std::numeric_limits<int64_t>::max()));
  ExpectIn("expected 1 axis", refusal({7, 4}, 0, {2, 4}));
}

TEST(WindowTest, HasRowsOfTheNewestSteps) {
  const auto refusal = [](const Shape& in, const Shape& out, int64_t window) {
    return RefusalOfNode("window", {in}, out, {{"window", window}});
  };
  EXPECT_EQ(refusal({3}, {5, 3}, 5), "");
  EXPECT_EQ(refusal({}, {5}, 5), "");
  EXPECT_EQ(refusal({2, 3}, {1, 2, 3}, 1), "");
  ExpectIn("expected [5, 3]", refusal({3}, {4, 3}, 5));
  ExpectIn("\"window\" is 0", refusal({3}, {1, 3}, 0));
  EXPECT_EQ(RefusalOfNode("zero_untaken", {{5}}, {5}, {}), "");
  ExpectIn("at least one axis", RefusalOfNode("zero_untaken", {{}}, {}, {}));
}

TEST(PresentTest, GivesOneAxis) {
  const Json attributes = {{"rows", 2}, {"first", -3}};
  EXPECT_EQ(RefusalOfNode("present", {}, {5}, attributes), "");
  ExpectIn("expected one axis", RefusalOfNode("present", {}, {5, 1}, attributes));
  ExpectIn("\"rows\" is 0", RefusalOfNode("present", {}, {5}, {{"rows", 0}, {"first", 0}}));
}

TEST(RecurrentTest, ChecksUnitsAndGates) {
  const auto refusal = [](const char* function, const Shape& in, const Shape& out,
                          const Shape& kernel, const Shape& bias) {
    std::vector<std::pair<std::string, Shape>> weights = {{"kernel", kernel}};
    if (!bias.empty()) weights.push_back({"bias", bias});
    const Json attributes = {{"function", function},
                             {"activation", "tanh"},
                             {"gate", "sigmoid"},
                             {"goes_on", true},
                             {"first", -2}};
    return RefusalOfNode("recurrent", {in}, out, attributes, weights);
  };
  EXPECT_EQ(refusal("lstm", {20}, {5}, {5, 20}, {20}), "");
  EXPECT_EQ(refusal("gru", {3, 15}, {3, 5}, {5, 15}, {}), "");
  EXPECT_EQ(refusal("simple", {5}, {5}, {5, 5}, {5}), "");
  ExpectIn("expected [20]", refusal("lstm", {15}, {5}, {5, 20}, {}));
  ExpectIn("expected [3, 15]", refusal("gru", {2, 15}, {3, 5}, {5, 15}, {}));
  ExpectIn("expected [5, 15]", refusal("gru", {15}, {5}, {15, 5}, {}));
  ExpectIn("adds to its input", refusal("gru_reset_before", {15}, {5}, {5, 15}, {15}));
  ExpectIn("at least one axis", refusal("simple", {}, {}, {1, 1}, {}));
}

TEST(AttentionTest, ChecksHeadsAndColumns) {
  const auto refusal = [](const Json& changes, int64_t qk = 6, int64_t key = 6, int64_t value = 9,
                          int64_t out = 9) {
    Json attributes = {{"heads", 3},      {"window", 4},      {"first_column", 0},
                       {"end_column", 4}, {"query_delay", 0}, {"scale", 0.5}};
    attributes.update(changes);
    return RefusalOfNode("attention", {{qk}, {key}, {value}}, {out}, attributes);
  };
  const Json none = Json::object();
  EXPECT_EQ(refusal(none), "");
  EXPECT_EQ(refusal({{"first_column", 3}}), "");
  EXPECT_EQ(refusal({{"end_column", 1}}), "");
  EXPECT_EQ(refusal({{"query_delay", 3}}), "");
  EXPECT_EQ(refusal({{"scale", -2}}), "");
  ExpectIn("attends to columns 4 to 4 - 1", refusal({{"first_column", 4}}));
  ExpectIn("attends to columns 2 to 2 - 1", refusal({{"first_column", 2}, {"end_column", 2}}));
  ExpectIn("attends to columns 0 to 5 - 1 of a window of 4", refusal({{"end_column", 5}}));
  ExpectIn("\"end_column\" is 0", refusal({{"end_column", 0}}));
  ExpectIn("\"first_column\" is -1", refusal({{"first_column", -1}}));
  ExpectIn("query_delay of 4, which is not in its window of 4", refusal({{"query_delay", 4}}));
  ExpectIn("\"heads\" is 0", refusal({{"heads", 0}}));
  ExpectIn("do not divide the query's 6", refusal({{"heads", 4}}));
  ExpectIn("do not divide the value's 9", refusal({{"heads", 2}}));
  ExpectIn("do not divide the key's 7", refusal(none, 6, 7));
  ExpectIn("a query of 6 elements and a key of 9", refusal(none, 6, 9));
  ExpectIn("expected [9]", refusal(none, 6, 6, 9, 6));
  EXPECT_EQ(refusal({{"heads", 6}, {"key_heads", 3}}, 12, 6, 9, 18), "");
  EXPECT_EQ(refusal({{"soft_cap", 2}}), "");
  ExpectIn("expected [18]", refusal({{"heads", 6}, {"key_heads", 3}}, 12, 6, 9, 9));
  ExpectIn("\"key_heads\" is 0", refusal({{"key_heads", 0}}));
  ExpectIn("3 heads of queries and 2 of keys", refusal({{"key_heads", 2}}, 6, 4, 4, 6));
  ExpectIn("do not divide the key's 7", refusal({{"key_heads", 2}}, 6, 7));
  ExpectIn("a query of 6 elements and a key of 6", refusal({{"key_heads", 1}}, 6, 6, 9, 27));
  ExpectIn("has a soft_cap of 0", refusal({{"soft_cap", 0}}));
  ExpectIn("\"soft_cap\" is -1", refusal({{"soft_cap", -1}}));
  ExpectIn("expected 1 axis", RefusalOfNode("attention", {{6}, {1, 6}, {9}}, {9},
                                            {{"heads", 3},
                                             {"window", 4},
                                             {"first_column", 0},
                                             {"end_column", 4},
                                             {"query_delay", 0},
                                             {"scale", 0.5}}));
}

TEST(AttentionTest, ChecksItsBiasAndSink) {
  const auto refusal = [](const std::string& name, const Shape& shape) {
    PlanBuilder b;
    const int x = b.Input("x", {4});
    b.Output("y", b.Node("attention", {x, x, x}, {4},
                         {{"heads", 2},
                          {"window", 3},
                          {"first_column", 0},
                          {"end_column", 3},
                          {"query_delay", 0},
                          {"scale", 0.5}},
                         {{name, b.Random(shape)}}));
    return Refusal(b);
  };
  EXPECT_EQ(refusal("bias", {2, 3}), "");
  EXPECT_EQ(refusal("sink", {2}), "");
  ExpectIn("expected [2, 3]", refusal("bias", {3, 2}));
  ExpectIn("expected [2]", refusal("sink", {1}));
}

// A plan of an earlier version has the fingerprint that it had.
TEST(AttentionTest, WhatIsLeftOutIsNotInTheFingerprint) {
  const auto attributes = [](const Json& changes) {
    PlanBuilder b;
    const int x = b.Input("x", {4});
    b.Output("y", b.Attention(x, x, x, 2, 3, changes));
    return b.File()->plan().nodes[0].attributes;
  };
  EXPECT_EQ(attributes(Json::object()).count("key_heads"), 0u);
  EXPECT_EQ(attributes(Json::object()).count("soft_cap"), 0u);
  EXPECT_EQ(attributes({{"soft_cap", 2}}).count("soft_cap"), 1u);
  EXPECT_EQ(attributes({{"key_heads", 2}}).count("key_heads"), 1u);
}

TEST(RotaryTest, ChecksItsAngles) {
  const auto refusal = [](const Shape& x, const Shape& turns, const Shape& angles) {
    PlanBuilder b;
    const int in = b.Input("x", x);
    const std::vector<double> some(Elements(turns), 1e18);
    const int of =
        b.Node("rotary_angles", {}, angles, {}, {{"turns", b.Weight(turns, some, "int64")}});
    b.Output("y", b.Node("rotary", {in, of}, x, {{"interleaved", false}}));
    return Refusal(b);
  };
  EXPECT_EQ(refusal({3, 4}, {2}, {2, 2}), "");
  EXPECT_EQ(refusal({7}, {3}, {2, 3}), "");
  ExpectIn("expected [2, 2]", refusal({3, 4}, {2}, {2, 3}));
  ExpectIn("expected [2]", refusal({3, 4}, {2, 1}, {2, 2}));
  ExpectIn("turns 2 pairs of heads of 3 elements", refusal({4, 3}, {2}, {2, 2}));
  ExpectIn("at least one axis", refusal({}, {1}, {2, 1}));
}

TEST(RetroactiveAttentionTest, ChecksHeadsAndWindow) {
  const auto refusal = [](const Json& changes, const std::vector<Shape>& inputs, const Shape& out) {
    Json attributes = {{"heads", 3}, {"window", 4}, {"scale", 0.5}, {"algorithm", "update"}};
    attributes.update(changes);
    return RefusalOfNode("retroactive_attention", inputs, out, attributes);
  };
  EXPECT_EQ(refusal(Json::object(), {{6}, {6}, {9}}, {4, 9}), "");
  EXPECT_EQ(refusal({{"algorithm", "recompute"}}, {{6}, {6}, {9}}, {4, 9}), "");
  ExpectIn("\"algorithm\" is \"fast\", expected one of \"auto\", \"update\", \"recompute\"",
           refusal({{"algorithm", "fast"}}, {{6}, {6}, {9}}, {4, 9}));
  ExpectIn("expected [5, 9]", refusal({{"window", 5}}, {{6}, {6}, {9}}, {4, 9}));
  ExpectIn("expected [4, 9]", refusal(Json::object(), {{6}, {6}, {9}}, {9}));
  ExpectIn("do not divide the value's 8", refusal(Json::object(), {{6}, {6}, {8}}, {4, 8}));
  ExpectIn("expected 1 axis", refusal(Json::object(), {{1, 6}, {6}, {9}}, {4, 9}));
}

TEST(WindowAttentionTest, ChecksRowsAndHeads) {
  const auto refusal = [](const Json& changes, const std::vector<Shape>& inputs, const Shape& out) {
    Json attributes = {{"heads", 3}, {"scale", 0.5}, {"band", 0}, {"causal", false}};
    attributes.update(changes);
    return RefusalOfNode("window_attention", inputs, out, attributes);
  };
  EXPECT_EQ(refusal(Json::object(), {{1, 6}, {5, 6}, {5, 9}}, {1, 9}), "");
  EXPECT_EQ(refusal({{"band", 100}}, {{5, 6}, {5, 6}, {5, 9}}, {5, 9}), "");
  ExpectIn("\"band\" is -1", refusal({{"band", -1}}, {{1, 6}, {5, 6}, {5, 9}}, {1, 9}));
  ExpectIn("has 6 rows of queries, more than the 5 rows of its window",
           refusal({{"causal", true}}, {{6, 6}, {5, 6}, {5, 9}}, {6, 9}));
  EXPECT_EQ(refusal({{"rows", 2}, {"first", -3}}, {{6, 6}, {5, 6}, {5, 9}}, {6, 9}), "");
  ExpectIn("\"rows\" is 0", refusal({{"rows", 0}}, {{1, 6}, {5, 6}, {5, 9}}, {1, 9}));
  ExpectIn("input 2 has shape [4, 9], expected [5, 9]",
           refusal(Json::object(), {{1, 6}, {5, 6}, {4, 9}}, {1, 9}));
  ExpectIn("expected [1, 9]", refusal(Json::object(), {{1, 6}, {5, 6}, {5, 9}}, {1, 6}));
  ExpectIn("a query of 6 elements and a key of 3",
           refusal(Json::object(), {{1, 6}, {5, 3}, {5, 9}}, {1, 9}));
  ExpectIn("expected 2 axes", refusal(Json::object(), {{6}, {5, 6}, {5, 9}}, {1, 9}));
}

TEST(MaskTest, HasOneElement) {
  PlanBuilder builder;
  const int x = builder.Input("x", {3});
  const int m = builder.Input("m", {1}, "bool"), n = builder.Input("n", {3}, "bool");
  const auto refusal = [&](const std::string& op, const std::vector<int>& inputs,
                           const Shape& shape, const std::string& dtype,
                           const Json& attributes = {}) {
    PlanBuilder with = builder;
    with.Output("y", with.Node(op, inputs, shape, attributes, {}, {}, dtype));
    return Refusal(with);
  };
  EXPECT_EQ(refusal("masked", {x, m}, {3}, ""), "");
  ExpectIn("input 1 has shape [3], expected [1]", refusal("masked", {x, n}, {3}, ""));
  EXPECT_EQ(refusal("mask_and", {m, m}, {1}, "bool"), "");
  ExpectIn("input 0 has shape [3], expected [1]", refusal("mask_and", {n, m}, {1}, "bool"));
  ExpectIn("input 1 has shape [3], expected [1]", refusal("mask_and", {m, n}, {1}, "bool"));
  const Json attributes = {{"value", -1}, {"any", false}};
  EXPECT_EQ(refusal("not_equal", {x}, {1}, "bool", attributes), "");
  EXPECT_EQ(refusal("not_equal", {n}, {1}, "bool", attributes), "");
  ExpectIn("expected [1]", refusal("not_equal", {x}, {3}, "bool", attributes));
}

TEST(CastTest, GoesFromAnyToAny) {
  const std::vector<std::string> dtypes = {"float32", "int32", "int64", "bool"};
  for (const std::string& from : dtypes) {
    for (const std::string& to : dtypes) {
      PlanBuilder builder;
      const int x = builder.Input("x", {2, 3}, from);
      builder.Output("y", builder.Node("cast", {x}, {2, 3}, {}, {}, {}, to));
      EXPECT_EQ(Refusal(builder), "");
    }
  }
  ExpectIn("expected [2]", RefusalOfNode("cast", {{2}}, {1, 2}, {}));
}

TEST(DTypeTest, HasNamesAndSizes) {
  const std::vector<std::pair<std::string, int64_t>> expected = {
      {"float32", 4}, {"float64", 8}, {"bfloat16", 2}, {"float16", 2},
      {"int32", 4},   {"int64", 8},   {"bool", 1}};
  for (const auto& [name, bytes] : expected) {
    EXPECT_EQ(NameOf(DTypeOf(name)), name);
    EXPECT_EQ(SizeOf(DTypeOf(name)), bytes);
  }
  EXPECT_THROW(DTypeOf("float8"), Error);
}

}  // namespace
}  // namespace continual_transformers
