"""Recorded words, mixed into streams of speech, and the rows of their log-mel spectrum.

Debian's package `asterisk-core-sounds-en-wav` has 568 prompts of a telephone exchange, spoken by
one person and recorded at 8 kHz. `read_words` reads those that are single words.
"""

import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np

RATE = 8000  # Hz
FRAME, HOP, BINS = 200, 80, 129  # Samples of a row, from row to row; frequencies of a spectrum.
MELS = 40
DIGITS = tuple("0123456789")
OTHER = len(DIGITS)  # The class of all other words, and of silence.
UNKNOWN = -1  # Not a class: the window has only a part of a digit.


def read(path):
    """Return the samples of a .wav file of one channel at 8 kHz: float32 `(T,)` in -1 to 1."""
    with wave.open(str(path)) as file:
        if (file.getnchannels(), file.getsampwidth(), file.getframerate()) != (1, 2, RATE):
            raise SystemExit(f"Expected {path} to have one channel of 16 bits at {RATE} Hz")
        samples = np.frombuffer(file.readframes(file.getnframes()), "<i2")
    return (samples / 2**15).astype("float32")


def read_words(folder):
    """Return (the ten digits, words for training, words for the test): lists of samples.

    The words are those in digits/, letters/ and phonetic/, for example "twelve" and "seventh".
    Every fourth one is for the test. There is one recording of each digit, so training and test
    share it.
    """
    folder = Path(folder)
    digits = [without_silence(read(folder / "digits" / f"{name}.wav")) for name in DIGITS]
    paths = [
        path
        for part in ("digits", "letters", "phonetic")
        for path in sorted((folder / part).glob("*.wav"))
        if part != "digits" or path.stem not in DIGITS
    ]
    words = [without_silence(read(path)) for path in paths]
    return digits, [word for i, word in enumerate(words) if i % 4], words[::4]


def without_silence(samples, level=0.02):
    """Return the samples from the first one to the last one that are louder than a level."""
    loud = np.flatnonzero(np.abs(samples) > level)
    return samples[loud[0] : loud[-1] + 1] if loud.size else samples[:0]


class Spoken(NamedTuple):
    """A digit in a stream of speech, and its first sample and the one after its last."""

    digit: int
    begin: int
    end: int


def mixture(digits, words, count, random):
    """Return a stream of words with noise: samples `(T,)`, and a list of the digits in it.

    Every other word is a digit, on average. Speed, gain, and the silence in front of a word are
    random, and so is the level of the noise.

    Args:
        digits, words: Lists of samples.
        count: The number of words.
        random: A NumPy generator.
    """
    pieces, spoken, end = [], [], 0
    for _ in range(count):
        digit = int(random.integers(2 * len(digits)))
        is_digit = digit < len(digits)
        word = digits[digit] if is_digit else words[random.integers(len(words))]
        speed = np.exp(random.uniform(-0.15, 0.15))
        word = np.interp(np.arange(0, len(word) - 1, speed), np.arange(len(word)), word)
        silence = int(random.integers(RATE // 10, RATE // 2))
        pieces += [np.zeros(silence), word * np.exp(random.normal(scale=0.3))]
        begin, end = end + silence, end + silence + len(word)
        if is_digit:
            spoken.append(Spoken(digit, begin, end))
    samples = np.concatenate([*pieces, np.zeros(RATE)])
    noise = np.exp(random.uniform(np.log(1e-4), np.log(1e-2)))
    samples += random.normal(scale=noise, size=len(samples))
    return samples.astype("float32"), spoken


def classes_of_windows(spoken, count, window):
    """Return the class of the window of mel rows that ends at each of `count` rows.

    It is the last digit that is whole in the window, or OTHER if the window has no part of a digit.
    It is UNKNOWN if a digit has begun but not ended, or has lost its beginning, or if there are not
    enough rows for a window yet.
    """
    ends = np.arange(count) * HOP + FRAME
    begins = ends - (window - 1) * HOP - FRAME
    classes = np.full(count, OTHER)
    for digit, begin, end in spoken:
        classes[(begins < end) & (ends > begin)] = UNKNOWN
        classes[(begins <= begin) & (ends >= end)] = digit
    classes[: window - 1] = UNKNOWN
    return classes


def classes_of_rows(spoken, count, samples_of_row):
    """Return the digit that is spoken at the end of each of `count` rows, or OTHER."""
    ends = np.arange(1, count + 1) * samples_of_row
    classes = np.full(count, OTHER)
    for digit, begin, end in spoken:
        classes[(ends > begin) & (ends <= end)] = digit
    return classes


def log_mel(samples):
    """Return a row of a log-mel spectrum every 10 ms, roughly in -2 to 2: `(T, MELS)`."""
    frames = np.lib.stride_tricks.sliding_window_view(samples, FRAME)[::HOP] * np.hanning(FRAME)
    spectrum = np.abs(np.fft.rfft(frames, 2 * (BINS - 1)))
    return ((np.log(spectrum @ mel_weights(BINS) + 1e-3) + 1) / 2).astype("float32")


def mel_weights(bins, count=MELS):
    """Return weights `(bins, count)` of a spectrum's frequencies, as the ear hears them."""
    edges = np.linspace(0, 2595 * np.log10(1 + RATE / 2 / 700), count + 2)
    edges = 700 * (10 ** (edges / 2595) - 1)
    frequency = np.linspace(0, RATE / 2, bins)[:, None]
    rising = (frequency - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequency) / (edges[2:] - edges[1:-1])
    return np.maximum(0, np.minimum(rising, falling)).astype("float32")
