"""The op libraries with GPU kernels, which `continual_transformers_tf` finds in this folder."""
