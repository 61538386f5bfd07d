# The batch: every cell of a profile's grid is one papermill run of one notebook, resumable, in parallel over cores.
#   snakemake --cores 2 --config profile=offline        (what `make run` calls)
#   snakemake -n --config profile=offline-full          (what would run)
# A cell is done when its manifest exists and is newer than its parameter files. Training inside a cell resumes from its
# last checkpoint. A change of the code does not run anything again: the table names cells that are older than others (see
# uhl.runs.PROTOCOL); remove their folders.

import os
import sys

from uhl.grid import Grid, task_file
from uhl.runs import Settings, read_yaml, slug

configfile: "params/default.yaml"

GRID = Grid.read(config["profile"])
RUNS = os.path.abspath(os.environ["UHL_RUNS"]) if os.environ.get("UHL_RUNS") else "runs"
if os.environ.get("UHL_RUNS"):
    os.environ["UHL_RUNS"] = RUNS  # notebooks run in their own folder
if os.environ.get("UHL_DATA"):
    os.environ["UHL_DATA"] = os.path.abspath(os.environ["UHL_DATA"])
CELL = f"{RUNS}/{GRID.profile}/{{task}}-s{{seed}}"
CELLS = [f"{RUNS}/{GRID.profile}/{cell}/manifest.json" for cell in GRID.cells()]
SETTINGS = f"params/{GRID.profile}/settings.yaml"
TARGET = f"params/{GRID.profile}/{{target}}.yaml"
GIVEN_TARGET = TARGET.replace("{target}", "{wildcards.target}")  # the same in a command

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


def own_task(w):
    """The parameter file of a task of the user's own; none for a task by name."""
    path = task_file(GRID.profile, w.task)
    return [str(path)] if path else []


def lent_adapter(w):
    """The adapter that the task has of another one; none where it is trained on the task itself."""
    lender = GRID.lends(w.task)
    return [f"{RUNS}/{GRID.profile}/{lender}-s{w.seed}/pretrain-{w.projector}/manifest.json"] if lender else []


def own_list(name):
    """A parameter file that a profile may have beside its settings: of a notebook outside of the batch, or of baselines
    on the source or retrained on targets.
    """
    path = f"params/{GRID.profile}/{name}.yaml"
    return [path] if os.path.exists(path) else []


def task(w):
    return f"-f {own_task(w)[0]}" if own_task(w) else f"-p task {w.task}"


def all_baselines(w):
    """Those of the settings in place of the target's own, where the grid has this cell as one of the targets' only once."""
    if not GRID.only_once(w.target, w.task, int(w.seed)):
        return ""
    return f" -y 'baselines: [{', '.join(Settings(**read_yaml(SETTINGS)).baselines)}]'"


def papermill(notebook, files=()):
    """Run a notebook into a scratch name beside its manifest and move it when it succeeded."""
    given = " ".join(f"-f {f}" for f in (SETTINGS, *files))
    return (
        "mkdir -p $(dirname {output[0]}) && echo \"$(date +%H:%M:%S)  started  $(dirname {output[0]})\" && "
        f"papermill notebooks/{notebook}.ipynb $(dirname {{output[0]}})/.running.ipynb --cwd notebooks "
        f"--execution-timeout 14400 --no-progress-bar {given} {{params.own}} > {{log}} 2>&1 "
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
        SETTINGS,
        own_task,
        lent_adapter,
    output:
        f"{CELL}/pretrain-{{projector}}/manifest.json",
    log:
        f"{RUNS}/{GRID.profile}/logs/{{task}}-s{{seed}}-pretrain-{{projector}}.log",
    priority: 3  # long chains first, baselines fill the gaps
    params:
        own=lambda w: f"{task(w)} -p seed {w.seed} -y 'projectors: [{w.projector}]'",
    shell:
        papermill("02_pretrain")


rule port:
    input:
        expand(f"{CELL}/pretrain-{{projector}}/manifest.json", projector=GRID.projectors, allow_missing=True),
        SETTINGS,
        own_task,
        TARGET,
    output:
        f"{CELL}/port-{{target}}/manifest.json",
    log:
        f"{RUNS}/{GRID.profile}/logs/{{task}}-s{{seed}}-port-{{target}}.log",
    priority: 1
    params:
        own=lambda w: f"{task(w)} -p seed {w.seed}",
    shell:
        papermill("03_port", [GIVEN_TARGET])


rule tune:
    input:
        expand(f"{CELL}/pretrain-{{projector}}/manifest.json", projector=GRID.projectors, allow_missing=True),
        SETTINGS,
        own_task,
        TARGET,
    output:
        f"{CELL}/tune-{{target}}/manifest.json",
    log:
        f"{RUNS}/{GRID.profile}/logs/{{task}}-s{{seed}}-tune-{{target}}.log",
    priority: 2
    params:
        own=lambda w: f"{task(w)} -p seed {w.seed}",
    shell:
        papermill("04_tune", [GIVEN_TARGET])


rule baselines_of_source:
    input:
        SETTINGS,
        own_task,
        own_list("source"),
    output:
        f"{CELL}/baselines-{slug(GRID.source)}/manifest.json",
    log:
        f"{RUNS}/{GRID.profile}/logs/{{task}}-s{{seed}}-baselines-{slug(GRID.source)}.log",
    priority: 2  # longer than those of a target, and begun while adapters are pre-trained
    params:
        own=lambda w: f"{task(w)} -p seed {w.seed} -y 'hosts: [source]'",
    shell:
        papermill("05_baselines", own_list("source"))


rule baselines:
    input:
        SETTINGS,
        own_task,
        own_list("retrained"),
        TARGET,
    output:
        f"{CELL}/baselines-{{target}}/manifest.json",
    log:
        f"{RUNS}/{GRID.profile}/logs/{{task}}-s{{seed}}-baselines-{{target}}.log",
    params:
        own=lambda w: f"{task(w)} -p seed {w.seed} -y 'hosts: [target]'{all_baselines(w)}",
    shell:
        papermill("05_baselines", [*own_list("retrained"), GIVEN_TARGET])


ruleorder: baselines_of_source > baselines


rule attempts:
    input:
        f"{CELL}/pretrain-canonical/manifest.json",
        SETTINGS,
        own_task,
        TARGET,
        own_list("attempts"),
        own_list("retrained"),
    output:
        f"{CELL}/attempts-{{target}}/attempts.csv",
    log:
        f"{RUNS}/{GRID.profile}/logs/{{task}}-s{{seed}}-attempts-{{target}}.log",
    params:
        own=lambda w: f"{task(w)} -p seed {w.seed}",
    shell:
        papermill("07_what_moves", [*own_list("attempts"), *own_list("retrained"), GIVEN_TARGET])


# Not of the batch: ways to port, compared on dev with the first seed (`make attempts`).
rule all_attempts:
    input:
        expand(f"{CELL}/attempts-{{target}}/attempts.csv", task=GRID.tasks, seed=GRID.seeds[0], target=GRID.targets),


rule compress:
    input:
        f"{CELL}/pretrain-canonical/manifest.json",
        SETTINGS,
        own_task,
        own_list("copies"),
    output:
        f"{CELL}/compress/compression.csv",
    log:
        f"{RUNS}/{GRID.profile}/logs/{{task}}-s{{seed}}-compress.log",
    params:
        own=lambda w: f"{task(w)} -p seed {w.seed}",
    shell:
        papermill("10_compress", own_list("copies"))


# Not of the batch: the adapter on pruned copies of its source (`make copies`).
rule all_copies:
    input:
        expand(f"{CELL}/compress/compression.csv", task=GRID.tasks, seed=GRID.seeds),


rule analysis:
    input:
        CELLS,
    output:
        f"{RUNS}/{GRID.profile}/analysis/manifest.json",
    log:
        f"{RUNS}/{GRID.profile}/logs/analysis.log",
    params:
        own="",
    shell:
        papermill("06_analysis")
