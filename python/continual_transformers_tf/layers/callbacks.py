"""What Keras' training loops need of continual layers."""

import keras

from continual_transformers_tf.layers.continual_layer import clean_state


class CleanState(keras.callbacks.Callback):
    """Every batch's streams begin anew, in `fit`, `evaluate` and `predict`.

    A model in "steps" mode takes row i of every batch as the next steps of stream i. Where the rows
    are sequences of their own instead, each batch must find the streams clean:

    ```python
    with ct.call_mode("steps"):
        model.fit(sequences, labels, callbacks=[ct.CleanState()])
    ```

    With `steps_per_execution` above 1, Keras runs several batches before it calls back.
    """

    def on_train_batch_begin(self, batch, logs=None):
        clean_state(self.model)

    on_test_batch_begin = on_train_batch_begin
    on_predict_batch_begin = on_train_batch_begin
