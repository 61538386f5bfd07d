"""Command line: ``uhl fetch | port | table | attempts | copies | pack | restore | inspect | verify | split | join |
export | bench | search``.

Errors of the package print one line, without a traceback.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from uhl import archives, audit, claims, report, results, runs, store, viz
from uhl.config import ARMS
from uhl.errors import UHLError
from uhl.fileformat import Header, read_either
from uhl.grid import PARAMS, Grid, target_of, task_file
from uhl.models import OFFLINE, cut_of, load_encoder, resolve
from uhl.porting import port, predict_texts
from uhl.runs import Settings, read_yaml
from uhl.tasks import OFFLINE as OFFLINE_TASKS
from uhl.tasks import find_task

HERE = Path(__file__).parent.parent


def fetch(options: argparse.Namespace) -> None:
    """Fetch the offline weights and text that a profile needs, so that parallel jobs find them."""
    grid = Grid.read(options.profile)
    if options.task:
        _described(options.profile, options.task)
    targets = [options.model] if options.model else grid.hosts
    for name in (grid.source, *(target_of(options.profile, t) for t in targets)):
        whole, _ = cut_of(name)
        if whole in OFFLINE or Path(whole).is_dir():
            resolve(whole)
    settings = Settings(**read_yaml(PARAMS / options.profile / "settings.yaml"))
    generic = settings.anchor_text == "generic" or settings.generic_anchors
    if generic or set(grid.trained) & set(OFFLINE_TASKS):
        from uhl.sources import vader_text

        vader_text()


def _described(profile: str, task: str) -> Path | None:
    """The file that describes a task in a profile; None of one known by its name, :class:`UHLError` of any other."""
    own = task_file(profile, task)
    if not own:
        find_task(task)
    return own


def port_file(options: argparse.Namespace) -> None:
    """Port an adapter's file to a host without labels and say how well it fits; with ``--texts`` also classify."""
    lines = _lines(options.texts) if options.texts else []
    adapter, target = store.load(options.file), load_encoder(options.host)
    source = load_encoder(options.source) if options.source else None
    made = port(adapter, target, options.task, options.arm, source)
    for name, value in made.report.items():
        text = ", ".join(f"{k}: {v}" for k, v in value.items()) if isinstance(value, dict) else value
        print(f"{name:13s} {text}", file=sys.stderr if options.texts else sys.stdout)
    for found in predict_texts(adapter, target, made, lines, options.task) if lines else ():
        print(json.dumps(found, ensure_ascii=False))


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UHLError(f"{path} {'is a folder' if path.is_dir() else 'does not exist'}; give a file with a text a line")
    try:
        text = path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise UHLError(f"{path} is not UTF-8 ({error}); give a file with a text a line") from error
    return text.removesuffix("\n").split("\n") if text else []  # other marks of a new line are part of a text


def table(options: argparse.Namespace) -> None:
    """Print the results table and where everything lies; with ``--readme`` put it into a README."""
    print(report.markdown(options.profile, options.target))
    left = audit.missing(options.profile)
    if left and not options.target:
        print(f"not complete: {len(left)} cells or rows are missing or old, first {left[0]}")
    folder = runs.root() / options.profile
    print(f"results    {folder / 'results.csv'}\nfigures    {folder / 'analysis'}")
    print(f"notebooks  {folder}/*/*/notebook.ipynb")
    if options.readme:
        judged = claims.of_profile(options.profile)
        full = claims.markdown(judged, options.profile, report.readme_of(options.profile))
        short = claims.markdown(judged, options.profile, report.README, report.SHORT["zero-shot"])
        report.update_readme(options.profile, HERE, full, short, options.partial)


def attempts(options: argparse.Namespace) -> None:
    """Gather what notebook 07 measured on a profile's targets as attempts.csv, and draw it."""
    viz.style()
    found, into = results.attempts(options.profile), HERE / report.figures_of(options.profile)
    if len(costs := found[found["group"].isin(viz.OF_BYTES)]):
        viz.save_fig(viz.score_against_anchor_bytes(costs), into / "anchor_bytes", costs)
    path = viz.save_fig(viz.attempt_changes(found), into / "attempts", found)
    print(f"{path.relative_to(HERE)}: {len(found)} attempts on {found.groupby(['task', 'target']).ngroups} cells")


def copies(options: argparse.Namespace) -> None:
    """Gather what notebook 10 measured on pruned copies of the source as compression.csv, and draw it."""
    viz.style()
    found, into = results.compressed(options.profile), HERE / report.figures_of(options.profile)
    viz.save_fig(viz.losses(found), into / "compression_losses", found)
    path = viz.save_fig(viz.compression(found), into / "compression", found)
    print(f"{path.relative_to(HERE)}: {found['copy'].nunique()} models, seeds {found['seeds'].max()}")


def pack(options: argparse.Namespace) -> None:
    """Write a profile's manifests and predictions into one archive, figures/<profile>.zip, without gold labels of your
    own data; with --adapters copy the adapters that it trained, and the texts in them, into adapters/<profile>.
    """
    path = archives.pack(options.profile, HERE / "figures" / f"{options.profile}.zip")
    print(f"{path.relative_to(HERE)}: {path.stat().st_size:,} bytes")
    if options.adapters:
        copies = archives.keep_adapters(options.profile, HERE / report.adapters_of(options.profile))
        if not copies:
            raise UHLError(f"no trained adapter of {options.profile} is here; make run PROFILE={options.profile}")
        for file in copies:
            print(f"{file.relative_to(HERE)}: {file.stat().st_size:,} bytes")


def restore(options: argparse.Namespace) -> None:
    """Put the cells of an archive back into the runs folder, so that tables and figures can be made without a run, and
    with them the trained adapters that adapters/<profile> has. Your own data is read again for its gold labels.
    """
    folder = HERE / "figures"
    archive = options.archive or folder / f"{options.profile}.zip"
    if not archive.is_file():
        there = ", ".join(sorted(file.stem for file in folder.glob("*.zip"))) or "none"
        raise UHLError(f"{archive} does not exist; profiles with an archive in {folder}: {there}")
    made = archives.restore(archive, HERE / report.adapters_of(archive.stem))
    print(f"{len(made)} cells restored into {runs.root()}")


def inspect(options: argparse.Namespace) -> None:
    """Print what an adapter's file holds: parts, bytes, tasks, anchors, provenance."""
    print(store.describe(options.file))


def verify(options: argparse.Namespace) -> None:
    """Check an adapter's file or a task pack: structure, ranges, hash."""
    found = read_either(options.file)
    if isinstance(found.header, Header):
        store.build(found)  # type: ignore[arg-type]
    print(f"{options.file}: ok, {len(found.tensors)} tensors, {found.header.format} version {found.header.version}")


def split(options: argparse.Namespace) -> None:
    """Cut an adapter into a dictionary and one task pack a task, which fit together again with `uhl join`, but for
    anchors: these stay in the whole file alone, and with them what ports it.
    """
    adapter = store.load(options.file)
    if adapter.anchors:
        print(
            f"anchors are in neither part: what is joined of these has no anchored port; keep {options.file}, which "
            f"takes task packs as well (`uhl join {options.file} PACK ... --out FILE`)",
            file=sys.stderr,
        )
    made = [store.save_dictionary(adapter, options.into / "dictionary.safetensors")]
    made += [store.save_task(adapter, name, options.into / f"{name}.task.safetensors") for name in adapter.tasks]
    for path in made:
        print(f"{path}: {path.stat().st_size:,} bytes")


def join(options: argparse.Namespace) -> None:
    """Plug task packs into a dictionary (or an adapter) and write the whole."""
    adapter = store.load(options.file)
    names = [store.add_task(adapter, pack) for pack in options.packs]
    path = store.save(adapter, options.out)
    print(f"{path}: {path.stat().st_size:,} bytes, with {', '.join(names)}")


def export(options: argparse.Namespace) -> None:
    """Write a trained cell's adapter as a PEFT folder, with a model card that has the profile's scores."""
    path = report.export(options.profile, options.task, options.seed, options.projector, options.into)
    print(f"{path}: load it with PeftModel.from_pretrained(host, {str(path)!r})")


def bench(options: argparse.Namespace) -> None:
    """Measure loading an adapter into a host of a known shape, beside rank-8 LoRA; print CSV. With --gpu: the kernels,
    weights and hosts on a CUDA device, kept in figures/.
    """
    if options.gpu:
        from uhl import gpu

        logging.getLogger("uhl").setLevel(logging.INFO)  # says which size is next
        for file in gpu.measure(options.into):
            print(file)
        return
    from uhl.bench import loading

    print(loading(options.shape).to_csv(index=False), end="")


def search(options: argparse.Namespace) -> None:
    """Search the spaces of params/<profile>/search.yaml on the source or a target, by dev scores; print CSV."""
    try:
        from uhl import search as searching
    except ModuleNotFoundError as error:
        raise UHLError(f"uhl search needs Optuna ({error}); pip install -e '.[notebooks]' in the repository") from error
    Grid.read(options.profile)
    _described(options.profile, options.task)
    place = {"task": options.task, "seed": options.seed, "host": options.host, "target": options.target}
    changes = {} if options.epochs is None else {"epochs": options.epochs, "steps": None}
    changes |= {} if options.train_size is None else {"train_size": options.train_size}
    spaces = searching.read_spaces(PARAMS / options.profile / "search.yaml")
    chosen, settings = searching.methods_of(spaces, options.host, options.method or ()), dict[str, Settings]()
    for method, space in chosen.items():
        as_run = searching.settings_of(options.profile, method, **place)
        settings[method] = Settings(**as_run.model_dump(mode="json") | changes)
        searching.check(settings[method], method, space)

    def told(row: dict[str, object]) -> None:
        print(*(row[key] for key in ("method", "trial", "state", "score", "settings")), file=sys.stderr, flush=True)

    studies = [
        searching.search(settings[method], method, space, options.trials, options.storage, told)
        for method, space in chosen.items()
    ]
    print(searching.table(studies).to_csv(index=False, float_format="%g"), end="")
    left = searching.save(next(iter(settings.values())), studies) if options.save else []
    if left:
        print(f"not saved: {', '.join(left)}, which methods share; search uhl-canonical for these", file=sys.stderr)


def _profile(command: argparse.ArgumentParser, default: str = "offline") -> None:
    command.add_argument("--profile", default=default, help=f"a folder of params/, or of runs/; by default {default}")


def main() -> None:
    """Parse and run; exit status 1 on an error of the package."""
    parser = argparse.ArgumentParser(prog="uhl", description=__doc__)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("fetch", help=fetch.__doc__)
    _profile(one)
    one.add_argument("--model", help="only this model beside the source")
    one.add_argument("--task", help="check that this task is known, too")
    one.set_defaults(run=fetch)
    command = commands.add_parser("port", help=port_file.__doc__)
    command.add_argument("file", type=Path, help="an adapter")
    command.add_argument("host", help="offline name, folder or hub id")
    command.add_argument("--task", help="one of the adapter's tasks, where it has several")
    command.add_argument("--arm", default="anchor", choices=ARMS)
    command.add_argument("--source", help="the model that the adapter was trained on, where the arm needs it")
    command.add_argument(
        "--texts",
        type=Path,
        help="a text a line, to be classified as JSON lines; longer ones than it was trained with are marked cut",
    )
    command.set_defaults(run=port_file)
    two = commands.add_parser("table", help=table.__doc__)
    _profile(two)
    two.add_argument("--target", help="only this target's rows")
    two.add_argument("--readme", action="store_true", help="write the table into a README, and figures/")
    two.add_argument("--partial", action="store_true", help="also where cells are missing; the caption says so")
    two.set_defaults(run=table)
    for name, does in (("attempts", attempts), ("copies", copies)):
        command = commands.add_parser(name, help=does.__doc__)
        _profile(command)
        command.set_defaults(run=does)
    for name, does in (("pack", pack), ("restore", restore)):
        command = commands.add_parser(name, help=does.__doc__)
        _profile(command, "offline-full")
        command.set_defaults(run=does, archive=None)
        if does is pack:
            command.add_argument(
                "--adapters", action="store_true", help="and copy the adapters into adapters/<profile>"
            )
    command.add_argument("archive", nargs="?", type=Path, help="instead of figures/<profile>.zip")
    for name, does in (("inspect", inspect), ("verify", verify)):
        command = commands.add_parser(name, help=does.__doc__)
        command.add_argument("file", type=Path)
        command.set_defaults(run=does)
    command = commands.add_parser("split", help=split.__doc__)
    command.add_argument("file", type=Path)
    command.add_argument("--into", type=Path, required=True, help="folder for the pieces")
    command.set_defaults(run=split)
    command = commands.add_parser("join", help=join.__doc__)
    command.add_argument("file", type=Path, help="a dictionary, or an adapter")
    command.add_argument("packs", type=Path, nargs="+", help="task packs")
    command.add_argument("--out", type=Path, required=True, help="file to write")
    command.set_defaults(run=join)
    command = commands.add_parser("export", help=export.__doc__)
    _profile(command)
    command.add_argument("--task", default="movies")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--projector", choices=("canonical", "dimension"), default="canonical")
    command.add_argument("--into", type=Path, required=True, help="folder to write")
    command.set_defaults(run=export)
    command = commands.add_parser("bench", help=bench.__doc__)
    command.add_argument("--shape", choices=("bert-base", "bert-large"), default="bert-large")
    command.add_argument("--gpu", action="store_true", help="the layers' times on a CUDA device")
    command.add_argument("--into", type=Path, default=HERE / "figures", help="with --gpu: folder of the tables")
    command.set_defaults(run=bench)
    three = commands.add_parser("search", help=search.__doc__)
    _profile(three, "offline-full")
    three.add_argument("--task", default="movies")
    three.add_argument("--seed", type=int, default=0)
    three.add_argument("--host", choices=("source", "target"), default="source", help="where methods train")
    three.add_argument("--target", help="by default the profile's first")
    three.add_argument("--epochs", type=float, help="on the source, instead of the profile's steps or epochs")
    three.add_argument("--train-size", type=int, help="instead of the profile's")
    three.add_argument("--method", action="append", help="one of the file's; by default all but tune-anchor")
    three.add_argument("--trials", type=int, help="of each method, at most; by default a whole grid, else 12")
    three.add_argument("--storage", help="URL of the database, for several workers; by default SQLite in runs/")
    three.add_argument("--save", action="store_true", help="write the best values into params/<profile>/")
    three.set_defaults(run=search)
    options = parser.parse_args()
    try:
        runs.quiet()
        if (profile := getattr(options, "profile", None)) and not (runs.root() / profile).is_dir():
            Grid.read(profile)  # raises where there is no such profile
        options.run(options)
        sys.stdout.flush()
    except BrokenPipeError:  # a reader that has enough, such as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UHLError as error:
        sys.exit(f"uhl: {error}")


if __name__ == "__main__":
    main()
