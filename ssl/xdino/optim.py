"""Optimisers, parameter groups, and the two things done to gradients before a step."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer


class LARS(Optimizer):
    """Layer-wise adaptive rate scaling (You et al., 2017, arXiv 1708.03888), as DINO uses it.

    One-dimensional parameters (biases, norms) are neither decayed nor adapted.
    """

    def __init__(
        self,
        params: Iterable[dict[str, object]],
        lr: float = 0.0,
        weight_decay: float = 0.0,
        momentum: float = 0.9,
        trust: float = 0.001,
    ) -> None:
        super().__init__(
            params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "trust": trust}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim != 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    p_norm, u_norm = p.norm(), update.norm()
                    ratio = group["trust"] * p_norm / u_norm
                    update = update * torch.where((p_norm > 0) & (u_norm > 0), ratio, 1.0)
                state = self.state[p]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(p)
                buffer = state["momentum_buffer"].mul_(group["momentum"]).add_(update)
                p.add_(buffer, alpha=-group["lr"])


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Two groups: what is decayed, then what is not (biases and one-dimensional parameters).

    By the published rule `cls_token`, XCA's `temperature` and a trained `weight_g` are decayed.
    """
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    for name, p in model.named_parameters():
        if p.requires_grad:
            (plain if name.endswith(".bias") or p.ndim == 1 else decayed).append(p)
    return [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]


def build(name: str, model: nn.Module) -> Optimizer:
    """AdamW, SGD or LARS over the two groups; the learning rate comes with each step."""
    groups = parameter_groups(model)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, fused=True)
    if name == "sgd":
        return torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    if name == "lars":
        return LARS(groups)
    raise ValueError(f'optimiser must be "adamw", "sgd" or "lars", got "{name}"')


def set_step(optimiser: Optimizer, lr: float, weight_decay: float | None) -> None:
    """Write this step's learning rate, and the weight decay of the first group.

    lr: of a group with an `lr_scale`, times that. weight_decay: None = every group keeps its own.
    """
    for group in optimiser.param_groups:
        group["lr"] = lr * group["lr_scale"] if "lr_scale" in group else lr
    if weight_decay is not None:
        optimiser.param_groups[0]["weight_decay"] = weight_decay


@torch.no_grad()
def gradient_norms(grads: Sequence[Tensor]) -> Tensor:
    """The norm of each tensor, `[P]`: not finite where one of its values, or their square, is not."""
    return torch.stack(torch._foreach_norm(list(grads)))


@torch.no_grad()
def clip_each(parameters: Iterable[Tensor], max_norm: float, norms: Tensor | None = None) -> None:
    """Scale each tensor's gradient to norm `max_norm` at most, without asking the device anything.

    Per tensor, as published (not the global norm that `clip_grad_norm_` clips). `norms`: of the
    gradients, where they are known already.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return
    norms = gradient_norms(grads) if norms is None else norms
    scales = norms.add(1e-6).reciprocal_().mul_(max_norm)
    torch._foreach_mul_(grads, list(scales.clamp_(max=1.0).unbind()))


@torch.no_grad()
def clip_together(
    parameters: Iterable[Tensor], max_norm: float, norms: Tensor | None = None
) -> None:
    """Scale all gradients by one factor, to norm `max_norm` at most; arguments as `clip_each`."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        return
    norms = gradient_norms(grads) if norms is None else norms
    scale = (max_norm / (norms.norm() + 1e-6)).clamp_(max=1.0)
    torch._foreach_mul_(grads, scale)


def drop_gradients(module: nn.Module) -> None:
    """No gradient at all (not zero), so that Adam's moments and the weights stay where they are."""
    for p in module.parameters():
        p.grad = None
