"""The loss in chunks of prototypes is the loss: values, gradients, centre and entropy."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from xdino.head import WeightNormLinear
from xdino.loss import dino_loss
from xdino.loss.chunked import chunked_dino_loss


def sphere(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=dtype), dim=-1)


def layer(d, K, dtype=torch.float64):
    made = WeightNormLinear(d, K, train_gain=True).to(dtype)
    made.weight_g.data.uniform_(0.5, 2)
    return made


@given(
    V=st.integers(2, 6),
    G=st.integers(1, 3),
    B=st.integers(1, 3),
    K=st.integers(2, 70),
    chunk=st.integers(1, 80),
    seed=st.integers(0, 999),
)
@settings(max_examples=40, deadline=None)
def test_equals_the_loss_on_whole_logits(V, G, B, K, chunk, seed):
    torch.manual_seed(seed)
    G = min(G, V)
    student, teacher, centre = layer(8, K), layer(8, K), 0.1 * torch.randn(1, K).double()
    z, y = sphere(V, B, 8).requires_grad_(), sphere(G, B, 8)
    logits = teacher(y)
    targets = torch.softmax((logits - centre) / 0.04, -1)
    expected = dino_loss(student(z), targets, 0.1)
    inputs = z, student.weight_v, student.weight_g
    gradients = torch.autograd.grad(3 * expected, inputs)
    found = chunked_dino_loss(z, y, student, teacher, centre, 0.1, 0.04, chunk)
    torch.testing.assert_close(found.loss, expected)
    torch.testing.assert_close(found.teacher_mean, logits.mean((0, 1)))
    entropy = torch.special.entr(targets).sum(-1).mean()
    torch.testing.assert_close(found.teacher_entropy, entropy)
    for got, want in zip(torch.autograd.grad(3 * found.loss, inputs), gradients, strict=True):
        torch.testing.assert_close(got, want)


def test_a_confident_teacher_and_far_centres_overflow_nothing():
    torch.manual_seed(0)
    student, teacher = layer(16, 300, torch.float32), layer(16, 300, torch.float32)
    centre = 50 * torch.randn(1, 300)
    z, y = sphere(4, 2, 16, dtype=torch.float32).requires_grad_(), sphere(2, 2, 16).float()
    targets = torch.softmax((teacher(y) - centre) / 0.01, -1)
    found = chunked_dino_loss(z, y, student, teacher, centre, 0.01, 0.01, 7)
    torch.testing.assert_close(
        found.loss, dino_loss(student(z), targets, 0.01), rtol=1e-5, atol=1e-5
    )
    found.loss.backward()
    assert z.grad.isfinite().all()


def test_whole_logits_never_exist():
    """Nothing kept or made is as large as [V, B, K] but the weights and their gradient."""
    student, teacher = layer(4, 5000, torch.float32), layer(4, 5000, torch.float32)
    z, y = sphere(10, 8, 4, dtype=torch.float32).requires_grad_(), sphere(2, 8, 4).float()
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor):
                largest = max(largest, out.numel())
            return out

    with Watch():
        chunked_dino_loss(
            z, y, student, teacher, torch.zeros(1, 5000), 0.1, 0.04, 100
        ).loss.backward()
    assert largest <= 5000 * 4 < 10 * 8 * 5000


def test_bf16_products_stay_close():
    torch.manual_seed(0)
    student, teacher = layer(32, 500, torch.float32), layer(32, 500, torch.float32)
    z, y = sphere(4, 4, 32, dtype=torch.float32), sphere(2, 4, 32).float()
    exact = chunked_dino_loss(z, y, student, teacher, torch.zeros(1, 500), 0.1, 0.04)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = chunked_dino_loss(z, y, student, teacher, torch.zeros(1, 500), 0.1, 0.04)
    assert half.loss.dtype == torch.float32
    torch.testing.assert_close(half.loss, exact.loss, rtol=1e-2, atol=0)


def test_mistakes_are_sentences():
    one = layer(4, 9)
    with pytest.raises(ValueError, match=r"student must be \[V, B, d\]"):
        chunked_dino_loss(sphere(2, 3, 4), sphere(2, 2, 4), one, one, torch.zeros(1, 9), 0.1, 0.1)
    with pytest.raises(ValueError, match="two in all"):
        chunked_dino_loss(sphere(1, 3, 4), sphere(1, 3, 4), one, one, torch.zeros(1, 9), 0.1, 0.1)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        chunked_dino_loss(
            sphere(2, 3, 4), sphere(2, 3, 4), one, one, torch.zeros(1, 9), 0.1, 0.1, 0
        )
