"""What SST-2 shares with itself and with the texts of this repository, and what scores are without that.

    UHL_DATA=FOLDER python tests/sst2.py        (FOLDER/sst2; with finished cells of the profile `local`, their scores)

SST-2's phrases are parts of its sentences, and its sentences are from the same reviews as those of `movies`. So a test
sentence may be among the unlabelled ones that `minilm-4x312` was distilled on, and an anchor, or a phrase of dev, may
be a part of one that is trained on. Case, blanks and marks do not count.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import pandas as pd

from uhl import report, runs, stages, student
from uhl.grid import PARAMS
from uhl.runs import Settings, read_yaml
from uhl.tasks import OFFLINE, load_task

LONGEST = 60  # words of a part


def plain(texts: Iterable[str]) -> list[str]:
    """Words of letters and digits alone, one blank between two."""
    return [" ".join(re.findall(r"[a-z0-9]+", text.lower())) for text in texts]


def joined(texts: Iterable[str]) -> list[str]:
    """The same without blanks, which SST-2 sets elsewhere (``do n't``)."""
    return [text.replace(" ", "") for text in plain(texts)]


def parts(texts: Iterable[str]) -> set[str]:
    """All runs of words that stand in texts."""
    found: set[str] = set()
    for words in map(str.split, plain(texts)):
        found.update(
            " ".join(words[a:b]) for a in range(len(words)) for b in range(a + 1, min(len(words), a + LONGEST) + 1)
        )
    return found


def main() -> None:
    """Print the shares, and for each ported arm the score on test sentences that the student has and has not seen."""
    files = ("settings.yaml", "sst2.yaml")
    settings = Settings(**{k: v for file in files for k, v in read_yaml(PARAMS / "local" / file).items()})
    data = stages.load_data(settings).data
    test = joined(data["test"]["text"])
    distilled = set(joined(student.corpus()))
    dev = {text for name in OFFLINE for text in joined(load_task(name).data["dev"]["text"])}
    seen = np.array([text in distilled for text in test])
    print(f"of {len(test):,} test sentences {seen.sum()} are in the student's corpus, {len(dev & set(test))} in a dev")
    trained = parts(data["train"]["text"])
    for split in ("unlabelled", "dev"):
        count = sum(text in trained for text in plain(data[split]["text"]))
        print(f"of {len(data[split]):,} texts of {split} {count:,} are parts of training texts, or such texts")
    if not (runs.root() / "local").is_dir():
        return
    rows = []
    for (task, target, phase, arm), cells in report.gather("local").items():
        if task == "sst2" and phase in {"zero-shot", "tuned"}:
            right = np.stack([cells[seed][:, 0] for seed in sorted(cells)])
            rows.append((target, phase, arm, len(cells), 100 * right[:, seen].mean(), 100 * right[:, ~seen].mean()))
    print(
        pd.DataFrame(rows, columns=["target", "phase", "arm", "seeds", "seen", "not seen"])
        .round(1)
        .to_string(index=False)
    )


if __name__ == "__main__":
    main()
