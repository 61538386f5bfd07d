"""The model card beside an adapter: what it was trained on, what it costs, how it scored, how to put it to work.

Our part stands between two marks, so that a person's own text around it survives the next save.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from peft.utils import SAFETENSORS_WEIGHTS_NAME

from uhl import budget
from uhl.config import Sizes
from uhl.fileformat import Header, bound_to, read
from uhl.files import write_text

START, END = "<!-- written by uhl: what stands between these marks is replaced -->", "<!-- end of uhl's part -->"
TEMPLATE = "[More Information Needed]"  # in the card that PEFT writes for every adapter
Score = Mapping[str, Any]  # host, task, arm, phase, score, low, high, n, seeds, extra_flops_pct, active_atoms


def write(folder: str | Path, scores: Sequence[Score] = ()) -> Path:
    """Write README.md beside the adapter file in ``folder``, or bring its part up to date."""
    folder = Path(folder)
    file, readme = folder / SAFETENSORS_WEIGHTS_NAME, folder / "README.md"
    header = read(file).header
    card = ModelCard(readme.read_text(encoding="utf-8") if readme.is_file() else "---\n---\n")
    data = card.data
    data["library_name"] = "peft"
    named, tags = data.get("base_model"), {*(data.get("tags") or ()), "peft", "unihyperlora"}
    if isinstance(named, str) and Path(named).is_absolute():  # a folder of this machine says nothing elsewhere
        data["base_model"] = str(header.info.get("source", Path(named).name))
        tags = {tag for tag in tags if named not in tag}
    data["tags"] = sorted(tags)
    ours, text = f"{START}\n\n{body(header, budget.file_bytes(file), scores)}\n{END}\n", card.text
    if START in text and END in text:
        before, after = text.split(START, 1)[0], text.split(END, 1)[1].removeprefix("\n")
        card.text = before + ours + after
    else:
        card.text = ours if TEMPLATE in text or not text.strip() else f"{ours}\n{text}"
    return write_text(readme, str(card))


def source(info: Mapping[str, object]) -> str:
    """The model that an adapter was trained on, and its shape, as far as its file says so."""
    return " ".join(str(info[key]) for key in ("source", "shape") if key in info) or "a model not named"


def body(header: Header, sizes: Mapping[str, int], scores: Sequence[Score] = ()) -> str:
    """Our part of the card, Markdown. ``sizes``: bytes by part, see :func:`uhl.budget.file_bytes`."""
    config = Sizes(**header.config)
    total = sum(sizes.values())
    lines = [
        "# UniHyperLoRA adapter",
        "",
        f"Trained on **{source(header.info)}**"
        + (f" (revision `{str(header.info['revision'])[:12]}`)" if header.info.get("revision") else "")
        + (f", on the task `{header.info['source_task']}`" if header.info.get("source_task") else "")
        + (f", taught by that model trained by `{header.info['teacher']}`" if header.info.get("teacher") else "")
        + f": {config.atoms} rank-1 atoms of canonical width {config.width}, {config.routed()}, at most "
        f"{min(config.top_k, config.atoms)} atoms a token, `{config.projector}` projector, on weights "
        f"{', '.join(config.types)}. It attaches to Transformers of other widths and depths.",
        "",
        "## Tasks",
        "",
        *(
            f"- `{name}`: {task.kind} classification, labels {', '.join(task.labels)}{bound_to(task)}"
            if task.labels
            else f"- `{name}`: the host's own head is used"
            for name, task in header.tasks.items()
        ),
        *([] if header.tasks else ["- none: a dictionary, to be joined with task packs (`uhl join`)"]),
        "",
        "## Scores",
        "",
        *(_table(scores) if scores else ["None recorded with this file."]),
        "",
        "## Budget",
        "",
        "| part | bytes |",
        "|---|---|",
        *(f"| {part} | {count:,} |" for part, count in sizes.items() if count),
        f"| file | {total:,} of at most {budget.LIMIT_BYTES:,} |",
        "",
        "## Use",
        "",
        *_use(header, config),
        "",
        "## Anchors",
        "",
        f"{header.anchors.count} unlabelled texts travel with the file, as the reference for ports. Their origin and "
        f"licence: {header.anchors.origin}."
        if header.anchors
        else "No text travels with the file.",
    ]
    return "\n".join(lines) + "\n"


def _table(scores: Sequence[Score]) -> list[str]:
    lines = ["| host | task | arm | phase | score [95 % interval] | n | seeds | FLOPs | atoms a token |"]
    lines.append("|---|---|---|---|---|---|---|---|---|")
    for s in scores:
        lines.append(
            f"| {s['host']} | {s['task']} | {s['arm']} | {s['phase']} | "
            f"{s['score']:.1f} [{s['low']:.1f}, {s['high']:.1f}] | {s['n']:,} | {s['seeds']} | "
            f"+{s['extra_flops_pct']:.1f} % | {s['active_atoms']:.2f} |"
        )
    lines += [
        "",
        "Test split, in percent: means over seeds, of which this file is one, with 95 % intervals over seeds and "
        "examples. FLOPs: added to the host's linear layers.",
    ]
    return lines


def _use(header: Header, config: Sizes) -> list[str]:
    lines = ["```python", "import uhl  # registers the PEFT method", "from peft import PeftModel", ""]
    lines += ["model = PeftModel.from_pretrained(host, folder)  # a host of any width, depth or family"]
    if config.projector == "canonical" and header.anchors:
        lines += ["uhl.port_model(model, tokenizer)  # no labels: seconds, on the anchor texts"]
    lines += ["```", ""]
    if config.projector == "dimension":
        lines.append("The projectors follow from the host's widths alone (the `dimension` arm).")
    elif header.anchors:
        lines.append("A port fits the host's states on the anchor texts to the source's codes (the `anchor` arm).")
    else:
        lines.append("A `canonical` adapter without anchors works on its source only, in the frame of its training.")
    return lines
