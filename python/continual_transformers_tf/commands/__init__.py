"""The commands of `continual-transformers`, a module each. `cli` puts them together."""
