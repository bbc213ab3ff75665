"""Losses and distillation against losses.py and timm's, with gradients."""

import pytest
import torch

from xdino.errors import UsageError
from xdino_transfer.classification.losses import Distillation, soft_target_cross_entropy
from xdino_transfer.classification.mixup import smoothed


def test_cross_entropy_over_soft_and_smoothed_targets(downstream, agree):
    tensors, told = downstream("classification")
    smooth = smoothed(tensors["smooth/target"], told["num_classes"], told["smoothing"])
    for name, targets in (("soft", tensors["soft/target"]), ("smooth", smooth)):
        logits = tensors[f"{name}/logits"].clone().requires_grad_()
        loss = soft_target_cross_entropy(logits, targets)
        loss.backward()
        agree(name, loss, tensors[f"{name}/loss"], 1e-6)
        agree(f"{name} gradient", logits.grad, tensors[f"{name}/grad"], 1e-6)


def test_distillation_is_the_published_one(downstream, agree):
    tensors, told = downstream("classification")
    targets, teacher = tensors["distil/target"], tensors["distil/teacher"]
    for i, case in enumerate(told["distil"]):
        distil = Distillation(case["kind"], case["alpha"], case["tau"])
        logits = tensors["distil/logits"].clone().requires_grad_()
        other = tensors["distil/logits_kd"].clone().requires_grad_()
        loss = distil(soft_target_cross_entropy(logits, targets), other, teacher)
        loss.backward()
        agree(f"loss {i}", loss, tensors[f"distil/{i}/loss"], 1e-6)
        agree(f"gradient {i}", logits.grad, tensors[f"distil/{i}/grad"], 1e-6)
        if case["kind"] == "none":
            assert other.grad is None
        else:
            agree(f"distilled {i}", other.grad, tensors[f"distil/{i}/grad_kd"], 1e-6)
        same = tensors["distil/logits"].clone().requires_grad_()
        loss = distil(soft_target_cross_entropy(same, targets), same, teacher)
        loss.backward()
        agree(f"shared loss {i}", loss, tensors[f"distil/{i}/loss_same"], 1e-6)
        agree(f"shared gradient {i}", same.grad, tensors[f"distil/{i}/grad_same"], 1e-6)


def test_a_teacher_of_other_classes_is_refused():
    logits = torch.zeros(2, 5)
    for kind in ("soft", "hard"):
        with pytest.raises(UsageError, match="the teacher has 7 classes and the network 5"):
            Distillation(kind)(torch.zeros(()), logits, torch.zeros(2, 7))
