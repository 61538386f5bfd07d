"""Archives of what is kept of each example: damaged and strange ones."""

import zipfile

import numpy as np
import pytest

from uhl import archives, evidence, runs
from uhl.errors import UHLError


def test_a_damaged_archive_is_named_and_cells_without_predictions_stay_out(tmp_path):
    cell = runs.root() / "t" / "mood-s0"
    for name, files in {"port-a": ("manifest.json", "predictions.npz"), "quickstart": ("manifest.json",)}.items():
        (cell / name).mkdir(parents=True)
        for file in files:
            (cell / name / file).write_text(
                '{"parameters": {"profile": "t"}, "rows": []}' * (1 if "json" in file else 99)
            )
    archive = archives.pack("t", tmp_path / "t.zip")
    assert zipfile.ZipFile(archive).namelist() == ["mood-s0/port-a/manifest.json", "mood-s0/port-a/predictions.npz"]
    whole = bytearray(archive.read_bytes())
    place = whole.index(b"manifest.json") + 20
    whole[place] ^= 0xFF
    archive.write_bytes(whole)
    with pytest.raises(UHLError, match="is not an archive of runs"):
        archives.restore(archive)


def test_an_archive_without_cells_and_predictions_without_gold(tmp_path):
    with zipfile.ZipFile(tmp_path / "empty.zip", "w"):
        pass
    with pytest.raises(UHLError, match=r"empty.zip holds no cell; make an archive with: uhl pack"):
        archives.restore(tmp_path / "empty.zip")
    np.savez(tmp_path / "predictions.npz", **{"a/test/labels": [0], "a/test/gold": [0, 1], "a/test/length": [1, 1]})
    with pytest.raises(UHLError, match="has 1 test predictions of a for 2 gold labels; delete that folder"):
        evidence.counts(tmp_path, "a", "test", "accuracy")


@pytest.mark.parametrize(
    "name", ["../evil/x/manifest.json", "a-s0/x/run.sh", "/a-s0/x/manifest.json", "b/a-s0/x/manifest.json"]
)
def test_a_strange_archive_is_refused_and_writes_nothing(tmp_path, name):
    path = tmp_path / "a.zip"
    path.write_bytes(b"no zip")
    with pytest.raises(UHLError, match="is not an archive of runs"):
        archives.restore(path)
    for odd in ('{"parameters": {"profile": "p"}, "artefacts": []}', "[]", '{"parameters": 1}'):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a-s0/x/manifest.json", odd)
            archive.writestr("a-s0/x/predictions.npz", "")
        with pytest.raises(UHLError, match="is not an archive of runs"):
            archives.restore(path)
    with zipfile.ZipFile(path, "w") as archive:
        manifest = '{"parameters": {"profile": "p"}, "rows": []}'
        for entry in ("a-s0/x/manifest.json", "a-s0/x/predictions.npz", name):
            archive.writestr(entry, manifest)
    with pytest.raises(UHLError, match="holds other files"):
        archives.restore(path)
    assert not runs.root().exists()
