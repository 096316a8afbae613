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
#include <vector>

#include "cc/session/error.h"
#include "cc/session/fingerprint.h"
#include "cc/session/plan_ops.h"
#include "gtest/gtest.h"
#include "tests/cc/model_file_case.h"
#include "tests/cc/refusals.h"

namespace continual_transformers {
namespace {

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

}  // namespace
}  // namespace continual_transformers
