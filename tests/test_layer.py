"""Attaching: identity, folding against the unfolded equation, gradients, E[k]."""

import pytest
import torch

from uhl import ops, store
from uhl.adapter import Folded, UHLAdapter
from uhl.anchors import Probe, observe
from uhl.config import Sizes
from uhl.errors import UHLError
from uhl.frame import dimension_frame
from uhl.host import find_slots, weight
from uhl.peft_method import attach
from uhl.porting import basis_of
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
    outputs = []
    for path in ("reference", "dense", "gather"):
        with attach(encoder.model, adapter, "mood", path=path) as attached:
            outputs.append(run(encoder))
            assert attached.paths == dict.fromkeys([s.path for s in attached.slots], path)
    for out in outputs[1:]:
        torch.testing.assert_close(out, outputs[0], atol=1e-4, rtol=1e-4)


def test_tuning_folds_the_atoms_once_and_has_the_same_gradients(encoder, adapter):
    """With the dictionary frozen the products with P are kept, and the bias's gradient is that of the dense path."""
    part = adapter.task("mood")
    for p in adapter.parameters():
        p.requires_grad_(p is part.bias)
    gradients = []
    for path in (None, "dense"):
        with attach(encoder.model, adapter, "mood", path=path) as attached:
            run(encoder)
            vectors = attached._cache.vectors[2]
            out = run(encoder)
            (out * torch.linspace(-1, 1, out.shape[-1])).sum().backward()
            assert attached._cache.vectors[2] is vectors
            with torch.no_grad():
                part.bias.add_(0.1)  # a step of the optimiser
                changed = run(encoder)
                part.bias.sub_(0.1)
            assert attached._cache.vectors[2] is vectors
            assert not torch.allclose(changed, run(encoder))
        gradients.append(part.bias.grad.clone())
        part.bias.grad = None
    assert gradients[0].abs().max() > 1e-3
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-3)
    with torch.no_grad(), attach(encoder.model, adapter, "mood") as attached:
        first = run(encoder)
        adapter.dictionary.u.add_(0.5)
        assert not torch.equal(run(encoder), first)


def test_folded_update_is_the_unfolded_equation(encoder, adapter):
    """One weight, one layer, by the formula in canonical coordinates, against the difference that attaching makes."""
    slots = find_slots(encoder.model)
    slot = slots[0]
    x = torch.randn(1, 4, slot.d_in)
    with attach(encoder.model, adapter, "mood") as attached:
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


def test_residual_frame_is_an_edit_of_the_stream(encoder, adapter):
    """A reader's update W N u (v . M x) is W applied to an edited input; a writer's is an edit of its output."""
    slots = find_slots(encoder.model)
    frame = basis_of(observe(encoder, Probe(["good film", "bad plot", "the cast was fine"])), 16).frame(
        encoder.model, slots
    )
    reader, writer = slots[0], next(s for s in slots if s.writer)
    (m_read, wn), (mw, n) = frame.pair(reader.path), frame.pair(writer.path)
    torch.testing.assert_close(wn, weight(encoder.model, reader) @ n)
    torch.testing.assert_close(frame.routes[0] / frame.routes[0].norm(), m_read / m_read.norm())
    inputs = encoder.tokenizer(["good film"], return_tensors="pt")
    states = torch.cat([s[0] for s in encoder.model(**inputs, output_hidden_states=True).hidden_states])
    sizes = (states @ frame.routes[0].T).norm(dim=1) / (states @ m_read.T).norm(dim=1) / states.pow(2).mean(1).sqrt()
    assert 0.3 < sizes.median() < 3  # the router's h / rms(h) is in the coordinates' own scale
    torch.testing.assert_close(mw, m_read @ weight(encoder.model, writer))
    assert not torch.allclose(wn, n, atol=1e-2)


def test_two_adapters_at_once_are_an_error_and_leave_the_first(encoder, adapter):
    with attach(encoder.model, adapter, "mood") as first:
        inside = run(encoder)
        with pytest.raises(UHLError, match="detach it first"):
            attach(encoder.model, adapter, "mood")
        assert torch.equal(run(encoder), inside)
        first.detach()
        first.detach()


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
        kept = attached._cache.now.reading
        layer.key(x)
        assert attached._cache.now.reading is kept
        layer.key(x.clone())
        assert attached._cache.now.reading is not kept  # another tensor
        layer.query(x)
        kept = attached._cache.now.reading
        x.mul_(2)  # the same tensor with other values
        layer.key(x)
        assert attached._cache.now.reading is not kept
        kept = attached._cache.now.reading
        with torch.enable_grad():
            layer.value(x)
        assert attached._cache.now.reading is not kept  # this one has gradients
    with torch.inference_mode(), attach(encoder.model, adapter, "mood", path="gather") as attached:
        run(encoder)
        assert attached._cache.now.reading is None


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
        shared = [attached._fold().like(dtype).atoms[s.path][0] for s in attached.slots if s.d_in == 24]
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
    torch.testing.assert_close(found[0].float(), wanted.float(), atol=0.3, rtol=0.1)


def test_scores_are_in_float32_whatever_the_states():
    """Squares beyond float16's largest number do not spoil the size of a state."""
    hidden, reader, task = torch.randn(3, 24) * 1000, torch.randn(12, 24) / 24, torch.zeros(12)
    wanted = route(hidden.half().float(), reader.half().float(), task, 2)
    found = route(hidden.half(), reader.half(), task, 2)
    assert torch.equal(found.index, wanted.index)
    assert found.gate.dtype == torch.float32
