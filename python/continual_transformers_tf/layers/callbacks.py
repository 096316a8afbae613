"""Callbacks for Keras' training loops."""

from typing import Any

import keras

from continual_transformers_tf.layers.model_streams import clean_state


class CleanState(keras.callbacks.Callback):
    """Cleans the streams before every batch of `fit`, `evaluate` and `predict`.

    A model in "steps" mode takes row i of every batch as the next steps of stream i. If the rows
    are separate sequences instead, each batch must find the streams clean:

    ```python
    with ct.call_mode("steps"):
        model.fit(sequences, labels, callbacks=[ct.CleanState()])
    ```

    With `steps_per_execution` above 1, Keras runs several batches before it calls back.
    """

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        clean_state(self.model)

    on_test_batch_begin = on_train_batch_begin
    on_predict_batch_begin = on_train_batch_begin
