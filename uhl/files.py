"""Files that are whole or absent: hashes, and writes to a temporary name that is moved on success."""

from __future__ import annotations

import hashlib
import io
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from safetensors import SafetensorError

from uhl.errors import UHLError


def sha256(path: str | Path) -> str:
    """Hex sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def check_sha256(path: str | Path, expected: str, remedy: str) -> None:
    """Raise :class:`UHLError` unless the file is there with the expected hash; ``remedy`` ends the message."""
    if not Path(path).is_file():
        raise UHLError(f"{path} is missing; {remedy}")
    found = sha256(path)
    if found != expected:
        raise UHLError(f"{path} is corrupt: sha256 {found[:12]}..., expected {expected[:12]}...; {remedy}")


def read_yaml(path: str | Path) -> Any:
    """What a YAML file holds. Raises :class:`UHLError` with the place of what is no YAML."""
    try:
        return yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        place = getattr(error, "problem_mark", None)
        line = f", line {place.line + 1}" if place else ""
        raise UHLError(f"{path}{line}: no YAML ({getattr(error, 'problem', error)}); mend it") from error


def write_atomic(path: str | Path, write: Callable[[Path], object]) -> Path:
    """Call ``write(temporary_path)``, then move the result to ``path``, or to what that links to. An interruption
    leaves the old file whole; the new one has its permissions.

    Raises :class:`UHLError` where the file system refuses, as a full disk does.
    """
    path = Path(path)
    temporary: Path | None = None
    try:
        place = path.resolve()
        place.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=place.parent, prefix=f".{path.name}.", suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        temporary.chmod(place.stat().st_mode & 0o777 if place.exists() else 0o666 & ~_umask())
        os.replace(temporary, place)
    except (OSError, SafetensorError) as error:
        kept = "the older file is as it was" if path.exists() else "no file was left behind"
        raise UHLError(f"{path} could not be written ({error}); {kept}: free space or choose another folder") from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
    return path


def _umask() -> int:
    """The process's mask of file modes, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def write_text(path: str | Path, text: str) -> Path:
    """Write UTF-8 text through :func:`write_atomic`."""
    return write_atomic(path, lambda tmp: tmp.write_text(text, encoding="utf-8"))


def write_csv(path: str | Path, table: pd.DataFrame, digits: int = 6) -> Path:
    """Write a table through :func:`write_atomic`, its numbers with so many significant digits."""
    return write_atomic(path, lambda tmp: table.to_csv(tmp, index=False, float_format=f"%.{digits}g"))


def write_npz(path: str | Path, arrays: Mapping[str, np.ndarray]) -> Path:
    """:func:`write_atomic` for arrays by name, compressed; ``path`` ends in `.npz`."""
    return write_atomic(path, lambda tmp: tmp.write_bytes(npz(arrays)))


def npz(arrays: Mapping[str, np.ndarray]) -> bytes:
    """The bytes of a compressed `.npz`."""
    made = io.BytesIO()
    np.savez_compressed(made, **arrays)  # type: ignore[arg-type]
    return made.getvalue()


@contextmanager
def build_folder(target: Path) -> Iterator[Path]:
    """Yield an empty scratch folder beside ``target`` that becomes ``target`` when the block succeeds.

    Raises :class:`UHLError` where there can be none.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise UHLError(f"{target} could not be made ({error}); free space or choose another folder") from error
    with made as scratch:
        folder = Path(scratch) / "new"
        folder.mkdir()
        yield folder
        if target.exists():
            os.replace(target, Path(scratch) / "old")
        os.replace(folder, target)
