"""The races: a step of a whole model, and of the attention layer, against rivals and a bound."""
