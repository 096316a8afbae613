"""States and plans in the form of versions whose attention rings were heads first."""

NEW_NAMES = {"query": "queries", "key": "keys", "value": "values"}
_OLD_NAMES = {new: old for old, new in NEW_NAMES.items()}


def old_state(state):
    """Return the state of a layer or model with the old names and axes of rings."""
    if not isinstance(state, dict):
        return state
    return {
        _OLD_NAMES.get(name, name): part.swapaxes(1, 2) if name in _OLD_NAMES else old_state(part)
        for name, part in state.items()
    }


def old_keras_state(described):
    """Return a plan's `keras_state` as older versions wrote it."""
    if not isinstance(described, dict):
        return described
    return {
        _OLD_NAMES.get(name, name): (
            [*part, "heads_first"] if name in _OLD_NAMES else old_keras_state(part)
        )
        for name, part in described.items()
    }


def new_state(state):
    """Convert a model's state from old names and axes to those of this version."""
    return {layer: _new_part(part) for layer, part in state.items()}


def _new_part(part):
    # Only a retroactive layer has rings of queries. Delayed queries have other axes than a ring.
    rings = {k: v for k, v in NEW_NAMES.items() if k != "query" or "softmax" in part}
    return {rings.get(k, k): x.swapaxes(1, 2) if k in rings else x for k, x in part.items()}
