"""Parameter groups, clipping per tensor, the frozen last layer, LARS."""

import pytest
import torch
from torch import nn

from xdino import optim
from xdino.head import DINOHead
from xdino.student_teacher import MultiCropNetwork
from xdino.xcit import XCiT


def test_groups_follow_the_published_rule():
    model = MultiCropNetwork(XCiT(8, 32, 1, 2), DINOHead(32, 16, 32, 8, norm_last_layer=False))
    names = {id(p): n for n, p in model.named_parameters()}
    decayed, plain = ({names[id(p)] for p in g["params"]} for g in optim.parameter_groups(model))
    assert decayed | plain == set(names.values())
    for name in (
        "backbone.cls_token",
        "backbone.blocks.0.attn.temperature",
        "head.last_layer.weight_g",
    ):
        assert name in decayed
    for name in ("backbone.blocks.0.gamma1", "backbone.norm.weight", "head.mlp.0.bias"):
        assert name in plain
    frozen = DINOHead(32, 16, 32, 8, norm_last_layer=True)
    kept = [p for g in optim.parameter_groups(frozen) for p in g["params"]]
    assert not any(p is frozen.last_layer.weight_g for p in kept)


def test_clipping_is_per_tensor():
    big, small, none = (nn.Parameter(torch.zeros(4)) for _ in range(3))
    big.grad, small.grad = torch.full((4,), 10.0), torch.full((4,), 0.1)
    optim.clip_each([big, small, none], 3.0)
    assert big.grad.norm().item() == pytest.approx(3.0, rel=1e-5)
    assert torch.equal(small.grad, torch.full((4,), 0.1))


@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_dropped_gradient_leaves_weights_and_moments_alone(name):
    model = nn.Linear(3, 3)
    optimiser = optim.build(name, model)
    optim.set_step(optimiser, 0.1, 0.04)
    model(torch.ones(1, 3)).sum().backward()
    before = model.weight.clone()
    optim.drop_gradients(model)
    optimiser.step()
    assert torch.equal(model.weight, before)
    assert not optimiser.state


def test_lars_follows_its_formula():
    p, b = nn.Parameter(torch.tensor([[3.0, 4.0]])), nn.Parameter(torch.tensor([1.0]))
    optimiser = optim.LARS([{"params": [p, b]}])
    optim.set_step(optimiser, 0.5, 0.1)
    p.grad, b.grad = torch.tensor([[1.0, 0.0]]), torch.tensor([2.0])
    update = torch.tensor([[1.0 + 0.3, 0.4]])
    expected = torch.tensor([[3.0, 4.0]]) - 0.5 * (0.001 * 5 / update.norm()) * update
    optimiser.step()
    torch.testing.assert_close(p.data, expected)
    torch.testing.assert_close(b.data, torch.tensor([0.0]))  # neither decayed nor adapted


def test_an_unknown_optimiser():
    with pytest.raises(ValueError, match='got "adam"'):
        optim.build("adam", nn.Linear(1, 1))
