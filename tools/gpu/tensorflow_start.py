"""Says whether the op runs on a GPU in TensorFlow here: `python tools/gpu/tensorflow_start.py`.

It prints facts as JSON, then a sentence. The exit status is not 0 if the op cannot run on a GPU.
With --product it multiplies matrices on the GPU, for which TensorFlow calls CUDA's libraries.
"""

import argparse
import json
import sys

import numpy as np


def facts() -> dict[str, object]:
    """Return what TensorFlow and the op library were built for, and the GPUs that there are."""
    import keras
    import tensorflow as tf

    import continual_transformers_tf as ct

    gpus = tf.config.list_physical_devices("GPU")
    return dict(
        python=sys.version.split()[0],
        tensorflow=tf.__version__,
        keras=keras.__version__,
        numpy=np.__version__,
        tensorflow_build=dict(tf.sysconfig.get_build_info()),
        gpus=[tf.config.experimental.get_device_details(gpu) for gpu in gpus],
        kernels=sorted(ct.ops.kernels()),
        kernels_error=ct.ops.load_error(),
        cuda_build=None if ct.ops.load_error() else ct.ops.cuda_build(),
    )


def why_not(found: dict[str, object]) -> str | None:
    """Return why the op cannot run on a GPU, from `facts`; None if it can."""
    if not found["gpus"]:
        return (
            f"TensorFlow {found['tensorflow']} sees no GPU here; its messages above may name a "
            "library that it could not open"
        )
    if found["kernels_error"]:
        return f"there are no fused kernels: {found['kernels_error']}"
    if "GPU" not in found["kernels"]:  # type: ignore[operator]
        return "the op library was built without GPU kernels"
    return None


def product_error() -> float:
    """Return the relative error of a product of matrices on the GPU."""
    import tensorflow as tf

    tf.config.experimental.enable_tensor_float_32_execution(False)
    a, b = np.random.default_rng(1).normal(size=(2, 256, 256))
    with tf.device("GPU:0"):
        product = tf.linalg.matmul(tf.constant(a, "float32"), tf.constant(b, "float32")).numpy()
    return float(np.abs(product - a @ b).max() / np.abs(a @ b).max())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--product", action="store_true")
    options = parser.parse_args(arguments)
    found = facts()
    print(json.dumps(found, default=str))
    why = why_not(found)
    if why:
        print(f"The op cannot run on a GPU: {why}.")
        return 1
    if options.product:
        error = product_error()
        print(f"A product of matrices on the GPU has a relative error of {error:.1e}.")
        return 0 if error < 1e-5 else 1
    print(f"TensorFlow {found['tensorflow']} sees {found['gpus']}.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
