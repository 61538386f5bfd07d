"""Port an adapter to another host: obtain the host's frame, without labels.

| arm          | readers and writers of the target                                  | needs                    |
|--------------|--------------------------------------------------------------------|--------------------------|
| `dimension`  | the projector's network h_psi(d)                                   | a `dimension` adapter    |
| `lineage`    | the source's own basis, as it is                                   | equal widths, the source |
| `embedding`  | the source's basis behind ridge regressions between token embeddings | the source, its vocabulary |
| `anchor`     | ridge regressions between the target's and the source's anchor codes | the file's anchors     |
| `refresh`    | `anchor`, then label-free steps on the task's bias (:mod:`uhl.refresh`) | the file's anchors   |
| `zero-atoms` | control: `anchor` for the head, no atoms                           | the file's anchors       |
| `random-p`   | control: `anchor` for the head and the scale, atoms behind a random orthogonal P | the file's anchors |
| `shuffled`   | control: `anchor` with the anchors' codes permuted                 | the file's anchors       |
| `refresh-random` | control: `refresh` with atoms behind a random orthogonal P     | the file's anchors       |

The anchored port runs the target over the anchor texts. The stream's reader M solves min ||H M^T - Z||^2 +
||Lambda M||^2 between its words' states H and the source's codes Z at matched depths; the writer N solves the reverse.
The head's reader is the same regression from what a head reads (sentence means, or words) at several levels to the
*adapted* source's codes, fitted with the atoms in place; the directions that the task's logits need are fitted to the
source's probabilities, on more texts than the others, and on fragments of texts, and shifted until left-out texts get
each label as often as the source gives it. On a host larger than the source these imitate the source to within a
standard error of the closest fit, not more: what a larger host knows better would be unlearnt (:func:`port_rules`). How
much of the atoms to use is the scale in :data:`SCALES` at which the source's probabilities are reproduced best; 0 is
allowed. How often the target will decide as the source did is predicted from the same texts, each left out of its own
fit (``agreement`` in the report), and so is what its other decisions cost (``expected_loss``). ``change`` is how much
the atoms move what the head reads: random directions at the same scale move it less. A head that no source has trained
(``own_head`` of its task) reads the target's own principal coordinates of the file's anchor texts, by every arm, or
where there are none what the arm gives.

A target that is the source itself, known by what it makes of the anchors to within 8 bits (a copy at half precision is
not), gets the source's own frame.
"""

from __future__ import annotations

import logging
import math
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from uhl import store
from uhl.adapter import UHLAdapter
from uhl.anchors import Anchors, Observed, Probe, finite, observe, too_long, unit_states
from uhl.config import ARMS, CONTROLS, METRICS
from uhl.errors import UHLError, one_of
from uhl.fileformat import digest
from uhl.fits import Wanted, Way, basis_of, head_fit, random_basis, stream_basis, upper_levels
from uhl.frame import Basis, Frame, dimension_frame
from uhl.host import Slot, find_slots, is_encoder_decoder
from uhl.layer import Attached
from uhl.models import Encoder
from uhl.peft_method import attach, tuner_of
from uhl.refresh import refresh
from uhl.ridge import ridge

logger = logging.getLogger("uhl.porting")

SCALES = (0.0, 1.0, 2.0)  # of the atoms, times source layers over target layers: a shorter host has fewer edits
RULES = 6  # of the anchored port: a head that was tuned belongs to the rules that it was ported by
LARGER_RULES = 7  # the same, to a host larger than the source
REFRESHED = {"refresh": "anchor", "refresh-random": "random-p"}  # arms that refresh, and the port that each starts from
FIXED = ("dimension", "lineage", "embedding")  # arms that no anchor has a part in
FEWEST_SHARED = 256  # entries of two vocabularies
# Cohen's kappa of source and target below which a port is called poor, by the task's metric; see notebooks 06 and 10.
# What scores in F1 needs all of an entity's words right, among many that are none.
DOUBTFUL = {"accuracy": 0.5, "f1": 0.8}
FORESEEN = {"agreement", "kappa", "expected_loss", "warning"}  # of a report


@dataclass
class Port:
    """A ported adapter's frame and scale, and a report: weights, fits, scales tried, seconds."""

    arm: str
    frame: Frame
    scale: float
    report: dict[str, object] = field(default_factory=dict)


@dataclass
class Shared:
    """What ports of one file to one host have in common, kept from one arm to the next: the host on the coded texts and
    on the rest, the source's basis, and the ports that others start from.
    """

    coded: Observed | None = None
    rest: Observed | None = None
    basis: Basis | None = None
    basis_seconds: float = 0.0
    ports: dict[tuple[object, ...], Port] = field(default_factory=dict)
    own: dict[str, Basis] = field(default_factory=dict)  # the host's own coordinates of sentences, or of words

    @classmethod
    def of(cls, seen: Observed, probe: Probe) -> Shared:
        """With a host that was observed on everything in a probe."""
        return cls(*seen.parts(sum(probe.first().units())))


@dataclass
class _Look:
    """A bare host on the anchors, for one port: what no other port has observed is observed when it is asked for.
    ``spared`` are the seconds that others have taken for what this one asked for.
    """

    target: Encoder
    probe: Probe
    shared: Shared
    spared: float = 0.0

    @cached_property
    def coded(self) -> Observed:
        """On the coded texts."""
        self.shared.coded = self._kept(self.shared.coded) or observe(self.target, self.probe.first())
        return self.shared.coded

    @cached_property
    def rest(self) -> Observed:
        """On all other texts, and on fragments."""
        start = len(self.probe.first().texts)
        if start == len(self.probe.observed):
            return self.coded.parts(self.coded.units.shape[1])[1]
        self.shared.rest = self._kept(self.shared.rest) or observe(self.target, self.probe, start)
        return self.shared.rest

    def _kept(self, seen: Observed | None) -> Observed | None:
        """What another port has observed, its seconds counted."""
        self.spared += seen.seconds if seen else 0.0
        return seen


def why_not(adapter: UHLAdapter, target: Encoder, arm: str, source: Encoder | None = None) -> str | None:
    """Why a cell is not defined, or None when it is."""
    one_of(arm, ARMS, "arm")
    if is_encoder_decoder(target.model):
        return "a model with encoder and decoder has no single stream of states to port to"
    if (arm == "dimension") != (adapter.config.projector == "dimension"):
        other = "arm dimension" if arm != "dimension" else "another arm"
        return (
            f"arm {arm} is not defined for an adapter trained under the {adapter.config.projector} projector; port it "
            f"by {other}"
        )
    if arm != "dimension" and (strait := _beside_the_stream(adapter, target)):
        return (
            f"{strait} neither reads nor writes {target.name}'s stream of states, {target.width} wide, so no adapter "
            "can be ported to it"
        )
    if arm in {"lineage", "embedding"} and source is None:
        return f"arm {arm} needs the source model; give it (`uhl port --source NAME`)"
    if arm == "lineage" and source is not None and source.width != target.width:
        return f"arm lineage needs equal widths; the source has {source.width}, the target {target.width}"
    if arm == "embedding" and source is not None:
        if len(_shared(source, target)[0]) < FEWEST_SHARED:
            return f"arm embedding needs a shared vocabulary; {source.name} and {target.name} have almost none"
        if any(_embeddings(e).shape[1] != e.width for e in (source, target)):
            return "arm embedding needs token embeddings of the stream's width"
    if arm not in FIXED and adapter.anchors is None:
        return (
            f"arm {arm} needs anchors, and the adapter has none; give the file as the workbook trained it (a new "
            "adapter gets some in notebook 02, or does without them under the projector `dimension`)"
        )
    if arm in REFRESHED and (adapter.anchors is None or adapter.anchors.bias is None):
        return f"arm {arm} needs anchors that hold the source's decisions; pre-train the adapter again"
    if arm in REFRESHED and adapter.info.get("tuned_on") and adapter.info.get("arm") not in REFRESHED:
        return f"arm {arm} starts from the source's head, and this file was tuned on {adapter.info['tuned_on']}"
    return None


def _beside_the_stream(adapter: UHLAdapter, target: Encoder) -> str | None:
    """The first weight with atoms whose side of the stream has another width than the host's states."""
    slots = find_slots(target.model, adapter.config.types)
    return next((slot.path for slot in slots if slot.sides(stream=True)[0] != target.width), None)


def _embeddings(encoder: Encoder) -> Float[Tensor, "vocabulary D"]:
    """Token embeddings, detached."""
    found: Tensor = encoder.model.get_input_embeddings().weight  # type: ignore[operator,assignment]
    return found.detach().cpu().float()


def port(
    adapter: UHLAdapter,
    target: Encoder,
    task: str | None = None,
    arm: str = "anchor",
    source: Encoder | None = None,
    seed: int = 0,
    shared: Shared | None = None,
    way: Way | None = None,
) -> Port:
    """The target's frame for ``adapter``. No labels are used. Raises :class:`UHLError` for an undefined cell.

    ``task`` may be left out where the adapter has one. The report says how well the maps fit at each depth, what scales
    of the atoms were tried, and how often the target will decide as the source did, with a ``warning`` (also logged)
    where that is poor.

    ``source`` is needed by `lineage` and `embedding` alone; ``seed`` draws the controls; ``shared`` spares what other
    ports of the same file to the same host have done (its seconds are counted all the same). `refresh` sets the task's
    bias in ``adapter``.
    """
    for given, kind, remedy in ((adapter, UHLAdapter, "uhl.store.load"), (target, Encoder, "uhl.models.load_encoder")):
        if not isinstance(given, kind):
            raise UHLError(f"port() got {given!r:.60} for an {kind.__name__}; load it by {remedy}")
    reason = why_not(adapter, target, arm, source)
    if reason:
        raise UHLError(reason)
    said = list[str]()
    begun, task, way, shared = time.time(), task or _only_task(adapter), way or Way(), shared or Shared()
    key = (_mark(adapter, task), arm, task, seed, way)
    if key in shared.ports:
        return shared.ports[key]
    if arm not in FIXED and _of_another_release(adapter, target):
        said.append(
            f"tuned on {adapter.info['tuned_on']} behind another release's port, which may differ from this one; its "
            "scores may not repeat"
        )
    slots, part = find_slots(target.model, adapter.config.types), adapter.task(task)
    if arm in REFRESHED and part.own_head is not None:
        raise UHLError(f"arm {arm} needs a source that decides, and the head of {task} was trained on none")
    if arm == "dimension":
        with torch.no_grad():
            done = Port(arm, dimension_frame(adapter.projector, slots, target.width), 1.0)
    elif arm in {"lineage", "embedding"}:
        assert source is not None
        trained_on = adapter.info.get("revision", "unknown")
        if "unknown" not in {trained_on, source.revision} and trained_on != source.revision:
            said.append(
                f"the adapter was trained on {adapter.info.get('source')}, and {source.name} has other weights; arm "
                f"{arm} needs the former as its source"
            )
        if shared.basis is None:
            shared.basis = source_basis(adapter, source)
            shared.basis_seconds = time.time() - begun
        else:
            begun -= shared.basis_seconds
        done = Port(arm, shared.basis.frame(slots), 1.0)
        if arm == "embedding":
            basis, explained = _embedding_basis(shared.basis, source, target)
            done = Port(arm, basis.frame(slots), 1.0, {"stream_fit": [round(explained, 4)]})
        done.report |= _judged(adapter, target, task, done)
    elif arm in REFRESHED:
        done = _start(adapter, target, task, arm, seed, shared, way)
        begun = time.time() - float(str(done.report["seconds"]))
        steps, confidence = way.refresh_steps, way.confidence
        done.report |= refresh(adapter, target, task, done.frame, done.scale, seed, steps, confidence)
    else:
        assert adapter.anchors is not None
        look, alone = _Look(target, adapter.anchors.probe, shared), True
        told, kept = adapter.info, adapter.info.get("scale")
        here = _tuned_on(adapter, target) and told.get("arm") == arm and isinstance(kept, float)
        if way.scales is None and here:
            way = way.model_copy(update={"scales": (kept,)})  # that of the head, which was tuned with it
        elif way.scales is None and arm == "random-p":  # at the same scale
            made = port(adapter, target, task, "anchor", source, seed, shared, way)
            begun, alone = time.time() - float(str(made.report["seconds"])), False
            way = way.model_copy(update={"scales": (made.scale,)})
        own = _own_basis(adapter, look) if way.known and arm in {"anchor", "zero-atoms"} else None
        if own is not None:
            done = Port(arm, own.frame(slots), float(arm != "zero-atoms"))
        else:
            done = _anchored(adapter, target, task, arm, slots, seed, look, way)
        begun -= look.spared if alone else 0.0
    if part.own_head is not None:
        done.frame = _own_coordinates(done.frame, adapter, part.kind, target, shared)
        done.report |= _strange(adapter, task, target, arm)
    for line in said:
        logger.warning("%s", line)
    if said:
        done.report["warning"] = "; ".join([*said, *filter(None, [str(done.report.get("warning", ""))])])
    done.report |= {"arm": arm, "weights": len(slots), "scale": done.scale, "seconds": round(time.time() - begun, 1)}
    if arm in REFRESHED.values():
        shared.ports[key] = done
    return done


def _own_coordinates(frame: Frame, adapter: UHLAdapter, kind: str, target: Encoder, shared: Shared) -> Frame:
    """A frame whose head reads the target's own principal coordinates of the anchor texts, or of their words; as it is
    where there are no anchors.
    """
    if adapter.anchors is None:
        return frame
    if kind not in shared.own:
        texts = adapter.anchors.probe.first()
        seen = shared.coded if kind == texts.kind else None
        seen = seen or observe(target, replace(texts, kind=kind, words=0))  # type: ignore[arg-type]
        shared.own[kind] = basis_of(seen, adapter.config.width, upper_levels(target.layers))
    own = shared.own[kind]
    return replace(frame, head=own.head, shift=own.shift, levels=own.levels, rescale=False)


def _strange(adapter: UHLAdapter, task: str, target: Encoder, arm: str) -> dict[str, object]:
    """A warning, which is logged, where a task's head is of another host than this; else nothing."""
    of = adapter.task(task).own_head
    if of is None or (of and _same(of, target)):
        return {}
    why = f"was fitted on {of} and reads that host's own coordinates" if of else "is not trained yet"
    said = f"the head of {task} {why}; what it says on {target.name} means nothing: tune the task there"
    if arm not in CONTROLS:
        logger.warning("%s", said)
    return {"warning": said}


def _mark(adapter: UHLAdapter, task: str) -> tuple[object, ...]:
    """What tells one adapter from another, as loaded again and again from one file; but for the task's bias, which arms
    that refresh change.
    """
    kept = {
        name: value for name, value in store.to_tensors(adapter).items() if not name.startswith(f"task.{task}.bias")
    }
    anchors, told = adapter.anchors, [adapter.info.get(name) for name in ("tuned_on", "arm", "scale")]
    shape = None if anchors is None else (anchors.kind, anchors.own, anchors.cuts, anchors.length, anchors.words)
    return digest(kept), shape, *map(str, told)


def _start(adapter: UHLAdapter, target: Encoder, task: str, arm: str, seed: int, shared: Shared, way: Way) -> Port:
    """The port that an arm refreshes, made now or before, without what it foresaw, which refreshing changes."""
    made = port(adapter, target, task, REFRESHED[arm], seed=seed, shared=shared, way=way)
    told = {key: value for key, value in made.report.items() if key not in FORESEEN}
    return Port(arm, made.frame, made.scale, told)


def _only_task(adapter: UHLAdapter) -> str:
    if len(adapter.tasks) != 1:
        raise UHLError(f"name one of the adapter's tasks: {', '.join(adapter.tasks) or 'it has none'}")
    return next(iter(adapter.tasks))


def port_model(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, name: str = "default", arm: str = "anchor"
) -> Port:
    """Port an adapter that a PEFT model carries to that model, and put the frame to work in it. No labels are used.

    The host is an encoder, or a decoder, with any head on it; its other adapters are left alone. An adapter that was
    trained since it was ported to this host, by name, gets the scale of the atoms that it was trained with. Raises
    :class:`UHLError` for an arm that the adapter does not allow, or that needs its source model, and for an adapter
    that works on some of the weights alone.
    """
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise UHLError(f"port_model() got {tokenizer!r:.60} for a tokenizer; load it by AutoTokenizer.from_pretrained")
    tuner = tuner_of(model)
    if name not in tuner.uhl_adapters:
        raise UHLError(f"the model has no adapter {name!r}; it has {', '.join(tuner.uhl_adapters) or 'none'}")
    adapter, host = tuner.uhl_adapters[name], tuner.model
    assert isinstance(adapter, UHLAdapter)
    inner = getattr(host, "base_model", host)  # transformers' name for a model without its head
    begin = next(f"{path}." if path else "" for path, module in host.named_modules() if module is inner)
    at_work_on = {slot.path for slot in tuner.attached(name).slots}
    with tuner.bare():
        known = {begin + slot.path for slot in find_slots(inner, adapter.config.types)}
        if at_work_on != known:
            raise UHLError(
                f"adapter {name!r} works on {len(at_work_on)} of the host's weights, and is ported to all {len(known)} "
                "of its types; load it without target_modules, exclude_modules and layers_to_transform"
            )
        target = Encoder(str(getattr(host.config, "_name_or_path", "")), inner, tokenizer, "unknown")
        task = tuner.attached(name).task_name
        place = f"{target.known_as}, {task}, {arm}"
        scale = _trained_at(adapter, place, task)
        done = port(adapter, target, task, arm, way=None if scale is None else Way(scales=(scale,)))
        if scale is None and target.name:  # a host without a name could not be told from another
            ported = adapter.info.get("ported")
            entry = {place: {"scale": done.scale, "content": _content(adapter, task)}}
            adapter.info["ported"] = (ported if isinstance(ported, dict) else {}) | entry
    pairs = {begin + path: pair for path, pair in done.frame.slots.items()}
    tuner.set_frame(name, replace(done.frame, slots=pairs), done.scale, arm)
    return done


def _content(adapter: UHLAdapter, task: str) -> str:
    """Hash of what all tasks share and of one task's parts, as a file holds them."""
    packed = store.pack_values(adapter, dict(adapter.named_parameters()))
    own = {name: value for name, value in packed.items() if not name.startswith("task.") or name.split(".")[1] == task}
    return digest(own)


def _trained_at(adapter: UHLAdapter, place: str, task: str) -> float | None:
    """The scale that an adapter was trained at after :func:`port_model` ported it to a place; None where it was not."""
    ported = adapter.info.get("ported")
    told = ported.get(place) if isinstance(ported, dict) else None
    scale = told.get("scale") if isinstance(told, dict) else None
    if not isinstance(told, dict) or not isinstance(scale, float) or not math.isfinite(scale):
        return None
    return scale if told.get("content") != _content(adapter, task) else None


def at_work(
    adapter: UHLAdapter, encoder: Encoder, task: str, frame: Frame | None, scale: float, learning: bool = False
) -> AbstractContextManager[Attached | None]:
    """A host with an adapter attached; left bare, None, where no atom acts: at scale 0 with a bias of zeros that is not
    ``learning``.
    """
    acts = scale != 0 or learning or bool(adapter.task(task).bias.any())
    return attach(encoder.model, adapter, task, frame, scale) if acts else nullcontext()


def predict_texts(
    adapter: UHLAdapter, target: Encoder, ported: Port, texts: Sequence[str], task: str | None = None
) -> list[dict[str, object]]:
    """What a ported adapter says of texts: ``text``, its ``label`` (of a token task: a list, a label a word) and the
    ``probability`` of that. The two parts of a pair are divided by a tab. Words beyond the length that the adapter was
    trained with are labelled by the mean of the text; a text of which the length leaves some out is marked ``cut``.
    Raises :class:`UHLError` for a task without a head, for a head of another host's, and where what the host makes of a
    text is not finite.
    """
    if isinstance(texts, str):
        raise UHLError(f"texts are a list of texts, got the text {texts!r:.60}; put it in brackets")
    task = task or _only_task(adapter)
    part = adapter.task(task)
    if not part.labels:
        raise UHLError(
            f"task {task!r} has no head in this file: the host that it was trained in decides by its own; call that "
            "host, or give a file that the workbook trained"
        )
    if wrong := _strange(adapter, task, target, ported.arm):
        raise UHLError(str(wrong["warning"]))
    length = part.length or (adapter.anchors.length if adapter.anchors else 64)
    probe = Probe(texts, part.kind, length=length, most=None)  # type: ignore[arg-type]
    with at_work(adapter, target, task, ported.frame, ported.scale), torch.no_grad():
        states = unit_states(target, probe, ported.frame.levels)
        codes = ported.frame.to(torch.device("cpu")).codes(states)
        found = finite(target, part.classify(codes.to(part.head.device)).softmax(-1).cpu())
    long = too_long(target, probe)
    out: list[dict[str, object]] = []
    for text, rows, cut in zip(texts, found.split(probe.units()), long, strict=True):
        best = rows.max(-1)
        label: object = [part.labels[i] for i in best.indices.tolist()]
        probability: object = [round(p, 4) for p in best.values.tolist()]
        if part.kind == "token" and not text.strip():
            label, probability = [], []
        elif part.kind != "token":
            (label,), (probability,) = label, probability  # type: ignore[misc,has-type]
        out.append({"text": text, "label": label, "probability": probability} | ({"cut": True} if cut else {}))
    return out


def source_basis(adapter: UHLAdapter, source: Encoder) -> Basis:
    """The basis that a `canonical` adapter was trained in: principal directions of its source over its anchors."""
    if adapter.anchors is None:
        raise UHLError("the adapter has no anchor texts to take the source's basis from")
    return basis_of(observe(source, replace(adapter.anchors.probe, words=0)), adapter.config.width)


def _own_basis(adapter: UHLAdapter, look: _Look) -> Basis | None:
    """The basis of a host that is the adapter's source itself: at every depth it makes of the anchors what the file
    says, as exactly as 8 bits hold it. None for any other.
    """
    anchors, seen, told = adapter.anchors, look.coded, adapter.info
    assert anchors is not None
    if told.get("layers") not in {None, len(seen.units) - 1} or told.get("shape") not in {None, look.target.shape}:
        return None
    basis = basis_of(seen, adapter.config.width, rest=look.rest)
    for depth, codes in zip(anchors.depths, anchors.stream, strict=True):
        dims, rows = codes.values.shape
        made = seen.stream(anchors.words)[seen.level(depth)][:rows] @ basis.read[0][:dims].T
        near = codes.scale + 1e-3 * codes.centre.float().abs()
        if len(made) < rows or ((made - codes.table()).abs() > near).any():
            return None
    return basis


def _shared(source: Encoder, target: Encoder) -> tuple[list[int], list[int]]:
    """Numbers of the vocabulary's entries that both models have, in either's numbering."""
    own, other = source.tokenizer.get_vocab(), target.tokenizer.get_vocab()
    both = sorted(set(own) & set(other))
    return [own[entry] for entry in both], [other[entry] for entry in both]


def _embedding_basis(basis: Basis, source: Encoder, target: Encoder) -> tuple[Basis, float]:
    """A source's basis behind the maps from the target's token embeddings to the source's and back; how much of the
    embeddings' variance the first explains. No text is used.
    """
    kept = zip((source, target), _shared(source, target), strict=True)
    own, other = (_embeddings(e)[torch.tensor(numbers)] for e, numbers in kept)
    there, back = ridge(other, own, False, held=False), ridge(own, other, False, each=False, held=False)
    scale = float(other.double().pow(2).mean().sqrt() / own.double().pow(2).mean().sqrt())
    made = Basis(
        tuple(read @ there.matrix.T for read in basis.read),
        tuple(back.matrix.T @ write for write in basis.write),
        basis.head @ there.matrix.T,
        basis.shift,
        tuple(rms * scale for rms in basis.rms),
    )
    return made, there.explained


def is_larger(adapter: UHLAdapter, target: Encoder) -> bool:
    """Whether a host is larger than the adapter's source, in layers times the square of the width. Where the file does
    not tell its source's shape, it is not.
    """
    shape = re.fullmatch(r"([0-9]{1,6}) x ([0-9]{1,6})", str(adapter.info.get("shape")))
    return shape is not None and target.layers * target.width**2 > int(shape[1]) * int(shape[2]) ** 2


def port_rules(adapter: UHLAdapter, target: Encoder) -> int:
    """Rules of anchored ports to a host: :data:`RULES`, or :data:`LARGER_RULES` where the host is larger than the
    source and the anchors hold logits: of more texts than have codes, or a teacher's. Not for a token task: its units
    are words, and those of one text are not independent, as a standard error would have them.
    """
    anchors = adapter.anchors
    apply = anchors is not None and anchors.logits is not None and anchors.kind != "token"
    return LARGER_RULES if apply and is_larger(adapter, target) else RULES


def _of_another_release(adapter: UHLAdapter, target: Encoder) -> bool:
    """Whether the head was tuned behind a port by rules that are not today's: on the target, or on any other host."""
    if not adapter.info.get("tuned_on"):
        return False
    rules = adapter.info.get("port_rules")
    return rules != port_rules(adapter, target) if _tuned_on(adapter, target) else rules not in (RULES, LARGER_RULES)


def _tuned_on(adapter: UHLAdapter, target: Encoder) -> bool:
    """Whether the head was tuned on the target."""
    there = adapter.info.get("tuned_on")
    return bool(there) and _same(str(there), target)


def _same(name: str, target: Encoder) -> bool:
    """Whether a host is the one of a name; where its folder lies may be another matter."""
    return Path(name).name == Path(target.name).name


def _anchored(
    adapter: UHLAdapter,
    target: Encoder,
    task: str,
    arm: str,
    slots: Sequence[Slot],
    seed: int,
    look: _Look,
    way: Way,
) -> Port:
    anchors = adapter.anchors
    assert anchors is not None
    generator = torch.Generator().manual_seed(seed)
    wanted = Wanted.of(anchors, generator if arm == "shuffled" else None)
    basis, fits = stream_basis(anchors, look.coded, wanted.order, way, adapter.dictionary.v.detach().cpu())
    whole, coded = look.probe, look.probe.first()
    few_units = sum(coded.units())
    if arm == "random-p":
        basis = random_basis(basis, generator)
    layers = adapter.info.get("layers")
    ratio = layers / target.layers if isinstance(layers, int) and layers > 0 else 1.0
    scales = (0.0,) if arm == "zero-atoms" else way.scales or tuple(ratio * s for s in SCALES)
    few = wanted if wanted.logits is None else wanted.first(few_units)

    def states(scale: float, rest: bool = False) -> Tensor:
        if scale == 0:
            return (look.rest if rest else look.coded).at(basis.levels)
        probe, start = (whole, len(coded.texts)) if rest else (coded, 0)
        with attach(target.model, adapter, task, _acting(basis.frame(slots), slots, way), scale):
            return unit_states(target, probe, basis.levels, start)

    with untuned(adapter, task):
        read = {scale: states(scale) for scale in scales}
        tried = {scale: head_fit(units, few, target.width, way) for scale, units in read.items()}
        scale = max(tried, key=lambda s: tried[s].explained)
        best = tried[scale]
        if wanted.logits is not None:  # the scale was chosen on the coded texts, in less time
            loose = port_rules(adapter, target) == LARGER_RULES if way.imitation is None else way.imitation == "one-se"
            best = head_fit(torch.cat([read[scale], states(scale, rest=True)]), wanted, target.width, way, loose)
    frame = replace(basis, head=best.matrix.T.contiguous(), shift=best.shift).frame(slots)
    frame = _acting(frame, slots, way)
    report: dict[str, object] = {
        "anchors": len(anchors.texts),
        "coded": anchors.coded,
        "stream_fit": [round(f, 4) for f in fits],
        "head_fit": {round(s, 4): round(f.explained, 4) for s, f in tried.items()},
        "final_fit": round(best.explained, 4),
        "change": round(_change(read[scale], states(0.0)), 4),
    }
    if anchors.judges(task):
        assert best.logits is not None
        assert anchors.bias is not None
        report |= _agreement(arm, best.logits[:few_units].float() + anchors.bias, anchors)
    return Port(arm, frame, scale, report)


def _change(states: Float[Tensor, "n D_levels"], bare: Float[Tensor, "n D_levels"]) -> float:
    """How much atoms change what a head reads, over how much that differs from text to text without them."""
    moved, spread = ((x - x.mean(0)).double().norm() for x in (states - bare, bare))
    return float(moved / spread.clamp_min(1e-12))


def _judged(adapter: UHLAdapter, target: Encoder, task: str, ported: Port) -> dict[str, object]:
    """:func:`_agreement` of a port that no anchor has a part in, where the file's anchors can tell: what the host says
    of them with the adapter at work.
    """
    anchors = adapter.anchors
    if anchors is None or not anchors.judges(task):
        return {}
    assert anchors.reads is not None
    assert anchors.bias is not None
    frame = ported.frame.to(torch.device("cpu"))
    with untuned(adapter, task), attach(target.model, adapter, task, ported.frame, ported.scale), torch.no_grad():
        codes = frame.codes(unit_states(target, anchors.probe.first(), frame.levels))
    by_source = codes @ anchors.reads.T + anchors.bias  # by the head as it was there: the adapter's may be tuned
    return _agreement(ported.arm, by_source, anchors)


def _acting(frame: Frame, slots: Sequence[Slot], way: Way) -> Frame:
    """A frame whose atoms do nothing in the lower layers, where the way says so."""
    last = max(slot.layer for slot in slots)
    first = {"all": 0, "upper": (last + 1) // 2, "last": last}[way.layers]
    if not first:
        return frame
    read, write = next(iter(frame.slots.values()))
    nothing = torch.zeros_like(read), torch.zeros_like(write)
    return replace(frame, slots=frame.slots | {s.path: nothing for s in slots if s.layer < first})


def _agreement(arm: str, logits: Float[Tensor, "u labels"], anchors: Anchors) -> dict[str, object]:
    """``agreement``, the share of the first units that the target gives the label which the source gave, by logits that
    were not fitted to them; the same beyond chance as Cohen's ``kappa``; ``expected_loss``, the points of accuracy that
    the differing labels cost if the source's probabilities are right (not of a tagger, whose score is another); and a
    ``warning``, which is logged, where kappa is below that of the task's metric in :data:`DOUBTFUL`.

    The first units are those of the coded texts, which are of the task's domain where any are. What a target knows
    better than the source does not show, so that a loss is rather expected to be too large.
    """
    from sklearn.metrics import cohen_kappa_score

    chances = anchors.decided()[: len(logits)].softmax(1)
    found, wanted = logits.argmax(1), chances.argmax(1)
    agreement, kappa = float((found == wanted).float().mean()), float(cohen_kappa_score(wanted, found))
    kappa = 0.0 if math.isnan(kappa) else kappa  # one label alone
    said: dict[str, object] = {"agreement": round(agreement, 4), "kappa": round(kappa, 4)}
    if METRICS[anchors.kind] == "accuracy":
        lost = chances.amax(1) - chances.gather(1, found[:, None])[:, 0]
        said["expected_loss"] = round(100 * float(lost.mean()), 2)
    if kappa < DOUBTFUL[METRICS[anchors.kind]]:
        said["warning"] = (
            f"a poor port: the host is expected to decide as the source does in {100 * agreement:.0f} % of cases "
            f"(kappa {kappa:.2f}); use more anchors, text nearer to the task's, or labels of this host"
        )
        if arm not in CONTROLS:  # which are meant to be poor
            logger.warning("%s", said["warning"])
    return said


@contextmanager
def untuned(adapter: UHLAdapter, task: str) -> Iterator[None]:
    """The task's bias at zero for a while: a tuned file is ported as it was before tuning, so its scores repeat."""
    bias = adapter.task(task).bias
    kept = bias.detach().clone()
    with torch.no_grad():
        bias.zero_()
        try:
            yield
        finally:
            bias.copy_(kept)
