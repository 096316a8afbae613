// Random errors in what a program reads, the same ones on every run.
#ifndef CONTINUAL_TRANSFORMERS_TESTS_CC_MUTATOR_H_
#define CONTINUAL_TRANSFORMERS_TESTS_CC_MUTATOR_H_

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "tests/cc/model_file_case.h"

namespace continual_transformers {

class Mutator {
 public:
  explicit Mutator(uint32_t seed) : random_(seed) {}

  size_t Below(size_t n) { return n == 0 ? 0 : random_() % n; }
  char Byte() { return static_cast<char>(random_()); }

  // Changes one place in a JSON value, at any depth.
  void Change(Json* root) {
    std::vector<Json*> places;
    Collect(root, &places);
    Json* place = places[Below(places.size())];
    switch (Below(place->is_structured() ? 5 : 3)) {
      case 0:
        *place = Odd();
        break;
      case 1:
        if (place->is_number()) {
          *place =
              std::abs(place->get<double>()) < 9e15 ? Json(place->get<int64_t>() + Small()) : Odd();
        } else {
          *place = Json(*places[Below(places.size())]);
        }
        break;
      case 2:
        *place = Json(*places[Below(places.size())]);
        break;
      case 3:
        if (!place->empty()) Erase(place);
        break;
      case 4:
        if (place->is_array()) {
          place->push_back(Json(*places[Below(places.size())]));
        } else {
          (*place)[Name()] = Json(*places[Below(places.size())]);
        }
        break;
    }
  }

  // Changes, inserts or cuts off bytes at one place.
  void ChangeBytes(std::string* bytes) {
    const size_t place = Below(bytes->size());
    switch (Below(4)) {
      case 0:
        bytes->resize(place);
        break;
      case 1:
        if (!bytes->empty()) (*bytes)[place] = static_cast<char>(random_());
        break;
      case 2:
        if (!bytes->empty()) (*bytes)[place] ^= static_cast<char>(1 << Below(8));
        break;
      case 3:
        bytes->insert(place, bytes->substr(Below(bytes->size()), Below(64)));
        break;
    }
  }

 private:
  void Erase(Json* place) {
    auto child = place->begin();
    for (size_t skip = Below(place->size()); skip > 0; --skip) ++child;
    place->erase(child);
  }

  static void Collect(Json* json, std::vector<Json*>* places) {
    places->push_back(json);
    if (!json->is_structured()) return;
    for (Json& child : *json) Collect(&child, places);
  }

  int64_t Small() { return static_cast<int64_t>(Below(5)) - 2; }

  Json Odd() {
    static const std::vector<Json> odd = {nullptr,
                                          true,
                                          0,
                                          -1,
                                          1,
                                          2,
                                          0.5,
                                          -0.0,
                                          1e308,
                                          2147483647,
                                          2147483648,
                                          int64_t{1} << 40,
                                          int64_t{1} << 62,
                                          std::numeric_limits<int64_t>::max(),
                                          std::numeric_limits<int64_t>::min(),
                                          std::numeric_limits<uint64_t>::max(),
                                          "",
                                          "bool",
                                          "int32",
                                          "float32",
                                          "prelu",
                                          Json::array(),
                                          Json::object(),
                                          Json::array({2147483647}),
                                          Json::array({65536, 65536}),
                                          Json::array({1, 1, 1, 1, 1, 1, 1, 1, 1})};
    return odd[Below(odd.size())];
  }

  std::string Name() {
    static const std::vector<std::string> names = {"dtype", "key",  "shape", "function",
                                                   "bias",  "axis", "",      "steps"};
    return names[Below(names.size())];
  }

  std::mt19937 random_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TESTS_CC_MUTATOR_H_
