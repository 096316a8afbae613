// The sentences with which a model file is refused, and the nodes of `EveryOp` to make wrong.
#ifndef CONTINUAL_TRANSFORMERS_TESTS_CC_REFUSALS_H_
#define CONTINUAL_TRANSFORMERS_TESTS_CC_REFUSALS_H_

#include <cstddef>
#include <string>

#include "cc/session/error.h"
#include "gtest/gtest.h"
#include "tests/cc/model_file_case.h"

namespace continual_transformers {

// Returns the message with which a file is refused, or "".
inline std::string Refusal(const std::string& bytes) {
  try {
    ModelFile::Copy(bytes.data(), bytes.size());
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::kBadModelFile) << error.what();
    EXPECT_NE(std::string(error.what()), "");
    return error.what();
  }
  return "";
}

inline std::string Refusal(const PlanBuilder& builder) { return Refusal(builder.Bytes()); }

inline void ExpectIn(const std::string& part, const std::string& text) {
  EXPECT_NE(text.find(part), std::string::npos)
      << "expected \"" << part << "\" in \"" << text << "\"";
}

// Returns the index of EveryOp's first node with this op and, if given, this function.
inline size_t PlaceOf(const PlanBuilder& builder, const std::string& op,
                      const std::string& function = "") {
  const Json& nodes = builder.plan["nodes"];
  for (size_t i = 0; i < nodes.size(); ++i) {
    const bool fits = function.empty() || nodes[i]["attributes"].value("function", "") == function;
    if (nodes[i]["op"] == op && fits) return i;
  }
  ADD_FAILURE() << "EveryOp has no " << op;
  return 0;
}

inline Json& NodeOf(PlanBuilder* builder, const std::string& op, const std::string& function = "") {
  return builder->plan["nodes"][PlaceOf(*builder, op, function)];
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_TESTS_CC_REFUSALS_H_
