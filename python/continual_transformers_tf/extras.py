"""The sentences that say which extra of the package installs what is missing."""


def install(*extras: str) -> str:
    """Return the command that installs extras, for an installed wheel and for a checkout.

    pip finds the package installed, and adds only what the extras name.
    """
    return f"pip install 'continual-transformers-tf[{','.join(extras)}]'"


def missing(package: str, *extras: str) -> str:
    """Return a sentence: a package is missing, and the extras that install it."""
    names = " and ".join(extras)
    which = "extra" if len(extras) == 1 else "extras"
    verb = "installs" if len(extras) == 1 else "install"
    return f"{package} is missing. The {which} {names} {verb} it: {install(*extras)}"
