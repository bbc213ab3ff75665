"""The loss against its definition as nested loops, and the centre."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xdino.loss import DINOLoss, dino_loss


def as_nested_loops(student, probs, temperature):
    total, pairs = 0.0, 0
    for g, q in enumerate(probs):
        for v, logits in enumerate(student):
            if v == g:
                continue
            total = total + (-q * torch.log_softmax(logits / temperature, -1)).sum(-1).mean()
            pairs += 1
    return total / pairs


@settings(max_examples=25, deadline=None)
@given(
    G=st.integers(1, 3), locals_=st.integers(0, 4), B=st.integers(1, 5), K=st.integers(2, 33),
    temperature=st.floats(0.05, 1.0), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_equals_the_nested_loops(G, locals_, B, K, temperature, seed):
    if G + locals_ < 2:
        locals_ = 1
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(G + locals_, B, K, generator=g, dtype=torch.float64, requires_grad=True)
    probs = torch.randn(G, B, K, generator=g, dtype=torch.float64).softmax(-1)
    ours = dino_loss(student, probs, temperature)
    (mine,) = torch.autograd.grad(ours, student)
    theirs = as_nested_loops(student, probs, temperature)
    (reference,) = torch.autograd.grad(theirs, student)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(mine, reference, rtol=1e-10, atol=1e-12)


def test_uniform_outputs_sit_at_ln_k():
    loss = DINOLoss(64)
    flat = torch.zeros(6, 3, 64)
    assert math.isclose(loss(flat, flat[:2], 0.04).item(), math.log(64), rel_tol=1e-6)


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((20, 64), (2, 4, 64)), ((5, 4, 64), (2, 4, 32)), ((5, 4, 64), (8, 64)), ((1, 4, 64), (1, 4, 64)),
     ((2, 4, 64), (3, 4, 64))],
)  # fmt: skip
def test_shapes_that_cannot_be(student, teacher):
    with pytest.raises(ValueError, match=r"must be|need at least"):
        dino_loss(torch.zeros(student), torch.zeros(teacher))


def test_the_centre_moves_only_when_told():
    loss = DINOLoss(8, centre_momentum=0.9)
    teacher = torch.randn(2, 4, 8)
    loss(torch.randn(5, 4, 8), teacher, 0.04)
    assert torch.equal(loss.centre, torch.zeros(1, 8))
    loss.update_centre(teacher.mean((0, 1)))
    torch.testing.assert_close(loss.centre, 0.1 * teacher.mean((0, 1))[None])
