#include "cc/session/state_layout.h"

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "cc/session/error.h"

namespace continual_transformers {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kMostBytes = int64_t{1} << 40;

class LayoutBuilder {
 public:
  explicit LayoutBuilder(const Plan& plan) : plan_(plan) {}

  // `ring_rows` 0: not a ring.
  void Add(int node, const char* name, DType dtype, std::vector<int64_t> shape, int64_t ring_rows,
           int64_t rows_a_step = 1) {
    StateEntry entry = {node, name, dtype, std::move(shape), end_, ring_rows, rows_a_step};
    // Value sizes are below 2^31, so a row is below 2^34 bytes and a ring below 2^65. int64 could
    // overflow.
    const double bytes = [&] {
      double product = SizeOf(dtype);
      for (int64_t n : entry.shape) product *= static_cast<double>(n);
      return product;
    }();
    if (bytes + static_cast<double>(end_) > static_cast<double>(kMostBytes)) {
      throw Error(ErrorCode::kBadModelFile,
                  plan_.nodes[node].name + ": a stream would take more than 2^40 bytes");
    }
    end_ = (end_ + BytesOf(entry) + kAlignment - 1) / kAlignment * kAlignment;
    entries_.push_back(std::move(entry));
  }

  StateLayout Finish() { return {std::move(entries_), std::max(end_, kAlignment)}; }

 private:
  const Plan& plan_;
  std::vector<StateEntry> entries_;
  int64_t end_ = 0;
};

std::vector<int64_t> Prepend(int64_t rows, const std::vector<int64_t>& shape) {
  std::vector<int64_t> all = {rows};
  all.insert(all.end(), shape.begin(), shape.end());
  return all;
}

}  // namespace

int64_t BytesOf(const StateEntry& entry) {
  int64_t bytes = SizeOf(entry.dtype);
  for (int64_t n : entry.shape) bytes *= n;
  return bytes;
}

StateLayout LayOut(const Plan& plan, DType cache_dtype) {
  LayoutBuilder layout(plan);
  for (size_t i = 0; i < plan.nodes.size(); ++i) {
    const Node& node = plan.nodes[i];
    const int n = static_cast<int>(i);
    switch (node.op) {
      case Op::kPositional:
        layout.Add(n, "offset", DType::kInt64, {}, 0);
        break;
      case Op::kDelay: {
        const Value& x = plan.values[node.inputs[0]];
        layout.Add(n, "ring", x.dtype, Prepend(node.Int("steps"), x.shape), node.Int("steps"));
        break;
      }
      case Op::kWindow: {
        const Value& x = plan.values[node.inputs[0]];
        const int64_t rows = std::max<int64_t>(1, node.Int("window") - 1);
        layout.Add(n, "ring", x.dtype, Prepend(rows, x.shape), rows);
        break;
      }
      case Op::kAttention:
      case Op::kRetroactiveAttention: {
        const int64_t rows = node.Int("window");
        const int64_t heads = node.Int("key_heads", node.Int("heads"));  // Of the rings.
        const int64_t key_dim = plan.values[node.inputs[1]].shape.back() / heads;
        const int64_t value_dim = plan.values[node.inputs[2]].shape.back() / heads;
        const int64_t each = RowsAStep(plan, node);
        if (node.op == Op::kAttention) {
          layout.Add(n, "key", cache_dtype, {rows, heads, key_dim}, rows, each);
          layout.Add(n, "value", cache_dtype, {rows, heads, value_dim}, rows, each);
          if (cache_dtype == DType::kInt8) {
            layout.Add(n, "key_scale", DType::kFloat32, {rows}, rows, each);
            layout.Add(n, "value_scale", DType::kFloat32, {rows}, rows, each);
          }
        } else {
          const DType compute = plan.compute_dtype;
          layout.Add(n, "query", compute, {rows, heads, key_dim}, rows);
          layout.Add(n, "key", compute, {rows, heads, key_dim}, rows);
          layout.Add(n, "value", compute, {rows, heads, value_dim}, rows);
          layout.Add(n, "softmax", DType::kFloat64, {heads, 4, rows}, 0);
          layout.Add(n, "weighted_sum", DType::kFloat64, {heads, rows, value_dim}, 0);
          layout.Add(n, "made_with", DType::kFloat64, {2}, 0);
        }
        layout.Add(n, "key_mask", DType::kBool, {rows}, rows, each);
        break;
      }
      case Op::kRecurrent: {
        if (!node.Bool("goes_on")) break;
        const int64_t units = plan.values[node.outputs[0]].shape.back();
        layout.Add(n, "state", plan.compute_dtype, {units}, 0);
        if (node.Text("function") == "lstm") {
          layout.Add(n, "memory", plan.compute_dtype, {units}, 0);
        }
        break;
      }
      default:
        break;
    }
  }
  return layout.Finish();
}

}  // namespace continual_transformers
