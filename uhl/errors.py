"""The package's errors: each message names what was wrong, what was expected, and the remedy."""


class UHLError(ValueError):
    """Bad input that the caller can mend: an unknown name, a corrupt file, a wrong shape, a mismatched task."""


class DivergenceError(UHLError):
    """Training gave a loss that is not finite."""


def one_of(value: str, allowed: object, what: str) -> str:
    """Return ``value`` when it is in ``allowed``; raise a :class:`UHLError` that lists the choices otherwise."""
    choices = list(allowed)  # type: ignore[call-overload]
    if value not in choices:
        raise UHLError(f"unknown {what} {value!r}; choose one of: {', '.join(map(str, choices))}")
    return value
