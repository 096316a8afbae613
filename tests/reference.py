"""The reference: attention over the whole window, recomputed at every step in float64 NumPy.

It imports nothing of the package under test. It has no ring, only each stream's whole history.
"""

import numpy as np

# The largest allowed max|output - reference| / max|reference|, for logits of order one.
BOUNDS = {"float64": 1e-12, "float32": 5e-6, "bfloat16": 2e-2, "float16": 4e-3}
# The largest error of rounding to a type, relative to the number.
ROUNDING = {"bfloat16": 2**-8, "float16": 2**-11}


def softmax(logits, axis=-1):
    with np.errstate(invalid="ignore"):  # A row with only -inf has no softmax: it gives zeros.
        weights = np.exp(logits - np.max(logits, axis=axis, keepdims=True))
        weights = np.where(np.isneginf(np.max(logits, axis=axis, keepdims=True)), 0, weights)
        total = weights.sum(axis=axis, keepdims=True)
        return np.where(total == 0, 0, weights / np.where(total == 0, 1, total))


def attention(query, keys, values, scale=None, mask=None):
    """Attend: query [H, D], keys [n, H, D], values [n, H, Dv], mask bool [H, n].

    Returns:
        (output [H, Dv], scores [H, n]).
    """
    scale = 1 / np.sqrt(query.shape[-1]) if scale is None else scale
    logits = scale * np.einsum("hd,nhd->hn", query, keys)
    if mask is not None:
        logits = np.where(mask, logits, -np.inf)
    scores = softmax(logits)
    return np.einsum("hn,nhd->hd", scores, values), scores


def sliding_windows(x, seq_len):
    """Return all windows: x [T, ...] -> [T - N + 1, N, ...]."""
    return np.stack([x[t : t + seq_len] for t in range(len(x) - seq_len + 1)])


def newest_of_multi_head_attention(weights, windows):
    """Return the newest row of multi-head self-attention on each window.

    Args:
        weights: Kernel [E, H, D] and bias [H, D] of query, key and value, and of the output
            [H, D, E] and [E], in the order of `keras.layers.MultiHeadAttention`.
        windows: [..., N, E].

    Returns:
        [..., E].
    """
    wq, bq, wk, bk, wv, bv, wo, bo = weights
    windows = windows.astype(np.float64)
    query = np.einsum("...e,ehd->...hd", windows[..., -1, :], wq) + bq
    key = np.einsum("...ne,ehd->...nhd", windows, wk) + bk
    value = np.einsum("...ne,ehd->...nhd", windows, wv) + bv
    logits = np.einsum("...hd,...nhd->...hn", query, key) / np.sqrt(wq.shape[-1])
    output = np.einsum("...hn,...nhd->...hd", softmax(logits), value)
    return np.einsum("...hd,hde->...e", output, wo) + bo


class Stream:
    """One stream, with every key and value that it has seen."""

    def __init__(self, seq_len, keys=(), values=()):
        self.seq_len = seq_len
        self.keys = [np.asarray(key, np.float64) for key in keys]
        self.values = [np.asarray(value, np.float64) for value in values]
        self.has_key = [True] * len(self.keys)

    def step(self, query, key, value, scale=None, mask=None, has_key=True):
        """Take one step: [H, D], [H, D], [H, Dv], mask [H, N] -> output [H, Dv], scores [H, N]."""
        self.keys.append(np.asarray(key, np.float64))
        self.values.append(np.asarray(value, np.float64))
        self.has_key.append(bool(has_key))
        query = np.asarray(query, np.float64)
        has_key = np.array(self.has_key[-self.seq_len :])
        keys = np.array(self.keys[-self.seq_len :])  # np.stack takes twice as long.
        values = np.array(self.values[-self.seq_len :])
        filled = len(keys)
        allowed = np.broadcast_to(has_key, (len(query), filled))
        if mask is not None:
            allowed = allowed & mask[:, self.seq_len - filled :]
        # Keys and values that no query attends to may be NaN.
        keys, values = (np.where(has_key[:, None, None], x, 0) for x in (keys, values))
        output, scores = attention(query, keys, values, scale, allowed)
        unfilled = np.zeros((len(query), self.seq_len - filled))
        return output, np.concatenate([unfilled, scores], 1)

    def take(self, query, key, value, scale=None, mask=None, has_key=None):
        """Take T steps at once, which is faster: [T, H, D], [T, H, D], [T, H, Dv], mask [H, T, N].

        Returns:
            (output [T, H, Dv], scores [T, H, N]).
        """
        count, n = len(query), self.seq_len
        self.keys += list(np.asarray(key, np.float64))
        self.values += list(np.asarray(value, np.float64))
        self.has_key += [True] * count if has_key is None else [bool(x) for x in has_key]
        outputs, scores = [], []
        for first in range(0, count, BLOCK):
            end = min(first + BLOCK, count)
            before = count - end
            keys, values, allowed = windows_of(
                end - first, n, before, self.has_key, self.keys, self.values
            )
            queries = np.asarray(query[first:end], np.float64)
            by = 1 / np.sqrt(queries.shape[-1]) if scale is None else scale
            logits = by * np.einsum("thd,tnhd->thn", queries, keys, optimize=True)
            allowed = allowed[:, None]
            if mask is not None:
                allowed = allowed & mask[:, first:end].swapaxes(0, 1)
            (taken,) = windows_of(end - first, n, before, [True] * len(self.has_key))
            # A column of no step stays zero, even in a row of NaN.
            rows = softmax(np.where(allowed, logits, -np.inf))
            scores.append(np.where(taken[:, None], rows, 0))
            outputs.append(np.einsum("thn,tnhd->thd", scores[-1], values, optimize=True))
        return np.concatenate(outputs), np.concatenate(scores)


# How many windows are computed at once: more would take more memory than they save time.
BLOCK = 32


def windows_of(count, seq_len, before, has_key, *arrays):
    """Return the windows of `count` steps, the last of which has `before` newer steps.

    Args:
        has_key: For each step of a stream's history, whether it has a key.
        arrays: For each step, a row: [steps][...].

    Returns:
        The windows of each array [count, N, ...], and which rows are steps with a key [count, N].
        Rows without a key are zeros, because keys and values that no query attends to may be NaN.
    """
    end = len(has_key) - before
    first = end - count - seq_len + 1
    unfilled = max(0, -first)
    kept = np.array([False] * unfilled + has_key[max(0, first) : end])
    index = np.arange(count)[:, None] + np.arange(seq_len)
    windows = []
    for array in arrays:
        rows = np.array(array[max(0, first) : end])  # np.stack takes twice as long.
        rows = np.concatenate([np.zeros((unfilled, *rows.shape[1:])), rows])
        rows[~kept] = 0
        windows.append(rows[index])
    return *windows, kept[index]


class RetroactiveStream:
    """One stream, with every query, key and value that it has seen."""

    def __init__(self, seq_len, queries=(), keys=(), values=()):
        self.seq_len = seq_len
        self.steps = [
            tuple(np.asarray(x, np.float64) for x in step)
            for step in zip(queries, keys, values, strict=True)
        ]
        self.has_key = [True] * len(self.steps)

    def step(self, query, key, value, scale=None, has_key=True, compute=True, mask=None):
        """Take one step: [H, D], [H, D], [H, Dv] -> [H, N, Dv], or None if it is not needed.

        Row N - 1 is that of the newest step's query; rows of steps never taken are zeros. The mask
        is bool [H, N, N]. With it, `scores` are those of the step, [H, N, N].
        """
        self.steps.append(tuple(np.asarray(x, np.float64) for x in (query, key, value)))
        self.has_key.append(bool(has_key))
        if not compute:
            return None
        queries, keys, values = map(np.stack, zip(*self.steps[-self.seq_len :], strict=True))
        has_key = np.array(self.has_key[-self.seq_len :])
        # Keys and values that no query attends to may be NaN.
        keys, values = (np.where(has_key[:, None, None], x, 0) for x in (keys, values))
        scale = 1 / np.sqrt(queries.shape[-1]) if scale is None else scale
        queries, keys, values = (x.swapaxes(0, 1) for x in (queries, keys, values))  # [H, n, ...]
        unfilled = self.seq_len - len(has_key)
        if mask is not None:
            has_key = has_key & mask[:, unfilled:, unfilled:]
        logits = np.where(has_key, scale * (queries @ keys.swapaxes(1, 2)), -np.inf)
        scores = softmax(logits)
        self.scores = np.pad(scores, ((0, 0), (unfilled, 0), (unfilled, 0)))
        return np.pad(scores @ values, ((0, 0), (unfilled, 0), (0, 0)))

    def take(self, query, key, value, scale=None, has_key=None, newest=None):
        """Take T steps at once, which is faster: [T, H, D], [T, H, D], [T, H, Dv].

        Returns:
            The outputs of the `newest` steps (None: of all), [newest, H, N, Dv].
        """
        count, n = len(query), self.seq_len
        self.steps += zip(*(np.asarray(x, np.float64) for x in (query, key, value)), strict=True)
        self.has_key += [True] * count if has_key is None else [bool(x) for x in has_key]
        queries, keys, values = zip(*self.steps[-(count + n) :], strict=True)
        has_key, taken = self.has_key[-(count + n) :], [True] * len(queries)
        newest = count if newest is None else newest
        outputs = []
        for first in range(count - newest, count, BLOCK):
            size = min(BLOCK, count - first)
            before = count - first - size
            q, taken_rows = windows_of(size, n, before, taken, queries)
            k, v, allowed = windows_of(size, n, before, has_key, keys, values)
            q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))  # [t, H, n, ...]
            by = 1 / np.sqrt(q.shape[-1]) if scale is None else scale
            logits = np.where(allowed[:, None, None], by * (q @ k.swapaxes(2, 3)), -np.inf)
            rows = np.where(taken_rows[:, None, :, None], softmax(logits) @ v, 0)
            outputs.append(rows)
        return np.concatenate(outputs)


def relative_error(output, expected):
    """Return max|output - expected| / max|expected|; NaN if there is a NaN."""
    output = np.asarray(output, np.float64)
    assert output.shape == expected.shape, (output.shape, expected.shape)
    largest = np.abs(expected).max(initial=0)
    return np.abs(output - expected).max(initial=0) / (largest if largest > 0 else 1)
