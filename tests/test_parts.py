"""Projector, mixer, router: shapes, starting points, the stated sizes."""

import math

import pytest
import torch

from uhl.adapter import UHLAdapter
from uhl.config import Sizes
from uhl.errors import UHLError
from uhl.mixer import BASIS, bias_features, type_features
from uhl.router import route


@pytest.fixture(scope="module")
def full():
    return UHLAdapter(Sizes())


def test_stated_sizes(full):
    assert sum(p.numel() for p in full.mixer.parameters()) == 2018
    assert full.add_task("t", ("a", "b"), "sentence").bias.numel() == 1024
    assert full.dictionary.u.shape == full.dictionary.v.shape == (128, 256)


@pytest.mark.parametrize("dim", [64, 255, 256, 312, 384, 1024, 3072])
def test_projector_has_unit_gain_at_every_dimension(full, dim):
    p = full.projector(dim, write=True)
    assert p.shape == (dim, 256)
    small = p @ p.T if dim < 256 else p.T @ p
    error = (small - torch.eye(len(small))).abs().max()
    assert error < (0.05 if dim < 256 else 1e-4)
    wrong = p * 1.1
    assert ((wrong @ wrong.T if dim < 256 else wrong.T @ wrong) - torch.eye(len(small))).abs().max() > 0.05


def test_projector_starts_as_the_cosine_transform(full):
    p = full.projector(384, write=False)
    i, c = 17, 9
    assert p[i, c].item() == pytest.approx(math.sqrt(2 / 384) * math.cos(math.pi * c * (i + 0.5) / 384), abs=1e-6)


def test_projector_is_continuous_in_the_dimension(full):
    with torch.no_grad():
        full.projector.second.add_(torch.randn(256, 10, generator=torch.Generator().manual_seed(1)) * 0.1)
    a, b = full.projector(1000, True)[500], full.projector(2000, True)[1001]
    far = full.projector(2000, True)[1400]
    near = (a[:20] * math.sqrt(1000) - b[:20] * math.sqrt(2000)).norm()
    assert near < 0.2 * (a[:20] * math.sqrt(1000) - far[:20] * math.sqrt(2000)).norm()


def test_mixer_follows_its_equation(adapter):
    from uhl.quant import fake_quantise

    x = type_features(0.4, "V")
    first, second = fake_quantise(adapter.mixer.first, 4), fake_quantise(adapter.mixer.second, 4)
    by_hand = second[:, :-1] @ torch.sin(first[:, :-1] @ x + first[:, -1]) + second[:, -1]
    torch.testing.assert_close(adapter.mixer(x), by_hand)
    assert not torch.allclose(adapter.mixer(type_features(0.5, "V")), by_hand, atol=1e-3)
    assert len(bias_features(0.4, "V")) == BASIS == 8


def test_route_takes_the_best_and_closes_below_half():
    hidden = torch.eye(3)[None]
    folded = torch.tensor([[2.0, -1, -5], [1, -2, -6], [3, -3, -7], [-9, 9, -8]])
    made = route(hidden, folded, torch.zeros(4), 2)
    assert made.index[0, 0].tolist() == [2, 0]
    assert made.gate[0].tolist() == [[1, 1], [1, 0], [0, 0]]  # a token may use two, one or no atoms


def test_expected_atoms_have_a_gradient():
    hidden, folded = torch.randn(1, 4, 6), torch.randn(8, 6)
    task = torch.zeros(8, requires_grad=True)
    route(hidden, folded, task, 2).gate.sum().backward()
    assert (task.grad >= 0).all()
    assert task.grad.abs().sum() > 0


def test_route_does_not_depend_on_the_streams_scale():
    hidden, folded, task = torch.randn(2, 5, 6), torch.randn(8, 6), torch.randn(8)
    one, two = (route(h, folded, task, 2) for h in (hidden, hidden * 7))
    assert torch.equal(one.index, two.index)
    assert torch.equal(one.gate, two.gate)


def test_settings_name_the_mistake():
    with pytest.raises(UHLError, match="atom: Extra inputs"):
        Sizes(atom=3)
    with pytest.raises(UHLError, match="top_k"):
        Sizes(top_k=0)
