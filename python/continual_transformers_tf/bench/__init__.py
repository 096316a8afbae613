"""The race: a step of the whole layer against every rival, and against its bound."""
