"""What an error says, where the system's own words are no sentence."""

from __future__ import annotations


def sentence(error: Exception) -> str:
    """What the error says; of a file that cannot be used its name, why, and what to do."""
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    name = "a file" if error.filename is None else str(error.filename)
    return f"{name} cannot be used ({error.strerror}), expected one that can be: correct its name, or make room for it"
