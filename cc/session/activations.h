// The activations that a plan names.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_ACTIVATIONS_H_
#define CONTINUAL_TRANSFORMERS_SESSION_ACTIVATIONS_H_

#include <string>

#include "cc/attention/activations.h"
#include "cc/session/plan.h"

namespace continual_transformers {

// Returns an activation that has no numbers, or relu6, by its name in a plan.
ActivationSpec ActivationNamed(const std::string& name, const Node& node);

// Returns the activation of an `activation` node without weights, with the node's numbers.
ActivationSpec ActivationOf(const Node& node);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_ACTIVATIONS_H_
