"""The races: a step of a whole model, and of the whole layer, against every rival and its bound."""
