import io
import json
import os
import shutil
import time
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from uhl import archives, audit, claims, grid, report, results, runs, stages, stats, viz
from uhl.baselines import SPARSE
from uhl.config import ARMS, CONTROLS, METHODS
from uhl.errors import UHLError
from uhl.files import build_folder, write_text
from uhl.grid import PARAMS
from uhl.runs import Settings
from uhl.stages import bearing


def test_an_unknown_or_mistyped_parameter_is_an_error():
    with pytest.raises(UHLError, match="sede: Extra inputs are not permitted; settings are: profile, source"):
        runs.read_parameters({"sede": 3, "_private": 1, "function": len})
    with pytest.raises(UHLError, match="seed"):
        runs.read_parameters({"seed": "three"})
    assert runs.read_parameters({"seed": 3, "In": [], "pd": pd}).seed == 3


def test_a_notebook_may_be_run_again_in_the_same_kernel():
    """Plain values that later cells left behind are no parameters; a mistyped one in a cell of literals still is."""
    read = "settings = runs.read_parameters(globals())"
    names = {"seed": 4, "outcomes": {}, "sentence": "the plot", "rows": []}
    first = ["", "import pandas", "seed = 3", read, "outcomes = {}\nfor arm in arms:\n    pass", "rows = list(x)"]
    assert runs.read_parameters({**names, "In": [*first, "import pandas", "seed = 4", read]}).seed == 4
    assert runs.read_parameters({**names, "In": [*first, read]}).seed == 4  # that cell alone
    injected = ["", "seed = 3", "# Parameters\nsede = 5", read]
    with pytest.raises(UHLError, match="sede: Extra inputs"):
        runs.read_parameters({"seed": 3, "sede": 5, "In": injected})
    assert runs.read_parameters({"seed": 5, "sede": 5, "In": [*injected, "seed = 5", read]}).seed == 5  # mended


def test_rows_follow_the_contract():
    assert tuple(runs.row(Settings(), phase="tuned")) == runs.COLUMNS
    with pytest.raises(UHLError, match="unknown column"):
        runs.row(Settings(), phase="tuned", colour="red")
    with pytest.raises(UHLError, match="phase 'later'"):
        runs.row(Settings(), phase="later")


NUMBERS = {"n": 2, "adapter_bytes": 1, "trainable_params": 1, "extra_flops_pct": 0, "active_atoms": 0, "seconds": 1}


def write(seed):
    settings = Settings(profile="p", seed=seed)
    made = runs.row(settings, target="x", arm="a", phase="tuned", split="test", metric="accuracy", score=50, **NUMBERS)
    return runs.write_manifest(settings, "tune-x", [made], labels=["n", "p"])


def test_results_are_made_from_the_manifests_and_never_repeat():
    for seed in (1, 0, 1):
        path = write(seed)
    assert runs.load_results("p")["seed"].tolist() == [0, 1]
    entry = json.loads(path.read_text())
    assert {"parameters", "versions", "hardware", "commit", "rows", "artefacts"} <= set(entry)
    assert entry["versions"]["torch"].startswith("2.13.0")


def test_results_are_those_of_the_cells_that_are_there():
    first, second = write(0), write(1)
    shutil.rmtree(first.parent)  # as messages advise
    assert runs.load_results("p")["seed"].tolist() == [1]
    shutil.rmtree(second.parent)
    with pytest.raises(UHLError, match="has no finished cells; run the profile first: make run PROFILE=p"):
        runs.load_results("p")


def changed(path, **values):
    """A manifest with other values in its rows."""
    entry = json.loads(path.read_text())
    path.write_text(json.dumps(entry | {"rows": [row | values for row in entry["rows"]]}))


def test_results_that_are_missing_repeated_or_mixed():
    with pytest.raises(UHLError, match="make run PROFILE=p"):
        runs.load_results("p")
    path = write(0)
    shutil.copytree(path.parent, path.parents[1] / "tune-again")
    with pytest.raises(UHLError, match="repeated rows, such as .*: two cells measured the same"):
        runs.load_results("p")
    shutil.rmtree(path.parents[1] / "tune-again")
    for other in (write(1), path):  # one, then both
        changed(other, profile="q")
        with pytest.raises(UHLError, match="holds rows of profile q; move their cells"):
            runs.load_results("p")


@pytest.mark.parametrize(
    ("column", "value", "said"),
    [
        ("adapter_bytes", None, "nothing for adapter_bytes of x, movies, a, tuned, 0, test, and 1 such rows"),
        ("n", None, "nothing for n of"),
        ("score", "high", "'high' for score of"),
        ("score", float("inf"), "for score of"),
        ("steps", "many", "'many' for steps of"),
    ],
)
def test_results_that_are_no_numbers(column, value, said):
    changed(write(0), **{column: value})
    write(1)
    with pytest.raises(UHLError, match=said):
        runs.load_results("p")


def test_manifests_that_are_damaged():
    path = write(0)
    for text, said in (("{", "is damaged"), ("[]", "is not a cell's manifest")):
        path.write_text(text)
        with pytest.raises(UHLError, match=f"manifest.json {said}.*; delete its folder and run the cell again"):
            runs.load_results("p")


def test_names_that_look_like_numbers_are_names():
    settings = Settings(profile="2024", task="7")
    made = runs.row(
        settings, target="null", arm="a", phase="tuned", split="test", metric="accuracy", score=50, **NUMBERS
    )
    runs.write_manifest(settings, "tune-null", [made], labels=["n", "p"])
    (row,) = runs.load_results("2024").to_dict("records")
    assert (row["profile"], row["task"], row["target"]) == ("2024", "7", "null")


OWN_DATA = {"local", "local-boolq", "local-transfer"}


@pytest.mark.parametrize("profile", sorted({*grid.profiles()} - OWN_DATA))
def test_every_profile_is_whole(profile):
    made = grid.Grid.read(profile)
    folder = grid.PARAMS / profile
    adapters = len(made.projectors)
    each = adapters + 1 + 3 * len(made.targets) + 2 * len(made.ported)
    lent = adapters * len(made.seeds) * (len(made.trained) - len(made.tasks))
    assert len(set(made.cells())) == len(made.seeds) * len(made.tasks) * each + sum(map(len, made.once.values())) + lent
    for name in made.hosts:
        path = folder / f"{name}.yaml"
        first = path.read_text().splitlines()[0]
        assert first.startswith("# make port TARGET=" + name), path
        assert runs.slug(runs.read_yaml(path)["target"]) == name
    assert audit.missing(profile) == made.cells()


def test_a_task_that_lends_its_adapter_is_trained_and_no_more():
    made = grid.Grid.read("offline-transfer")
    assert (made.lends("amazon"), made.lends("movies")) == ("movies", None)
    cells = [c for c in made.cells() if c.startswith("movies")]
    assert cells == [f"movies-s{seed}/pretrain-{p}" for seed in (0, 1, 2) for p in ("canonical", "dimension")]
    values = grid.Grid.read("offline-transfer").model_dump() | {"tasks": ("movies", "amazon")}
    assert "movies-s0/tune-minilm-l3" in grid.Grid(**values).cells()
    assert grid.Grid.read("offline").lends("movies") is None


def test_a_target_may_be_ported_to_and_not_tuned_on():
    values = grid.Grid.read("offline").model_dump() | {"seeds": (0,), "ported": ("mpnet-base",)}
    cells = grid.Grid(**values).cells()
    assert [c for c in cells if "mpnet" in c] == ["movies-s0/port-mpnet-base", "movies-s0/baselines-mpnet-base"]
    assert "movies-s0/tune-minilm-l3" in cells


def test_a_grid_names_models_to_port_to_and_a_profile_that_there_is(tmp_path, monkeypatch):
    shutil.copytree(PARAMS / "offline-sixteen", tmp_path / "offline-sixteen")
    monkeypatch.setattr(grid, "PARAMS", tmp_path)
    with pytest.raises(UHLError, match="`beside: offline-full`, and there is no such profile"):
        grid.Grid.read("offline-sixteen")
    values = yaml.safe_load((file := tmp_path / "offline-sixteen" / "grid.yaml").read_text())
    file.write_text(yaml.safe_dump(values | {"beside": None, "ported": []}))
    with pytest.raises(UHLError, match="no model to port to; name some in `targets` or in `ported`"):
        grid.Grid.read("offline-sixteen")


@pytest.mark.parametrize(
    ("profile", "settings"),
    [
        ("offline-sixteen", {"top_k", "lambda_f"}),
        ("offline-transfer", {"source_task"}),
        ("offline-taught", {"teacher"}),
    ],
)
def test_what_sets_a_profile_apart_from_the_one_it_is_compared_with(profile, settings):
    """Beside what is run: its arms and baselines. The most that atoms can cost in the loss is the same."""
    compared = (profile, grid.Grid.read(profile).beside)
    own, other = (Settings(**runs.read_yaml(PARAMS / name / "settings.yaml")) for name in compared)
    apart = {name for name, value in own if value != getattr(other, name)}
    assert apart - {"arms", "baselines"} == {"profile"} | settings
    assert own.lambda_f * own.top_k == other.lambda_f * other.top_k


@pytest.mark.parametrize("profile", [p for p in grid.profiles() if grid.Grid.read(p).beside])
def test_baselines_are_run_alike_in_a_profile_and_the_one_it_is_compared_with(profile):
    """So that those of the other are taken; the sparse ones have the adapter's own settings."""
    mine = grid.Grid.read(profile)
    theirs = grid.Grid.read(mine.beside)
    shared = [cell for cell in mine.cells() if "/baselines-" in cell and cell in theirs.cells()]
    assert shared
    for cell in shared:
        both = mine.settings(cell), theirs.settings(cell)
        for method in set(both[0].baselines) & set(both[1].baselines) - {*SPARSE}:
            own, other = (stages.decisive(s, cell.split("/")[1], baselines=(method,)) for s in both)
            assert {name for name in own if own[name] != other[name]} == {"profile"}


def test_a_file_keeps_its_permissions_and_its_link(tmp_path):
    before = os.umask(0o077)
    try:
        private = write_text(tmp_path / "private", "a")
    finally:
        os.umask(before)
    assert private.stat().st_mode & 0o777 == 0o600
    private.chmod(0o640)
    (tmp_path / "link").symlink_to(private)
    write_text(tmp_path / "link", "b")
    assert (tmp_path / "link").is_symlink()
    assert private.read_text() == "b"
    assert private.stat().st_mode & 0o777 == 0o640


def lacking(profile):
    """What a profile lacks, but for ports of other rules: an archive may be of a release before."""
    return [entry for entry in audit.missing(profile) if "by other rules" not in entry]


def test_a_profile_is_compared_with_the_one_that_its_grid_names():
    """On the same examples and seeds, arm by arm, without baselines."""
    figures = PARAMS.parent / "figures"
    archives.restore(figures / "offline-transfer.zip")
    wanted = "offline-full: nothing of it is here to compare with; uhl restore --profile offline-full"
    assert lacking("offline-transfer") == [wanted]
    assert results.beside("offline-transfer").empty
    archives.restore(figures / "offline-full.zip")
    assert lacking("offline-transfer") == []
    shutil.rmtree(runs.root() / "offline-full" / "amazon-s1" / "port-minilm-l3")
    (said,) = lacking("offline-transfer")
    assert said == "offline-full, to compare with, lacks 1 cells or rows, first amazon-s1/port-minilm-l3"
    archives.restore(figures / "offline-full.zip")
    assert results.beside("offline-full").empty
    found = results.beside("offline-transfer").set_index(["task", "target", "phase", "arm"])
    assert not {"no-adapter", "head", "lora-r8", "sat-lora"} & set(found.index.get_level_values("arm"))
    own, lent = (
        pd.read_csv(figures / folder / "summary.csv").set_index(found.index.names)["score"]
        for folder in ("", "offline-transfer")
    )
    for key, row in found.iterrows():
        assert row["difference"] == pytest.approx(lent[key] - own[key])
        assert row["low"] < row["difference"] < row["high"]
    path = runs.root() / "offline-transfer" / "amazon-s0" / "tune-minilm-l3" / "predictions.npz"
    with np.load(path) as stored:
        turned = {name: x[::-1] for name, x in stored.items()}
    np.savez(path, **turned)
    with pytest.raises(UHLError, match="scored on other test examples"):
        results.beside("offline-transfer")


def grid_with_mpnet_once(tmp_path, monkeypatch, once="mpnet-base", task="movies"):
    """The profile `offline` with two seeds, and `mpnet-base` tuned on with the first of them alone."""
    shutil.copytree(PARAMS / "offline", tmp_path / "offline")
    monkeypatch.setattr(grid, "PARAMS", tmp_path)
    file = tmp_path / "offline" / "grid.yaml"
    values = grid.Grid.read("offline").model_dump(mode="json")
    file.write_text(yaml.safe_dump(values | {"seeds": [0, 1], "ported": ["mpnet-base"], "once": {once: [task]}}))
    return grid.Grid.read("offline")


def test_a_target_may_be_tuned_on_with_the_first_seed_alone(tmp_path, monkeypatch):
    made = grid_with_mpnet_once(tmp_path, monkeypatch)
    assert [c for c in made.cells() if "tune-mpnet" in c] == ["movies-s0/tune-mpnet-base"]
    assert made.only_once("mpnet-base", "movies", 0)
    assert not made.only_once("mpnet-base", "movies", 1)
    assert not made.only_once("mpnet-base", "amazon", 0)
    assert not made.only_once("minilm-l3", "movies", 0)
    with pytest.raises(UHLError, match="'minilm-l3' in `once`; list it in `ported`"):
        grid_with_mpnet_once(tmp_path / "other", monkeypatch, "minilm-l3")
    with pytest.raises(UHLError, match="'amazno' in `once`, and not in `tasks`"):
        grid_with_mpnet_once(tmp_path / "task", monkeypatch, task="amazno")


def test_what_a_grid_has_once_asks_nothing_of_other_seeds(tmp_path, monkeypatch):
    made = grid_with_mpnet_once(tmp_path, monkeypatch)
    shared = tmp_path / "offline" / "settings.yaml"
    shared.write_text(shared.read_text() + "\nsplits: [test]\nbaselines: [head, bitfit, sat-lora]\n")
    for file in ("mpnet-base", "minilm-l3"):
        place = tmp_path / "offline" / f"{file}.yaml"
        place.write_text(place.read_text() + "\nbaselines: [head]\n")
    for seed, methods in enumerate((("head", "sat-lora"), ("head",))):
        for target in ("mpnet-base", "minilm-l3"):
            one_finished_cell(made.settings(f"movies-s{seed}/baselines-{target}"), methods)
    wanted = ["movies-s0/baselines-mpnet-base: bitfit on test"]
    assert sorted(m for m in audit.missing("offline") if " on " in m) == sorted(wanted)


def test_cells_that_were_run_with_other_settings_are_named(tmp_path, monkeypatch):
    made = grid_with_mpnet_once(tmp_path, monkeypatch)
    file = tmp_path / "offline" / "mpnet-base.yaml"
    before = file.read_text()
    for seed, own in enumerate(("bf16: true", "tune_steps: 9\nlora_rate: 0.5\nvera_rate: 0.5\nepochs: 9")):
        file.write_text(f"{before}\n{own}\n")
        one_finished_cell(made.settings(f"movies-s{seed}/baselines-mpnet-base"), ("head", "lora-r8"))
    file.write_text(before + "\nbf16: true\n")
    named = [m for m in audit.missing("offline") if "run with" in m]
    assert named == [  # VeRA and epochs have no part in these cells
        "movies-s1/baselines-mpnet-base: run with bf16 False (now True), lora_rate 0.5 (now 0.003), tune_steps 9 (now "
        "60); delete the folder, and run it again"
    ]
    file.write_text(before)  # and all of the profile so
    shared = tmp_path / "offline" / "settings.yaml"
    shared.write_text(shared.read_text() + "\nbf16: true\n")
    assert [m for m in audit.missing("offline") if "run with" in m] == named


BEARING = {  # a stage: settings that its scores depend on, and some that they do not
    "pretrain-canonical": (
        "rate mixer_rate more_anchors lambda_f epochs steps bf16 source_task",
        "dimension_rate tune_steps lora_rate",
    ),
    "pretrain-dimension": ("dimension_rate top_k", "rate anchors more_anchors teacher_weight target"),
    "port-minilm-l3": ("max_length unlabelled target", "bf16 head_rate mixer_rate lambda_q rate refresh_steps epochs"),
    "tune-minilm-l3": ("tune_rate tune_batch bf16 head_rate lambda_q", "mixer_rate lambda_f epochs anchors batch"),
    "baselines-minilm-l3": (
        "tune_steps lora_rate anchors bf16",
        "epochs batch vera_rate lambda_f teacher mixer_rate source_task",
    ),
    "baselines-minilm-l6": ("epochs steps batch full_rate", "tune_steps target vera_rate rate"),
}


@pytest.mark.parametrize("stage", BEARING)
def test_what_a_cells_scores_depend_on(stage):
    asked = Settings(arms=("anchor",), baselines=("head", "lora-r8", "full"))
    yes, no = (set(names.split()) for names in BEARING[stage])
    found = bearing(stage, asked)
    assert yes <= found
    assert not no & found


def test_what_scores_depend_on_by_what_is_asked():
    """Steps in place of epochs, a teacher with its rate, arms that refresh, sparse methods; every setting somewhere."""
    assert {"steps", "batch"} <= bearing("pretrain-canonical", Settings(steps=5)) - {"epochs"}
    assert "epochs" not in bearing("pretrain-canonical", Settings(steps=5))
    assert {"teacher_weight", "full_rate"} <= bearing("pretrain-dimension", Settings(teacher="full"))
    assert "refresh_steps" in bearing("port-minilm-l3", Settings(arms=("anchor", "refresh")))
    assert {"mixer_rate", "lambda_f"} <= bearing("baselines-minilm-l6", Settings(baselines=("sat-lora",)))
    assert not {"rate", "anchors"} & bearing("pretrain-canonical", Settings(source_task="amazon"))
    every = Settings(baselines=METHODS, teacher="full", steps=5)
    used = set().union(*(bearing(stage, asked) for stage in BEARING for asked in (every, Settings())))
    rows = {"arms", "baselines", "splits", "hosts", "projectors", "attempts", "copies"}
    assert used | rows == set(Settings.model_fields)


def test_arms_that_a_profile_has_since_are_missed(tmp_path, monkeypatch):
    archives.restore(PARAMS.parent / "figures" / "offline-sixteen.zip")
    archives.restore(PARAMS.parent / "figures" / "offline-full.zip")
    assert audit.missing("offline-sixteen") == []
    shutil.copytree(PARAMS, tmp_path / "params")
    monkeypatch.setattr(grid, "PARAMS", tmp_path / "params")
    shared = tmp_path / "params" / "offline-sixteen" / "settings.yaml"
    values = yaml.safe_load(shared.read_text())
    shared.write_text(yaml.safe_dump(values | {"arms": [*values["arms"], "embedding"]}))
    said = audit.missing("offline-sixteen")
    ports = [c for c in grid.Grid.read("offline-sixteen").cells() if "/port-" in c]
    assert {f"{cell}: embedding on test" for cell in ports} <= set(said)


def test_a_seed_that_the_grid_has_not_is_named(tmp_path, monkeypatch):
    """It would be one more in the means of some rows; a target of the user's own has rows of its own."""
    made = grid_with_mpnet_once(tmp_path, monkeypatch)
    for cell in ("movies-s0/baselines-minilm-l3", "movies-s7/baselines-minilm-l3"):
        one_finished_cell(made.settings(cell))
    one_finished_cell(made.settings("movies-s7/baselines-minilm-l3").model_copy(update={"target": "mine"}))
    one_finished_cell(made.settings("movies-s1/tune-mpnet-base"))  # which the grid has once, with its first seed
    shutil.move(
        runs.root() / "offline/movies-s1/baselines-mpnet-base", runs.root() / "offline/movies-s1/tune-mpnet-base"
    )
    said = "movies-s7/baselines-minilm-l3: seed 7 is not of the profile's grid; name it there, or delete the folder"
    assert [m for m in audit.missing("offline") if "of the profile's grid" in m] == [said]


def test_a_source_may_be_a_folder_or_of_an_organisation(tmp_path, monkeypatch):
    values = grid.Grid.read("offline").model_dump() | {"source": "google-bert/bert-base-uncased"}
    assert "movies-s0/baselines-bert-base-uncased" in grid.Grid(**values).cells()
    monkeypatch.setattr(grid, "PARAMS", tmp_path)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "settings.yaml").write_text("source: /models/big")
    (tmp_path / "p" / "grid.yaml").write_text("{profile: p, source: minilm-l6, targets: [a], tasks: [b], seeds: [0]}")
    with pytest.raises(UHLError, match="names source 'minilm-l6'; its settings.yaml has '/models/big'"):
        grid.Grid.read("p")
    (tmp_path / "p" / "grid.yaml").write_text("")
    with pytest.raises(UHLError, match="profile"):
        grid.Grid.read("p")


def test_a_parameter_file_is_named_after_its_target(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "PARAMS", tmp_path)
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "mine.yaml").write_text("target: /models/TinyBERT")
    with pytest.raises(UHLError, match=r"mine\.yaml has target '/models/TinyBERT'.*TinyBERT\.yaml"):
        grid.target_of("p", "mine")
    (tmp_path / "p" / "TinyBERT.yaml").write_text("target: /models/TinyBERT")
    assert grid.target_of("p", "TinyBERT") == "/models/TinyBERT"


def test_unknown_profile_and_bad_parameter_file(tmp_path):
    offline = "offline, offline-full, offline-sixteen, offline-taught, offline-transfer"
    known = f"demo, local, local-boolq, local-transfer, {offline}, paper, paper-transfer"
    with pytest.raises(UHLError, match=f"profiles: {known}$"):
        grid.Grid.read("online")
    with pytest.raises(UHLError, match="does not exist"):
        runs.read_yaml(tmp_path / "none.yaml")
    (tmp_path / "cut.yaml").write_text("seed: 1\ntask: [a\n")
    with pytest.raises(UHLError, match=r"cut\.yaml, line 3: no YAML \(expected .*\); mend it"):
        runs.read_yaml(tmp_path / "cut.yaml")
    (tmp_path / "x.yaml").write_text("targt: minilm-l3")
    with pytest.raises(UHLError, match="targt"):
        runs.read_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize(
    "words", [["table"], ["attempts"], ["pack"], ["restore"], ["search"], ["export", "--into", "x"]]
)
def test_a_command_names_the_profiles_there_are(words, monkeypatch):
    """But takes one that only the runs have, of a notebook's own parameter."""
    from uhl import __main__ as command

    monkeypatch.setattr("sys.argv", ["uhl", *words, "--profile", "of-nobody"])
    with pytest.raises(SystemExit, match="unknown profile 'of-nobody'; profiles: demo, local, "):
        command.main()
    (runs.root() / "of-nobody").mkdir(parents=True)
    with pytest.raises(SystemExit) as told:
        command.main()
    assert ("unknown profile" in str(told.value)) == (words == ["search"])  # which needs its spaces


@pytest.mark.parametrize("words", [["search", "--task", "movie"], ["fetch", "--task", "movie"]])
def test_an_unknown_task_is_told_before_anything_is_made(words, monkeypatch):
    from uhl import __main__ as command

    monkeypatch.setattr("sys.argv", ["uhl", *words])
    with pytest.raises(SystemExit, match="unknown task 'movie'; offline names: movies, amazon; hub names: sst2"):
        command.main()
    assert not runs.root().exists()


def test_an_archive_that_is_not_there_is_told_from_a_broken_one(tmp_path, monkeypatch):
    from uhl import __main__ as command

    monkeypatch.setattr("sys.argv", ["uhl", "restore", str(tmp_path / "x.zip")])
    with pytest.raises(
        SystemExit, match=r"x\.zip does not exist; profiles with an archive in .*: local, offline-full, "
    ):
        command.main()


def test_the_readme_is_not_written_from_an_incomplete_profile(tmp_path):
    with pytest.raises(UHLError, match="offline is not complete, 9 cells or rows are missing or old, first movies-s0/"):
        report.update_readme("offline", tmp_path)


def test_files_are_whole_or_absent(tmp_path):
    path = write_text(tmp_path / "a.txt", "old")

    def interrupt(tmp):
        tmp.write_text("half")
        raise KeyboardInterrupt

    from uhl.files import write_atomic

    with pytest.raises(KeyboardInterrupt):
        write_atomic(path, interrupt)
    assert path.read_text() == "old"
    with pytest.raises(UHLError, match=r"f could not be made \(.*\); free space or"), build_folder(path / "f"):
        pass
    with pytest.raises(RuntimeError, match="boom"), build_folder(tmp_path / "f") as folder:
        (folder / "x").write_text("x")
        raise RuntimeError("boom")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.txt"]


def test_pairs_are_of_common_seeds_only():
    rng = np.random.default_rng(0)
    right = {seed: np.c_[rng.integers(0, 2, 50), np.ones((50, 2))] for seed in range(3)}
    key = ("movies", "x", "tuned")
    cells = {(*key, "anchor"): {0: right[0], 2: right[2]}, (*key, "zero-atoms"): {1: right[1], 2: right[2] * [0, 1, 1]}}
    (row,) = results.paired(cells).to_dict("records")
    assert row["seeds"] == 1
    assert row["difference"] == pytest.approx(100 * right[2][:, 0].mean())
    assert results.paired({(*key, "anchor"): {0: right[0]}, (*key, "zero-atoms"): {1: right[1]}}).empty


def right(percent, n=1000):
    """Counts of that many right answers, the first ones."""
    return np.c_[np.arange(n) < n * percent / 100, np.ones((n, 2))].astype(float)


def test_gap_recovered_where_there_is_a_gap():
    def cells(target, lora):
        scores = {("zero-shot", "no-adapter"): 50.0, ("zero-shot", "anchor"): 60.0, ("retrained", "lora-r8"): lora}
        return {("movies", target, *key): dict.fromkeys(range(3), right(score)) for key, score in scores.items()}

    tables = cells("x", 70.0) | cells("y", 50.0)
    gaps = results.gap_recovered(tables)
    found = gaps.set_index(["target", "arm"])
    assert found.loc[("x", "anchor"), "gap"] == pytest.approx(0.5)
    assert 0.3 < found.loc[("x", "anchor"), "low"] < 0.5 < found.loc[("x", "anchor"), "high"] < 0.7
    assert found.loc[("y", "anchor"), ["gap", "low", "high"]].isna().all()
    assert found["pgr"].isna().all()  # the source was not run
    own = {("movies", "s", "source", "uhl-canonical"): dict.fromkeys(range(3), right(56.0))}
    beyond = results.gap_recovered(tables | own).set_index(["target", "arm"])
    assert beyond.loc[("x", "anchor"), "pgr"] == pytest.approx(4 / 14)
    assert beyond.loc[("x", "anchor"), "pgr low"] < 4 / 14 < beyond.loc[("x", "anchor"), "pgr high"]
    assert np.isnan(beyond.loc[("y", "anchor"), "pgr"])  # the source is better than the host
    taught = results.gap_recovered(tables | own, None, {"movies": dict.fromkeys(range(3), right(58.0))})
    assert taught.set_index(["target", "arm"]).loc[("x", "anchor"), "pgr"] == pytest.approx(2 / 12)  # above the teacher
    near = results.gap_recovered(cells("x", 56.3) | own).set_index(["target", "arm"])
    assert np.isnan(near.loc[("x", "anchor"), "pgr"])  # LoRA is above it by three texts of a thousand
    ported = "movies", "x", "zero-shot", "anchor"
    other = results.gap_recovered(tables | own | {ported: {0: right(62.0), 3: right(70.0)}})  # LoRA has seed 0
    fewer = other.set_index(["target", "arm"]).loc[("x", "anchor")]
    assert fewer[["seeds", "gap", "pgr"]].tolist() == [1, pytest.approx(12 / 20), pytest.approx(6 / 14)]
    none = results.gap_recovered(tables | {ported: {3: right(70.0)}})
    assert ("x", "anchor") not in none.set_index(["target", "arm"]).index
    fig = viz.gap_heat(gaps)
    shown = {t.get_position(): t.get_text().split("\n")[0] for t in fig.axes[0].texts}  # rows by arm, columns by target
    missing = {(1.5, 0.5): "no gap", (1.5, 1.5): "no gap"}
    assert shown == {(0.5, 0.5): "0.00", (0.5, 1.5): "0.50"} | missing
    fig = viz.gap_heat(gaps[gaps["target"] == "y"])
    assert "no gap" in fig.axes[0].texts[0].get_text()


@pytest.mark.parametrize(("n", "verdict"), [(100, "not decidable"), (400, "held")])
def test_equal_decisions_on_few_examples_decide_no_claim(n, verdict):
    same = {seed: stats.counts(np.ones(n, int), np.ones(n, int)) for seed in range(3)}
    tables = {("movies", "x", "zero-shot", "anchor"): same, ("movies", "s", "source", "uhl-canonical"): same}
    (found,) = (c for c in claims._zero_shot(tables) if c.arm == "anchor")
    assert claims._judged(found, None, None)[-2] == verdict
    of_reviews = claims._judged(found, np.arange(n) // 2, None)  # half as many that are independent
    assert of_reviews[-2] == "not decidable"
    assert of_reviews[-1] == f"no difference on {n} examples of {n // 2} groups, too few to exclude one"


def test_one_seed_decides_nothing_alone():
    """A difference that its examples decide, of one seed; of three; and of one beside other cells that have three."""
    key = ("movies", "x")
    one = {(*key, "zero-shot", "anchor"): {0: right(80)}, (*key, "zero-shot", "zero-atoms"): {0: right(70)}}
    (row,) = results.paired(one).to_dict("records")
    assert row["p holm"] < 1e-6
    assert row["verdict"] == "undecided"
    three = {name: dict.fromkeys(range(3), next(iter(cell.values()))) for name, cell in one.items()}
    assert results.paired(three)["verdict"].tolist() == ["better"]
    rng = np.random.default_rng(0)
    others = {
        ("movies", host, "zero-shot", arm): {s: right(75 + rng.normal(0, 0.3)) for s in range(3)}
        for host in "abcd"
        for arm in ("anchor", "zero-atoms")
    }
    assert results.paired(one | others).set_index("target").loc["x", "verdict"] == "better"
    source = {("movies", "s", "source", "uhl-canonical"): {0: right(60)}}
    budgets = dict.fromkeys(("adapter_bytes", "extra_flops_pct", "top_k", "active_atoms", "seeds", "n"), 1)
    table = pd.DataFrame([budgets | {"task": "movies", "target": "x", "phase": "zero-shot", "arm": "anchor"}])
    judged = claims.judge(table, one | source, {})
    (told,) = judged[(judged["arm"] == "anchor") & judged["claim"].str.startswith("1")].to_dict("records")
    assert (told["verdict"], told["reason"]) == ("not decidable", "one seed does not show how much seeds vary")
    apart = claims.judge(table, one | {("movies", "s", "source", "uhl-canonical"): {1: right(60)}}, {})
    assert "anchor and uhl-canonical have no seed in common" in set(apart["reason"])
    lacking = judged[(judged["arm"] == "embedding")]
    assert set(lacking["verdict"]) == {"not run"}
    without = judged[judged["arm"].isin(claims.WITHOUT) & judged["claim"].str.startswith("1")].set_index("arm")
    assert without["effect"].to_dict() == {"zero-atoms": 10.0, "random-p": pytest.approx(float("nan"), nan_ok=True)}
    assert lacking["reason"].str.contains("is not defined there, or was not run").all()


def test_what_was_trained_apart_lends_its_variance_to_such_alone():
    """Arms of one adapter differ alike in all seeds; LoRA beside it does not. Each kind is judged by its own."""
    rng = np.random.default_rng(0)
    cells = {}
    for host in "abcd":
        own = [75 + rng.normal(0, 3) for _ in range(3)]
        for phase, arm, apart in (
            ("tuned", "anchor", 0.3),
            ("tuned", "zero-atoms", 0.3),
            ("retrained", "lora-r8", 3.0),
        ):
            base = own if phase == "tuned" else [75.0] * 3
            cells["movies", host, phase, arm] = {s: right(base[s] + rng.normal(0, apart)) for s in range(3)}
    known = results.priors_apart(cells)
    assert 4 * known["movies", True].variance < known["movies", False].variance
    assert known["movies", True].most == known["movies", False].most == 8  # two for each of four models
    table = results.paired(cells).set_index(["target", "second"])
    width = table["high"] - table["low"]
    assert (width.xs("retrained lora-r8", level=1) > width.xs("tuned zero-atoms", level=1)).all()


def test_claims_tell_what_is_left_of_them_when_all_are_corrected():
    rng = np.random.default_rng(0)
    lost = {"a": 0.0, "b": 5.0, "c": 20.0}
    cells = {
        ("movies", host, "zero-shot", arm): {s: right(80 - less + rng.normal(0, 0.3)) for s in range(3)}
        for host, less in lost.items()
        for arm in ("anchor", "zero-atoms")
    }
    cells["movies", "s", "source", "uhl-canonical"] = dict.fromkeys(range(3), right(80))
    judged = claims.judge(pd.DataFrame(columns=["phase", "arm", "task", "target"]), cells, {})
    ran = judged[judged["seeds"] > 0].set_index(["target", "arm"])
    assert len(ran) == 6
    assert judged.loc[judged["seeds"] == 0, "p holm"].isna().all()
    assert ran.loc["c", "verdict"].tolist() == ["refuted"] * 2
    assert (ran["p holm"] >= ran["p"]).all()
    assert ran["p holm"].sort_values().iloc[0] == pytest.approx(6 * ran["p"].min())
    page = Path("figures/offline/README.md")
    nowhere = ", ".join(arm for arm in claims.JUDGED if arm not in {"anchor", "zero-atoms"})
    assert claims.markdown(judged, "offline", page).endswith(f"\n\nRun nowhere, and not judged: {nowhere} (claim 1).")
    assert "nowhere" not in claims.markdown(judged, "offline", page, ("anchor",))


def test_what_says_nothing_of_other_cells_lends_them_no_variance():
    """Ports by shuffled anchors vary as they will, and cells that show the same say it once."""
    rng = np.random.default_rng(0)
    cells = {
        ("movies", host, "zero-shot", arm): {s: right(75 + rng.normal(0, 0.5)) for s in range(3)}
        for host in "abc"
        for arm in ("anchor", "zero-atoms", "embedding", "lineage")
    }
    wild = {("movies", "a", "zero-shot", "shuffled"): dict(enumerate(map(right, (50, 25, 75))))}
    again = {("movies", "a", "zero-shot", "random-p"): cells["movies", "a", "zero-shot", "zero-atoms"]}
    compared = ["first", "second", "target"]
    without, beside, twice = (
        results.paired(some).set_index(compared) for some in (cells, cells | wild, cells | wild | again)
    )
    assert "zero-shot shuffled" in set(beside.reset_index()["second"])
    for column in ("low", "high"):
        assert beside.loc[without.index, column].tolist() == without[column].tolist()
        assert twice.loc[without.index, column].tolist() == without[column].tolist()


def test_a_caption_names_what_a_target_lacks():
    rows = [("s", "source", "uhl-canonical")]
    rows += [("a", "zero-shot", arm) for arm in ("anchor", "refresh", "lineage")] + [("a", "tuned", "anchor")]
    rows += [("b", "zero-shot", "anchor")]
    table = pd.DataFrame(rows, columns=["target", "phase", "arm"])
    said = report._not_run(table, [("movies", "b", "zero-shot", "lineage")])
    assert said == "Not run on b: zero-shot “anchor, refreshed”; all of tuned. "


def test_examples_that_stand_alone_have_mcnemars_p_however_they_are_marked():
    key = ("movies", "x", "zero-shot")
    cells = {(*key, "anchor"): {0: right(60)}, (*key, "zero-atoms"): {0: right(50)}}
    for groups in (None, {"movies": None}, {"movies": np.arange(1000)}):
        assert results.paired(cells, groups)["p mcnemar"].tolist() == [pytest.approx(0.0, abs=1e-9)]
    assert results.paired(cells, {"movies": np.arange(1000) // 2})["p mcnemar"].isna().all()


def one_finished_cell(settings, methods=("head",)):
    """Baselines retrained on the settings' target, with two test examples."""
    rows, arrays = [], {"labels": [0, 1], "gold": [0, 0], "length": [1, 1]}
    for method in methods:
        made = runs.row(
            settings, target=settings.target, arm=method, phase="retrained", split="test", metric="accuracy", score=50
        )
        made |= NUMBERS
        rows.append(made)
    folder = runs.cell_dir(settings, f"baselines-{settings.target}")
    manifest = runs.write_manifest(settings, folder.name, rows, labels=["n", "p"])
    kept = {f"{method}/test/{k}": np.array(v) for method in methods for k, v in arrays.items()}
    np.savez(folder / "predictions.npz", **kept)
    return manifest


def test_each_profile_has_its_archive_beside_its_figures(tmp_path):
    own = tmp_path / "movies.v2"
    own.mkdir()
    for profile, task in (("local", str(own)), ("offline", "movies")):
        one_finished_cell(Settings(profile=profile, task=task))
        report.update_readme(profile, tmp_path, partial=True)
        with zipfile.ZipFile(tmp_path / "figures" / f"{profile}.zip") as archive:
            (name,) = (name for name in archive.namelist() if name.endswith("npz"))
            held = np.load(io.BytesIO(archive.read(name)))
        assert ("head/test/gold" in held.files) == (profile == "offline")
    assert sorted(p.relative_to(tmp_path / "figures").as_posix() for p in (tmp_path / "figures").rglob("*.*")) == [
        "local.zip",
        "local/README.md",
        "local/results.csv",
        "offline.zip",
        "offline/README.md",
        "offline/results.csv",
    ]


def test_the_first_profiles_results_stand_in_the_readme(tmp_path, monkeypatch):
    """In full beside its figures, and on the first page the rows that matter most."""
    monkeypatch.setattr(report, "FIRST", "offline")
    one_finished_cell(Settings(profile="offline"))
    (tmp_path / "figures").mkdir()
    pages, (start, end) = [tmp_path / "README.md", tmp_path / "figures" / "README.md"], report.MARKS
    pages[1].write_text(f"a\n{start}\nold\n{end}\nb\n")
    pages[0].write_text("a\nb\n")
    with pytest.raises(UHLError, match=r"^README\.md has no place for the table; expected the lines <!-- results"):
        report.update_readme("offline", tmp_path, partial=True)
    assert "old\n" in pages[1].read_text()  # neither is written when one can't be
    pages[0].write_text(f"a\n{start}\nold\n{end}\nb\n")
    report.update_readme("offline", tmp_path, "all verdicts", "few verdicts", partial=True)
    for page, verdicts in zip(pages, ("few", "all"), strict=True):
        text = page.read_text()
        assert text.startswith(f"a\n{start}\n\n| model | phase")
        assert text.endswith(f"\n{verdicts} verdicts\n\n{end}\nb\n")
        assert "old" not in text.split("**Not complete")[0]
    assert "what ran where: [figures/README.md](figures/README.md)" in pages[0].read_text()
    assert (tmp_path / "figures" / "results.csv").is_file()


def test_a_short_table_has_the_arms_that_the_first_page_shows():
    known = {phase: set(arms) for phase, arms in report.SHORT.items()}
    assert list(known) == list(runs.PHASES)
    assert known["retrained"] | known["source"] <= {*METHODS, "uhl-canonical"}
    assert known["zero-shot"] | known["tuned"] <= {*ARMS, *CONTROLS}
    for target, methods in (("minilm-l3", ("lora-r8", "head")), ("minilm-4x312", ("head", "bitfit"))):
        one_finished_cell(Settings(profile="offline", target=target), methods)
    full, short = (
        [line.split(" | ")[:3] for line in report.markdown("offline", short=few).splitlines() if line.startswith("| ")]
        for few in (False, True)
    )
    assert len(full) == 5
    assert [(row[0][2:], row[2]) for row in short[1:]] == [
        ("minilm-4x312", "head only"),
        ("minilm-l3", "head only"),
        ("minilm-l3", "LoRA r8 (q, v)"),
    ]


def test_a_table_with_missing_cells_says_so(tmp_path):
    one_finished_cell(grid.Grid.read("offline").settings("movies-s0/baselines-minilm-l3"))
    with pytest.raises(UHLError, match="cells or rows are missing or old"):
        report.update_readme("offline", tmp_path)
    report.update_readme("offline", tmp_path, partial=True)
    text = (tmp_path / "figures" / "offline" / "README.md").read_text()
    lacks = len(grid.Grid.read("offline").cells()) - 1 + 2 * 3 - 1  # two splits of three baselines, but the one row
    assert f"**Not complete: {lacks} cells or rows are missing or old, first movies-s0/pretrain-canonical.**" in text
    assert "movies-s0/baselines-minilm-l3: lora-r8 on test" in audit.missing("offline")
    assert "movies-s0/baselines-minilm-l3: head on test" not in audit.missing("offline")
    assert "movies on minilm-l3: seeds 1, n = 2" in text


def test_a_table_says_of_how_many_groups_its_examples_are():
    folder = one_finished_cell(Settings(profile="offline")).parent
    assert "seeds 1, n = 2)" in report.markdown("offline")
    with np.load(folder / "predictions.npz") as stored:
        np.savez(folder / "predictions.npz", **stored, **{"test/group": np.array([4, 4])})
    assert "seeds 1, n = 2 of 1 groups)" in report.markdown("offline")


def test_what_an_analysis_lacks_lies_beside_it(tmp_path):
    """And stands on its figures, which are looked at by themselves; so does where each cell ran."""
    one_finished_cell(grid.Grid.read("offline").settings("movies-s0/baselines-minilm-l3"))
    fig, table = viz.arm_scores(pd.DataFrame({"arm": [], "score": []}), "x"), pd.DataFrame({"a": [1]})
    folder = report.finish("offline", {"tuned": (fig, table)}, {"summary": table}).parent
    assert pd.read_csv(folder / "missing.csv")["missing"].tolist() == audit.missing("offline")
    assert (
        fig.texts[0].get_text()
        == f"Not complete: {len(audit.missing('offline'))} cells or rows of offline are missing or old"
    )
    (cell,) = pd.read_csv(folder / "cells.csv").to_dict("records")
    assert cell == {"cell": "movies-s0/baselines-minilm-l3", "hardware": runs.hardware(), "commit": runs.commit()}
    report.update_readme("offline", tmp_path, partial=True)
    assert (tmp_path / "figures" / "offline" / "tuned.png").is_file()
    report.finish("offline", {}, {"summary": table})
    assert not [*folder.glob("tuned.*")]  # of an analysis before
    later = one_finished_cell(Settings(profile="offline", target="other"))
    os.utime(later, (time.time() + 9,) * 2)
    with pytest.raises(UHLError, match="figures from before .*baselines-other was run; make table PROFILE=offline"):
        report.update_readme("offline", tmp_path, partial=True)
    archives.restore(PARAMS.parent / "figures" / "offline-full.zip")
    whole = viz.arm_scores(pd.DataFrame({"arm": [], "score": []}), "x")
    folder = report.finish("offline-full", {"tuned": (whole, table)}, {}).parent
    assert pd.read_csv(folder / "missing.csv").empty
    assert not whole.texts


def test_sizes_at_one_precision():
    """LoRA's float16 numbers halve, heads and files of ours and the sparse methods are at 8 bits already."""
    head, header = (800, 514), 5_000  # bytes and numbers of a head, bytes of a file's header
    sizes = [
        ("x", "head", *head),
        ("x", "lora-r8", 800 + header + 2 * 40_000, 514 + 40_000),
        ("x", "vb-lora", 800 + 60_000, 514 + 75_000),
        ("x", "sat-lora", 500_000, 490_000),
        ("y", "lora-r8", 800 + header + 2 * 40_000, 514 + 40_000),  # without a head there
    ]
    table = pd.DataFrame(sizes, columns=["target", "arm", "adapter_bytes", "trainable_params"])
    table = table.assign(task="movies", phase="retrained")
    tuned = table.iloc[:1].assign(arm="anchor", phase="tuned", adapter_bytes=900_000, trainable_params=1_000)
    made = results.at_eight_bits(pd.concat([table, tuned], ignore_index=True)).tolist()
    assert made == [800, 800 + header + 40_000, 30_400, 500_000, 800 + header + 40_000 - 514, 900_000]


def test_labels_are_told_by_the_same_seeds():
    """Of an arm that was tuned with fewer seeds than it was ported with."""
    tables = {
        ("movies", "x", "zero-shot", "anchor"): {seed: right(60 + 10 * seed) for seed in range(3)},
        ("movies", "x", "tuned", "anchor"): {0: right(65)},
        ("movies", "x", "zero-shot", "lineage"): {seed: right(50 + seed) for seed in range(3)},
    }
    costs = {
        "trainable_params": 1,
        "adapter_bytes": 1,
        "bytes at 8 bits": 1,
        "peak_mb": 1,
        "seconds": 1,
        "steps": 1,
        "extra_flops_pct": 1,
    }
    rows = [
        {"task": task, "target": target, "phase": phase, "arm": arm, "metric": "accuracy", "low": 0.0, "high": 100.0}
        | {"score": float(np.mean([100 * c[:, 0].mean() for c in cells.values()])), "seeds": len(cells), "n": 1000}
        | costs
        | {"in budget": True}
        for (task, target, phase, arm), cells in tables.items()
    ]
    table = pd.DataFrame(rows)
    moved = results.before_and_after(table, tables, {}).set_index(["phase", "arm"])
    assert moved["score"].round(6).tolist() == [60, 65, 51]
    assert moved["seeds"].tolist() == [1, 1, 3]
    assert moved["low"].iloc[0] < 58 < 62 < moved["high"].iloc[0]
    board = results.leaderboard(table, moved.reset_index()).set_index("method")
    assert board.loc["anchor", ["phase", "score", "zero-shot", "seeds"]].tolist() == ["tuned", 65, pytest.approx(60), 1]
    assert board.loc["lineage", ["phase", "score", "zero-shot", "seeds"]].tolist() == ["zero-shot", 51, 51, 3]


def test_commit_is_what_git_says_unless_told(monkeypatch):
    monkeypatch.setenv("UHL_COMMIT", "0123456789")
    assert runs.commit() == "0123456789"
    monkeypatch.setenv("UHL_COMMIT", "")
    said = runs.commit()
    monkeypatch.delenv("UHL_COMMIT")
    assert said == runs.commit() != ""
