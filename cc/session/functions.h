// The element-wise functions that a plan names.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_FUNCTIONS_H_
#define CONTINUAL_TRANSFORMERS_SESSION_FUNCTIONS_H_

#include "cc/attention/activations.h"
#include "cc/session/plan.h"

namespace continual_transformers {

// Returns the function of an `activation` node without weights, with the node's numbers.
FunctionSpec FunctionOf(const Node& node);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_FUNCTIONS_H_
