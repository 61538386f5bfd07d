"""Attaching: identity, folding against the unfolded equation, gradients, E[k]."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from world import fill

from uhl import ops, store, viz
from uhl.adapter import Folded, UHLAdapter
from uhl.anchors import Probe, observe
from uhl.config import Sizes
from uhl.errors import UHLError
from uhl.fits import basis_of
from uhl.frame import Basis, dimension_frame
from uhl.host import find_slots, weight
from uhl.layer import Attached
from uhl.mixer import type_features
from uhl.peft_method import attach
from uhl.router import route

IDS = torch.randint(5, 20, (2, 6), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


def run(encoder):
    return encoder.model(input_ids=IDS, attention_mask=MASK).last_hidden_state


def test_a_new_adapter_changes_nothing(encoder, config):
    adapter = UHLAdapter(config)
    adapter.add_task("mood", ("a", "b"), "sentence")
    before = run(encoder)
    with attach(encoder.model, adapter, "mood"):
        assert torch.equal(run(encoder), before)


def test_paths_agree_inside_a_host(encoder, adapter):
    outputs, slopes = [], []
    paths = ["reference", "dense", "gather", *(["fused"] if ops.TRITON else [])]
    for path in paths:
        with attach(encoder.model, adapter, "mood", path=path) as attached:
            outputs.append(run(encoder))
            outputs[-1].sin().sum().backward()
            slopes.append([p.grad for p in adapter.parameters() if p.grad is not None])
            adapter.zero_grad()
            assert attached.paths == dict.fromkeys([s.path for s in attached.slots], path)
            chosen = attached.routes[0]
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0], atol=1e-4, rtol=1e-4)
    for found in slopes[1:]:
        for mine, wanted in zip(found, slopes[0], strict=True):
            assert wanted.abs().max() > 1e-3
            torch.testing.assert_close(mine, wanted, atol=1e-3 * wanted.abs().max().item(), rtol=1e-3)
    atom = int(chosen.index[chosen.gate > 0.5][0])
    with torch.no_grad():
        adapter.dictionary.u[atom] = adapter.dictionary.u[(atom + 1) % 12].clone()  # a wrong one
    with attach(encoder.model, adapter, "mood"):
        assert not torch.allclose(run(encoder), outputs[0], atol=1e-2)


class Operations(TorchDispatchMode):
    """Names of the operations that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("path", ["dense", "gather", "fused"])
def test_a_training_step_in_deterministic_mode_gives_the_same_bits(encoder, adapter, path):
    """New memory holds NaN then, and what has no deterministic form is an error."""
    if path == "fused":
        pytest.importorskip("triton", reason="Triton is not installed")
    torch.use_deterministic_algorithms(True)
    try:
        found = []
        with attach(encoder.model, adapter, "mood", path=path):
            for _ in range(2):
                run(encoder).sin().sum().backward()
                found.append([p.grad for p in adapter.parameters() if p.grad is not None])
                adapter.zero_grad()
    finally:
        torch.use_deterministic_algorithms(False)
    for first, second in zip(*found, strict=True):
        assert first.abs().max() > 0
        assert torch.equal(first, second)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_training_step_folds_once(encoder, adapter, monkeypatch, checkpointing):
    made, fold = [], adapter.fold
    monkeypatch.setattr(adapter, "fold", lambda *given: made.append(torch.is_grad_enabled()) or fold(*given))
    if checkpointing:
        encoder.model.activation_checkpointing_enable({"use_reentrant": False})
        encoder.model.train()
    with attach(encoder.model, adapter, "mood"):
        made.clear()  # attaching folds, to find a frame that is missing
        for step in range(1, 4):
            run(encoder).sin().sum().backward()
            assert made == [True] * step
            with torch.no_grad():
                adapter.dictionary.u.add_(0.01)


@pytest.mark.parametrize("path", [None, "dense", "gather"])
def test_a_pass_asks_for_no_value_and_does_as_much_for_any_number_of_tokens(encoder, adapter, path, monkeypatch):
    """A value asked for would wait for a GPU; what tests/test_gpu.py shows there is counted here."""
    counted = []
    if path is None:
        monkeypatch.setattr(ops, "LAUNCH", 0)  # the choice is that of many tokens
    with attach(encoder.model, adapter, "mood", path=path):
        for length in (40, 60):
            ids = torch.randint(5, 20, (2, length))
            out = encoder.model(input_ids=ids).last_hidden_state  # folds, and makes what is kept
            with Operations() as seen:
                out = encoder.model(input_ids=ids).last_hidden_state
                out.square().sum().backward()
            counted.append(seen.names)
            adapter.zero_grad()
    asking = ("_local_scalar_dense", "nonzero", "is_nonzero", "aten::equal", "unique", "masked_select")
    assert len(counted[0]) > 100
    assert not [name for names in counted for name in names if any(part in name for part in asking)]
    assert counted[0] == counted[1]


def test_one_adapter_works_in_two_hosts_at_once(make_encoder, adapter):
    """Each has folds of its own, and both follow the parameters."""
    hosts = [make_encoder(), make_encoder(layers=2, width=32, seed=1)]

    def alone():
        found = []
        for host in hosts:
            with attach(host.model, adapter, "mood"):
                found.append(run(host).detach())
        return found

    before = alone()
    with attach(hosts[0].model, adapter, "mood"), attach(hosts[1].model, adapter, "mood"):
        for host, wanted in (*zip(hosts, before, strict=True), (hosts[0], before[0])):
            torch.testing.assert_close(run(host), wanted)
        with torch.no_grad():
            adapter.dictionary.u.mul_(1.5)
        after = [run(host).detach() for host in hosts]
    for found, wanted, old in zip(after, alone(), before, strict=True):
        torch.testing.assert_close(found, wanted)
        assert not torch.allclose(found, old, atol=1e-3)


def test_tuning_folds_the_atoms_once_and_has_the_same_gradients(encoder, adapter):
    """With the dictionary frozen the products with P are kept, and the bias's gradient is that of the dense path."""
    part = adapter.task("mood")
    for p in adapter.parameters():
        p.requires_grad_(p is part.bias)
    gradients = []
    for path in (None, "dense"):
        with attach(encoder.model, adapter, "mood", path=path) as attached:
            run(encoder)
            vectors = attached.folds._cache.vectors[2]
            out = run(encoder)
            (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
            assert attached.folds._cache.vectors[2] is vectors
            with torch.no_grad():
                part.bias.add_(0.1)  # a step of the optimiser
                changed = run(encoder)
                part.bias.sub_(0.1)
            assert attached.folds._cache.vectors[2] is vectors
            assert not torch.allclose(changed, run(encoder))
        gradients.append(part.bias.grad.clone())
        part.bias.grad = None
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
    with torch.no_grad(), attach(encoder.model, adapter, "mood") as attached:
        first = run(encoder)
        adapter.dictionary.u.add_(0.5)
        assert not torch.equal(run(encoder), first)


def test_training_steps_copy_nothing_that_stays_the_same(encoder, adapter, monkeypatch):
    """What mixer and bias see of the weights, and a given frame: on an accelerator each copy would be waited for."""
    from uhl import adapter as module
    from uhl.frame import Frame

    made = []
    monkeypatch.setattr(module, "type_features", lambda *a: made.append("features") or type_features(*a))
    move = Frame.to
    monkeypatch.setattr(Frame, "to", lambda self, device: made.append("frame") or move(self, device))
    frame = basis_of(observe(encoder, Probe(["good film", "bad plot"])), 16).frame(find_slots(encoder.model))
    with attach(encoder.model, adapter, "mood", frame):
        with torch.inference_mode():
            run(encoder)  # what this leaves must serve training
        first = len(made)
        for _ in range(3):
            run(encoder).sum().backward()
    assert made.count("features") == len(find_slots(encoder.model))
    assert len(made) == first
    assert adapter.mixer.first.grad.abs().max() > 0
    other = find_slots(encoder.model)[:2]
    torch.testing.assert_close(
        adapter.strengths(other, "mood"), adapter.strengths(find_slots(encoder.model), "mood")[:2]
    )


@pytest.mark.parametrize("path", ["reference", "dense", "gather", "fused"])
def test_folded_update_is_the_unfolded_equation(encoder, adapter, path):
    """One weight, one layer, by the formula in canonical coordinates, against the difference that attaching makes."""
    if path == "fused":
        pytest.importorskip("triton", reason="Triton is not installed")
    slots = find_slots(encoder.model)
    slot = slots[0]
    x = torch.randn(1, 4, slot.d_in)
    with attach(encoder.model, adapter, "mood", path=path) as attached:
        run(encoder)
        hidden = torch.randn(1, 4, slot.d_in)
        attached.before_layer(slot.layer, hidden)
        layer = encoder.model.get_submodule(slot.path)
        delta = layer(x) - layer.base_layer(x)
        chosen = attached.routes[slot.layer]
    u, v = adapter.dictionary()
    p_in, p_out = dimension_frame(adapter.projector, slots, encoder.width).slots[slot.path]
    m = adapter.strengths(slots, "mood")[0]
    wanted = torch.zeros_like(delta)
    for t in range(4):
        for j, s in zip(chosen.index[0, t], chosen.gate[0, t], strict=True):
            wanted[0, t] += s * m[j] * (p_out @ u[j]) * (v[j] @ (p_in @ x[0, t]))
    torch.testing.assert_close(delta, wanted, atol=1e-5, rtol=1e-4)
    assert wanted.abs().max() > 1e-3
    learned = [*adapter.dictionary.parameters(), *adapter.projector.parameters(), *adapter.mixer.parameters()]
    weights = torch.linspace(-1, 1, delta.numel()).view_as(delta)
    found, true = (torch.autograd.grad((d * weights).sum(), learned, retain_graph=True) for d in (delta, wanted))
    for mine, gradient in zip(found, true, strict=True):
        assert gradient.abs().max() > 1e-4
        torch.testing.assert_close(mine, gradient, atol=1e-5, rtol=1e-3)


def test_gradients_reach_every_trained_part(encoder, adapter):
    with attach(encoder.model, adapter, "mood") as attached:
        (run(encoder).pow(2).sum() + attached.active()).backward()
    part = adapter.task("mood")
    for name, p in adapter.named_parameters():
        if p is not part.head and p is not part.head_bias:
            assert p.grad is not None, name
            assert p.grad.abs().sum() > 0, name


def test_active_counts_gates_of_real_tokens_only(encoder, adapter):
    with torch.no_grad():
        adapter.task("mood").embedding.sub_(1.2)  # so that some gates are closed
    with attach(encoder.model, adapter, "mood") as attached:
        run(encoder)
        gates = torch.stack([attached.routes[n].gate.sum(-1) for n in range(3)])
        by_hand = (gates * MASK).sum() / (3 * MASK.sum())
        assert attached.active().item() == pytest.approx(by_hand.item())
        assert attached.active().item() != pytest.approx(gates.mean().item())
        assert 0 < attached.active() <= 2


def test_refolds_exactly_when_parameters_change(encoder, adapter):
    with torch.no_grad(), attach(encoder.model, adapter, "mood") as attached:
        first = run(encoder)
        folded = attached.folded
        run(encoder)
        assert attached.folded is folded
        adapter.mixer.second.add_(0.5)
        assert not torch.equal(run(encoder), first)
        assert attached.folded is not folded


def stream_frame(encoder):
    seen = observe(encoder, Probe(["good film", "bad plot", "the cast was fine"]))
    return basis_of(seen, 16).frame(find_slots(encoder.model))


def on_the_weights_sides(frame, encoder):
    """The same edits as changes of the weights: the writer carried through a reader of the stream, and vice versa."""
    pairs = {}
    for slot in find_slots(encoder.model):
        (read, write), own = frame.slots[slot.path], weight(encoder.model, slot)
        pairs[slot.path] = (read @ own, write) if slot.writer else (read, own @ write)
    return replace(frame, slots=pairs, stream=False)


def test_what_compiled_hosts_hold_follows_the_device(encoder, adapter):
    with attach(encoder.model, adapter, "mood") as attached:
        folds, held = attached.folds, attached.folds._cache.compiled
        folds.prepare_compiled(torch.float32)
        first = held[torch.float32]
        folds.prepare_compiled(torch.float32)
        assert held == {torch.float32: first}
        first.tensors = [t.to("meta") for t in first.tensors]  # as if the host had been compiled on another device
        folds.prepare_compiled(torch.float32)
        assert {t.device for t in held[torch.float32].tensors} == {adapter.device}


def test_residual_frame_reads_the_stream_in_the_routers_scale(encoder):
    frame = stream_frame(encoder)
    (read, write), slots = frame.slots[find_slots(encoder.model)[0].path], find_slots(encoder.model)
    assert all(pair[0] is read and pair[1] is write for pair in frame.slots.values())  # one map, for all weights
    assert {s.sides(True) for s in slots} == {(24, 24)}
    assert {s.sides(False) for s in slots} == {(24, 24), (24, 48), (48, 24)}
    torch.testing.assert_close(frame.routes[0] / frame.routes[0].norm(), read / read.norm())
    inputs = encoder.tokenizer(["good film"], return_tensors="pt")
    states = torch.cat([s[0] for s in encoder.model(**inputs, output_hidden_states=True).hidden_states])
    sizes = (states @ frame.routes[0].T).norm(dim=1) / (states @ read.T).norm(dim=1) / states.pow(2).mean(1).sqrt()
    assert 0.3 < sizes.median() < 3  # the router's h / rms(h) is in the coordinates' own scale


@pytest.mark.parametrize("path", ["reference", "dense", "gather"])
@pytest.mark.parametrize("kind", [{}, {"routing": "model"}, {"router": "static"}], ids=str)
def test_edits_of_the_stream_are_changes_of_the_weights(encoder, config, kind, path):
    """Outputs and gradients of a residual frame equal those of the products of its maps with the host's weights."""
    adapter = UHLAdapter(config.model_copy(update=kind))
    adapter.add_task("mood", ("negative", "positive"), "sentence")
    fill(adapter)
    for name, p in encoder.model.named_parameters():  # without biases their part would not be seen
        p.requires_grad_(name.endswith("dense.bias"))
        p.data.copy_(torch.linspace(-1, 1, p.numel()).sin()) if name.endswith("dense.bias") else None
    frame = stream_frame(encoder)
    found = []
    for one in (on_the_weights_sides(frame, encoder), frame):
        leaves = [*adapter.parameters(), *(p for p in encoder.model.parameters() if p.requires_grad)]
        with attach(encoder.model, adapter, "mood", one, path=path) as attached:
            assert attached.stream == one.stream
            out = run(encoder)
            weighed = out * torch.linspace(-1, 1, out.numel()).sin().view_as(out)
            found.append((out, torch.autograd.grad(weighed.sum(), leaves, allow_unused=True)))
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-4, rtol=1e-3)
    assert not torch.allclose(run(encoder), found[0][0], atol=0.05)
    told = [(a, b) for a, b in zip(found[0][1], found[1][1], strict=True) if a is not None or b is not None]
    assert len(told) > 8
    for wanted, mine in told:
        assert (mine - wanted).abs().max() <= 2e-3 * wanted.abs().max() + 1e-6


def test_in_the_stream_a_writer_is_routed_by_what_it_writes(encoder, config):
    """Where each weight has its own route: a reader's by its input, a writer's by its output without the bias."""
    adapter = UHLAdapter(config.model_copy(update={"routing": "weight"}))
    adapter.add_task("mood", ("negative", "positive"), "sentence")
    frame, seen = stream_frame(encoder), {}
    with attach(encoder.model, fill(adapter), "mood", frame) as attached:
        for slot in attached.slots:
            one = encoder.model.get_submodule(slot.path)
            one.base.bias.data.copy_(torch.linspace(-1, 1, slot.d_out))
            keep = lambda m, args, out, path=slot.path: seen.update({path: (args[0], out - m.bias)})  # noqa: E731
            one.base.register_forward_hook(keep)
        x = torch.linspace(-9, 9, 96).sin().view(1, 4, 24)
        for slot in attached.slots[:6]:
            given = x if not slot.path.endswith("output.dense") or "attention" in slot.path else torch.cat([x, x], -1)
            encoder.model.get_submodule(slot.path)(given)
            chosen, read = attached.routes[slot.path], seen[slot.path][1] if slot.writer else given
            wanted = route(read, adapter.router() @ frame.slots[slot.path][0], adapter.task("mood").embedding, 2)
            assert torch.equal(chosen.index, wanted.index)
            torch.testing.assert_close(chosen.gate, wanted.gate)


def test_two_adapters_edit_what_the_host_gave(encoder, adapter):
    """Each reads the host's own states, so two that do half are one, and their order does not matter."""
    frame, model, x = stream_frame(encoder), encoder.model, torch.linspace(-9, 9, 48).sin().view(1, 2, 24)
    with attach(model, adapter, "mood", frame):
        wanted = [m(x) for m in (layer(model, "query"), layer(model, "intermediate.dense"))]
    with attach(model, adapter, "mood", frame) as attached:
        tuner_layers = [layer(model, "query"), layer(model, "intermediate.dense")]
        for one in tuner_layers:
            one._shared[1]["again"] = attached
            one.slots["again"] = one.slots["default"]
            one._active_adapter = ["default", "again"]
        twice = [one(x) for one in tuner_layers]
        bare = [one.base(x) for one in tuner_layers]
    for one, two, none in zip(wanted, twice, bare, strict=True):
        assert (one - none).abs().max() > 1e-2
        torch.testing.assert_close(two - none, 2 * (one - none), atol=1e-4, rtol=1e-3)


def layer(model, name):
    return model.get_submodule(next(s.path for s in find_slots(model) if s.path.endswith(name)))


def test_a_static_adapter_in_the_stream_merges(encoder, config):
    adapter = UHLAdapter(config.model_copy(update={"router": "static"}))
    adapter.add_task("mood", ("negative", "positive"), "sentence")
    with attach(encoder.model, fill(adapter), "mood", stream_frame(encoder)), torch.no_grad():
        wanted = run(encoder)
        tuner_layers = [m for m in encoder.model.modules() if hasattr(m, "base_layer")]
        for one in tuner_layers:
            one.merge()
        torch.testing.assert_close(run(encoder), wanted, atol=1e-4, rtol=1e-3)
        again = tuner_layers[0].get_delta_weight("default")  # of the weight as it was
        for one in tuner_layers:
            one.unmerge()
        torch.testing.assert_close(tuner_layers[0].get_delta_weight("default"), again)
        torch.testing.assert_close(run(encoder), wanted, atol=0, rtol=0)


def test_two_adapters_at_once_are_an_error_and_leave_the_first(encoder, adapter):
    with attach(encoder.model, adapter, "mood") as first:
        inside = run(encoder)
        with pytest.raises(UHLError, match="detach it first"):
            attach(encoder.model, adapter, "mood")
        assert torch.equal(run(encoder), inside)
        first.detach()
        first.detach()


def test_an_attachment_that_fails_leaves_the_host_as_it_was(encoder, make_encoder, adapter, monkeypatch):
    wanted, modules = run(encoder), dict(encoder.model.named_modules())
    trains = [p.requires_grad for p in encoder.model.parameters()]

    def frame_of(layers, width):
        read, write = torch.randn(adapter.config.width, width), torch.randn(width, adapter.config.width)
        basis = Basis((read,), (write,), read, read[:, 0], (1.0,))
        return basis.frame(find_slots(make_encoder(layers, width).model))

    layers, width = encoder.layers, encoder.width
    adapter.info = {}

    def not_folded(_):
        raise UHLError("not folded")

    for given, said in (
        ({"path": "fast"}, "unknown path 'fast'"),
        ({"frame": frame_of(layers - 1, width)}, f"it has nothing for encoder.layer.{layers - 1}."),
        ({"frame": frame_of(layers + 1, width)}, f"another host, which has encoder.layer.{layers}."),
        ({"frame": frame_of(layers, width // 2)}, f"reads {width // 2} and writes {width // 2} wide, the host {width}"),
        ({}, "not folded"),  # once the host is whole
    ):
        with pytest.raises(UHLError, match=said), monkeypatch.context() as patch:
            if not given:
                patch.setattr(Attached, "folded", property(not_folded))
            attach(encoder.model, adapter, "mood", **given)
        assert dict(encoder.model.named_modules()) == modules
        assert [p.requires_grad for p in encoder.model.parameters()] == trains
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in encoder.model.modules())
        assert torch.equal(run(encoder), wanted)
        assert adapter.info == {} or not given
    with attach(encoder.model, adapter, "mood") as attached:
        with pytest.raises(UHLError, match="of another host"):
            attached.set_frame(frame_of(layers + 1, width))
        assert not attached.ported


def test_unknown_task(encoder, adapter):
    with pytest.raises(UHLError, match="no task 'other'; it has mood"):
        attach(encoder.model, adapter, "other")


@pytest.mark.parametrize("path", ["gather", "dense"])
def test_weights_that_read_the_same_read_once(encoder, adapter, path, monkeypatch):
    """Q, K and V share what they read: four readings a layer, not six, with the reference's results and gradients."""
    calls = []
    read, write = ops.halves(path)

    def counted(*given):
        calls.append(given)
        return read(*given)

    monkeypatch.setattr(ops, "halves", lambda _: (counted, write))
    found = {}
    for name in (path, "reference"):
        if name == "reference":
            monkeypatch.setattr(ops, "halves", lambda _: None)
        adapter.zero_grad()
        with attach(encoder.model, adapter, "mood", path=name):
            out = run(encoder)
            (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
        found[name] = [out, *(p.grad.clone() for p in adapter.parameters() if p.grad is not None)]
    assert len(calls) == 4 * 3
    assert len(found[path]) == len(found["reference"])
    for mine, wanted in zip(found[path], found["reference"], strict=True):
        torch.testing.assert_close(mine, wanted, atol=1e-3, rtol=1e-3)


def test_what_was_read_is_read_again_where_anything_differs(encoder, adapter):
    with torch.no_grad(), attach(encoder.model, adapter, "mood", path="gather") as attached:
        layer = encoder.model.encoder.layer[0].attention.self
        x = torch.randn(1, 4, 24)
        attached.before_layer(0, x)
        layer.query(x)
        kept = attached._now.reading
        layer.key(x)
        assert attached._now.reading is kept
        layer.key(x.clone())
        assert attached._now.reading is not kept  # another tensor
        layer.query(x)
        kept = attached._now.reading
        x.mul_(2)  # the same tensor with other values
        layer.key(x)
        assert attached._now.reading is not kept
        kept = attached._now.reading
        with torch.enable_grad():
            layer.value(x)
        assert attached._now.reading is not kept  # this one has gradients
    with torch.inference_mode(), attach(encoder.model, adapter, "mood", path="gather") as attached:
        run(encoder)
        assert attached._now.reading is None


def routed(adapter, config, routing):
    """The same adapter with another routing."""
    made = UHLAdapter(config.model_copy(update={"routing": routing}))
    made.add_task("mood", ("negative", "positive"), "sentence")
    made.load_state_dict(adapter.state_dict())
    return made


def test_each_weight_may_have_its_own_route(encoder, adapter, config):
    with attach(encoder.model, routed(adapter, config, "weight"), "mood") as attached:
        run(encoder)
        assert sorted(attached.routes) == sorted(s.path for s in attached.slots)
        slot = next(s for s in attached.slots if s.d_in == 48)  # feed-forward, out
        x, reader = torch.randn(2, 6, 48), attached.folded.own_routes[slot.path]
        layer = encoder.model.get_submodule(slot.path)
        layer(x)
        found = attached.routes[slot.path]
        wanted = route(x, reader, attached.folded.embedding, 2)
        assert torch.equal(found.index, wanted.index)
        p_in = dimension_frame(adapter.projector, attached.slots, 24).slots[slot.path][0]
        torch.testing.assert_close(reader, attached.adapter.router() @ p_in)
        gates = torch.stack([r.gate.detach().sum(-1) for r in attached.routes.values()])
        assert attached.active().item() == pytest.approx(float((gates * MASK).sum() / (len(gates) * MASK.sum())))


def test_all_layers_may_share_one_route(encoder, adapter, config):
    shared = routed(adapter, config, "model")
    with attach(encoder.model, shared, "mood") as attached:
        first = run(encoder)
        assert list(attached.routes) == [0]
        inputs = {}
        layer = encoder.model.encoder.layer[0]
        handle = layer.register_forward_pre_hook(lambda _m, args: inputs.update(hidden=args[0]))
        run(encoder)
        handle.remove()
        wanted = route(inputs["hidden"], attached.folded.reader(0), attached.folded.embedding, 2)
        assert torch.equal(attached.routes[0].index, wanted.index)
        gates = attached.routes[0].gate.detach().sum(-1)
        assert attached.active().item() == pytest.approx(float((gates * MASK).sum() / MASK.sum()))
        asked = []
        attached._route = lambda *given: asked.append(1) or type(attached)._route(attached, *given)
        run(encoder)
        assert len(asked) == 1
    with attach(encoder.model, adapter, "mood"):
        assert not torch.allclose(run(encoder), first, atol=1e-4)


@pytest.mark.parametrize("routing", ["layer", "weight", "model"])
def test_every_routing_has_gradients_and_its_own_file(encoder, adapter, config, routing, tmp_path):
    made = routed(adapter, config, routing)
    with attach(encoder.model, made, "mood") as attached:
        (run(encoder).pow(2).sum() + attached.active()).backward()
        assert made.router.weight.grad.abs().max() > 1e-6
        wanted = run(encoder)
    path = store.save(made, tmp_path / "a.safetensors")
    assert (b"routing" in path.read_bytes()) == (routing != "layer")  # so that older releases read the usual ones
    with attach(encoder.model, store.load(path), "mood") as attached:
        assert attached.adapter.config.routing == routing
        torch.testing.assert_close(run(encoder), wanted, atol=1e-3, rtol=1e-3)


def test_a_static_router_has_no_other_routing():
    with pytest.raises(UHLError, match="leave routing at `layer`"):
        Sizes(router="static", routing="model")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_host_is_given_folds_of_its_dtype_once(encoder, adapter, dtype, monkeypatch):
    """On Triton's path, where nothing learns; refreshed when a parameter changes."""
    pytest.importorskip("triton", reason="Triton is not installed")
    casts, given = [], []
    like, get = Folded.like, ops.get
    monkeypatch.setattr(Folded, "like", lambda folded, wanted: casts.append(wanted) or like(folded, wanted))

    def watched(name):
        return lambda y, x, v, u, *rest: given.append({x.dtype, v.dtype, u.dtype}) or get(name)(y, x, v, u, *rest)

    monkeypatch.setattr(ops, "get", watched)
    encoder.model.to(dtype)
    with attach(encoder.model, adapter, "mood", path="fused") as attached, torch.no_grad():
        found = [run(encoder), run(encoder)]
        assert casts == [dtype]
        assert given == [{dtype}] * 2 * len(attached.slots)
        assert {r.gate.dtype for r in attached.routes.values()} == {torch.float32}
        shared = [attached.folds().like(dtype).atoms[s.path][0] for s in attached.slots if s.d_in == 24]
        assert len({t.data_ptr() for t in shared}) == 1
        adapter.dictionary.u.add_(0.5)
        assert not torch.equal(run(encoder), found[0])
        assert casts == [dtype] * 2
        adapter.dictionary.u.sub_(0.5)
        given.clear()
        with torch.enable_grad():
            run(encoder)
        assert given == [{dtype, torch.float32}] * len(attached.slots)  # what learns stays in float32
    assert torch.equal(*found)
    given.clear()
    with torch.no_grad(), attach(encoder.model, adapter, "mood", path="gather"):
        wanted = run(encoder)
    assert given == []
    assert casts == [dtype] * 2  # other paths have float32
    adapter.dictionary.u.data.zero_()
    with torch.no_grad(), attach(encoder.model, adapter, "mood", path="gather"):
        alone = run(encoder)
    assert (found[0] - wanted).norm() < 0.1 * (alone - wanted).norm()


def test_scores_are_in_float32_whatever_the_states():
    """Squares beyond float16's largest number do not spoil the size of a state."""
    hidden, reader, task = torch.randn(3, 24) * 1000, torch.randn(12, 24) / 24, torch.zeros(12)
    wanted = route(hidden.half().float(), reader.half().float(), task, 2)
    found = route(hidden.half(), reader.half(), task, 2)
    assert torch.equal(found.index, wanted.index)
    assert found.gate.dtype == torch.float32


def test_the_explorer_shows_the_layer_and_the_text_that_are_chosen(encoder, adapter, monkeypatch):
    shown = []
    draw = viz.routing_map
    monkeypatch.setattr(
        viz.routing, "routing_map", lambda table, layers: shown.append((table, layers)) or draw(table, layers)
    )
    with attach(encoder.model, adapter, "mood") as attached:
        box, controls, _ = viz.routing_explorer(attached, encoder, "good film").children
        slider, every = controls.children
        slider.value = 2
        box.value = "the plot was bad"
        every.value = True
    assert [layers for _, layers in shown] == [[0], [2], [2], None]
    assert [table["position"].nunique() for table, _ in shown] == [4, 4, 6, 6]  # with [CLS] and [SEP]
    taken = shown[-1][0]
    assert set(taken["layer"]) == {0, 1, 2}
    assert taken.equals(viz.routing_table(attached, encoder, "the plot was bad"))


def test_what_atoms_read_in_a_bias_follows_it(encoder, adapter):
    """It is kept with a fold; a host's bias may change all the same."""
    frame = stream_frame(encoder)
    with attach(encoder.model, adapter, "mood", frame) as attached, torch.no_grad():
        first = run(encoder)
        assert attached.folds().read
        slot = next(s for s in attached.slots if s.writer)
        encoder.model.get_submodule(slot.path).base.bias.add_(torch.linspace(-1, 1, 24))
        changed = run(encoder)
        attached.folds.forget()
        torch.testing.assert_close(changed, run(encoder))
        assert (changed - first).abs().max() > 1e-3
