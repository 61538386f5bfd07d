"""Porting: the regression, the identity on the source itself, and exactness under a change of basis."""

import copy
import inspect
import json
import time
from dataclasses import replace
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import PeftModel
from sklearn.linear_model import Ridge
from transformers import AutoModel, BertForSequenceClassification, MobileBertConfig
from world import sentences

import uhl
from uhl import anchors, budget, porting, store
from uhl.adapter import UHLAdapter
from uhl.anchors import Codes, Probe, batches, final_means, fragments, observe, pieces_of, unit_states
from uhl.config import ARMS, Sizes
from uhl.errors import UHLError
from uhl.fits import Wanted, Way, _map_pair, basis_of, cka, head_fit, share_offsets, stream_basis, upper_levels
from uhl.frame import LAST
from uhl.host import find_slots
from uhl.models import Encoder
from uhl.peft_method import attach
from uhl.porting import Port, Shared, port, port_rules, predict_texts, why_not
from uhl.refresh import refresh
from uhl.ridge import FOLDS, PENALTIES, Rows, ridge, ridge_of_groups
from uhl.stages import make_anchors
from uhl.tasks import Task
from uhl.train import Classifier, predict

TAGS = ("O", "B-JOY", "I-JOY")


def trained(source, projector="canonical", width=16, kind="sentence", coded=None, tuned=True, own=None, cuts=0):
    """An adapter with anchors on a source, its parts filled at random; the task's bias too where it is ``tuned``."""
    from world import fill

    adapter = UHLAdapter(Sizes(atoms=12, width=width, hidden=6, projector=projector))
    adapter.add_task("mood", TAGS if kind == "token" else ("negative", "positive"), kind)
    fill(adapter)
    if not tuned:
        torch.nn.init.zeros_(adapter.task("mood").bias)
    texts = sorted(set(sentences(200)))
    texts = [t.replace(" ", "\t", 1) for t in texts] if kind == "pair" else texts
    probe = Probe(texts, kind, 1, coded, own=own, cuts=cuts)
    seen = observe(source, probe)
    basis = basis_of(seen, width)
    frame = basis.frame(find_slots(source.model))
    adapter.anchors = make_anchors(source, adapter, "mood", seen, basis, frame, probe, "test")
    return adapter, frame


def logits(encoder, adapter, ported, kind="sentence"):
    with attach(encoder.model, adapter, "mood", ported.frame, ported.scale) as attached:
        means = unit_states(encoder, Probe(sentences(20, 9), kind), ported.frame.levels)
        return adapter.task("mood").classify(attached.frame.codes(means)).detach()


def test_ridge_equals_scikit_learn_and_chooses_each_penalty_by_gcv():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(60, 8)), rng.normal(size=(60, 3)) * [0.1, 1, 10]
    y += x @ rng.normal(size=(8, 3))
    fit = ridge(torch.from_numpy(x), torch.from_numpy(y))
    values = np.linalg.svd(x - x.mean(0), compute_uv=False) ** 2

    def gcv(penalty, column):
        model = Ridge(alpha=penalty).fit(x, column)
        free = 60 - (values / (values + penalty)).sum() - 1
        return 60 * ((column - model.predict(x)) ** 2).sum() / free**2

    tried = [p * values.mean() for p in PENALTIES]
    for c in range(3):
        best = min(tried, key=lambda p, c=c: gcv(p, y[:, c]))
        assert float(fit.penalty[c]) == pytest.approx(best, rel=1e-5)
        theirs = Ridge(alpha=best).fit(x, y[:, c])
        np.testing.assert_allclose(fit.matrix[:, c].numpy(), theirs.coef_, atol=1e-5)
        np.testing.assert_allclose(fit.shift[c].numpy(), theirs.intercept_, atol=1e-5)
    assert fit.penalty[0] < fit.penalty[2]
    with pytest.raises(UHLError, match="at least 16"):
        ridge(torch.zeros(3, 2), torch.zeros(3, 2))


@pytest.mark.parametrize("columns", [20, 79, 80, 81, 400])
@pytest.mark.parametrize("centre", [True, False])
def test_ridge_does_not_call_noise_explained(columns, centre):
    g = torch.Generator().manual_seed(0)
    spread = torch.linspace(3, 0.01, columns)  # like a model's states: a few strong directions and a long tail
    fit = ridge(torch.randn(80, columns, generator=g) * spread, torch.randn(80, 50, generator=g), centre)
    assert -0.1 < fit.explained < 0.1


@pytest.mark.parametrize("rows", [30, 80])
def test_ridge_predicts_a_left_out_row_as_a_fit_without_it_does(rows):
    g = torch.Generator().manual_seed(3)
    x, y = torch.randn(rows, 12, generator=g), torch.randn(rows, 2, generator=g)
    y += 2 * x[:, :2]
    fit = ridge(x, y)
    for row in (0, rows // 2):
        kept = torch.arange(rows) != row
        for c in range(2):
            model = Ridge(alpha=float(fit.penalty[c])).fit(x[kept].double(), y[kept, c].double())
            assert float(fit.left_out[row, c]) == pytest.approx(float(model.predict(x[row : row + 1])[0]), rel=1e-4)


@pytest.mark.parametrize("columns", [8, 200])
def test_weighted_ridge_leaves_a_groups_rows_out_together(columns):
    g = torch.Generator().manual_seed(4)
    x, y = torch.randn(90, columns, generator=g).double(), torch.randn(90, 2, generator=g).double()
    y += 2 * x[:, :2]
    groups, weights = torch.randperm(90, generator=g) % 20, torch.ones(90).double()
    weights[30:] = 0.3
    fit, loose = (ridge(x, y, rows=Rows(weights, groups), one_se=one_se) for one_se in (False, True))

    def left_out(penalty, c):
        found = torch.empty(90).double()
        for group in range(20):
            kept = groups != group
            model = Ridge(alpha=float(penalty)).fit(x[kept], y[kept, c], weights[kept])
            found[~kept] = torch.from_numpy(model.predict(x[~kept]))
        return found

    judges = weights == 1
    centred = weights.sqrt()[:, None] * (x - (weights[:, None] * x).sum(0) / weights.sum())
    power = torch.linalg.svdvals(centred).pow(2)
    tried = [p * float(power.sum()) / min(x.shape) for p in PENALTIES]
    tried = [p for p in tried if 89 - (power / (power + p)).sum() >= 9]
    for c in range(2):
        theirs = {p: left_out(p, c) for p in tried}
        misses = {p: (y[judges, c] - found[judges]).pow(2).mean() for p, found in theirs.items()}
        best = min(tried, key=misses.__getitem__)
        assert float(fit.penalty[c]) == pytest.approx(best, rel=1e-5)
        torch.testing.assert_close(fit.left_out[:, c], theirs[best], rtol=1e-6, atol=1e-6)
        spread = y[judges, c].var(correction=0)
        assert float(fit.columns[c]) == pytest.approx(1 - float(misses[best] / spread), rel=1e-6)
        model = Ridge(alpha=best).fit(x, y[:, c], weights)
        np.testing.assert_allclose(fit.matrix[:, c].numpy(), model.coef_, atol=1e-5)
        np.testing.assert_allclose(fit.shift[c].numpy(), model.intercept_, atol=1e-5)
        squares = (y[judges, c] - theirs[best][judges]).pow(2)
        limit = misses[best] + squares.std() / len(squares) ** 0.5
        largest = max(p for p in tried if misses[p] <= limit)
        assert largest > best
        assert float(loose.penalty[c]) == pytest.approx(largest, rel=1e-5)
        assert float(loose.columns[c]) == pytest.approx(1 - float(misses[largest] / spread), rel=1e-6)


@pytest.mark.parametrize("each", [True, False])
@pytest.mark.parametrize("columns", [8, 200])
def test_ridge_of_groups_predicts_each_fold_from_the_others(columns, each):
    g = torch.Generator().manual_seed(5)
    x, y = torch.randn(120, columns, generator=g), 3 * torch.randn(120, 3, generator=g) * torch.tensor([0.1, 1.0, 3.0])
    y += 2 * x[:, :3]
    names = torch.randperm(30, generator=g).repeat(4) + 5
    folds = (names - 5) % FOLDS
    fit = ridge_of_groups(x, y, names, each)
    tried = [p * float(x.double().pow(2).sum()) / min(x.shape) for p in PENALTIES]

    def left_out(penalty):
        found = torch.empty(120, 3).double()
        for fold in range(FOLDS):
            kept = folds != fold
            model = Ridge(alpha=penalty, fit_intercept=False).fit(x[kept].double(), y[kept].double())
            found[~kept] = torch.from_numpy(model.predict(x[~kept].double()))
        return found

    theirs = {p: left_out(p) for p in tried}
    misses = {p: (y - found).pow(2).sum(0) for p, found in theirs.items()}
    chosen = []
    for c in range(3):
        best = min(tried, key=lambda p, c=c: float(misses[p][c] if each else misses[p].sum()))
        chosen.append(best)
        assert float(fit.penalty[c]) == pytest.approx(best, rel=1e-5)
        torch.testing.assert_close(fit.left_out[:, c], theirs[best][:, c], rtol=1e-6, atol=1e-6)
        assert float(fit.columns[c]) == pytest.approx(
            1 - float(misses[best][c] / y[:, c].double().pow(2).sum()), rel=1e-6
        )
        model = Ridge(alpha=best, fit_intercept=False).fit(x.double(), y[:, c].double())
        np.testing.assert_allclose(fit.matrix[:, c].numpy(), model.coef_, atol=1e-5)
    assert not fit.shift.any()
    assert (len(set(chosen)) == 1) != each
    with pytest.raises(UHLError, match="15 anchors are too few"):
        ridge_of_groups(x, y, names % 15)


def test_rows_of_a_group_do_not_tell_of_each_other():
    """States of one text at several levels are alike. Left out by themselves, they make noise look explained."""
    g = torch.Generator().manual_seed(6)
    x, y = torch.randn(200, 50, generator=g).repeat(4, 1), torch.randn(200, 20, generator=g).repeat(4, 1)
    x += 0.1 * torch.randn(x.shape, generator=g)
    assert ridge(x, y, False).explained > 0.1
    assert -0.05 < ridge_of_groups(x, y, torch.arange(200).repeat(4)).explained < 0.02


@pytest.mark.parametrize(
    ("last", "levels"),
    [(1, (1,)), (2, (1, 2)), (3, (2, 3)), (4, (2, 3, 4)), (6, (3, 4, 6)), (12, (6, 9, 12)), (24, (12, 18, 24))],
)
def test_a_head_reads_at_most_three_levels_of_the_upper_half(last, levels):
    assert upper_levels(last) == levels


def test_fragments_are_the_texts_words_in_order():
    assert fragments("a b c d e f g", 2) == ["a b c d", "e f g"]
    assert fragments("a b c d e f g", 3) == []  # fewer than three words each
    assert fragments("ask\ta b c d e f", 2) == ["ask\ta b c", "ask\td e f"]
    assert fragments("a b c", 0) == []
    whole = Probe(["a b c d e f", "g h", "i j k l m n", "o p q r s t"], words=1, coded=1, own=3, cuts=2)
    assert whole.observed == [*whole.texts, "a b c", "d e f", "i j k", "l m n"]
    assert whole.groups().tolist() == [0, 1, 2, 3, 0, 0, 2, 2]
    assert whole.weights(0.5).tolist() == [1, 1, 1, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert whole.rows(replace(whole, texts=whole.texts[:2])) == [0, 1, 4, 5]
    assert whole.rows(whole.first()) == [0]
    assert whole.first().observed == ["a b c d e f"]


def test_a_file_with_fragments_ports_as_before_it_was_written(encoder, make_encoder, tmp_path):
    target = make_encoder(layers=2, width=32, seed=0)
    adapter, _ = trained(encoder, coded=40, tuned=False, own=60, cuts=2)
    texts = adapter.anchors.texts
    assert len(adapter.anchors.logits.table()) == len(texts) + 2 * 60
    before = port(adapter, target)
    path = store.save(adapter, tmp_path / "a.safetensors")
    found = store.load(path)
    after = port(found, target)
    assert (found.anchors.own, found.anchors.cuts) == (60, 2)
    torch.testing.assert_close(after.frame.head, before.frame.head)
    assert after.report["agreement"] == before.report["agreement"]
    assert budget.adapter_parts(found) == {n: b for n, b in budget.file_bytes(path).items() if n != "header"}
    assert "2 fragments of each of the first 60" in store.describe(path)
    seen = observe(target, found.anchors.probe)
    for cut in ({"cuts": False}, {"texts": 50}, {"texts": 50, "cuts": False}, {"coded": 20}):
        found.anchors = adapter.anchors.cut(**cut)
        count, asked = cut.get("texts", len(texts)), found.anchors.probe
        assert len(found.anchors.logits.table()) == count + (0 if "cuts" in cut else 2 * min(60, count))
        fewer = port(found, target, shared=Shared.of(seen.cut(adapter.anchors.probe, asked), asked))
        own = port(found, target)
        torch.testing.assert_close(fewer.frame.head, own.frame.head, rtol=1e-3, atol=1e-4)
        assert len(store.load(store.save(found, path)).anchors.texts) == count


@pytest.mark.parametrize("rows", [60, 200, 600])
def test_what_ridge_says_it_explains_is_what_it_explains_on_new_rows(rows):
    """Fewer rows than columns, as with a wide host and few anchors, and more."""
    g = torch.Generator().manual_seed(1)
    spread = torch.linspace(3, 0.01, 300)
    x, noise = torch.randn(rows + 2000, 300, generator=g) * spread, torch.randn(rows + 2000, 40, generator=g)
    y = x[:, :30] @ torch.randn(30, 40, generator=g) / 10 + noise
    fit = ridge(x[:rows], y[:rows])
    left = (y[rows:] - x[rows:] @ fit.matrix - fit.shift).pow(2).sum()
    fresh = 1 - float(left / (y[rows:] - y[rows:].mean(0)).pow(2).sum())
    assert fit.explained == pytest.approx(fresh, abs=0.08)


def test_lineage_to_the_source_itself_is_the_identity(encoder):
    adapter, frame = trained(encoder)
    ported = port(adapter, encoder, "mood", "lineage", encoder)
    assert torch.equal(ported.frame.head, frame.head)
    for path in frame.slots:
        assert all(torch.equal(a, b) for a, b in zip(frame.slots[path], ported.frame.slots[path], strict=True))


@pytest.mark.parametrize("arm", ["anchor", "zero-atoms"])
def test_an_anchored_port_to_the_source_itself_is_the_identity(encoder, arm):
    adapter, frame = trained(encoder)
    itself = Encoder("elsewhere", encoder.model, encoder.tokenizer, "unknown")
    ported = port(adapter, itself, "mood", arm)
    assert ported.scale == (arm == "anchor")
    assert torch.equal(ported.frame.head, frame.head)
    for path in frame.slots:
        assert all(torch.equal(a, b) for a, b in zip(frame.slots[path], ported.frame.slots[path], strict=True))


def test_on_a_host_larger_than_the_source_the_ported_head_imitates_less(encoder, make_encoder, caplog):
    adapter, _ = trained(encoder, coded=40, tuned=False)
    said = adapter.anchors.logits.table()
    blurred = Codes.of(said + said.std() * torch.randn(said.shape, generator=torch.Generator().manual_seed(2)))
    adapter.anchors.logits = blurred  # so that several penalties do almost as well as the best
    shape = encoder.layers, encoder.width
    larger, other = make_encoder(shape[0] + 1, shape[1], seed=3), make_encoder(4 * shape[0], shape[1] // 2, seed=3)
    cases = [(larger, "one-se", "closest", porting.LARGER_RULES), (other, "closest", "one-se", porting.RULES)]
    for host, own, unlike, rules in cases:  # the second is as large as the source
        adapter.info = {"layers": shape[0]}
        assert port_rules(adapter, host) == porting.RULES  # nothing says how wide the source was
        adapter.info = {"layers": shape[0], "shape": encoder.shape}
        assert port_rules(adapter, host) == rules
        shared = Shared.of(observe(host, adapter.anchors.probe), adapter.anchors.probe)
        found, same, less = (port(adapter, host, shared=shared, way=Way(imitation=i)) for i in (None, own, unlike))
        assert torch.equal(found.frame.head, same.frame.head)
        assert not torch.equal(found.frame.head, less.frame.head)
        others = porting.RULES + porting.LARGER_RULES - rules
        for place, told, stale in ((host.name, rules, False), (host.name, others, True), ("x", others, False)):
            caplog.clear()
            adapter.info |= {"tuned_on": place, "port_rules": told}
            with caplog.at_level("WARNING", "uhl.porting"):
                port(adapter, host, shared=replace(shared, ports={}))
            assert ("behind another release's port" in caplog.text) == stale


@pytest.mark.parametrize("labels", [2, 4])
def test_offsets_give_decisions_the_shares_that_are_wanted(labels):
    made = torch.Generator().manual_seed(labels)
    rows = torch.randn(400, labels, generator=made) + torch.linspace(0, 2, labels)  # the last is decided on too often
    wanted = torch.randint(labels - 1, (400,), generator=made) if labels > 2 else torch.arange(400) % 8 // 7
    offsets = share_offsets(rows, wanted)
    assert float(offsets.sum()) == pytest.approx(0, abs=1e-9)
    found = torch.bincount((rows + offsets).argmax(1), minlength=labels)
    assert (found - torch.bincount(wanted, minlength=labels)).abs().max() <= 4
    assert torch.allclose(share_offsets(rows + 7, wanted), offsets, atol=1e-4)


def synthetic(coded, bias=(0.5, 0.0, -0.5)):
    """States of 300 texts on a host of width 8, and what a source wants of them, by codes or by logits beside them."""
    made = torch.Generator().manual_seed(3)
    states, reads = torch.randn(300, 8, generator=made), torch.randn(3, 8, generator=made)
    codes = states @ torch.randn(8, 8, generator=made) * 0.7 + torch.randn(300, 8, generator=made)
    units = Rows(torch.ones(300), torch.arange(300))
    logits = None if coded else codes @ reads.T + torch.randn(300, 3, generator=made)
    return states, Wanted(codes, torch.arange(300), torch.arange(300), reads, torch.tensor(bias), logits, units, None)


@pytest.mark.parametrize("coded", [False, True])
@pytest.mark.parametrize("shares", ["fitted", "source"])
@pytest.mark.parametrize("targets", ["logits", "probabilities"])
def test_a_head_is_fitted_to_the_source_s_logits_or_probabilities(coded, shares, targets):
    """What its reader makes of states is what is told of left-out ones; behind the head it decides as a regression of
    the same does, or gives each label as often as the source; and of probabilities it makes the logits that fit best.
    """
    states, wanted = synthetic(coded)
    source = (wanted.codes @ wanted.reads.T if coded else wanted.logits) + wanted.bias
    fit = head_fit(states, wanted, 8, Way(targets=targets, shares=shares))
    said = (states @ fit.matrix + fit.shift) @ wanted.reads.T + wanted.bias
    left_out = fit.logits + wanted.bias
    apart = [x - x.mean(1, keepdim=True) for x in (said, left_out)]
    assert float((apart[0] - apart[1]).pow(2).mean() / apart[0].pow(2).mean()) < 0.01
    if shares == "source":
        counts = [torch.bincount(x.argmax(1), minlength=3) for x in (left_out, source)]
        assert (counts[0] - counts[1]).abs().max() <= 3
        return
    goal = source.softmax(1) if targets == "probabilities" else source
    usual = Ridge(alpha=1.0).fit(states.numpy(), goal.numpy()).predict(states.numpy())
    assert np.mean(usual.argmax(1) == said.argmax(1).numpy()) > 0.98
    if targets == "probabilities":
        loss = [float(-(source.softmax(1) * (k * left_out).log_softmax(1)).sum(1).mean()) for k in (0.9, 1.0, 1.1)]
        assert loss[1] == min(loss)


def test_a_host_that_differs_from_the_source_by_little_is_not_it(encoder):
    adapter, _ = trained(encoder)
    other = copy.deepcopy(encoder)
    with torch.no_grad():
        other.model.encoder.layer[-1].output.LayerNorm.bias[3] += 0.1
    for host, way in ((other, Way()), (encoder, Way(known=False))):
        assert "stream_fit" in port(adapter, host, "mood", way=way).report
    assert "stream_fit" not in port(adapter, encoder, "mood").report


def test_a_port_leaves_modes_as_they_were(encoder, make_encoder):
    adapter, _ = trained(encoder)
    target = make_encoder(layers=2, width=32, seed=0)
    for module in target.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    target.model.train()
    target.model.encoder.layer[0].eval()
    before = [m.training for m in target.model.modules()]
    ported = port(adapter, target, "mood", "refresh", way=Way(refresh_steps=3))
    assert [m.training for m in target.model.modules()] == before
    target.model.eval()
    again = port(adapter, target, "mood", "refresh", way=Way(refresh_steps=3))
    assert torch.equal(again.frame.head, ported.frame.head)  # no dropout in either


def test_a_token_task_is_ported_to_another_tokenizer_and_scored_on_the_same_tokens(encoder, make_encoder, bpe):
    """What a split is scored on is what the port was fitted on, and what is predicted of a text."""
    adapter, _ = trained(encoder, kind="token", coded=120, tuned=False)
    host = replace(make_encoder(2, 32, vocab_size=320), tokenizer=bpe)
    ported = port(adapter, host, "mood")
    rows = [text.split() for text in sentences(30, 11)]
    tags = [[1 if word == "good" else 0 for word in row] for row in rows]
    data = DatasetDict({"test": Dataset.from_dict({"tokens": rows, "tags": tags})})
    with attach(host.model, adapter, "mood", ported.frame, ported.scale) as attached:
        classifier = Classifier(host.model, adapter.task("mood"), None, attached)
        found = predict(classifier, host, Task("ner", "token", TAGS, data), "test")
    said = predict_texts(adapter, host, ported, [" ".join(row) for row in rows])
    assert [[TAGS[tag] for tag in row] for row in found.labels] == [entry["label"] for entry in said]
    assert len({tag for row in found.labels for tag in row}) > 1


def test_words_are_found_by_characters_whatever_the_tokenizer(tokenizer, bpe):
    """Byte-level BPE against WordPiece: the same characters on both sides, and no special token."""
    text = "the cast was  unbelievably good"
    probe = Probe([text], words=3)
    spans = [probe.spans(text)[i] for i in probe.picks(text)]
    assert [text[a:b] for _, a, b in spans] == ["the", "was", "good"]
    found = []
    for made in (tokenizer(text)[0], bpe(text)[0]):
        offsets = made.offsets
        weights = pieces_of([(part, *o) for part, o in zip(made.sequence_ids, offsets, strict=True)], spans)
        assert torch.allclose(weights.sum(1), torch.ones(3))
        rows = [[offsets[i] for i in row.nonzero().flatten().tolist()] for row in weights]
        found.append([text[r[0][0] : r[-1][1]].strip() for r in rows])
    assert found == [["the", "was", "good"]] * 2
    pieces = [(None, 0, 0), (0, 0, 3), (0, 3, 8), (1, 0, 8), (None, 0, 0)]
    assert (3 * pieces_of(pieces, [(0, 20, 24)])).tolist() == [[0, 1, 1, 1, 0]]  # cut off: all tokens
    assert pieces_of(pieces, [(0, 1, 6), (1, 1, 6)]).tolist() == [[0, 0.5, 0.5, 0, 0], [0, 0, 0, 1, 0]]
    assert pieces_of(pieces, [(0, 1, 6)], first=True).tolist() == [[0, 1, 0, 0, 0]]


def test_shared_and_level_maps_and_the_last_levels_head(encoder, make_encoder):
    adapter, _ = trained(encoder)
    target = make_encoder(layers=2, width=32, seed=0)
    ports = {m: port(adapter, target, "mood", way=Way(maps=m, scales=(1.0,))) for m in ("shared", "level")}
    assert len(ports["shared"].frame.routes) == 1
    assert len(ports["level"].frame.routes) == 3
    one, two = (logits(target, adapter, p) for p in ports.values())
    assert (one - two).abs().max() > 1e-4
    last = port(adapter, target, "mood", "zero-atoms", way=Way(reads="last"))
    assert last.frame.levels == (-1,)
    assert ports["shared"].frame.levels == (1, 2)


def test_maps_made_in_other_ways():
    g = torch.Generator().manual_seed(0)
    spread = torch.tensor([1.0, 1.0, 2.0, 3.0, 0.5, 0.2])
    states = (spread * torch.randn(400, 6, generator=g)) @ torch.linalg.qr(torch.randn(6, 6, generator=g))[0]
    loud = 10 * states[:, 0] + 40 * torch.randn(400, generator=g)  # a coordinate that is large, and told badly
    codes = torch.stack([loud, states[:, 1], states[:, 2] + 0.1 * states[:, 3]], 1)
    reads = torch.tensor([[0.6, 0.8, 0.0, 0.0], [0.6, 0.0, 0.3, 0.0]])

    def pair(**given):
        read, write, (fit,) = _map_pair(states[None], codes[None], torch.arange(400), 4, Way(**given), reads)
        assert (read.shape, write.shape) == ((4, 6), (6, 4))
        assert not read[3].any()
        assert not write[:, 3].any()
        return read[:3].double(), write[:, :3].double(), fit

    usual, writer, fit = pair()
    assert 0 < fit < 0.5
    x, z = states.double(), codes.double()
    moment, spread_of_codes = x.T @ x / len(x), z.T @ z / len(z)
    values, vectors = torch.linalg.eigh(spread_of_codes)
    root = vectors * values.sqrt() @ vectors.T
    for kind, white in (("principal", torch.eye(3, dtype=torch.float64)), ("canonical", torch.linalg.inv(root))):
        read, write, _ = pair(rank=1, directions=kind)
        told = white @ usual @ moment @ usual.T @ white
        first = torch.linalg.eigh(told).eigenvectors[:, -1:]
        keep = (white @ first @ first.T @ torch.linalg.inv(white)).T  # of columns of codes
        torch.testing.assert_close(read, keep @ usual, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(write, writer @ keep, rtol=1e-3, atol=1e-4)
        loud, others = read[0].norm(), read[1:].norm()
        assert loud > 3 * others if kind == "principal" else loud / 41 < others / 3, kind  # 41: its spread
    torch.testing.assert_close(pair(rank=3, directions="canonical")[0], usual, rtol=1e-3, atol=1e-4)

    turned = pair(penalties="atoms")[0]
    for row in torch.linalg.svd(reads[:, :3].double())[2]:  # as if each were fitted alone
        alone = ridge_of_groups(states, z @ row[:, None], torch.arange(400)).matrix[:, 0].double()
        torch.testing.assert_close(row @ turned, alone, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(turned, usual, atol=1e-4)

    read, changed, _ = pair(writer="inverse")
    assert torch.equal(read, usual)
    for code, wanted in zip((1, 2), ([0, 1, 0], [0, 0, 1]), strict=True):
        assert (usual @ changed)[1:, code].tolist() == pytest.approx(wanted[1:], abs=0.05)  # read as it was written
    assert (usual @ changed)[0, 0] < 0.98  # damped: hardly told
    least = moment @ usual[1:].T @ torch.linalg.inv(usual[1:] @ moment @ usual[1:].T)  # of d' S^-1 d, without the first
    inverse = torch.linalg.inv(moment)
    for code in (0, 1):
        mine, other = changed[:, 1 + code], torch.linalg.pinv(usual)[:, 1 + code]
        assert mine @ inverse @ mine < other @ inverse @ other  # smaller than what is small by plain length
        assert mine @ inverse @ mine < 2 * least[:, code] @ inverse @ least[:, code]


def test_what_levels_share_is_not_taken_for_explained():
    """Noise that is nearly the same at four levels, of three words a text."""
    g = torch.Generator().manual_seed(1)
    states, codes = (torch.randn(1, 300, size, generator=g).expand(4, -1, -1) for size in (40, 10))
    states = states + 0.1 * torch.randn(4, 300, 40, generator=g)
    *_, fits = _map_pair(states, codes, torch.arange(300) // 3, 10, Way(), torch.randn(5, 10, generator=g))
    assert max(fits) < 0.02
    *_, rows_alone = _map_pair(states[:1], codes[:1], torch.arange(300), 10, Way(), torch.randn(5, 10, generator=g))
    assert max(rows_alone) < 0.02


def test_levels_are_matched_by_what_they_hold(encoder, make_encoder):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(300, 8, generator=g)
    turn = torch.linalg.qr(torch.randn(8, 8, generator=g))[0]
    assert cka(x, 3 * x @ turn + 1) == pytest.approx(1, abs=1e-6)
    assert cka(x, torch.randn(300, 5, generator=g)) < 0.1
    adapter, _ = trained(encoder)
    target = make_encoder(layers=2, width=32, seed=0)
    seen, anchors = observe(target, adapter.anchors.probe), adapter.anchors
    states = seen.stream(anchors.words)[:, : anchors.coded * anchors.words]
    own = torch.stack([h @ torch.linalg.svd(h - h.mean(0))[2][:16].T for h in states])  # most of each level
    order = [2, 0, 1]  # the source's tables hold this host's levels, and not by their depth
    given = replace(anchors, stream=[Codes.of(own[i]) for i in order], depths=(0.0, 0.5, 1.0))
    for way, wanted in (("relative", order), ("cka", [0, 1, 2])):
        asked = Way(depths=way, maps="level")
        basis, _ = stream_basis(given, seen, torch.arange(anchors.coded), asked, adapter.dictionary.v.detach())
        told = [level @ read.T for level, read in zip(states, basis.read, strict=True)]
        assert [int(((t - own) ** 2).sum((1, 2)).argmin()) for t in told] == wanted, way


def test_atoms_in_some_layers_and_directions_alone(encoder, make_encoder):
    adapter, _ = trained(encoder)
    target = make_encoder(layers=3, width=32, seed=0)
    kept = {"scales": (1.0,)}
    ways = {"all": Way(**kept), "last": Way(layers="last", **kept), "upper": Way(layers="upper", **kept)}
    ways |= {"one": Way(rank=1, **kept), "whole": Way(rank=16, **kept)}
    ports = {name: port(adapter, target, "mood", way=way) for name, way in ways.items()}
    inputs = target.tokenizer(["good film was not dull"], return_tensors="pt")

    def hidden(made=None):
        if made is None:
            return target.model(**inputs, output_hidden_states=True).hidden_states
        with attach(target.model, adapter, "mood", made.frame, made.scale):
            return target.model(**inputs, output_hidden_states=True).hidden_states

    bare, found = hidden(), {name: hidden(made) for name, made in ports.items()}
    changed = {name: [not torch.equal(a, b) for a, b in zip(bare, f, strict=True)] for name, f in found.items()}
    assert changed["all"] == [False, True, True, True]
    assert changed["last"] == [False, False, False, True]
    assert changed["upper"] == [False, False, True, True]
    read, write = next(iter(ports["one"].frame.slots.values()))
    assert torch.linalg.matrix_rank(read) == torch.linalg.matrix_rank(write) == 1
    few = next(iter(port(adapter, target, "mood", way=Way(rank=8, **kept)).frame.slots.values()))[0]
    all_of_it = next(iter(ports["all"].frame.slots.values()))[0]
    states = observe(target, adapter.anchors.probe).words.flatten(0, 1)
    told = [(states @ r.T).pow(2).sum() for r in (few, all_of_it)]
    assert 0.8 * told[1] < told[0] <= told[1]  # half of the directions say most of it
    whole, plain = ports["whole"], ports["all"]
    for mine, usual in zip(whole.frame.slots.values(), plain.frame.slots.values(), strict=True):
        for a, b in zip(mine, usual, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def permuted(encoder, order):
    """The same function with the residual stream's coordinates relabelled."""
    model = copy.deepcopy(encoder.model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            stream_in = any(
                k in name for k in ("query.weight", "key.weight", "value.weight", "intermediate.dense.weight")
            )
            stream_out = name.endswith("output.dense.weight")
            if stream_in or "embeddings.weight" in name:
                p.copy_(p[:, order])
            elif stream_out or "LayerNorm" in name or name.endswith("output.dense.bias"):
                p.copy_(p[order])
    return Encoder("permuted", model, encoder.tokenizer, "none")


def permuted_neurons(encoder):
    """The same function with the feed-forward neurons of every layer relabelled."""
    model = copy.deepcopy(encoder.model)
    with torch.no_grad():
        for layer in model.encoder.layer:
            order = torch.randperm(layer.intermediate.dense.out_features, generator=torch.Generator().manual_seed(2))
            layer.intermediate.dense.weight.copy_(layer.intermediate.dense.weight[order])
            layer.intermediate.dense.bias.copy_(layer.intermediate.dense.bias[order])
            layer.output.dense.weight.copy_(layer.output.dense.weight[:, order])
    return Encoder("neurons", model, encoder.tokenizer, "none")


def permuted_heads(encoder):
    """The same function with the attention heads of every layer in another order."""
    model = copy.deepcopy(encoder.model)
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    order = torch.arange(width).view(heads, -1).flip(0).flatten()
    with torch.no_grad():
        for layer in model.encoder.layer:
            for part in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
                part.weight.copy_(part.weight[order])
                part.bias.copy_(part.bias[order])
            layer.attention.output.dense.weight.copy_(layer.attention.output.dense.weight[:, order])
    return Encoder("heads", model, encoder.tokenizer, "none")


def rotation(width):
    """Orthogonal, and with the mean of a vector as it was: what a layer norm of unit gains lets through."""
    square = torch.randn(width, width, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    square[:, 0] = 1.0
    basis = torch.linalg.qr(square)[0]
    turn = torch.linalg.qr(torch.randn(width - 1, width - 1, generator=torch.Generator().manual_seed(6)).double())[0]
    return (basis @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), turn) @ basis.T).float()


def rotated(encoder, turn):
    """The same function with the residual stream turned."""
    model = copy.deepcopy(encoder.model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            reads = any(k in name for k in ("query.weight", "key.weight", "value.weight", "intermediate.dense.weight"))
            if reads or "embeddings.weight" in name:
                p.copy_(p @ turn.T)
            elif name.endswith(("output.dense.weight", "output.dense.bias", "LayerNorm.bias")):
                p.copy_(turn @ p)
    return Encoder("rotated", model, encoder.tokenizer, "none")


@pytest.mark.parametrize("change", ["stream", "neurons", "heads", "rotation"])
def test_an_anchored_port_does_not_see_the_basis_and_dimension_does(encoder, monkeypatch, change):
    monkeypatch.setattr("uhl.porting.SCALES", (1.0,))  # atoms at work
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    turn = {"stream": torch.eye(24)[order], "rotation": rotation(24)}.get(change, torch.eye(24))
    with torch.no_grad():
        for name, p in encoder.model.named_parameters():
            if name.endswith("bias"):  # zero at initialisation, which would not tell
                p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))) / 3)
    ways = {
        "stream": lambda: permuted(encoder, order),
        "neurons": lambda: permuted_neurons(encoder),
        "heads": lambda: permuted_heads(encoder),
        "rotation": lambda: rotated(encoder, turn),
    }
    other = ways[change]()
    inputs = encoder.tokenizer(sentences(3), return_tensors="pt")
    plain, same = (e.model(**inputs).last_hidden_state for e in (encoder, other))
    torch.testing.assert_close(plain @ turn.T, same, atol=1e-4, rtol=1e-4)  # the same function indeed
    adapter, _ = trained(encoder)
    first, second = (port(adapter, e, "mood", "anchor", way=Way(known=False)) for e in (encoder, other))
    assert first.scale == second.scale
    a, b = logits(encoder, adapter, first), logits(other, adapter, second)
    assert (a - b).norm() / a.norm() < 1e-3
    blind, _ = trained(encoder, "dimension")
    a, b = (logits(e, blind, port(blind, e, "mood", "dimension")) for e in (encoder, other))
    assert (a - b).norm() / a.norm() > 1e-2


def test_anchor_explains_codes_better_than_shuffled_anchors(encoder, make_encoder):
    adapter, _ = trained(encoder)
    target = make_encoder(layers=2, width=32, seed=0)
    fits = {arm: max(port(adapter, target, "mood", arm).report["head_fit"].values()) for arm in ("anchor", "shuffled")}
    assert fits["anchor"] > fits["shuffled"] + 0.1


@pytest.mark.parametrize("kind", ["sentence", "token"])
def test_texts_with_logits_alone_pin_down_what_the_head_reads(encoder, make_encoder, kind):
    targets = [make_encoder(layers=2, width=32, seed=seed) for seed in range(3)]
    few, frame = trained(encoder, kind=kind, coded=30, tuned=False)
    assert (few.anchors.coded, len(few.anchors.texts)) == (30, len(set(sentences(200))))
    with attach(encoder.model, few, "mood", frame):
        states = unit_states(encoder, Probe(sentences(20, 9), kind), (-1,))
    source = few.task("mood").classify(frame.codes(states)).detach().softmax(-1)
    whole, misses = few.anchors, []
    fewer = whole.probe.first()
    own = Codes.of(whole.logits.table()[: sum(fewer.units())]) if kind == "token" else None
    for few.anchors in (whole, replace(whole, texts=fewer.texts, logits=own)):
        found = [logits(t, few, port(few, t, "mood", "zero-atoms"), kind).softmax(-1) for t in targets]
        misses.append(sum(float((one - source).pow(2).mean()) for one in found))
    assert misses[0] < 0.8 * misses[1]


def test_another_model_than_the_source_is_named(encoder, make_encoder, caplog):
    adapter, _ = trained(encoder, coded=120, tuned=False)
    adapter.info |= {"source": "first", "revision": "1"}
    with caplog.at_level("WARNING", "uhl.porting"):
        for revision in ("1", "2"):
            uhl.port(adapter, make_encoder(), arm="lineage", source=replace(encoder, name="second", revision=revision))
    (told,) = (r.message for r in caplog.records if "other weights" in r.message)
    assert told.startswith("the adapter was trained on first, and second has other weights")


def test_a_line_without_words_has_no_labels(encoder, make_encoder):
    adapter, _ = trained(encoder, kind="token", coded=120, tuned=False)
    target = make_encoder(layers=2, width=32, seed=0)
    found = predict_texts(adapter, target, uhl.port(adapter, target), ["good film", " "])
    assert [len(f["label"]) for f in found] == [2, 0]


def test_a_host_with_encoder_and_decoder_is_refused(encoder, make_encoder):
    adapter, _ = trained(encoder, coded=120, tuned=False)
    target = make_encoder(layers=2, width=32, seed=0)
    target.model.config.is_encoder_decoder = True
    with pytest.raises(UHLError, match="no single stream of states to port to"):
        uhl.port(adapter, target)


@pytest.mark.parametrize("kind", ["sentence", "pair", "token"])
def test_a_file_gives_back_what_a_port_needs_and_agreement_is_what_happens(encoder, make_encoder, kind, tmp_path):
    adapter, frame = trained(encoder, kind=kind, coded=120, tuned=False)
    adapter = store.load(store.save(adapter, tmp_path / "a.safetensors"))
    parts, measured = budget.adapter_parts(adapter), budget.file_bytes(tmp_path / "a.safetensors")
    assert parts == {name: size for name, size in measured.items() if name != "header"}
    target = make_encoder(layers=2, width=32, seed=0)
    ported = uhl.port(adapter, target)
    lines = [t.replace(" ", "\t", 1) if kind == "pair" else t for t in sorted(set(sentences(300, 11)))]
    said = []
    for host, made in ((target, ported), (encoder, Port("lineage", frame, 1.0))):
        found = predict_texts(adapter, host, made, lines)
        assert [f["text"] for f in found] == lines
        labels = [f["label"] for f in found]
        said.append([tag for row in labels for tag in row] if kind == "token" else labels)
        assert set(said[-1]) <= set(adapter.task("mood").labels)
    agreed = np.mean(np.array(said[0]) == np.array(said[1]))
    assert ported.report["agreement"] == pytest.approx(agreed, abs=0.1)
    assert agreed > 0.6


def test_a_poor_port_is_called_one(encoder, make_encoder, caplog):
    adapter, _ = trained(encoder, tuned=False)
    good = port(adapter, encoder, "mood", "zero-atoms", way=Way(known=False)).report
    assert good["kappa"] > 0.8
    assert "warning" not in good
    assert good["agreement"] > 0.9
    with caplog.at_level("WARNING", "uhl.porting"):
        poor = port(adapter, make_encoder(2, 24, seed=3), "mood", "shuffled").report
        assert not caplog.text  # a control
        adapter.anchors = adapter.anchors.cut(16, 16)
        adapter.anchors.texts = adapter.anchors.texts[::-1]  # paired wrongly
        port(adapter, make_encoder(2, 24, seed=3), "mood", "anchor")
    assert abs(poor["kappa"]) < 0.3
    assert "more anchors" in poor["warning"]
    assert "a poor port" in caplog.text


@pytest.mark.parametrize(("kind", "warned"), [("sentence", False), ("pair", False), ("token", True)])
def test_a_tagger_needs_more_agreement(kind, warned):
    wanted = torch.eye(2)[[0, 0, 0, 0, 1, 1, 1, 1]]
    wanted[-1] = torch.tensor([0.3, 0.7]).log()
    found = torch.eye(2)[[0, 0, 0, 0, 1, 1, 1, 0]]  # 7 of 8 as wanted
    said = porting._agreement("anchor", found, Mock(spec=anchors.Anchors, kind=kind, decided=lambda: wanted))
    assert said["kappa"] == pytest.approx(0.75)
    assert ("warning" in said) == warned
    assert said.get("expected_loss") == (None if kind == "token" else 5.0)  # 0.7 - 0.3, of one in eight


def test_a_port_without_anchors_in_it_is_judged_on_them(encoder, make_encoder, caplog):
    adapter, _ = trained(encoder)
    with caplog.at_level("WARNING", "uhl.porting"):
        own = port(adapter, encoder, "mood", "lineage", encoder).report
        assert own["agreement"] > 0.95
        assert "warning" not in own
        assert not caplog.text
        stranger = port(adapter, make_encoder(encoder.layers, encoder.width, seed=3), "mood", "lineage", encoder).report
    assert abs(stranger["kappa"]) < 0.4
    assert "a poor port" in caplog.text
    with torch.no_grad():
        for name in ("bias", "head", "head_bias"):  # tuned elsewhere
            adapter.task("mood").get_parameter(name).add_(1.0)
        adapter.task("mood").head[0].mul_(-3)
    assert port(adapter, encoder, "mood", "lineage", encoder).report["agreement"] == own["agreement"]


def test_a_pair_is_read_as_two_parts(encoder):
    probe = Probe(["good film\twas bad", "the plot"], "pair", words=4)
    assert probe.spans(probe.texts[0]) == [(0, 0, 4), (0, 5, 9), (1, 0, 3), (1, 4, 7)]
    ((rows, batch),) = batches(encoder, probe)
    first = encoder.tokenizer("good film", "was bad")
    assert batch["input_ids"][rows.index(0)].tolist()[: len(first["input_ids"])] == first["input_ids"]
    seen = observe(encoder, probe)
    with torch.no_grad():
        states = encoder.model(**encoder.tokenizer("good film", "was bad", return_tensors="pt")).last_hidden_state[0]
    torch.testing.assert_close(seen.words[-1, :4], states[[1, 2, 4, 5]], atol=1e-5, rtol=1e-4)


def test_a_word_is_read_at_its_first_piece(encoder):
    probe = Probe(["goodfilm was bad", "the"], "token", words=1)
    units = unit_states(encoder, probe, (-1,))
    assert len(units) == sum(probe.units()) == 4
    with torch.no_grad():
        states = encoder.model(**encoder.tokenizer("goodfilm was bad", return_tensors="pt")).last_hidden_state[0]
    assert encoder.tokenizer.tokenize("goodfilm was bad") == ["good", "##film", "was", "bad"]
    torch.testing.assert_close(units[:3], states[[1, 3, 4]], atol=1e-5, rtol=1e-4)
    assert probe.coded_units() == [1, 3]


def test_refreshing_finds_the_way_back_to_the_source(encoder):
    adapter, frame = trained(encoder)  # the anchors hold what it says with its bias; refreshing starts without
    bias, home = adapter.task("mood").bias, Port("anchor", frame, 1.0)
    wanted = logits(encoder, adapter, home).softmax(-1)
    with torch.no_grad():
        bias.zero_()
    start = logits(encoder, adapter, home).softmax(-1)
    assert refresh(adapter, encoder, "mood", frame, 1.0, steps=100)["kept_step"] > 0
    assert (logits(encoder, adapter, home).softmax(-1) - wanted).norm() < 0.8 * (start - wanted).norm()


def test_refreshing_moves_the_bias_alone_and_keeps_the_best(encoder, make_encoder):
    target = make_encoder(layers=2, width=32, seed=0)
    adapter, _ = trained(encoder)
    adapter.task("mood").bias.requires_grad_(False)
    before = {k: v.clone() for k, v in adapter.named_parameters()}
    ported = port(adapter, target, "mood", "refresh", way=Way(refresh_steps=40))
    changed = {k for k, v in adapter.named_parameters() if not torch.equal(v, before[k])}
    assert changed == {"tasks.mood.bias"}
    assert not adapter.task("mood").bias.requires_grad
    assert adapter.dictionary.u.requires_grad
    curve = ported.report["held_out"]
    assert set(curve) == set(range(0, 41, 5))
    assert curve[ported.report["kept_step"]] == min(curve.values())
    again = port(adapter, target, "mood", "anchor")  # as for a tuned file: the same frame
    assert torch.equal(again.frame.head, ported.frame.head)
    start = trained(encoder)[0]
    start.anchors.reads = None
    with pytest.raises(UHLError, match="hold the source's decisions"):
        port(start, target, "mood", "refresh")


@pytest.mark.unchecked
def test_arms_that_share_their_work_are_ported_as_alone(encoder, make_encoder, monkeypatch):
    import uhl.porting

    monkeypatch.setattr("uhl.porting.FEWEST_SHARED", 16)
    target, shared, way = make_encoder(layers=2, width=24, seed=0), Shared(), Way(refresh_steps=3)
    arms = [arm for arm in ARMS if arm != "dimension"]
    watched = []
    for name in ("observe", "_anchored"):
        does = getattr(uhl.porting, name)
        monkeypatch.setattr(
            uhl.porting, name, lambda *a, does=does, name=name, **k: watched.append(name) or does(*a, **k)
        )
    made = trained(encoder, coded=150)[0]
    made.info = {"layers": encoder.layers}
    begun_alone = {arm: copy.deepcopy(made) for arm in arms}  # refreshing changes the bias
    ported_alone = {arm: port(own, target, "mood", arm, encoder, way=way) for arm, own in begun_alone.items()}
    for arm in (*arms, *reversed(arms)):
        adapters = begun_alone[arm], copy.deepcopy(made)
        alone = ported_alone[arm]
        watched.clear()
        together = port(adapters[1], target, "mood", arm, encoder, shared=shared, way=way)
        first = watched.copy()
        assert (alone.scale, set(alone.report)) == (together.scale, set(together.report))
        assert torch.equal(alone.frame.head, together.frame.head)
        for a, b in zip(alone.frame.slots.values(), together.frame.slots.values(), strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])
        assert torch.equal(adapters[0].task("mood").bias, adapters[1].task("mood").bias)
        if arm in {"refresh", "refresh-random"}:
            assert first == []  # anchor and random-p were ported before
    changed = copy.deepcopy(made)
    changed.redraw(0)
    for adapter, seed, chosen in [
        (copy.deepcopy(made), 1, way),
        (copy.deepcopy(made), 0, Way(refresh_steps=3, scales=(1.0,))),
        (changed, 0, way),
    ]:
        watched.clear()
        port(adapter, target, "mood", "refresh", seed=seed, shared=shared, way=chosen)
        assert watched == ["_anchored"]
    begun, seen = time.time(), [replace(part, seconds=7.0) for part in (shared.coded, shared.rest)]
    found = port(copy.deepcopy(made), target, "mood", "zero-atoms", shared=Shared(*seen))
    assert 13.9 <= float(found.report["seconds"]) <= 14.1 + time.time() - begun
    late = Shared(*seen)
    alone = float(port(copy.deepcopy(made), target, "mood", "refresh", way=way).report["seconds"])
    needs = 7 if ported_alone["anchor"].scale else 14
    for _ in range(2):  # refresh alone, and from a port that was made before
        again = port(copy.deepcopy(made), target, "mood", "refresh", shared=late, way=way)
        assert needs <= float(again.report["seconds"]) <= needs + 2 * alone + 1


@pytest.mark.unchecked
def test_a_bare_host_reads_no_more_texts_than_a_port_needs(encoder, make_encoder, monkeypatch):
    """Those with logits alone it reads with the atoms at work, but where none act, or it may be the source itself."""
    adapter, target = trained(encoder, coded=40, tuned=False, own=60, cuts=2)[0], make_encoder(layers=2, width=24)
    adapter.info = {"layers": encoder.layers, "shape": encoder.shape}
    watched, texts = [], len(adapter.anchors.probe.observed)

    def watching(host, probe, start=0):
        watched.append((start, len(probe.observed)))
        return observe(host, probe, start)

    monkeypatch.setattr(porting, "observe", watching)
    acting, none, unknown = Way(scales=(1.0,)), Way(scales=(0.0,)), Way(scales=(1.0,), known=False)
    few, all_of_them = [(0, 40)], [(0, 40), (40, texts)]
    cases = [(arm, acting, target, few) for arm in ("anchor", "shuffled", "random-p")]
    cases += [("anchor", none, target, all_of_them), ("zero-atoms", Way(), target, all_of_them)]
    cases += [("anchor", acting, encoder, all_of_them), ("anchor", unknown, encoder, few)]
    cases += [("anchor", acting, make_encoder(encoder.layers, 16), few)]  # as deep, and narrower
    whole = observe(target, adapter.anchors.probe)
    for arm, way, host, needs in cases:
        watched.clear()
        found = port(copy.deepcopy(adapter), host, "mood", arm, way=way)
        assert watched == needs, (arm, host.name)
        if host is target:
            told = [replace(part, seconds=7.0) for part in whole.parts(40)]
            begun, shared = time.time(), Shared(*told)
            again = port(copy.deepcopy(adapter), host, "mood", arm, way=way, shared=shared)
            assert watched == needs
            torch.testing.assert_close(again.frame.head, found.frame.head, rtol=1e-3, atol=1e-4)
            least = 7 * len(needs)
            assert least - 0.1 <= float(again.report["seconds"]) <= least + 0.1 + time.time() - begun


@pytest.mark.parametrize("kind", ["sentence", "pair", "token"])
def test_what_is_observed_in_two_parts_is_what_is_observed_in_one(encoder, kind):
    texts = ["film\t" + text for text in sentences(50)] if kind == "pair" else sentences(50)
    probe = Probe(texts, kind, 2, coded=20, own=30, cuts=0 if kind == "token" else 2)
    units = sum(probe.first().units())
    whole, parts = observe(encoder, probe), [observe(encoder, probe.first()), observe(encoder, probe, start=20)]
    assert [part.units.shape[1] for part in parts] == [part.units.shape[1] for part in whole.parts(units)]
    torch.testing.assert_close(torch.cat([part.units for part in parts], 1), whole.units, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parts[0].words, whole.words, rtol=1e-4, atol=1e-5)
    assert parts[1].words.shape[1] == 0
    assert sum(part.count for part in parts) == whole.count
    one, two = basis_of(whole, 16), basis_of(parts[0], 16, rest=parts[1])
    for a, b in ((one.read[0], two.read[0]), (one.write[0], two.write[0]), (one.head, two.head)):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    first, rest = whole.parts(units)
    assert torch.equal(basis_of(first, 16, rest=rest).head, one.head)
    nothing = observe(encoder, probe, start=len(probe.observed))
    assert (nothing.units.shape, nothing.count) == ((encoder.layers + 1, 0, 24), 0)


def test_another_files_port_is_not_taken_for_this_ones(encoder, make_encoder):
    """Two files of one dictionary differ in their heads, in what their anchors say, or in these anchors' order."""
    one, target, shared = trained(encoder, coded=150)[0], make_encoder(layers=2, width=24), Shared()
    head, logits, turned = (copy.deepcopy(one) for _ in range(3))
    torch.nn.init.normal_(head.task("mood").head)
    logits.anchors.logits = Codes.of(-logits.anchors.logits.table())
    turned.anchors.stream[0] = Codes.of(turned.anchors.stream[0].table().flip(0))
    ports = [port(made, target, "mood", "anchor", shared=shared) for made in (one, head, logits, turned)]
    assert len({id(made) for made in ports}) == 4
    refreshed = copy.deepcopy(one)
    torch.nn.init.normal_(refreshed.task("mood").bias)
    for same in (copy.deepcopy(one), refreshed):
        assert port(same, target, "mood", "anchor", shared=shared) is ports[0]


def test_a_host_whose_states_are_not_finite_is_refused(encoder, make_encoder):
    adapter, target = trained(encoder)[0], make_encoder(layers=3, width=24)
    made = port(adapter, target)
    with torch.no_grad():
        target.model.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(UHLError, match="tiny-3x24: states at level 2 of 3 are not finite; its weights are damaged"):
        port(adapter, target)
    with pytest.raises(UHLError, match="what it makes of some text is not finite"):
        predict_texts(adapter, target, made, ["good film"])


def test_a_head_that_says_what_is_not_finite_is_refused(encoder):
    adapter = trained(encoder)[0]
    made = port(adapter, encoder)
    with torch.no_grad():
        adapter.task("mood").head_bias[0] = float("nan")
    with pytest.raises(UHLError, match="what it makes of some text is not finite"):
        predict_texts(adapter, encoder, made, ["good film"])


def test_a_tokenizer_of_another_model_is_named(encoder, make_encoder):
    target = make_encoder(layers=2, vocab_size=20)
    with pytest.raises(
        UHLError, match=r"its tokenizer gives token \d+, the model has 20 embeddings; load the tokenizer"
    ):
        port(trained(encoder)[0], target)
    silent = make_encoder(layers=2)
    del silent.model.config.vocab_size  # as of models that read characters
    port(trained(encoder)[0], silent)


def test_what_is_wrong_with_a_text_that_has_no_code_is_said_too(encoder, make_encoder):
    """The atoms are at work when such a text is read, and nothing else has looked at it."""
    adapter, target, way = trained(encoder, coded=40)[0], make_encoder(layers=2, width=24), Way(scales=(1.0,))
    adapter.info = {"layers": encoder.layers}
    known, number = target.tokenizer(" ".join(adapter.anchors.texts))["input_ids"], target.tokenizer.vocab["##film"]
    assert number > max(known)
    adapter.anchors.texts[-1] = "goodfilm"
    with torch.no_grad():
        target.model.embeddings.word_embeddings.weight[number] = float("inf")
    with pytest.raises(
        UHLError, match="what it makes of some text is not finite; its weights are damaged, or overflow"
    ):
        port(adapter, target, way=way)
    target.model.config.vocab_size = number
    with pytest.raises(UHLError, match=f"the model has {number} embeddings; load the tokenizer"):
        port(adapter, target, way=way)


def test_a_host_beside_whose_stream_the_weights_lie_is_refused(encoder, tokenizer):
    size = {"vocab_size": 64, "hidden_size": 24, "embedding_size": 12, "intra_bottleneck_size": 12}
    config = MobileBertConfig(**size, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32)
    target = Encoder("tiny-mobile", AutoModel.from_config(config).eval(), tokenizer, "none")
    with pytest.raises(UHLError, match=r"neither reads nor writes tiny-mobile's stream of states, 24 wide, so no"):
        port(trained(encoder)[0], target)


def test_what_is_no_adapter_or_no_host_is_named(encoder):
    (adapter, _), unchecked = trained(encoder), inspect.unwrap(port)  # tests check types, a user's session does not
    with pytest.raises(UHLError, match=r"port\(\) got 'a.safetensors' for an UHLAdapter; load it by uhl.store.load"):
        unchecked("a.safetensors", encoder)
    with pytest.raises(UHLError, match=r"got 'minilm-l3' for an Encoder; load it by uhl.models.load_encoder"):
        unchecked(adapter, "minilm-l3")
    with pytest.raises(UHLError, match="texts are a list of texts, got the text 'good film'"):
        predict_texts(adapter, encoder, port(adapter, encoder), "good film")


def test_a_source_with_other_weights_is_said_in_the_report(encoder, make_encoder):
    """The command line logs nothing, and a user of it reads the report."""
    adapter, _ = trained(encoder)
    adapter.info |= {"source": "tiny-big", "revision": "abc"}
    stranger = make_encoder(seed=5)
    stranger.revision = "def"
    said = port(adapter, encoder, "mood", "lineage", stranger).report["warning"]
    assert said.startswith("the adapter was trained on tiny-big, and tiny-3x24 has other weights; arm lineage needs")


@pytest.mark.parametrize(("places", "most"), [(512, 64), (22, 20)])
def test_texts_that_are_cut_are_marked(encoder, make_encoder, places, most):
    """What is beyond the length that the adapter was trained with, or the places of the host, is not read."""
    adapter, host = trained(encoder)[0], make_encoder(2, 32, max_position_embeddings=places)
    words = "good " * (most - 2)  # beside [CLS] and [SEP]
    texts = [words.strip(), words + "bad", words + "bad bad", words[: -len("good ")].replace(" ", "\t", 1).strip()]
    assert predict_texts(adapter, host, port(adapter, host), []) == []
    told = predict_texts(adapter, host, port(adapter, host), texts)
    assert [row.get("cut") for row in told] == [None, True, True, None]
    assert told[0]["probability"] == told[1]["probability"] == told[2]["probability"]


def test_pairs_that_are_cut_are_marked(encoder):
    adapter, _ = trained(encoder, kind="pair")
    texts = ["good\t" + "film " * 60, "good\t" + "film " * 61, "good " * 61, "good " * 62]  # beside three of its own
    told = predict_texts(adapter, encoder, port(adapter, encoder), texts)
    assert [row.get("cut") for row in told] == [None, True, None, True]


def test_embeddings_align_models_that_share_a_vocabulary(encoder, make_encoder, monkeypatch):
    adapter, frame = trained(encoder)
    assert "needs a shared vocabulary" in why_not(adapter, encoder, "embedding", encoder)
    monkeypatch.setattr("uhl.porting.FEWEST_SHARED", 16)
    assert "needs the source model" in why_not(adapter, encoder, "embedding")
    turn = rotation(24)
    for other, same in ((rotated(encoder, turn), True), (make_encoder(2, 40), False)):
        ported = port(adapter, other, "mood", "embedding", encoder)
        assert torch.isfinite(logits(other, adapter, ported)).all()
        if same:  # 37 rows for 24 columns: the map is the rotation, but for the penalty
            torch.testing.assert_close(ported.frame.head, frame.head @ turn.T, atol=0.05, rtol=0.05)


def test_the_command_ports_and_classifies(encoder, make_encoder, tmp_path, monkeypatch, capsys):
    from uhl import __main__ as command

    adapter, _ = trained(encoder)
    store.save(adapter, tmp_path / "a.safetensors")
    target = make_encoder(2, 32)
    monkeypatch.setattr(command, "load_encoder", lambda name: target)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["uhl", "port", str(tmp_path / "a.safetensors"), "small", *map(str, words)])
        command.main()
        return capsys.readouterr()

    out = run().out
    assert all(word in out for word in ("agreement", "stream_fit", "scale"))
    (tmp_path / "texts").write_bytes("\ufeffgood film\nbad\u2028plot\r\n".encode())  # of an editor on Windows
    rows = [json.loads(line) for line in run("--texts", tmp_path / "texts").out.strip().split("\n")]
    assert [r["text"] for r in rows] == ["good film", "bad\u2028plot"]
    assert all(r["label"] in {"negative", "positive"} and 0.5 <= r["probability"] <= 1 for r in rows)
    with pytest.raises(SystemExit, match="give a file with a text a line"):
        run("--texts", tmp_path / "none")
    (tmp_path / "latin").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(SystemExit, match="is not UTF-8"):
        run("--texts", tmp_path / "latin")
    with pytest.raises(SystemExit, match="is a folder; give a file with a text a line"):
        run("--texts", tmp_path)
    with pytest.raises(SystemExit, match="needs the source model"):
        run("--arm", "lineage")
    with pytest.raises(SystemExit, match="trained under the canonical projector; port it by another arm"):
        run("--arm", "dimension")


@pytest.mark.parametrize("arm", ["anchor", "zero-atoms", "random-p", "shuffled", "refresh", "refresh-random"])
def test_every_arm_gives_a_whole_frame(encoder, make_encoder, arm):
    adapter, _ = trained(encoder)
    target = make_encoder(layers=2, width=12)
    before = {k: v.clone() for k, v in target.model.state_dict().items()}
    ported = port(adapter, target, "mood", arm, way=Way(refresh_steps=3))
    assert torch.isfinite(logits(target, adapter, ported)).all()
    assert (ported.scale == 0.0) or arm != "zero-atoms"
    assert set(ported.frame.slots) == {s.path for s in find_slots(target.model)}
    assert all(torch.equal(v, before[k]) for k, v in target.model.state_dict().items())


@pytest.mark.parametrize("scales", [(0.0,), (1.0, 3.0)])
def test_random_directions_are_as_strong_as_those_of_the_anchors(encoder, make_encoder, scales, monkeypatch):
    """A control that chose its own scale would mostly choose none, and be the head alone."""
    monkeypatch.setattr("uhl.porting.SCALES", scales)
    adapter, _ = trained(encoder)
    target = make_encoder(layers=2, width=12)
    found = port(adapter, target, "mood")
    assert found.scale in scales
    assert port(adapter, target, "mood", "random-p").scale == found.scale
    assert port(adapter, target, "mood", "random-p", way=Way(scales=(7.0,))).scale == 7


def test_port_needs_no_labels_and_repeats(encoder, make_encoder):
    adapter, _ = trained(encoder)
    target = make_encoder(layers=2, width=12)
    one, two = (port(adapter, target, "mood", "random-p", seed=3) for _ in range(2))
    assert torch.equal(one.frame.routes[0], two.frame.routes[0])
    assert not torch.equal(one.frame.routes[0], port(adapter, target, "mood", "random-p", seed=4).frame.routes[0])


def test_undefined_cells_say_why(encoder, make_encoder):
    adapter, _ = trained(encoder)
    narrow = make_encoder(width=12)
    assert "equal widths" in why_not(adapter, narrow, "lineage", encoder)
    assert "needs the source model" in why_not(adapter, encoder, "lineage")
    assert "not defined" in why_not(adapter, encoder, "dimension")
    adapter.anchors = None
    assert "needs anchors" in why_not(adapter, encoder, "anchor")
    with pytest.raises(UHLError, match="needs anchors"):
        port(adapter, encoder, "mood", "anchor")
    with pytest.raises(UHLError, match="choose one of: " + ", ".join(ARMS)):
        port(adapter, encoder, "mood", "magic")


def test_batches_cover_every_text_once(encoder):
    texts = sentences(70)
    seen = sorted(i for rows, _ in batches(encoder, Probe(texts), size=16) for i in rows)
    assert seen == list(range(70))


@pytest.mark.parametrize("kind", ["sentence", "pair", "token"])
def test_units_may_be_read_from_a_text_on(encoder, kind):
    texts = ["film\t" + text for text in sentences(12)] if kind == "pair" else sentences(12)
    probe = Probe(texts, kind, coded=5, cuts=0 if kind == "token" else 2)
    whole, few = (unit_states(encoder, p, (1, -1)) for p in (probe, probe.first()))
    rest = unit_states(encoder, probe, (1, -1), start=5)
    assert 0 < len(few) < len(whole)
    torch.testing.assert_close(torch.cat([few, rest]), whole, atol=1e-5, rtol=1e-4)
    assert unit_states(encoder, probe, (1, -1), start=len(probe.observed)).shape == (0, 48)


def test_batches_of_long_texts_are_small(encoder, monkeypatch):
    monkeypatch.setattr(anchors, "TOKENS", 100)
    texts = sorted([*sentences(40), *(" ".join(sentences(9)) for _ in range(5)), "film " * 200])
    found = list(batches(encoder, Probe(texts, length=64), size=8))
    assert sorted(i for rows, _ in found for i in rows) == list(range(46))
    assert max(len(rows) for rows, _ in found) == 8
    assert all(len(rows) == 1 or batch["input_ids"].numel() <= 100 for rows, batch in found)
    assert any(len(rows) < 5 for rows, _ in found)


def test_batches_hold_texts_of_as_many_tokens_not_characters(encoder):
    """A padded token costs what a real one does, and an unknown word, however long, is one token."""
    words = ["film", "x" * 30]
    texts = [" ".join([words[i % 2]] * (3 + i % 5)) for i in range(80)]
    found = [batch["attention_mask"] for _, batch in batches(encoder, Probe(texts), size=16)]
    assert [mask.shape for mask in found] == [(16, 5 + i) for i in range(5)]
    assert all(mask.all() for mask in found)


def test_sentence_means_ignore_padding(encoder):
    short, both = final_means(encoder, ["good"]), final_means(encoder, ["good", "the cast was not very good a joy"])
    torch.testing.assert_close(short[0], both[0], atol=1e-5, rtol=1e-4)
    seen = observe(encoder, Probe(["good", "bad plot"], words=2))
    assert seen.units.shape == (encoder.layers + 1, 2, 24)
    assert seen.words.shape == (encoder.layers + 1, 4, 24)
    torch.testing.assert_close(seen.at(LAST)[0], final_means(encoder, ["good"])[0], atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        states = [
            torch.cat([s[0] for s in encoder.model(**inputs, output_hidden_states=True).hidden_states])
            for inputs in (encoder.tokenizer(t, return_tensors="pt") for t in ("good", "bad plot"))
        ]
    tokens = torch.cat(states).double()
    torch.testing.assert_close(seen.moment, tokens.T @ tokens / len(tokens), atol=1e-4, rtol=1e-4)
    assert basis_of(seen, 16).rms == pytest.approx((float(tokens.pow(2).mean().sqrt()),), rel=1e-4)


def test_a_mean_of_halves_does_not_overflow():
    states, mask = torch.full((1, 512, 4), 200.0, dtype=torch.float16), torch.ones(1, 512)
    assert torch.equal(anchors.sentence_mean(states, mask), states[:, 0])


def test_a_tokenizer_that_pads_on_the_left_gives_the_same_states(encoder):
    left = replace(encoder, tokenizer=copy.deepcopy(encoder.tokenizer))
    left.tokenizer.padding_side = "left"
    texts = sentences(20)
    assert torch.equal(final_means(left, texts), final_means(encoder, texts))
    left.tokenizer.pad_token = None
    with pytest.raises(UHLError, match="has no padding token; give it one, for instance"):
        final_means(left, texts)


def peft_folder(adapter, folder):
    """An adapter as PEFT reads it."""
    store.save(adapter, folder / "adapter_model.safetensors")
    sizes = adapter.config.model_dump() | {"types": None}
    uhl.UHLConfig(**sizes, task="mood").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("headed", [False, True])
def test_porting_a_peft_model_is_the_same_port(encoder, make_encoder, tmp_path, headed, caplog):
    adapter, _ = trained(encoder)
    folder = peft_folder(adapter, tmp_path)
    target = make_encoder(2, 40, seed=4)
    by_hand = port(store.load(folder / "adapter_model.safetensors"), target, "mood", "anchor")
    with attach(target.model, store.load(folder / "adapter_model.safetensors"), "mood", by_hand.frame, by_hand.scale):
        wanted = final_means(target, sentences(20, 9))
    host = target.model
    if headed:
        host = BertForSequenceClassification(target.model.config).eval()
        host.bert = copy.deepcopy(target.model)
    with caplog.at_level("INFO", "uhl"):
        model = PeftModel.from_pretrained(host, folder)
    assert "at depths 0 to 1, to be ported to this host before it runs: uhl.port_model(model, tokenizer)" in caplog.text
    inner = host.bert if headed else host
    with pytest.raises(UHLError, match=r"no projectors of its own for this host; port it first: uhl.port_model\("):
        inner(**encoder.tokenizer(["good"], return_tensors="pt"))
    with caplog.at_level("INFO", "uhl"):
        done = uhl.port_model(model, target.tokenizer)
    assert done.scale == by_hand.scale
    assert f"12 weights in 2 layers at depths 0 to 1, by the `anchor` arm at scale {done.scale:g}" in caplog.text
    found = final_means(Encoder("host", inner, target.tokenizer, ""), sentences(20, 9))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    with model.disable_adapter():
        assert not torch.allclose(final_means(Encoder("h", inner, target.tokenizer, ""), sentences(20, 9)), wanted)


def test_an_adapter_that_was_trained_where_it_was_ported_keeps_its_scale(encoder, make_encoder, tmp_path):
    adapter, _ = trained(encoder)
    folder, host = peft_folder(adapter, tmp_path), make_encoder(2, 40, seed=4)
    host.model.config._name_or_path = "host"
    model = PeftModel.from_pretrained(copy.deepcopy(host.model), folder)
    first = uhl.port_model(model, host.tokenizer)
    assert uhl.port_model(model, host.tokenizer).scale == first.scale
    tuner = model.base_model.uhl_adapters["default"]
    ((place, told),) = tuner.info["ported"].items()
    assert place == "host, mood, anchor"
    told["scale"] = 0.125  # one that would not be chosen
    tuner.add_task("other", ("a", "b"), "sentence")
    assert uhl.port_model(model, host.tokenizer).scale == first.scale  # nothing was trained
    told = tuner.info["ported"][place]
    told["scale"] = 0.125
    with torch.no_grad():
        tuner.task("mood").head += 0.1
    for _ in range(2):
        uhl.port_model(model, host.tokenizer, arm="zero-atoms")
        assert uhl.port_model(model, host.tokenizer).scale == 0.125
    model.save_pretrained(tmp_path / "tuned")
    for name, kept in (("host", True), ("another", False), ("", False)):
        host.model.config._name_or_path = name
        again = PeftModel.from_pretrained(copy.deepcopy(host.model), tmp_path / "tuned")
        for _ in range(2):
            assert (uhl.port_model(again, host.tokenizer).scale == 0.125) == kept


def test_porting_a_peft_model_that_is_the_source_is_the_identity(encoder, tmp_path):
    adapter, frame = trained(encoder)
    model = PeftModel.from_pretrained(copy.deepcopy(encoder.model), peft_folder(adapter, tmp_path)).train()
    done = uhl.port_model(model, encoder.tokenizer)
    assert done.scale == 1
    for path, pair in frame.slots.items():
        assert all(torch.equal(a, b) for a, b in zip(pair, done.frame.slots[path], strict=True))
    assert all(m.training for m in model.modules())


def test_porting_a_bare_host_leaves_the_configurations_as_they_were(encoder, make_encoder, tmp_path):
    adapter, _ = trained(encoder)
    folder, host = peft_folder(adapter, tmp_path), make_encoder(2, 40, seed=4)
    model = PeftModel.from_pretrained(copy.deepcopy(host.model), folder, adapter_name="mine")
    model.add_adapter("default", uhl.UHLConfig(atoms=16, width=32, target_modules=["query"]))
    before = dict(model.peft_config)
    uhl.port_model(model, host.tokenizer, "mine")
    assert {name: id(c) for name, c in model.peft_config.items()} == {name: id(c) for name, c in before.items()}
    assert model.base_model.model.peft_config is model.peft_config
    assert model.peft_config["default"].target_modules == {"query"}
    model.save_pretrained(tmp_path / "both")
    again = PeftModel.from_pretrained(copy.deepcopy(host.model), tmp_path / "both" / "mine")
    assert len(again.base_model.attached().slots) == 12


def test_an_adapter_of_some_weights_is_not_ported_as_one_of_all(encoder, tmp_path):
    adapter, _ = trained(encoder)
    config = uhl.UHLConfig.from_pretrained(peft_folder(adapter, tmp_path))
    config.target_modules = {"query", "value"}
    model = PeftModel.from_pretrained(copy.deepcopy(encoder.model), tmp_path, config=config)
    count = len(find_slots(encoder.model))
    with pytest.raises(UHLError, match=rf"works on {count // 3} of the host's weights.* all {count} .*target_modules"):
        uhl.port_model(model, encoder.tokenizer)
    with pytest.raises(UHLError, match=r"got 'bert' for a tokenizer; load it by AutoTokenizer"):
        inspect.unwrap(uhl.port_model)(model, "bert")


def test_a_ported_file_does_not_tell_where_its_host_lay(encoder, make_encoder, tmp_path):
    adapter, _ = trained(encoder)
    host = make_encoder(2, 40, seed=4)
    host.model.config._name_or_path = str(tmp_path)
    model = PeftModel.from_pretrained(copy.deepcopy(host.model), peft_folder(adapter, tmp_path))
    uhl.port_model(model, host.tokenizer)
    assert list(model.base_model.uhl_adapters["default"].info["ported"]) == [f"{tmp_path.name}, mood, anchor"]
    assert replace(host, name=f"{tmp_path}@layers=1").known_as == f"{tmp_path.name}@layers=1"
    assert replace(host, name="no/folder").known_as == "no/folder"


def test_a_task_without_a_head_cannot_be_asked(encoder, adapter):
    adapter.add_task("main", (), "sentence")
    done = port(adapter, encoder, "main", "dimension")
    with pytest.raises(UHLError, match="task 'main' has no head in this file"):
        predict_texts(adapter, encoder, done, ["good"], "main")
    with pytest.raises(UHLError, match=r"of an uhl.models.Encoder give its .model"):
        inspect.unwrap(attach)(encoder, adapter, "main")


def test_porting_a_peft_model_says_what_is_missing(encoder, tmp_path):
    adapter, _ = trained(encoder)
    adapter.anchors = None
    model = PeftModel.from_pretrained(copy.deepcopy(encoder.model), peft_folder(adapter, tmp_path))
    with pytest.raises(
        UHLError, match="needs anchors, and the adapter has none; .*a new adapter gets some in notebook 02"
    ):
        uhl.port_model(model, encoder.tokenizer)
    with pytest.raises(UHLError, match="has no adapter 'other'; it has default"):
        uhl.port_model(model, encoder.tokenizer, "other")
    assert any(hasattr(m, "base_layer") for m in model.modules())  # put back after the error


def test_weights_that_share_maps_share_what_is_folded(encoder):
    adapter, frame = trained(encoder)
    slots = find_slots(encoder.model)
    vectors = adapter.vectors(frame, slots)
    assert len({id(t) for pair in vectors.values() for t in pair}) == 2  # V M and U N^T, of which there is one each
    half = copy.deepcopy(encoder)
    half.model.to(torch.bfloat16)
    halved = adapter.vectors(port(adapter, half, "mood", "lineage", encoder).frame, slots)
    assert {t.dtype for pair in halved.values() for t in pair} == {torch.float32}


def test_a_host_whose_weights_cannot_be_read_is_ported(make_encoder):
    """Packed weights, as quantised hosts have: a port runs them and does not look at them."""

    class Packed(torch.nn.Linear):
        def __init__(self, inner):
            torch.nn.Module.__init__(self)
            self.in_features, self.out_features = inner.in_features, inner.out_features
            self.weight = torch.nn.Parameter(inner.weight.detach().view(torch.uint8).flatten(), requires_grad=False)
            self.bias = inner.bias

        def forward(self, x):
            kernel = self.weight.view(torch.float32).view(self.out_features, self.in_features)
            return torch.nn.functional.linear(x, kernel, self.bias)

    source, target, packed = make_encoder(3, 24), make_encoder(2, 16, seed=1), make_encoder(2, 16, seed=1)
    for slot in find_slots(packed.model):
        parent, _, name = slot.path.rpartition(".")
        setattr(packed.model.get_submodule(parent), name, Packed(packed.model.get_submodule(slot.path)))
    adapter, _ = trained(source)
    wanted, found = (logits(one, adapter, port(adapter, one, "mood", "anchor")) for one in (target, packed))
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
