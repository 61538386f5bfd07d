# The batch: every cell of a profile's grid is one papermill run of one notebook, resumable, in parallel over cores.
#   snakemake --cores 2 --config profile=offline        (what `make run` calls)
#   snakemake -n --config profile=offline-full          (what would run)
# A cell is done when its manifest exists and is newer than its parameter files. Training inside a cell resumes from its
# last checkpoint. A change of the code does not run anything again: the table names cells that are older than others (see
# uhl.runs.PROTOCOL); remove their folders.

import os
import shlex
import sys

import yaml

from uhl.grid import PARAMS, Grid
from uhl.runs import slug

configfile: "params/default.yaml"

GRID = Grid.read(config["profile"])
RUNS = os.path.abspath(os.environ["UHL_RUNS"]) if os.environ.get("UHL_RUNS") else "runs"
if os.environ.get("UHL_RUNS"):
    os.environ["UHL_RUNS"] = RUNS  # notebooks run in their own folder
if os.environ.get("UHL_DATA"):
    os.environ["UHL_DATA"] = os.path.abspath(os.environ["UHL_DATA"])
CELL = f"{RUNS}/{GRID.profile}/{{task}}-s{{seed}}"
CELLS = [f"{RUNS}/{GRID.profile}/{cell}/manifest.json" for cell in GRID.cells()]
SOURCE = slug(GRID.source)

# One thread a job where several run at once: small models gain more from jobs side by side than from threads.
os.environ["UHL_BATCH"] = "1"
os.environ["PATH"] = os.path.dirname(sys.executable) + os.pathsep + os.environ["PATH"]  # papermill of this environment
os.environ["PYTHONWARNINGS"] = "ignore"
cores = workflow.resource_settings.cores  # none where a cluster runs the jobs
if cores and cores > 1 and "SLURM_JOB_ID" not in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"

wildcard_constraints:
    seed=r"\d+",
    projector="canonical|dimension",


def files(stage):
    """A function of a cell's wildcards: its parameter files, from the root of the repository."""
    return lambda w: [str(f.relative_to(PARAMS.parent)) for f in GRID.files(w.task, stage.format(**dict(w.items())))]


def given(stage):
    """A function of a cell's wildcards: all of its settings, as papermill takes them. Those that no file has are there
    by default, and not as the notebook is stored.
    """

    def text(w):
        settings = GRID.settings(f"{w.task}-s{w.seed}/{stage.format(**dict(w.items()))}").model_dump(mode="json")
        return f"-y {shlex.quote(yaml.safe_dump(settings, default_flow_style=True, width=float('inf')).strip())}"

    return text


def lent_adapter(w):
    """The adapter that the task has of another one; none where it is trained on the task itself."""
    lender = GRID.lends(w.task)
    return [f"{RUNS}/{GRID.profile}/{lender}-s{w.seed}/pretrain-{w.projector}/manifest.json"] if lender else []


def papermill(notebook):
    """Run a notebook into a scratch name beside its manifest and move it when it succeeded."""
    return (
        "mkdir -p $(dirname {output[0]}) && echo \"$(date +%H:%M:%S)  started  $(dirname {output[0]})\" && "
        f"papermill notebooks/{notebook}.ipynb $(dirname {{output[0]}})/.running.ipynb --cwd notebooks "
        f"--execution-timeout 14400 --no-progress-bar {{params.given}} > {{log}} 2>&1 "
        "|| {{ tail -n 4 {log} >&2; exit 1; }}; "
        "mv $(dirname {output[0]})/.running.ipynb $(dirname {output[0]})/notebook.ipynb"
    )


rule all:
    input:
        CELLS,  # each by name: one whose folder was removed is run again
        f"{RUNS}/{GRID.profile}/analysis/manifest.json",
    default_target: True


rule pretrain:
    input:
        files("pretrain-{projector}"),
        lent_adapter,
    output:
        f"{CELL}/pretrain-{{projector}}/manifest.json",
    log:
        f"{RUNS}/{GRID.profile}/logs/{{task}}-s{{seed}}-pretrain-{{projector}}.log",
    priority: 3  # long chains first, baselines fill the gaps
    params:
        given=given("pretrain-{projector}"),
    shell:
        papermill("02_pretrain")


rule port:
    input:
        expand(f"{CELL}/pretrain-{{projector}}/manifest.json", projector=GRID.projectors, allow_missing=True),
        files("port-{target}"),
    output:
        f"{CELL}/port-{{target}}/manifest.json",
    log:
        f"{RUNS}/{GRID.profile}/logs/{{task}}-s{{seed}}-port-{{target}}.log",
    priority: 1
    params:
        given=given("port-{target}"),
    shell:
        papermill("03_port")


rule tune:
    input:
        expand(f"{CELL}/pretrain-{{projector}}/manifest.json", projector=GRID.projectors, allow_missing=True),
        files("tune-{target}"),
    output:
        f"{CELL}/tune-{{target}}/manifest.json",
    log:
        f"{RUNS}/{GRID.profile}/logs/{{task}}-s{{seed}}-tune-{{target}}.log",
    priority: 2
    params:
        given=given("tune-{target}"),
    shell:
        papermill("04_tune")


rule baselines_of_source:
    input:
        files(f"baselines-{SOURCE}"),
    output:
        f"{CELL}/baselines-{SOURCE}/manifest.json",
    log:
        f"{RUNS}/{GRID.profile}/logs/{{task}}-s{{seed}}-baselines-{SOURCE}.log",
    priority: 2  # longer than those of a target, and begun while adapters are pre-trained
    params:
        given=given(f"baselines-{SOURCE}"),
    shell:
        papermill("05_baselines")


rule baselines:
    input:
        files("baselines-{target}"),
    output:
        f"{CELL}/baselines-{{target}}/manifest.json",
    log:
        f"{RUNS}/{GRID.profile}/logs/{{task}}-s{{seed}}-baselines-{{target}}.log",
    params:
        given=given("baselines-{target}"),
    shell:
        papermill("05_baselines")


ruleorder: baselines_of_source > baselines


rule attempts:
    input:
        f"{CELL}/pretrain-canonical/manifest.json",
        files("attempts-{target}"),
    output:
        f"{CELL}/attempts-{{target}}/attempts.csv",
    log:
        f"{RUNS}/{GRID.profile}/logs/{{task}}-s{{seed}}-attempts-{{target}}.log",
    params:
        given=given("attempts-{target}"),
    shell:
        papermill("07_what_moves")


# Not of the batch: ways to port, compared on dev with the first seed (`make attempts`).
rule all_attempts:
    input:
        expand(f"{CELL}/attempts-{{target}}/attempts.csv", task=GRID.tasks, seed=GRID.seeds[0], target=GRID.targets),


rule compress:
    input:
        f"{CELL}/pretrain-canonical/manifest.json",
        files("compress"),
    output:
        f"{CELL}/compress/compression.csv",
    log:
        f"{RUNS}/{GRID.profile}/logs/{{task}}-s{{seed}}-compress.log",
    params:
        given=given("compress"),
    shell:
        papermill("10_compress")


# Not of the batch: the adapter on pruned copies of its source (`make copies`).
rule all_copies:
    input:
        expand(f"{CELL}/compress/compression.csv", task=GRID.tasks, seed=GRID.seeds),


rule analysis:
    input:
        CELLS,
        f"params/{GRID.profile}/grid.yaml",
    output:
        f"{RUNS}/{GRID.profile}/analysis/manifest.json",
    log:
        f"{RUNS}/{GRID.profile}/logs/analysis.log",
    params:
        given=f"-f params/{GRID.profile}/settings.yaml",
    shell:
        papermill("06_analysis")
