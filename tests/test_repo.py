"""The repository itself: versions in step, notebooks whole and tidy, real data where a folder is named."""

import json
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import yaml

from uhl.grid import Grid, profiles
from uhl.runs import Settings
from uhl.stages import bearing

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def pins():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = [project["dependencies"], *project["optional-dependencies"].values()]
    return versions(entry for group in groups for entry in group)


def versions(entries):
    """Name to version, without the marker that says for which systems."""
    return dict(entry.lower().split(";")[0].split("==") for entry in entries)


def locked():
    lock = versions((ROOT / "requirements.lock").read_text().splitlines())
    return {name.replace("_", "-"): version for name, version in lock.items()}


def test_lock_environment_and_project_agree():
    lock = locked()
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"][-1]["pip"]
    assert environment.pop() == "-e ."
    assert versions(environment) == pins()
    assert {name: lock.get(name) for name in pins()} == pins()
    assert lock["torch"] == "2.13.0"


def test_what_is_installed_is_what_is_locked():
    """What the project names, and all that comes in through that."""
    from importlib.metadata import requires, version

    from packaging.requirements import Requirement

    lock = locked()
    left, seen = [(name, "") for name in pins()], set()
    while left:
        seen.add(found := left.pop())
        name, extra = found
        if not name.startswith(("nvidia-", "cuda-")):  # torch's own, elsewhere than on CPUs
            assert version(name).split("+")[0] == lock.get(name), name
        for text in requires(name) or ():
            more = Requirement(text)
            if more.marker is None or more.marker.evaluate({"extra": extra}):
                needed = {(more.name.lower().replace("_", "-"), e) for e in ("", *more.extras)}
                left += needed - seen - set(left)


def code_cells(path):
    book = json.loads(path.read_text())
    return [c for c in book["cells"] if c["cell_type"] == "code"], book


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_whole_and_tidy(path):
    cells, book = code_cells(path)
    tags = [c["metadata"].get("tags", []) for c in cells]
    assert sum("parameters" in t for t in tags) == 1
    assert all(c["execution_count"] for c in cells), "stored without execution counts, so nbval compares nothing"
    compared = [c for c, t in zip(cells, tags, strict=True) if c["outputs"] and "nbval-ignore-output" not in t]
    assert len(compared) >= 3, "too little output that nbval compares"
    assert not any(o["output_type"] == "error" for c in cells for o in c["outputs"])
    assert "widgets" not in book["metadata"]
    assert "papermill" not in book["metadata"]
    assert "version" not in book["metadata"]["language_info"], "pre-commit would change it"
    lengths = sorted(len("".join(c["source"]).splitlines()) for c in cells)
    assert lengths[-1] <= 25
    assert lengths[len(lengths) // 2] <= 8
    assert 20 <= len(book["cells"]) <= 45
    text = path.read_text()
    assert not re.search(r'"/(home|root|tmp|work|Users)/', text)
    assert not any(re.search(r"^class ", "".join(c["source"]), re.M) for c in cells)
    assert "What we saw" in text


def test_nbval_fails_on_a_changed_output(tmp_path):
    """Without this, a notebook stored without outputs or with everything ignored would pass unseen."""
    book = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    book.cells = [nbformat.v4.new_code_cell("print('atoms:', 64 + 64)", execution_count=1)]
    for told in ("128", "129"):
        book.cells[0].outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"atoms: {told}\n")]
        nbformat.write(book, tmp_path / f"{told}.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval", "-rA", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert re.search(r"^PASSED .*128\.ipynb", done.stdout, re.M)
    assert re.search(r"^FAILED .*129\.ipynb", done.stdout, re.M)
    assert "1 failed, 1 passed" in done.stdout


@pytest.mark.parametrize("profile", profiles())
def test_profiles_override_every_stored_parameter(profile):
    """A notebook's stored parameters are those of a small demonstration; none may leak into a profile's run."""
    folder = ROOT / "params" / profile
    values = {}
    files = [folder / name for name in ("settings.yaml", "attempts.yaml", "copies.yaml")]
    for file in filter(Path.is_file, files):
        values |= yaml.safe_load(file.read_text())
    given = set(values) | ({"refresh_steps"} if "refresh" not in values.get("arms", ["refresh"]) else set())
    per_cell = {"target", "task", "seed", "hosts", "projectors"}
    for path in NOTEBOOKS:
        if path.stem[:2] in {"00", "01", "08", "09"}:  # these run with their stored parameters
            continue
        if path.stem[:2] in {"07", "10"} and not all(map(Path.is_file, files)):  # not of this profile
            continue
        cells, _ = code_cells(path)
        cell = next(c for c in cells if "parameters" in c["metadata"].get("tags", []))
        names = {line.split("=")[0].strip() for line in cell["source"]}
        assert names <= given | per_cell, path.stem


def test_notebooks_as_stored_are_the_demo_profile():
    """So that cells which a reader stepped through and those of `make run PROFILE=demo` may stand in one table."""
    made = Grid.read("demo")
    for stage, book in (
        ("pretrain-canonical", "02_pretrain"),
        ("port-minilm-l3", "03_port"),
        ("tune-minilm-l3", "04_tune"),
        ("baselines-minilm-l6", "05_baselines"),
    ):
        cells, _ = code_cells(ROOT / "notebooks" / f"{book}.ipynb")
        cell = next(c for c in cells if "parameters" in c["metadata"].get("tags", []))
        stored: dict[str, object] = {}
        exec("".join(cell["source"]), {}, stored)
        asked = made.settings(f"movies-s0/{stage}")
        names = bearing(stage, asked)
        assert Settings(**stored).model_dump(include=names) == asked.model_dump(include=names), book


def test_papermill_refuses_an_unknown_parameter(tmp_path, monkeypatch):
    import papermill

    monkeypatch.setenv("UHL_RUNS", str(tmp_path))
    with pytest.raises(papermill.PapermillExecutionError, match="taks: Extra inputs are not permitted"):
        papermill.execute_notebook(
            str(ROOT / "notebooks" / "06_analysis.ipynb"),
            str(tmp_path / "out.ipynb"),
            parameters={"taks": "movies"},
            cwd=str(ROOT / "notebooks"),
            progress_bar=False,
        )
    assert [p.name for p in tmp_path.iterdir()] == ["out.ipynb"]


EARLIER = {"offline-taught", "offline-transfer"}  # profiles whose ports are of the rules before
GOING_ON = {"local"}  # profiles whose archive has some cells of today's grid, and whose tables are of the one before


@pytest.mark.parametrize("profile", sorted(path.stem for path in ROOT.glob("figures/*.zip")))
def test_the_committed_evidence_is_whole_and_gives_the_committed_scores(tmp_path, monkeypatch, profile):
    """What README says that `uhl restore` and `make table` do, without the figures."""
    from uhl import archives, audit, grid, report, runs, tasks

    if lost := [t for t in grid.Grid.read(profile).trained if t not in tasks.OFFLINE and not (DATA / t).is_dir()]:
        pytest.skip(f"UHL_DATA names no folder with {lost[0]}/")
    monkeypatch.setenv("UHL_RUNS", str(tmp_path))
    for name in {profile, report.FIRST}:  # others are compared with that
        archives.restore(ROOT / "figures" / f"{name}.zip")
    lacks = audit.missing(profile)
    by_rules = [entry for entry in lacks if "ported by other rules" in entry]
    assert bool(by_rules) == (profile in EARLIER)
    lacks = [entry for entry in lacks if entry not in by_rules]
    if profile in GOING_ON:
        assert lacks
        made = {str(cell.relative_to(tmp_path / profile)) for cell in runs.manifests(profile)}
        assert not made & {entry.partition(":")[0] for entry in lacks}  # none is of an old grid
        return
    assert lacks == pd.read_csv(ROOT / report.figures_of(profile) / "missing.csv")["missing"].tolist()
    made, kept = runs.load_results(profile), pd.read_csv(ROOT / report.figures_of(profile) / "results.csv")
    assert made["score"].tolist() == pytest.approx(kept["score"].tolist(), rel=1e-5)
    assert (made["arm"] == kept["arm"]).all()


@pytest.mark.slow
def test_notebook_06_makes_the_committed_tables_from_the_archive_in_a_minute(tmp_path, monkeypatch):
    """Without a model, and the same numbers; seconds are those of the processor, as other tests run beside it."""
    from uhl import archives

    monkeypatch.setenv("UHL_RUNS", str(tmp_path))
    archives.restore(ROOT / "figures" / "offline-full.zip")
    made, before = tmp_path / "offline-full" / "analysis", resource.getrusage(resource.RUSAGE_CHILDREN)
    call = [Path(sys.executable).parent / "papermill", "notebooks/06_analysis.ipynb", tmp_path / "06.ipynb"]
    call += ["--cwd", "notebooks", "--no-progress-bar", "-p", "profile", "offline-full"]
    environment = {**os.environ, "UHL_BATCH": "1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(call, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 60
    tables = sorted(file.name for file in made.glob("*.csv"))
    assert {"summary.csv", "paired.csv", "claims.csv", "leaderboard.csv", "gap_recovered.csv"} <= set(tables)
    for name in tables:
        found, kept = (pd.read_csv(folder / name) for folder in (made, ROOT / "figures"))
        pd.testing.assert_frame_equal(found, kept, rtol=1e-5)


def test_the_adapters_that_lie_here_are_those_of_their_runs_and_are_put_back(tmp_path, monkeypatch):
    from uhl import archives, runs, store

    monkeypatch.setenv("UHL_RUNS", str(tmp_path))
    files = sorted(ROOT.glob("adapters/*/*.safetensors"))
    assert ROOT / "adapters" / "offline-full" / "movies-s0-canonical.safetensors" in files
    for folder in {file.parent for file in files}:
        archives.restore(ROOT / "figures" / f"{folder.name}.zip", folder)  # which compares hashes
    back = sorted(tmp_path.glob("*/*-s*/pretrain-*/adapter.safetensors"))
    assert sorted(file.read_bytes() for file in files) == sorted(file.read_bytes() for file in back)
    for file in files:
        assert file.stat().st_size < 1_000_000
        assert store.load(file).info["source"] == "minilm-l6"
        assert {entry["protocol"] for entry in runs.manifests(file.parent.name).values()} == {runs.PROTOCOL}


SECTIONS = {  # of figures/README.md, and the folders of the profiles that each tells of; "": offline-full
    "The profile offline-full": ("",),
    "Real data": ("local", "local-boolq"),
    "Another task's adapter": ("offline-transfer", "local-transfer"),
    "Sixteen atoms a token": ("offline-sixteen",),
    "A teacher": ("offline-taught",),
}


def intervals_of_tables(folders):
    """Values with their intervals, (rows, 3), of either sign, in the tables of some folders of figures."""
    known = []
    for file in (file for folder in folders for file in (ROOT / "figures" / folder).glob("*.csv")):
        table = pd.read_csv(file).select_dtypes("number")
        for low in (c for c in table if "low" in c and c.replace("low", "high") in table):
            ends = table[[low, low.replace("low", "high")]]
            values = [c for c in table if not re.search(r"^p( |$)|low|high|seeds", c)]
            known += [ends.assign(value=table[c])[["value", *ends]].dropna().to_numpy() for c in values]
    rows = np.concatenate(known)
    return np.concatenate([rows, -rows[:, [0, 2, 1]]])


def check_intervals(text, folders):
    """``1.8 [0.7, 2.8]`` in a sentence: a value and its interval, as some row has them. Returns how many there are."""
    rows, number = intervals_of_tables(folders), r"(-?\d+\.\d+)"
    prose = " ".join(line for line in text.splitlines() if not line.startswith("|"))
    said = re.findall(rf"{number}\s+\[{number},\s+{number}\]", prose)
    for told in said:
        half = 0.5 * 10.0 ** -len(told[0].partition(".")[2]) + 1e-9
        assert (np.abs(rows - [float(x) for x in told]) <= half).all(1).any(), "{} [{}, {}]".format(*told)
    return len(said)


def test_every_interval_in_prose_is_one_of_a_table_of_its_profile():
    folders = sorted({folder for own in SECTIONS.values() for folder in own})
    assert check_intervals((ROOT / "README.md").read_text(), folders) > 15
    titles = re.split(r"^## (.*)\n", (ROOT / "figures" / "README.md").read_text(), flags=re.MULTILINE)
    sections = dict(zip(titles[1::2], titles[2::2], strict=True))
    assert sum(check_intervals(sections[title], own) for title, own in SECTIONS.items()) > 80
    assert not any(check_intervals(text, folders) for title, text in sections.items() if title not in SECTIONS)


@pytest.mark.parametrize("file", ["retrained.yaml", "source.yaml"])
def test_baselines_have_the_searched_rates_in_every_profile_that_has_searched_ones(file):
    others = ("offline-transfer", "local-transfer", "offline-sixteen", "offline-taught", "local-boolq")
    full, local, *lent = (
        yaml.safe_load((ROOT / "params" / name / file).read_text()) for name in ("offline-full", "local", *others)
    )
    assert full == local
    for given in lent:
        rates = {name: value for name, value in given.items() if name.endswith("_rate")}
        assert rates.items() <= full.items()
        assert set(given) <= {*rates, "baselines"}


def test_every_rate_in_use_is_the_best_of_as_many_trials():
    """Each method's, of the first four values that the profile's search lists; what was tried beyond them was worse."""
    params = ROOT / "params" / "offline-full"
    space, used = {}, {}
    for method, ranges in yaml.safe_load((params / "search.yaml").read_text()).items():
        ((name, values),) = ranges.items()
        assert values == sorted(values)
        space[method] = name, values
    for file in ("settings", "retrained", "source"):
        used[file] = yaml.safe_load((params / f"{file}.yaml").read_text())
    found = pd.read_csv(ROOT / "figures" / "search.csv").query("steps == 500 or state == 'pruned'")
    found = found[found["train_size"].isna()]
    assert set(found["method"]) == set(space)
    for (method, target), trials in found.groupby(["method", found["target"].fillna("")]):
        name, values = space[method]
        file = "settings" if name in used["settings"] else "retrained" if target else "source"
        tried = trials.assign(value=trials["settings"].str.removeprefix(f"{name} ").astype(float))
        assert sorted(tried["value"]) == values
        assert used[file][name] in values[1:-1]  # a poorer one on either side
        for some in (values[:4], values):
            best = tried[tried["value"].isin(some) & (tried["state"] == "complete")]
            assert used[file][name] in best.loc[best["score"] == best["score"].max(), "value"].tolist()


def test_the_rate_of_sixteen_atoms_is_the_best_of_as_many_trials():
    folder = ROOT / "params" / "offline-sixteen"
    ((method, ranges),) = yaml.safe_load((folder / "search.yaml").read_text()).items()
    found = pd.read_csv(ROOT / "figures" / "offline-sixteen" / "search.csv")
    assert (set(found["method"]), set(found["split"]), set(found["state"])) == ({method}, {"dev"}, {"complete"})
    tried = found["settings"].str.removeprefix("rate ").astype(float)
    assert sorted(tried) == ranges["rate"]
    assert len(tried) == 4
    used = yaml.safe_load((folder / "settings.yaml").read_text())
    assert used["rate"] == tried[found["score"].idxmax()]
    assert set(found["steps"]) == {used["steps"]}


def make(folder, *arguments, **variables):
    """Whether make did it, and what it said, in this environment as it is installed; not as a part of another make."""
    installed = Path(sys.executable).parent.parent
    call = ["make", f"VENV={installed}", "-o", f"{installed}/.installed", *arguments]
    kept = {name: value for name, value in os.environ.items() if name not in {"MAKEFLAGS", "MFLAGS", "MAKELEVEL"}}
    done = subprocess.run(call, cwd=folder, capture_output=True, text=True, env=kept | variables, timeout=300)
    return not done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["TARGET=minilm-l3", "PROFILE=of-nobody"], r"no profile of-nobody; profiles: .*\boffline\b"),
        (["TARGET=nobody"], "no params/offline/nobody.yaml; targets: minilm-4x312 "),
        (["TARGET=minilm-l3", "TASK=of-nobody"], "uhl: unknown task 'of-nobody'; offline names: movies, amazon; "),
    ],
)
def test_make_port_says_what_it_takes_before_anything_is_run(tmp_path, arguments, told):
    did, said = make(ROOT, "port", *arguments, UHL_RUNS=str(tmp_path))
    assert not did
    assert re.match(told, said)
    assert not list(tmp_path.iterdir())


def test_make_clean_asks_first(tmp_path):
    (tmp_path / "runs" / "offline").mkdir(parents=True)
    shutil.copy(ROOT / "Makefile", tmp_path)
    did, said = make(tmp_path, "clean")
    assert not did
    assert said.startswith("make clean removes runs/ and all that ran there; add CONFIRM=1")
    assert (tmp_path / "runs" / "offline").is_dir()
    assert make(tmp_path, "clean", "CONFIRM=1")[0]
    assert not (tmp_path / "runs").exists()


def snakemake(runs, *arguments):
    """What Snakemake said, with ``runs`` as the folder of runs."""
    command = [Path(sys.executable).parent / "snakemake", *arguments]
    environment = {**os.environ, "UHL_RUNS": str(runs)}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_snakemake_plans_the_whole_grid_for_a_cluster(tmp_path):
    said = snakemake(tmp_path, "-n", "--workflow-profile", "profiles/slurm", "--config", "profile=offline-full")
    counts = dict(re.findall(r"^(\w+)\s+(\d+)$", said, re.M))
    assert counts["pretrain"] == "12"
    assert (counts["port"], counts["tune"]) == ("18", "14")
    assert (counts["baselines"], counts["baselines_of_source"]) == ("18", "6")
    assert not {"attempts", "compress"} & set(counts)  # by `make attempts` and `make copies` alone
    assert "cpus_per_task=2" in said


def test_a_cell_whose_folder_was_removed_is_run_again(tmp_path):
    from uhl.grid import Grid

    for cell in [*Grid.read("demo").cells(), "analysis"]:  # the analysis is the newest
        if cell != "movies-s0/baselines-minilm-l6":
            (tmp_path / "demo" / cell).mkdir(parents=True)
            (tmp_path / "demo" / cell / "manifest.json").touch()
    said = snakemake(tmp_path, "-n", "--cores", "1", "--rerun-triggers", "mtime", "--config", "profile=demo")
    counts = dict(re.findall(r"^(\w+)\s+(\d+)$", said, re.M))
    assert counts == {"all": "1", "analysis": "1", "baselines_of_source": "1", "total": "3"}


def test_a_port_of_a_lent_adapter_trains_the_lender_first(tmp_path):
    cell = tmp_path / "offline-transfer" / "amazon-s1" / "port-minilm-l3" / "manifest.json"
    said = snakemake(tmp_path, "-n", "--cores", "1", "--config", "profile=offline-transfer", "--", cell)
    assert dict(re.findall(r"^(\w+)\s+(\d+)$", said, re.M)) == {"port": "1", "pretrain": "4", "total": "5"}
    asked = re.findall(r"^\s+input: (?:\S+, )*\S+/movies-s1/pretrain-(\w+)/manifest\.json$", said, re.M)
    assert sorted(asked) == ["canonical", "dimension"]


def test_a_cell_is_given_all_its_settings_and_none_that_its_notebook_is_stored_with(tmp_path):
    """A profile that says nothing of a setting has its default."""
    from uhl.grid import PARAMS
    from uhl.runs import read_yaml

    profile, stage = "offline-sixteen", "movies-s2/port-minilm-l3"
    assert len(set(Settings.model_fields) - set(read_yaml(PARAMS / profile / "settings.yaml"))) > 5
    cell = tmp_path / profile / stage / "manifest.json"
    said = snakemake(tmp_path, "-n", "-p", "--cores", "1", "--config", f"profile={profile}", "--", cell)
    (line,) = [line for line in said.splitlines() if "papermill notebooks/03_port.ipynb" in line]
    words = shlex.split(line)
    given = yaml.safe_load(words[words.index("-y") + 1])
    assert given == Grid.read(profile).settings(stage).model_dump(mode="json")
    assert given["task"] == "movies"
    assert given["seed"] == 2
    assert given["target"] == "minilm-l3"


@pytest.mark.slow
def test_two_local_workers_run_cells_side_by_side_and_once(tmp_path):
    """Two cells of the demo profile, on real models."""
    cells = [tmp_path / "demo" / "movies-s0" / f"pretrain-{p}" / "manifest.json" for p in ("canonical", "dimension")]
    call = ["--nolock", "--cores", "2", "--rerun-triggers", "mtime", "--config", "profile=demo", "--", *cells]
    assert len(re.findall(r"\d\d:\d\d:\d\d  started  ", snakemake(tmp_path, *call))) == 2
    ran = [json.loads((c.parent / "notebook.ipynb").read_text())["metadata"]["papermill"] for c in cells]
    assert max(r["start_time"] for r in ran) < min(r["end_time"] for r in ran)
    table = pd.read_csv(tmp_path / "demo" / "results.csv")
    assert set(table["arm"]) == {"uhl-canonical", "uhl-dimension"}  # both wrote it, one after the other
    before = [c.stat().st_mtime_ns for c in cells]
    assert "Nothing to be done" in snakemake(tmp_path, *call)
    assert [c.stat().st_mtime_ns for c in cells] == before


# --- real data, where UHL_DATA names a folder of it ---

DATA = Path(os.environ.get("UHL_DATA", "/nonexistent"))
REAL = {
    "sst2": ("sst2", "sentence", {"text": "sentence"}, (), 67_349),
    "conll2003": ("conll2003", "token", {"tags": "ner_tags"}, (), 14_000),
    "amazon_cells": ("amazon_cells", "sentence", {"text": "sentence"}, (), 500),
}


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="UHL_DATA names no folder with sst2/, conll2003/, boolq/, amazon_cells/")
@pytest.mark.parametrize("name", REAL)
def test_real_data_trains_above_its_trivial_baseline(name, tmp_path):
    import torch

    from uhl import stages, tasks
    from uhl.adapter import UHLAdapter
    from uhl.config import Sizes, TrainConfig
    from uhl.head import fit_head
    from uhl.models import load_encoder
    from uhl.peft_method import attach
    from uhl.train import Classifier, predict, train

    folder, kind, columns, labels, least = REAL[name]
    if not (DATA / folder).is_dir():
        pytest.skip(f"{DATA} has no {folder}/")
    whole = tasks.load_task(tasks.TaskSpec(str(DATA / folder), kind, columns, labels))
    assert len(whole.data["train"]) > 0.8 * least
    few = {"sentence": 1500, "token": 400}[kind]
    task = whole.subset("train", few, 0).subset("dev", 400, 0).subset("test", 400, 0)
    encoder = stages.freeze(load_encoder("minilm-l6"))
    adapter = UHLAdapter(Sizes(projector="dimension"))
    part = adapter.add_task("t", task.labels, task.kind)
    part.bias.requires_grad_(False)
    torch.manual_seed(0)
    config = TrainConfig(steps=40, max_length=64)
    with attach(encoder.model, adapter, "t") as attached:
        classifier = Classifier(encoder.model, part, None, attached, config)
        fit_head(classifier, encoder, task, config.max_length)
        train(classifier, encoder, task, config, tmp_path / "trainer")
        found = predict(classifier, encoder, task, "test", max_length=config.max_length)
    _, trivial = tasks.majority(task)
    assert found.score > trivial, (found.score, trivial)


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "boolq").is_dir(), reason="UHL_DATA names no folder with boolq/")
def test_boolq_is_read_and_trains_above_its_majority_class(tmp_path):
    """On a larger host than the others: 40 minutes, with UHL_LONG=1 alone."""
    import boolq

    from uhl import tasks

    for split in ("train", "test"):  # some copies call a split that they made themselves `derived`
        (found, *_) = sorted((DATA / "boolq").glob(f"*{split}.jsonl*"))
        (tmp_path / f"{split}{''.join(found.suffixes)}").symlink_to(found.resolve())
    whole = tasks.load_task(tasks.TaskSpec(str(tmp_path), "pair", boolq.COLUMNS, ()))
    assert len(whole.data["train"]) > 0.8 * 1_000
    if "UHL_LONG" not in os.environ:
        pytest.skip("the file is read; set UHL_LONG=1 to train, 40 minutes")
    found, trivial = boolq.run(tmp_path)
    assert found > trivial
