"""One step of a plan in TensorFlow's ops, with the stream's state as inputs and outputs.

`docs/model_file.md` defines the nodes. Each op of a plan is one function here, written with those
TensorFlow ops that LiteRT's built-in ops can express. A value of the plan is a tensor `[1, ...]`,
that of one stream.

To add an op, write its function with the decorator `op` of `op_table.py`: in `row_ops.py` if it
needs nothing but its inputs, otherwise in `stream_ops.py`.
"""

from continual_transformers_tf.models.plan_in_tensorflow import row_ops, stream_ops  # noqa: F401
from continual_transformers_tf.models.plan_in_tensorflow.plan_step import PlanStep

__all__ = ["PlanStep"]
