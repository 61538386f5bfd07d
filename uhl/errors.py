"""The one error class of the package: each message names what was wrong, what was expected, and the remedy."""


class UHLError(ValueError):
    """Bad input that the caller can mend: an unknown name, a corrupt file, a wrong shape, a mismatched task."""


def one_of(value: str, allowed: object, what: str) -> str:
    """Return ``value`` when it is in ``allowed``; raise a :class:`UHLError` that lists the choices otherwise."""
    choices = list(allowed)  # type: ignore[call-overload]
    if value not in choices:
        raise UHLError(f"unknown {what} {value!r}; choose one of: {', '.join(map(str, choices))}")
    return value
