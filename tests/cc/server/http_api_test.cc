#include "cc/server/http_api.h"

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "cc/server/history.h"
#include "cc/server/http_infer.h"
#include "cc/server/stream_copy.h"
#include "tests/cc/server/http_case.h"

namespace continual_transformers::server {
namespace {

constexpr char kInfer[] = "/v2/models/m/infer";

Json InferOf(const std::string& stream, const Json& data, const Json& shape = {3}) {
  return {{"parameters", {{"sequence_id", stream}}},
          {"inputs", {{{"name", "x"}, {"datatype", "FP32"}, {"shape", shape}, {"data", data}}}}};
}

Json BodyOf(const HttpResponse& response) {
  const Json body = Json::parse(response.body, nullptr, false);
  EXPECT_FALSE(body.is_discarded()) << response.body;
  return body;
}

// Returns the sentence of a refusal.
std::string ErrorOf(const HttpResponse& response, int status, const std::string& reason) {
  EXPECT_EQ(response.status, status) << response.body;
  const Json body = BodyOf(response);
  EXPECT_EQ(body.value("reason", ""), reason);
  return body.value("error", "");
}

void ExpectIn(const std::string& part, const std::string& text) {
  EXPECT_NE(text.find(part), std::string::npos)
      << "expected \"" << part << "\" in \"" << text << "\"";
}

class HttpApiTest : public ::testing::Test {
 protected:
  OneModel one_;
  HttpApi api_{{}, {&one_.repository}};
};

TEST_F(HttpApiTest, StepsOfAStream) {
  Json request = InferOf("a", {1, 2.5, -3});
  request["id"] = "seven \"7\"";
  Json answer = BodyOf(Post(&api_, kInfer, request.dump()));
  EXPECT_EQ(answer["model_name"], "m");
  EXPECT_EQ(answer["id"], "seven \"7\"");
  EXPECT_EQ(answer["parameters"]["next_step"], 1);
  EXPECT_EQ(answer["outputs"][0]["data"], Json({0, 0, 0}));
  // Nested data, and several steps.
  answer = BodyOf(Post(&api_, kInfer, InferOf("a", {{{4, 5, 6}, {7, 8, 9}}}, {1, 2, 3}).dump()));
  EXPECT_EQ(answer["outputs"][0]["shape"], Json({1, 2, 3}));
  EXPECT_EQ(answer["outputs"][0]["data"], Json({1, 2.5, -3, 4, 5, 6}));
  EXPECT_EQ(answer["parameters"]["next_step"], 3);
}

TEST_F(HttpApiTest, NumbersThatJsonLacks) {
  Post(&api_, kInfer, InferOf("a", {"NaN", "Infinity", "-Infinity"}).dump());
  const Json answer = BodyOf(Post(&api_, kInfer, InferOf("a", {1, 2, 3}).dump()));
  EXPECT_EQ(answer["outputs"][0]["data"], Json({"NaN", "Infinity", "-Infinity"}));
}

TEST_F(HttpApiTest, FloatsAreTheSameBitsAgain) {
  std::mt19937 random(3);
  for (int i = 0; i < 200; ++i) {
    std::vector<float> sent(3);
    for (float& x : sent) {
      const auto bits = static_cast<uint32_t>(random());
      std::memcpy(&x, &bits, sizeof(x));
      if (!std::isfinite(x)) x = std::numeric_limits<float>::denorm_min();
    }
    Post(&api_, kInfer, InferOf("a", sent).dump());
    const Json answer = BodyOf(Post(&api_, kInfer, InferOf("a", sent).dump()));
    EXPECT_EQ(answer["outputs"][0]["data"].get<std::vector<float>>(), sent);
  }
}

TEST_F(HttpApiTest, BinaryTensors) {
  const std::string bytes = BytesOf(std::vector<float>{1, 2, 3});
  const std::string json =
      R"({"parameters":{"sequence_id":9,"binary_data_output":true},"inputs":[)"
      R"({"name":"x","datatype":"FP32","shape":[1,3],"parameters":{"binary_data_size":12}}]})";
  Post(&api_, kInfer, json + bytes, std::to_string(json.size()));
  const HttpResponse response = Post(&api_, kInfer, json + bytes, std::to_string(json.size()));
  ASSERT_EQ(response.status, 200) << response.body;
  EXPECT_EQ(BodyOf(response)["outputs"][0]["parameters"]["binary_data_size"], 12);
  ASSERT_EQ(response.tensors.size(), 1U);
  EXPECT_EQ(response.tensors[0], bytes);
  ASSERT_EQ(response.headers.size(), 1U);
  EXPECT_EQ(response.headers[0].first, "Inference-Header-Content-Length");
  EXPECT_EQ(response.headers[0].second, std::to_string(response.body.size()));
  // The number 9 and the string "9" are the same stream.
  EXPECT_EQ(BodyOf(Post(&api_, kInfer, InferOf("9", {0, 0, 0}).dump()))["parameters"]["next_step"],
            3);
}

TEST_F(HttpApiTest, ManyStreams) {
  Json request = InferOf("a", {1, 1, 1, 2, 2, 2}, {2, 3});
  request.erase("parameters");
  request["inputs"].push_back(
      {{"name", "streams"}, {"datatype", "BYTES"}, {"shape", {2}}, {"data", {"a", "b"}}});
  request["inputs"].push_back(
      {{"name", "step"}, {"datatype", "INT64"}, {"shape", {2}}, {"data", {0, 0}}});
  EXPECT_EQ(Post(&api_, kInfer, request.dump()).status, 200);
  // The same again is answered again.
  EXPECT_EQ(Post(&api_, kInfer, request.dump()).status, 200);
  request["inputs"][2]["data"] = {1, 3};
  const HttpResponse refused = Post(&api_, kInfer, request.dump());
  ErrorOf(refused, 409, "out_of_step");
  EXPECT_EQ(BodyOf(refused)["expected"], Json({{{"stream", "b"}, {"step", 1}}}));
  // No stream has moved.
  request["inputs"][2]["data"] = {1, 1};
  const Json answer = BodyOf(Post(&api_, kInfer, request.dump()));
  EXPECT_EQ(answer["outputs"][0]["data"], Json({1, 1, 1, 2, 2, 2}));
  EXPECT_FALSE(answer.contains("parameters"));
  // The short names, as over gRPC.
  request["inputs"][2]["data"] = {0, 0};
  request["parameters"] = {{"start", true}, {"end", true}};
  EXPECT_EQ(BodyOf(Post(&api_, kInfer, request.dump()))["outputs"][0]["data"],
            Json({0, 0, 0, 0, 0, 0}));
  EXPECT_EQ(one_.repository.Find("m")->statistics().open_streams, 0);
  request["parameters"] = {{"end", 1}};
  ExpectIn("the parameter end",
           ErrorOf(Post(&api_, kInfer, request.dump()), 400, "invalid_argument"));
}

TEST_F(HttpApiTest, WithoutAStep) {
  Json request = InferOf("a", {1, 2, 3});
  Post(&api_, kInfer, request.dump());
  Post(&api_, kInfer, request.dump());
  Json end = InferOf("a", Json::array(), {0, 3});
  Json answer = BodyOf(Post(&api_, kInfer, end.dump()));
  EXPECT_EQ(answer["outputs"][0]["shape"], Json({0, 3}));
  EXPECT_FALSE(answer.contains("parameters"));  // It asked nothing.
  end["parameters"]["sequence_end"] = true;
  end["parameters"]["step"] = 1;
  ExpectIn("expects step 2, got step 1",
           ErrorOf(Post(&api_, kInfer, end.dump()), 409, "out_of_step"));
  end["parameters"]["step"] = 2;
  for (int i = 0; i < 2; ++i) {
    answer = BodyOf(Post(&api_, kInfer, end.dump()));
    EXPECT_EQ(answer["outputs"][0]["shape"], Json({0, 3}));
    EXPECT_EQ(answer["outputs"][0]["data"], Json::array());
    EXPECT_EQ(answer["parameters"]["next_step"], 2);
  }
  EXPECT_EQ(one_.repository.Find("m")->statistics().open_streams, 0);
}

TEST(HttpApi, AnswersAndStepsAreLimited) {
  OneModel one;
  HttpApi api({}, {&one.repository}, {96, 10});  // 8 rows of 3 floats
  const auto rows = [](int64_t streams, int64_t steps) {
    Json names = Json::array(), data = Json::array();
    for (int64_t i = 0; i < streams; ++i) names.push_back("s" + std::to_string(i));
    for (int64_t i = 0; i < streams * steps * 3; ++i) data.push_back(i);
    return Json{
        {"inputs",
         {{{"name", "x"}, {"datatype", "FP32"}, {"shape", {streams, steps, 3}}, {"data", data}},
          {{"name", "streams"}, {"datatype", "BYTES"}, {"shape", {streams}}, {"data", names}}}}}
        .dump();
  };
  const std::string path = "/v2/models/m/infer";
  for (const auto& [streams, steps] :
       std::vector<std::pair<int64_t, int64_t>>{{3, 3}, {1, 9}, {9, 1}, {2, 5}}) {
    ExpectIn("--max-message-mb",
             ErrorOf(Post(&api, path, rows(streams, steps)), 400, "invalid_argument"));
  }
  for (const auto& [streams, steps] :
       std::vector<std::pair<int64_t, int64_t>>{{1, 11}, {11, 1}, {4, 3}}) {
    ExpectIn("--max-steps",
             ErrorOf(Post(&api, path, rows(streams, steps)), 400, "invalid_argument"));
  }
  // No stream has moved by a request that was refused.
  EXPECT_EQ(one.repository.Find("m")->statistics().opened, 0);
  EXPECT_EQ(Post(&api, path, rows(2, 4)).status, 200);
  EXPECT_EQ(Post(&api, path, rows(8, 1)).status, 200);
  EXPECT_EQ(Post(&api, path, rows(0, 1000)).status, 200);
  EXPECT_EQ(Post(&api, path, rows(2, 0)).status, 200);
}

TEST(HttpApi, EveryDatatype) {
  const PlanBuilder builder = EveryOp();
  const size_t count = builder.plan["outputs"].size();
  OneModel one(builder);
  HttpApi api({}, {&one.repository});
  Json request = {
      {"parameters", {{"sequence_id", "a"}}},
      {"inputs",
       {{{"name", "x"}, {"datatype", "FP32"}, {"shape", {6}}, {"data", {1, 2, 3, 4, 5, 6}}},
        {{"name", "tokens"}, {"datatype", "INT32"}, {"shape", {2}}, {"data", {1, 2}}},
        {{"name", "id"}, {"datatype", "INT64"}, {"shape", Json::array()}, {"data", {2}}}}}};
  const Json answer = BodyOf(Post(&api, kInfer, request.dump()));
  ASSERT_EQ(answer["outputs"].size(), count);
  // The same as bytes.
  request["parameters"] = {{"sequence_id", "b"}, {"binary_data_output", true}};
  const HttpResponse binary = Post(&api, kInfer, request.dump());
  ASSERT_EQ(binary.tensors.size(), count);
  const auto floats = answer["outputs"][0]["data"].get<std::vector<float>>();
  EXPECT_EQ(BytesOf(floats), binary.tensors[0]);
  const auto whole = answer["outputs"][2]["data"].get<std::vector<int32_t>>();
  EXPECT_EQ(answer["outputs"][2]["datatype"], "INT32");
  EXPECT_EQ(BytesOf(whole), binary.tensors[2]);
  EXPECT_EQ(answer["outputs"][3]["datatype"], "BOOL");
  const auto mask = answer["outputs"][3]["data"].get<std::vector<bool>>();
  EXPECT_EQ(std::string(mask.begin(), mask.end()), binary.tensors[3]);
  // Some outputs only, each in its own form.
  request["outputs"] = {{{"name", "mask"}},
                        {{"name", "whole"}, {"parameters", {{"binary_data", false}}}}};
  const HttpResponse some = Post(&api, kInfer, request.dump());
  const Json outputs = BodyOf(some)["outputs"];
  EXPECT_EQ(outputs[0]["parameters"]["binary_data_size"], 1);
  EXPECT_TRUE(outputs[1].contains("data"));
  EXPECT_EQ(some.tensors.size(), 1U);

  const auto refused = [&](int input, const Json& data) {
    Json changed = request;
    changed["inputs"][input]["data"] = data;
    return ErrorOf(Post(&api, kInfer, changed.dump()), 400, "invalid_argument");
  };
  ExpectIn("2147483648, which is no INT32", refused(1, {1, 2147483648}));
  ExpectIn("-2147483649, which is no INT32", refused(1, {1, -2147483649}));
  ExpectIn("1.0, which is no INT32", refused(1, {1, 1.0}));
  ExpectIn("\"1\", which is no INT32", refused(1, {1, "1"}));
  ExpectIn("true, which is no INT32", refused(1, {1, true}));
  ExpectIn("18446744073709551615, which is no INT64", refused(2, {UINT64_MAX}));
  ExpectIn("3.5e+38, which is no FP32", refused(0, {1, 2, 3, 4, 5, 3.5e38}));
  ExpectIn("null, which is no FP32", refused(0, {1, 2, 3, 4, 5, nullptr}));
}

TEST_F(HttpApiTest, RefusesBodies) {
  const auto refused = [this](const std::string& body, const std::string& length = "") {
    return ErrorOf(Post(&api_, kInfer, body, length), 400, "invalid_argument");
  };
  const auto changed = [&](const std::string& pointer, const Json& value) {
    Json request = InferOf("a", {1, 2, 3});
    request[Json::json_pointer(pointer)] = value;
    return refused(request.dump());
  };
  ExpectIn("not JSON at byte 1", refused(""));
  ExpectIn("not JSON", refused(R"({"inputs": [NaN]})"));
  ExpectIn("a list, expected a JSON object", refused("[]"));
  ExpectIn("no \"inputs\"", refused("{}"));
  ExpectIn("number that is too large", refused(R"({"id": 1e999})"));
  ExpectIn("not JSON", refused("{\"id\": \"\xff\"}"));
  ExpectIn("an object, expected a list", changed("/inputs", Json::object()));
  ExpectIn("expected an object", changed("/inputs/0", 3));
  ExpectIn("expected a string", changed("/inputs/0/name", 3));
  ExpectIn("has no input \"z\"", changed("/inputs/0/name", "z"));
  ExpectIn("datatype \"FP8\"", changed("/inputs/0/datatype", "FP8"));
  ExpectIn("no form in JSON", changed("/inputs/0/datatype", "FP16"));
  ExpectIn("expected FP32", changed("/inputs/0/datatype", "FP64"));
  ExpectIn("expected a whole number", changed("/inputs/0/shape", {1.5}));
  ExpectIn("3 elements of data, and its shape has 4", changed("/inputs/0/shape", {4}));
  ExpectIn("cannot have the shape", changed("/inputs/0/shape", {-3}));
  ExpectIn("cannot have the shape", changed("/inputs/0/shape", {int64_t{1} << 62, 16}));
  ExpectIn("33 axes", changed("/inputs/0/shape", std::vector<int>(33, 1)));
  ExpectIn("not nested as its", changed("/inputs/0/data", {{1, 2}, {3}}));
  ExpectIn("not nested as its", changed("/inputs/0/data", {{{1, 2, 3}}}));
  ExpectIn("a list, which is no FP32", changed("/inputs/0/data", {1, {2}, 3}));
  ExpectIn("has both", changed("/inputs/0/parameters", {{"binary_data_size", 0}}));
  ExpectIn("sequence_id", changed("/parameters/sequence_id", 1.5));
  ExpectIn("which stream", changed("/parameters/sequence_id", 0));
  ExpectIn("which stream", changed("/parameters/sequence_id", ""));
  ExpectIn("expected true or false", changed("/parameters/sequence_start", 1));
  ExpectIn("expected a whole number", changed("/parameters/step", "1"));
  ExpectIn("expected 0 or more", changed("/parameters/step", -1));
  ExpectIn("\"id\" is 3", changed("/id", 3));
  ExpectIn("no output \"z\"", changed("/outputs", {{{"name", "z"}}}));

  const std::string json =
      R"({"parameters":{"sequence_id":9},"inputs":[)"
      R"({"name":"x","datatype":"FP32","shape":[3],"parameters":{"binary_data_size":12}}]})";
  const std::string length = std::to_string(json.size());
  ExpectIn("11 bytes are left behind the JSON", refused(json + std::string(11, 0), length));
  ExpectIn("1 bytes are left", refused(json + std::string(13, 0), length));
  ExpectIn("Inference-Header-Content-Length", refused(json, "999"));
  ExpectIn("Inference-Header-Content-Length", refused(json, "-1"));
  ExpectIn("Inference-Header-Content-Length", refused(json, "12x"));
  ExpectIn("bytes of JSON", refused(std::string(kMostJsonBytes + 1, ' ')));
  const std::string named = R"({"inputs":[{"name":"streams","datatype":"BYTES","shape":[1],)"
                            R"("parameters":{"binary_data_size":5}}]})";
  ExpectIn("cut off", refused(named + std::string("\x09\0\0\0a", 5), std::to_string(named.size())));
  // Nothing has moved, and everything was counted.
  size_t open = 0;
  const auto model = one_.repository.Find("m");
  model->ListStreams(10, false, &open);
  EXPECT_EQ(open, 0U);
  EXPECT_GE(model->statistics().refused[static_cast<int>(Reason::kInvalidArgument)], 30);

  Json shared = InferOf("a", {1, 2, 3});
  shared["inputs"][0]["parameters"]["shared_memory_region"] = "r";
  ErrorOf(Post(&api_, kInfer, shared.dump()), 501, "unsupported");
}

// The lists are deeper than any stack could be if they were read by recursion.
TEST_F(HttpApiTest, RefusesDeepJson) {
  const std::string deep(1 << 20, '[');
  ErrorOf(Post(&api_, kInfer, deep), 400, "invalid_argument");
  ErrorOf(Post(&api_, kInfer,
               R"({"inputs":[{"name":"x","datatype":"FP32","shape":[3],"data":)" + deep +
                   std::string(1 << 20, ']') + "}]}"),
          400, "invalid_argument");
}

TEST_F(HttpApiTest, RandomChangesAreAnswered) {
  const std::string json =
      R"({"parameters":{"sequence_id":"a","step":0},"inputs":[{"name":"x","datatype":"FP32",)"
      R"("shape":[1,3],"parameters":{"binary_data_size":12}}],"outputs":[{"name":"y"}]})";
  const std::string body = json + BytesOf(std::vector<float>{1, 2, 3});
  std::mt19937 random(5);
  std::set<int> statuses;
  for (int i = 0; i < 20000; ++i) {
    std::string changed = body;
    std::string length = std::to_string(json.size());
    for (uint32_t k = random() % 3 + 1; k > 0; --k) {
      const size_t at = random() % changed.size();
      switch (random() % 4) {
        case 0:
          changed[at] = static_cast<char>(random());
          break;
        case 1:
          changed.erase(at, random() % 4);
          break;
        case 2:
          changed.insert(at, 1, "[]{},:\"0919.-e"[random() % 14]);
          break;
        default:
          length = std::to_string(random() % (2 * body.size()));
      }
      if (changed.empty()) changed = " ";
    }
    statuses.insert(Post(&api_, kInfer, changed, length).status);
  }
  EXPECT_TRUE(statuses.count(400) == 1 && statuses.count(200) == 1);
  EXPECT_EQ(statuses.count(500), 0U);
}

TEST_F(HttpApiTest, DescribesTheModel) {
  EXPECT_EQ(BodyOf(Get(&api_, "/v2/models/m"))["inputs"][0]["shape"], Json({-1, 3}));
  EXPECT_EQ(Get(&api_, "/v2/models/m/versions/1/ready").status, 200);
  const Json config = BodyOf(Get(&api_, "/v2/models/m/config"));
  EXPECT_EQ(config["input"][0]["dims"], Json({3}));
  EXPECT_TRUE(config["max_batch_size"].is_number());
  EXPECT_TRUE(config["sequence_batching"].contains("oldest"));
  Post(&api_, kInfer, InferOf("a", {1, 2, 3}).dump());
  for (const char* const path : {"/v2/models/m/stats", "/v2/models/stats"}) {
    const Json statistics = BodyOf(Get(&api_, path))["model_stats"][0];
    EXPECT_EQ(statistics["inference_stats"]["success"]["count"], 1);
  }
  ErrorOf(Get(&api_, "/v2/models/n"), 404, "not_found");
  ErrorOf(Get(&api_, "/v2/models/m/versions/2"), 404, "not_found");
  ErrorOf(Get(&api_, "/v2/models/m/nothing"), 404, "not_found");
  ErrorOf(Get(&api_, "/v2/models/%zz"), 400, "invalid_argument");
  ErrorOf(Get(&api_, kInfer), 405, "unsupported");
}

TEST_F(HttpApiTest, LoadsAndUnloads) {
  EXPECT_EQ(Post(&api_, "/v2/repository/models/m/unload", "{}").status, 200);
  EXPECT_EQ(BodyOf(Post(&api_, "/v2/repository/index", ""))[0]["state"], "UNAVAILABLE");
  EXPECT_EQ(BodyOf(Post(&api_, "/v2/repository/index", R"({"ready":true})")), Json::array());
  EXPECT_EQ(Get(&api_, "/v2/models/m/ready").status, 400);
  ErrorOf(Post(&api_, kInfer, InferOf("a", {1, 2, 3}).dump()), 503, "unavailable");
  EXPECT_EQ(Post(&api_, "/v2/repository/models/m/load", "").status, 200);
  EXPECT_EQ(Get(&api_, "/v2/models/m/ready").status, 200);
  ErrorOf(Post(&api_, "/v2/repository/models/n/load", ""), 404, "not_found");
  ErrorOf(Post(&api_, "/v2/repository/models/m/load", R"({"parameters":{"config":"{}"}})"), 501,
          "unsupported");
}

// A parsed text needs many times its size.
TEST_F(HttpApiTest, EveryJsonIsLimited) {
  const std::string large = R"({"a":")" + std::string(kMostJsonBytes, 'a') + R"("})";
  for (const char* const path :
       {"/v2/models/m/infer", "/v2/repository/index", "/v2/repository/models/m/load"}) {
    ExpectIn("bytes of JSON", ErrorOf(Post(&api_, path, large), 400, "invalid_argument"));
    for (const char* const body : {"[]", "{", "1e999"}) {
      ErrorOf(Post(&api_, path, body), 400, "invalid_argument");
    }
  }
}

TEST_F(HttpApiTest, WithoutATokenTheOperatorIsUnknown) {
  ExpectIn("--token-file", ErrorOf(Get(&api_, "/v2/models/m/streams"), 403, "unauthenticated"));
  ErrorOf(Get(&api_, "/v2/models/m/versions/1/streams/a"), 403, "unauthenticated");
}

TEST_F(HttpApiTest, RefusesPagesOfOtherServersAndCompressedBodies) {
  HttpRequest request;
  request.method = "POST";
  request.target = "/v2/repository/models/m/unload";
  request.host = "127.0.0.1:8000";
  request.origin = "http://elsewhere.example";
  ErrorOf(Call(&api_, request), 403, "unauthenticated");
  request.origin = "null";
  ErrorOf(Call(&api_, request), 403, "unauthenticated");
  EXPECT_EQ(Get(&api_, "/v2/models/m/ready").status, 200);
  request.origin = "http://127.0.0.1:8000";
  EXPECT_EQ(Call(&api_, request).status, 200);
  request.content_encoding = "gzip";
  ErrorOf(Call(&api_, request), 415, "unsupported");
}

// The owner of a name can let it lead to this machine, so that a browser takes this server for the
// server of the owner's page.
TEST(HttpApi, RefusesPagesOfNamesWithoutAToken) {
  OneModel one;
  HttpApi open({}, {&one.repository});
  Security security;
  security.operator_token = "operator";
  HttpApi operated(security, {&one.repository});
  security.token = "secret";
  HttpApi guarded(security, {&one.repository});
  const auto call = [](HttpApi* api, const std::string& target, const std::string& host,
                       const std::string& token = "") {
    HttpRequest request;
    request.method = "POST";
    request.target = target;
    request.host = host;
    request.origin = "http://" + host;
    if (!token.empty()) request.authorization = "Bearer " + token;
    return Call(api, request);
  };
  const std::string load = "/v2/repository/models/m/load", index = "/v2/repository/index";
  for (const char* const host :
       {"localhost", "localhost:8000", "LOCALHOST:1", "127.0.0.1", "127.0.0.1:8000", "10.1.2.3:80",
        "[::1]", "[::1]:8000", "[fe80::1]:8000"}) {
    EXPECT_EQ(call(&open, load, host).status, 200) << host;
  }
  for (const char* const host :
       {"evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example:1",
        "[::1].evil.example", "[::1", "[]", "[evil]:1", "::1", "1", "", ":8000"}) {
    ExpectIn("localhost", ErrorOf(call(&open, load, host), 403, "unauthenticated"));
    ErrorOf(call(&open, index, host), 403, "unauthenticated");
    ErrorOf(call(&operated, index, host), 403, "unauthenticated");
  }
  // A token cannot be had in this way.
  EXPECT_EQ(call(&operated, load, "a.example", "operator").status, 200);
  EXPECT_EQ(call(&guarded, index, "a.example", "secret").status, 200);
  // Programs other than browsers send no origin.
  HttpRequest request;
  request.method = "POST";
  request.target = index;
  request.host = "a.example:8000";
  EXPECT_EQ(Call(&open, request).status, 200);
}

TEST(HttpApi, TheTokenOpensWhatIsNotOpen) {
  OneModel one;
  Security security;
  security.token = "secret";
  HttpApi api(security, {&one.repository});
  for (const char* const path : {"/", "/page.js", "/metrics", "/v2/health/live"}) {
    EXPECT_EQ(Get(&api, path).status, 200) << path;
  }
  for (const char* const path :
       {"/v2", "/status", "/v2/models/m", "/v2/models/m/streams", "/v2/models/m/streams/a/outputs",
        "/nothing", "/v2/health/../models/m", "/v2//models/m", "//status"}) {
    ErrorOf(Get(&api, path), 401, "unauthenticated");
    ErrorOf(Get(&api, path, "secreT"), 401, "unauthenticated");
  }
  EXPECT_EQ(Get(&api, "/v2", "secret").status, 200);
  EXPECT_EQ(Get(&api, "/v2/models/m/streams", "secret").status, 200);
}

// Whoever may only step streams may not end all of them.
TEST(HttpApi, LoadingIsForTheOperator) {
  struct Case {
    const char *token, *operator_token;  // of the server
    const char* sent;
    int status;
  };
  for (const Case& one : std::vector<Case>{
           {"", "", "", 200},
           {"", "", "any", 200},
           {"secret", "", "", 401},
           {"secret", "", "wrong", 401},
           {"secret", "", "secret", 200},
           {"", "operator", "", 401},
           {"", "operator", "operator", 200},
           {"secret", "operator", "", 401},
           {"secret", "operator", "secret", 401},
           {"secret", "operator", "operator", 200},
       }) {
    SCOPED_TRACE(std::string(one.token) + " " + one.operator_token + " " + one.sent);
    OneModel model;
    Security security;
    security.token = one.token;
    security.operator_token = one.operator_token;
    HttpApi api(security, {&model.repository});
    const auto call = [&](const std::string& method, const std::string& target) {
      HttpRequest request;
      request.method = method;
      request.target = target;
      if (*one.sent != 0) request.authorization = std::string("Bearer ") + one.sent;
      return Call(&api, std::move(request)).status;
    };
    const bool passes = one.status == 200;
    EXPECT_EQ(call("POST", "/v2/repository/models/m/unload"), one.status);
    EXPECT_EQ(model.repository.index()[0].ready, !passes);
    EXPECT_EQ(call("POST", "/v2/repository/models/m/load"), one.status);
    EXPECT_TRUE(model.repository.index()[0].ready);
    EXPECT_EQ(call("GET", "/v2/repository/models/m/load"), passes ? 405 : 401);
    // The list of models is for every client.
    const bool client = *one.token == 0 || passes || std::string(one.sent) == one.token;
    EXPECT_EQ(call("POST", "/v2/repository/index"), client ? 200 : 401);
  }
}

TEST(HttpApi, StreamsAreListedCopiedAndClosed) {
  OneModel one;
  Security security;
  security.token = "secret";
  HttpApi api(security, {&one.repository});
  const auto call = [&](const std::string& method, const std::string& target,
                        const std::string& body = "") {
    HttpRequest request;
    request.method = method;
    request.target = target;
    request.authorization = "Bearer secret";
    request.body = body;
    return Call(&api, std::move(request));
  };
  Json request = InferOf("a/\xc3\xa9", {1, 2, 3});
  request["parameters"]["step"] = 0;
  call("POST", kInfer, request.dump());

  Json list = BodyOf(call("GET", "/v2/models/m/streams"));
  EXPECT_EQ(list["open"], 1);
  EXPECT_EQ(list["streams"][0]["name"], "a/\xc3\xa9");
  EXPECT_EQ(list["streams"][0]["next_step"], 1);
  const std::string path = list["streams"][0]["path"];
  EXPECT_EQ(path, "/v2/models/m/streams/a%2F%C3%A9");
  EXPECT_EQ(BodyOf(call("GET", "/v2/models/m/streams?limit=0"))["streams"].size(), 0U);
  ErrorOf(call("GET", "/v2/models/m/streams?limit=x"), 400, "invalid_argument");

  const std::string copy = call("GET", path).body;
  EXPECT_EQ(call("DELETE", path).status, 200);
  ErrorOf(call("DELETE", path), 404, "not_found");
  ErrorOf(call("GET", path), 404, "not_found");
  EXPECT_EQ(call("PUT", "/v2/models/m/streams/b", copy).status, 200);
  // It goes on where the other one was, and repeats its last answer.
  request["parameters"] = {{"sequence_id", "b"}, {"step", 0}};
  EXPECT_EQ(BodyOf(call("POST", kInfer, request.dump()))["outputs"][0]["data"], Json({0, 0, 0}));
  request["parameters"]["step"] = 1;
  EXPECT_EQ(BodyOf(call("POST", kInfer, request.dump()))["outputs"][0]["data"], Json({1, 2, 3}));

  ExpectIn("not a copy", ErrorOf(call("PUT", path, "hello"), 400, "invalid_argument"));
  for (size_t i = 0; i < copy.size(); ++i) {
    std::string damaged = copy;
    damaged[i] = static_cast<char>(damaged[i] ^ 0x10);
    ErrorOf(call("PUT", path, damaged), 400, "invalid_argument");
    ErrorOf(call("PUT", path, copy.substr(0, i)), 400, "invalid_argument");
  }
  ErrorOf(call("PUT", path, copy + "x"), 400, "invalid_argument");
  StreamCopy other = DecodeStreamCopy(copy);
  other.state[20] = static_cast<char>(other.state[20] ^ 1);  // a fingerprint
  ErrorOf(call("PUT", path, EncodeStreamCopy(other)), 400, "invalid_argument");
  ErrorOf(call("GET", path), 404, "not_found");
}

TEST(HttpApi, RefusalsOfTheModelHaveTheirStatus) {
  ModelOptions options;
  options.max_streams = 1;
  options.strict_start = true;
  OneModel one(DelayModel(), options);
  HttpApi api({}, {&one.repository});
  ErrorOf(Post(&api, kInfer, InferOf("a", {1, 2, 3}).dump()), 409, "not_started");
  Json request = InferOf("a", {1, 2, 3});
  request["parameters"]["sequence_start"] = true;
  EXPECT_EQ(Post(&api, kInfer, request.dump()).status, 200);
  request["parameters"]["sequence_id"] = "b";
  ErrorOf(Post(&api, kInfer, request.dump()), 429, "too_many_streams");
  one.repository.Find("m")->CloseStream("a", End::kIdle);
  ErrorOf(Post(&api, kInfer, InferOf("a", {1, 2, 3}).dump()), 409, "ended");

  request["parameters"] = {{"sequence_id", "a"}, {"sequence_start", true}, {"timeout", -1}};
  EXPECT_EQ(Post(&api, kInfer, request.dump()).status, 200);
  one.repository.Drain();
  EXPECT_EQ(Get(&api, "/v2/health/ready").status, 400);
  EXPECT_EQ(Get(&api, "/v2/health/live").status, 200);
  ErrorOf(Post(&api, kInfer, request.dump()), 503, "unavailable");
}

TEST_F(HttpApiTest, ClientsThatHaveGoneMoveNothing) {
  HttpRequest request;
  request.method = "POST";
  request.target = kInfer;
  request.body = InferOf("a", {1, 2, 3}).dump();
  const auto exchange = std::make_shared<WaitingExchange>();
  exchange->Leave();
  api_.Handle(request, exchange);
  ErrorOf(exchange->Wait(), 503, "cancelled");
  EXPECT_EQ(BodyOf(Post(&api_, kInfer, request.body))["parameters"]["next_step"], 1);
}

TEST_F(HttpApiTest, OutputsOfOneStream) {
  const HttpResponse response = Get(&api_, "/v2/models/m/streams/a%2Fb/outputs");
  ASSERT_NE(response.events, nullptr);
  EXPECT_EQ(response.events->Next(), "");
  Post(&api_, kInfer, InferOf("b", {9, 9, 9}).dump());
  EXPECT_EQ(response.events->Next(), "");
  Post(&api_, kInfer, InferOf("a/b", {1, 2, 3}).dump());
  // Only the last step of several, though nobody has looked since.
  Post(&api_, kInfer, InferOf("a/b", {{4, 5, 6}, {0, 0, 0}}, {2, 3}).dump());
  const std::string event = response.events->Next();
  ASSERT_EQ(event.substr(0, 6), "data: ");
  ASSERT_EQ(event.substr(event.size() - 2), "\n\n");
  const Json shown = Json::parse(event.substr(6));
  EXPECT_EQ(shown["next_step"], 3);
  EXPECT_EQ(shown["outputs"][0]["numbers"], Json({4, 5, 6}));
  EXPECT_EQ(response.events->Next(), "");
  EXPECT_FALSE(response.events->ended());
  one_.repository.Unload("m");
  EXPECT_TRUE(response.events->ended());
}

TEST_F(HttpApiTest, WatchersAreLimited) {
  std::vector<HttpResponse> watchers;
  for (int i = 0; i < 32; ++i) watchers.push_back(Get(&api_, "/v2/models/m/streams/a/outputs"));
  ErrorOf(Get(&api_, "/v2/models/m/streams/a/outputs"), 429, "queue_full");
  watchers.clear();
  EXPECT_EQ(Get(&api_, "/v2/models/m/streams/a/outputs").status, 200);
}

TEST_F(HttpApiTest, Metrics) {
  Post(&api_, kInfer, InferOf("a", {1, 2, 3}).dump());
  Post(&api_, kInfer, "{}");
  const std::string text = Get(&api_, "/metrics").body;
  ExpectIn("\ncontinual_transformers_steps_total{model=\"m\"} 1\n", text);
  ExpectIn("\ncontinual_transformers_open_streams{model=\"m\"} 1\n", text);
  ExpectIn(
      "\ncontinual_transformers_refused_requests_total{model=\"m\",reason=\"invalid_argument\"} "
      "1\n",
      text);
  ExpectIn("\ncontinual_transformers_batch_rows_bucket{model=\"m\",le=\"1\"} 1\n", text);
  ExpectIn("\ncontinual_transformers_batch_rows_bucket{model=\"m\",le=\"+Inf\"} 1\n", text);
}

TEST_F(HttpApiTest, StatusHasTheHistory) {
  Json model = BodyOf(Get(&api_, "/status"))["models"][0];
  EXPECT_EQ(model["history"]["sample"], Json::array());
  api_.Sample();
  Post(&api_, kInfer, InferOf("a", {1, 2, 3}).dump());
  api_.Sample();
  api_.Sample();
  model = BodyOf(Get(&api_, "/status"))["models"][0];
  EXPECT_EQ(model["history"]["sample"], Json({2, 3}));
  EXPECT_EQ(model["history"]["rows_per_batch"], Json({1, 0}));
  EXPECT_EQ(model["history"]["open_streams"], Json({1, 1}));
  EXPECT_GT(model["history"]["latency_p50"][0], 0);
  model = BodyOf(Get(&api_, "/status?since=2"))["models"][0];
  EXPECT_EQ(model["history"]["sample"], Json({3}));
}

TEST(History, Quantile) {
  Histogram histogram(1, 2, 4);  // 1, 2, 4, 8, more
  EXPECT_EQ(Quantile(histogram, nullptr, 0.5), 0);
  histogram.Add(3, 10);
  EXPECT_EQ(Quantile(histogram, nullptr, 0.5), 3);
  EXPECT_EQ(Quantile(histogram, nullptr, 1), 4);
  const Histogram before = histogram;
  histogram.Add(100);
  EXPECT_EQ(Quantile(histogram, nullptr, 0.5), 3.1);
  EXPECT_EQ(Quantile(histogram, &before, 0.5), 8);
}

TEST(History, HasTheLastSamplesOnly) {
  History history;
  for (int64_t i = 0; i < 400; ++i) history.Add("m", i, Statistics());
  const auto samples = history.Since("m", -1)["sample"];
  EXPECT_EQ(samples.size(), History::kSamples);
  EXPECT_EQ(samples.back(), 399);
  history.ForgetOthers(400);
  EXPECT_EQ(history.Since("m", -1)["sample"].size(), 0U);
}

}  // namespace
}  // namespace continual_transformers::server
