"""What SST-2 shares with itself and with the texts of this repository, and what scores are without that.

    UHL_DATA=FOLDER python tests/sst2.py          (FOLDER/sst2; with the scores of finished cells of profile `local`)
    UHL_DATA=FOLDER python tests/sst2.py --port   (and ports their adapters anew: some three minutes each on a core)

SST-2's phrases are parts of its sentences, and its sentences are from the same reviews as those of `movies`. So a test
sentence may be among the unlabelled ones that `minilm-4x312` was distilled on, and an anchor, or a phrase of dev, may
be a part of one that is trained on. The second command puts other anchors into the trained adapters: sentences of
`movies` that are neither in SST-2's test split nor a part of what is trained on. Case, blanks and marks do not count.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pandas as pd
from datasets import Dataset, DatasetDict

from uhl import attempts, results, runs, stages, store, student
from uhl.grid import PARAMS, Grid
from uhl.models import load_encoder
from uhl.porting import Shared, at_work, port
from uhl.runs import Settings, read_yaml
from uhl.tasks import OFFLINE, Task, load_task, rated_sentences
from uhl.train import Classifier, predict

SHORTEST = 10  # letters of a sentence that may be an anchor


def joined(texts: Iterable[str]) -> list[str]:
    """Letters and digits alone: SST-2 sets blanks elsewhere (``do n't``)."""
    return ["".join(re.findall(r"[a-z0-9]+", text.lower())) for text in texts]


def shares(task: Task) -> np.ndarray:
    """Print what splits share; which test sentences the student was distilled on."""
    test, distilled = joined(task.data["test"]["text"]), set(joined(student.corpus()))
    dev = {text for name in OFFLINE for text in joined(load_task(name).data["dev"]["text"])}
    seen = np.array([text in distilled for text in test])
    print(f"of {len(test):,} test sentences {seen.sum()} are in the student's corpus, {len(dev & set(test))} in a dev")
    trained = "\n".join(joined(task.data["train"]["text"]))
    for split in ("unlabelled", "dev"):
        texts = joined(task.data[split]["text"])
        print(
            f"of {len(texts):,} texts of {split} {sum(text in trained for text in texts):,} are parts of training ones"
        )
    return seen


def scores(seen: np.ndarray) -> pd.DataFrame:
    """Test scores of finished cells on the sentences that the student has seen, and on the others."""
    rows = []
    for (task, target, phase, arm), cells in results.gather("local").items():
        if task == "sst2" and phase in {"zero-shot", "tuned"}:
            right = np.stack([cells[seed][:, 0] for seed in sorted(cells)])
            rows.append((target, phase, arm, len(cells), 100 * right[:, seen].mean(), 100 * right[:, ~seen].mean()))
    return pd.DataFrame(rows, columns=["target", "phase", "arm", "seeds", "seen", "not seen"])


def other_anchors(task: Task) -> Task:
    """The task with other unlabelled texts: sentences of `movies` that it does not know."""
    known, test = "\n".join(joined(task.data["train"]["text"])), set(joined(task.data["test"]["text"]))
    texts = list(rated_sentences("movies")["text"])
    free = [text for text, key in zip(texts, joined(texts), strict=True) if len(key) >= SHORTEST and key not in test]
    free = sorted(text for text, key in zip(free, joined(free), strict=True) if key not in known)
    print(f"{len(free):,} of {len(texts):,} sentences of movies are unknown to it")
    return replace(task, data=DatasetDict({**task.data, "unlabelled": Dataset.from_dict({"text": free})}))


def ports(settings: Settings, task: Task) -> None:
    """Print test scores of the trained adapters' ports with their own anchors, and with others."""
    source, other = stages.freeze(load_encoder(settings.source)), other_anchors(task)
    rows = []
    for seed in Grid.read("local").seeds:
        own = settings.model_copy(update={"seed": seed})
        file = runs.cell_dir(own, "pretrain-canonical") / "adapter.safetensors"
        for anchors in ("own", "other") if file.is_file() else ():
            adapter = store.load(file)
            if anchors == "other":
                adapter.anchors = attempts.anew(own, adapter, source, stages.probe(own, other))
            for name in Grid.read("local").targets:
                target = stages.freeze(load_encoder(name))
                shared = Shared()
                for arm in ("anchor", "zero-atoms"):
                    made = port(adapter, target, task.name, arm, source, seed, shared)
                    with at_work(adapter, target, task.name, made.frame, made.scale) as attached:
                        part = adapter.task(task.name)
                        classifier = Classifier(target.model, part, made.frame, attached, own.train_config())
                        found = predict(classifier, target, task, "test", max_length=own.max_length).score
                    rows.append((name, arm, anchors, seed, found))
                    print(f"seed {seed}, {anchors} anchors, {name}, {arm}: {found:.1f}", flush=True)
    table = pd.DataFrame(rows, columns=["target", "arm", "anchors", "seed", "score"])
    print(table.pivot_table("score", ["target", "arm"], "anchors").round(1).to_string())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", action="store_true", help="port the adapters of finished cells with other anchors")
    options = parser.parse_args()
    runs.quiet()
    files = ("settings.yaml", "sst2.yaml")
    settings = Settings(**{k: v for file in files for k, v in read_yaml(PARAMS / "local" / file).items()})
    task = stages.load_data(settings)
    seen = shares(task)
    if (runs.root() / "local" / "results.csv").is_file():
        print(scores(seen).round(1).to_string(index=False))
    if options.port:
        ports(settings, task)


if __name__ == "__main__":
    main()
