"""The sentences that say which extra of the package installs what is missing."""

from collections.abc import Sequence


def install(*extras: str) -> str:
    """Return the command that installs extras, for an installed wheel and for a checkout.

    pip finds the package installed, and adds only what the extras name.
    """
    return f"pip install 'continual-transformers-tf[{','.join(extras)}]'"


def missing(packages: Sequence[str], *extras: str) -> str:
    """Return a sentence: packages are missing, and the extras that install them."""
    is_missing, it = ("is missing", "it") if len(packages) == 1 else ("are missing", "them")
    which = f"extra {extras[0]} installs" if len(extras) == 1 else f"extras {_and(extras)} install"
    return f"{_and(packages)} {is_missing}. The {which} {it}: {install(*extras)}"


def _and(names: Sequence[str]) -> str:
    *before, last = names
    return f"{', '.join(before)} and {last}" if before else last
