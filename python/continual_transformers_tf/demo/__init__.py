"""A smartwatch, streamed: the data, the model, its training, and the demo of the command line."""
