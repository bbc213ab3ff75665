"""One step of what segmenters and detectors share: sums, micro-batches, groups, numbers that are none."""

import copy

import pytest
import torch
from torch import nn

from xdino.errors import NonFinite
from xdino_transfer.dense_training.learner import DenseLearner, adamw, parameter_groups
from xdino_transfer.dense_training.recipe import drop_path_of, in_iterations
from xdino_transfer.rates import only_norms


class Network(nn.Module):
    """Names as the published ones: a trunk, a level, a head, two kinds of norms."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.ModuleDict(
            {"blocks": nn.Linear(4, 4), "norm1": nn.LayerNorm(4), "fpn1": nn.Linear(4, 4)}
        )
        self.decode_head = nn.ModuleDict({"bn": nn.BatchNorm1d(4), "conv_seg": nn.Linear(4, 2)})

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.backbone["fpn1"](self.backbone["norm1"](self.backbone["blocks"](x)))
        return self.decode_head["conv_seg"](x)


def losses(network: Network, batch: torch.Tensor) -> dict[str, torch.Tensor]:
    found = network(batch)
    return {
        "decode": found.square().mean(),
        "accuracy": found.detach().mean() + 50,
        "auxiliary": 0.4 * found.abs().mean(),
    }


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def learner(network: Network, **options: object) -> DenseLearner:
    return DenseLearner(network, losses, adamw(parameter_groups(network, 0.1)), **options)


def test_losses_are_summed_and_what_is_told_is_not(network):
    batch = torch.randn(6, 4)
    wanted = {name: float(value.detach()) for name, value in losses(network, batch).items()}
    step = learner(network)
    step.begin(0.01)
    step.add(batch)
    result = step.finish(ask=True)
    assert result.loss == pytest.approx(wanted["decode"] + wanted["auxiliary"])
    assert result.diagnostics == pytest.approx(
        {
            "loss_decode": wanted["decode"],
            "loss_auxiliary": wanted["auxiliary"],
            "accuracy": wanted["accuracy"],
        }
    )


def test_micro_batches_add_up(network):
    whole, parts = learner(network), learner(copy.deepcopy(network))
    for _ in range(3):
        batch = torch.randn(6, 4)
        whole.begin(0.01)
        whole.add(batch)
        parts.begin(0.01, count=3)
        for part in batch.split(2):
            parts.add(part)
        assert parts.finish().loss == pytest.approx(whole.finish().loss, rel=1e-5)
    for a, b in zip(whole.network.parameters(), parts.network.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    whole.begin(0.01, count=2)
    whole.add(torch.randn(2, 4))
    with pytest.raises(ValueError, match="a step of 2 micro-batches was given 1"):
        whole.finish()


def test_a_step_that_is_not_finite_moves_nothing(network):
    step = learner(network)
    before = copy.deepcopy(network.state_dict())
    step.begin(0.01)
    step.add(torch.full((2, 4), float("inf")))
    with pytest.raises(NonFinite):
        step.finish()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_only_norms_are_spared_and_the_trunk_may_be_slower(network):
    for group, published in zip(
        parameter_groups(network, 0.1), only_norms(network, 0.1), strict=True
    ):
        assert [id(p) for p in group["params"]] == [id(p) for p in published["params"]]
        assert (group["weight_decay"], group["lr_scale"]) == (published["weight_decay"], 1.0)
    slow = {
        id(parameter)
        for group in parameter_groups(network, 0.1, 0.5)
        if group["lr_scale"] == 0.5
        for parameter in group["params"]
    }
    trunk = ("backbone.blocks", "backbone.norm1")
    names = {id(p): name for name, p in network.named_parameters()}
    assert slow == {key for key, name in names.items() if name.startswith(trunk)}


def test_a_state_goes_on(network):
    whole = learner(network)
    other = learner(Network())
    batches = torch.randn(4, 6, 4)

    def steps(one: DenseLearner, part: torch.Tensor) -> list[float]:
        found = []
        for batch in part:
            one.begin(0.01)
            one.add(batch)
            found.append(one.finish().loss)
        return found

    steps(whole, batches[:2])
    other.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert steps(other, batches[2:]) == steps(whole, batches[2:])


def test_published_drop_paths_and_durations():
    sizes = ("tiny_12", "small_12", "small_24", "medium_24")
    assert [drop_path_of(f"xcit_{size}_p16") for size in sizes] == [0, 0.05, 0.1, 0.15]
    assert [in_iterations(told, 80_000) for told in ("10%", "0.5 %", 1500.0)] == [8000, 400, 1500]
