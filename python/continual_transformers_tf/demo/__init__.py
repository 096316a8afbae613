"""The smartwatch demo: its data, its model, the training, and the command line's output."""
