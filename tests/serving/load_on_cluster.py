"""Streams that are stepped in the background, each answer compared with an undisturbed run's."""

import threading
import time

import numpy as np

import continual_transformers_tf as ct

FEATURES = 6


class LoadOnCluster:
    """Streams of a client, stepped by a thread while the test does something to the servers.

    One request has a step of each of `together`. The others are stepped one by one, and keep all
    their inputs.

    Args:
        urls: Of servers.
        model_file: What they serve.
        together: How many streams a request has.
        alone: How many streams have requests of their own.
        ours: Part of the streams' names.
        access: More arguments of the client.
    """

    def __init__(self, urls, model_file, together=24, alone=8, ours="load", **access):
        self.client = ct.serving.Client(urls, timeout=60, attempt_timeout=1, **access)
        self.session = ct.Session.load(model_file)
        self.random = np.random.default_rng(5)
        self.together = [f"{ours} {i}" for i in range(together)]
        self.alone = [self.client.open(f"{ours} alone {i}", keep=100_000) for i in range(alone)]
        self.ids = self.session.open(together + alone)
        self.steps = 0  # Of each stream.
        self._stop, self._failed = threading.Event(), None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def step(self):
        """Step each stream once, and compare."""
        x = self.random.standard_normal((len(self.ids), FEATURES)).astype(np.float32)
        expected = self.session.step(x, streams=self.ids)
        many = len(self.together)
        if many:
            numbers = [self.steps] * many
            y = self.client.step(x[:many], self.together, numbers, start=self.steps == 0)
            np.testing.assert_allclose(y, expected[:many], atol=1e-5)
        for i, stream in enumerate(self.alone, many):
            y = stream.step(x[i])
            np.testing.assert_allclose(y, expected[i], atol=1e-5, err_msg=stream.name)
        self.steps += 1

    def _run(self):
        try:
            while not self._stop.is_set():
                self.step()
                time.sleep(0.002)
        except BaseException as error:
            self._failed = error

    def wait_for(self, steps, seconds=60):
        """Wait until each stream has taken more steps."""
        wanted = self.steps + steps
        end = time.monotonic() + seconds
        while self.steps < wanted:
            if self._failed is not None:
                raise self._failed
            assert time.monotonic() < end, f"{self.steps} steps, {wanted} expected"
            time.sleep(0.01)

    def stop(self):
        """Stop, and raise what went wrong."""
        self._stop.set()
        self._thread.join(90)
        assert not self._thread.is_alive()
        self.client.close()
        if self._failed is not None:
            raise self._failed
