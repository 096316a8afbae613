// The activations that a plan names.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_ACTIVATIONS_H_
#define CONTINUAL_TRANSFORMERS_SESSION_ACTIVATIONS_H_

#include "cc/attention/activations.h"
#include "cc/session/plan.h"

namespace continual_transformers {

// Returns the activation of an `activation` node without weights, with the node's numbers.
ActivationSpec ActivationOf(const Node& node);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_ACTIVATIONS_H_
