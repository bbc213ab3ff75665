"""Every kernel against the plain path, forward and backward, on the CPU.

Triton decides when it is imported whether it interprets its kernels, so these run in a process of
their own (test_interpreted), or by hand:

    TRITON_INTERPRET=1 python -m pytest tests/kernels/cases_in_interpreter.py
"""

import copy
import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from xdino import acceleration, augment, kernels
from xdino.augment import photometric
from xdino.kernels import batch_norm, lpi, mlp, residual, sums, xca
from xdino.runtime import distributed
from xdino.xcit import LPI, NORM_EPS, XCA, XCiT

assert kernels.interpreted(), "start with TRITON_INTERPRET=1"


def file_of(subject):
    """tests/`subject`/test_golden.py, whose checks hold on this path as well."""
    path = Path(__file__).parents[1] / subject / "test_golden.py"
    spec = importlib.util.spec_from_file_location(f"{subject}_golden", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def gradients(result, weights, inputs):
    """Of the sum of all results, each times its weights."""
    total = sum((r.float() * w).sum() for r, w in zip(result, weights, strict=True))
    return torch.autograd.grad(total, inputs)


def randn(*shape):
    return torch.randn(shape).requires_grad_()


# Cross-covariance attention


@pytest.mark.parametrize(
    ("d", "heads", "tokens"), [(32, 2, 77), (48, 2, 33), (64, 1, 1), (64, 1, 129), (8, 2, 12)]
)
def test_xca(d, heads, tokens, agree):
    temperature = nn.Parameter(torch.rand(heads, 1, 1) + 0.5)
    qkv = torch.randn(2, tokens, 3 * d * heads)
    qkv[0, :, 3] = qkv[1, :, d * heads + 1] = 0  # a query and a key channel without any length
    qkv[1] *= 30
    qkv.requires_grad_()
    weights = torch.randn(2, tokens, d * heads)
    plain = plain_xca(qkv, temperature, heads)
    fused = xca.attend(qkv, temperature, heads, NORM_EPS)
    agree("forward", fused, plain.detach(), 2e-6)
    inputs = qkv, temperature
    ours, theirs = (gradients([out], [weights], inputs) for out in (fused, plain))
    agree("qkv", ours[0][0], theirs[0][0], 5e-6)
    agree("qkv, large", ours[0][1], theirs[0][1], 5e-6)
    agree("temperature", ours[1], theirs[1], 1e-5)


def plain_xca(qkv, temperature, heads):
    """XCA.forward between its projections, which are taken out."""
    attn = XCA(qkv.shape[2] // 3, heads)
    del attn.temperature
    attn.proj, attn.temperature = nn.Identity(), temperature
    attn.qkv = nn.Identity()
    attn.qkv.forward = lambda x: qkv
    return attn(qkv[..., : qkv.shape[2] // 3])


@pytest.mark.parametrize("d", [32, 48, 64])
def test_xca_in_bf16_is_close_to_float32(d):
    heads = 2
    exact = torch.randn(2, 65, 3 * d * heads).bfloat16().float().requires_grad_()
    half = exact.detach().bfloat16().requires_grad_()
    temperature = torch.ones(heads, 1, 1).requires_grad_()
    weights = torch.randn(2, 65, d * heads)

    def results(qkv, call):
        out = call(qkv)
        return [out.float(), *gradients([out], [weights], (qkv, temperature))]

    expected = results(exact, lambda qkv: plain_xca(qkv, temperature, heads))
    with torch.autocast("cpu", torch.bfloat16):
        plain = results(half, lambda qkv: plain_xca(qkv, temperature, heads))
    fused = results(half, lambda qkv: xca.attend(qkv, temperature, heads, NORM_EPS))
    assert fused[0].dtype == torch.float32
    assert fused[1].dtype == torch.bfloat16
    for ours, theirs, right in zip(fused, plain, expected, strict=True):
        off, allowed = ((x.float() - right).norm() / right.norm() for x in (ours, theirs))
        # The interpreter cuts float32 off to bfloat16, twice on the way; a device rounds it.
        assert off < 3 * allowed + 1e-3


def test_biases_learn_without_another_pass(agree):
    """Of the linear layers before and behind GELU, and of those that end in the stream."""
    D, T = 96, 77
    layers = [nn.Linear(D, D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)]
    proj, fc1, fc2 = layers
    gamma, x = randn(D), torch.randn(3, T, D)
    norm, drop = nn.LayerNorm(D, eps=1e-6), torch.tensor([2.0, 0, 1.25])
    plain = x + drop.view(3, 1, 1) * gamma * proj(x)
    plain = plain + gamma * fc2(F.gelu(fc1(norm(plain))))
    branch = mlp.without_bias_gradient(proj, x)
    stream, read = residual.add_norm(x, branch, gamma, drop, norm, torch.float32, proj.bias)
    branch = mlp.without_bias_gradient(fc2, mlp.linear_gelu(fc1, read))
    fused, _ = residual.add_norm(stream, branch, gamma, None, None, torch.float32, fc2.bias)
    agree("forward", fused, plain.detach(), 2e-6)
    weights = torch.randn(3, T, D)
    inputs = [p for layer in layers for p in layer.parameters()]
    ours, theirs = (gradients([out], [weights], inputs) for out in (fused, plain))
    for a, b in zip(ours, theirs, strict=True):
        agree("gradient", a, b, 1e-5)
    layer = nn.Linear(D, 8, bias=False)
    agree("without a bias", mlp.linear_gelu(layer, x), F.gelu(layer(x)), 1e-6)
    assert mlp.without_bias_gradient(layer, x).equal(layer(x))


@pytest.mark.parametrize("shape", [(1, 3), (130, 5, 7), (2000, 33)])
def test_column_sums(shape, agree, monkeypatch):
    monkeypatch.setattr(sums, "ROWS", 128)
    monkeypatch.setattr(sums, "COLUMNS", 16)
    x = torch.randn(shape)
    agree("sums", sums.column_sums(x), x.double().sum(0).float(), 1e-5)


# The residual sum and the norm that reads it


@pytest.mark.parametrize("D", [192, 384, 48])
@pytest.mark.parametrize("dropping", [False, True])
def test_residual_sum_and_norm(D, dropping, agree, monkeypatch):
    monkeypatch.setattr(residual, "NUMBERS", 2048)  # several programs, and
    monkeypatch.setattr(sums, "PROGRAMS", 2)  # several steps of each, the last not full
    B, N = 3, 7
    x, branch, gamma = randn(B, N, D), randn(B, N, D), randn(D)
    norm = nn.LayerNorm(D, eps=1e-6)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    drop = torch.tensor([2.0, 0, 1.25]) if dropping else None
    scale = 1 if drop is None else drop.view(B, 1, 1)
    total, again = (x + scale * gamma * branch for _ in range(2))
    plain = total, norm(total)
    fused = residual.add_norm(x, branch, gamma, drop, norm, torch.float32)
    weights = torch.randn(2, B, N, D)
    inputs = x, branch, gamma, norm.weight, norm.bias
    ours, theirs = (gradients(result, weights, inputs) for result in (fused, plain))
    for a, b in zip([*fused, *ours], [*plain, *theirs], strict=True):
        agree("sum, norm or gradient", a, b.detach(), 2e-6)
    alone, nothing = residual.add_norm(x, branch, gamma, drop, None, torch.float32)
    assert nothing is None
    agree("the sum alone", alone, again.detach(), 1e-6)
    ours, theirs = (gradients([one], weights[:1], inputs[:3]) for one in (alone, again))
    for a, b in zip(ours, theirs, strict=True):
        agree("gradient of the sum alone", a, b, 2e-6)


def test_residual_sum_in_mixed_precision(agree):
    x, branch, gamma = torch.randn(1, 5, 192), torch.randn(1, 5, 192).bfloat16(), randn(192)
    x, branch = x.requires_grad_(), branch.requires_grad_()
    norm = nn.LayerNorm(192, eps=1e-6)
    fused = residual.add_norm(x, branch, gamma, None, norm, torch.bfloat16)
    assert [f.dtype for f in fused] == [torch.float32, torch.bfloat16]
    total = x + gamma * branch.float()
    agree("sum", fused[0], total.detach(), 1e-6)
    agree("norm", fused[1].float(), norm(total).detach(), 2**-8)
    weights = torch.randn(2, 1, 5, 192)
    ours = gradients(fused, weights, (x, branch))
    theirs = gradients((total, norm(total)), weights, (x, branch))
    assert [g.dtype for g in ours] == [torch.float32, torch.bfloat16]
    for a, b in zip(ours, theirs, strict=True):
        agree("gradient", a, b.float(), 2**-7)


# BatchNorm and local patch interaction


@pytest.fixture
def small_blocks(monkeypatch):
    """Many programs with several steps each, the last not full, as on a device."""
    monkeypatch.setattr(batch_norm, "ROWS", 32)
    monkeypatch.setattr(batch_norm, "COLUMNS", 32)
    monkeypatch.setattr(sums, "PROGRAMS", 2)


@pytest.mark.parametrize(("C", "gelu", "offset"), [(24, True, 0.0), (48, False, 300.0)])
def test_batch_norm_and_gelu(C, gelu, offset, agree, small_blocks):
    norm = nn.BatchNorm2d(C).train()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    norm.running_mean.uniform_()
    other = copy.deepcopy(norm)
    x = (torch.randn(133, C) + offset).requires_grad_()
    plain = norm(x.t().reshape(1, C, 7, 19)).reshape(C, -1).t()
    plain = F.gelu(plain) if gelu else plain
    fused = batch_norm.batch_norm_gelu(x, other, gelu)
    agree("forward", fused, plain.detach(), 2e-6 if offset == 0 else 1e-4)
    weights = torch.randn(133, C)
    ours = gradients([fused], [weights], (x, other.weight, other.bias))
    theirs = gradients([plain], [weights], (x, norm.weight, norm.bias))
    for a, b in zip(ours, theirs, strict=True):
        agree("gradient", a, b, 5e-6 if offset == 0 else 1e-4)
    for name, value in norm.state_dict().items():
        agree(name, other.state_dict()[name], value, 1e-6 if offset == 0 else 1e-5)


@pytest.mark.parametrize(("B", "h", "w", "D"), [(3, 5, 7, 192), (1, 11, 3, 384), (3, 1, 1, 40)])
def test_lpi(B, h, w, D, agree):
    check_lpi(B, h, w, D, agree)


def test_lpi_in_small_blocks(agree, small_blocks):
    check_lpi(2, 5, 7, 40, agree)


def check_lpi(B, h, w, D, agree):
    module = LPI(D).train()
    norm = nn.LayerNorm(D, eps=1e-6)
    for parameter in (*module.bn.parameters(), *norm.parameters()):
        nn.init.normal_(parameter)
    other = copy.deepcopy(module)
    x, stream, gamma = randn(B, h * w, D), randn(B, h * w, D), randn(D)
    drop = torch.linspace(0, 2, B) if B > 1 else None
    total = stream + (1 if drop is None else drop.view(B, 1, 1)) * gamma * module(x, h, w)
    plain = total, norm(total)
    fused = lpi.interact(x, stream, other, gamma, drop, norm, (h, w), torch.float32)
    for a, b in zip(fused, plain, strict=True):
        agree("forward", a, b.detach(), 3e-6)
    weights = torch.randn(2, B, h * w, D)
    common = x, stream, gamma, norm.weight, norm.bias
    ours = gradients(fused, weights, (*common, *other.parameters()))
    theirs = gradients(plain, weights, (*common, *module.parameters()))
    names = ("x", "stream", "gamma", "weight", "bias", *dict(module.named_parameters()))
    for name, a, b in zip(names, ours, theirs, strict=True):
        if B * h * w > 3:  # with three values to a channel, the BatchNorm leaves only noise
            agree(f"gradient of {name}", a, b, 2e-5)
    for name, value in module.state_dict().items():
        agree(name, other.state_dict()[name], value, 2e-6)


# The whole network


def walk(model, images, autocast):
    """Tokens, gradients and statistics of one training pass with dropped paths."""
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        tokens = model.patch_tokens(images)[0]
    weight = torch.sin(torch.arange(tokens.numel())).view_as(tokens)
    (tokens.float() * weight).sum().backward()
    found = {name: p.grad.float() for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: b.clone().float() for name, b in model.named_buffers()}
    return found | {"tokens": tokens.detach().float()}


def network(embed_dim, heads, **arguments):
    model = XCiT(4, embed_dim, 2, heads, **arguments).train()
    for parameter in model.parameters():  # LayerScale and norms as training leaves them
        parameter.data.add_(torch.randn_like(parameter) * 0.05)
    return model


@pytest.mark.parametrize(
    ("embed_dim", "heads"), [(192, 4), pytest.param(160, 2, marks=pytest.mark.slow)]
)
def test_network(embed_dim, heads, agree):
    # Heads of 80 channels are too wide for the XCA kernel: that part stays plain.
    plain = network(embed_dim, heads, drop_path_rate=0.3)
    fused = copy.deepcopy(plain)
    fused.fused = True
    images = torch.randn(3, 3, 12, 20)
    expected, found = walk(plain, images, False), walk(fused, images, False)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        agree(name, found[name], value, 3e-5)
    torch.manual_seed(6)
    (first, last), *grid = fused.tokens_after(images, [0, 1])
    torch.manual_seed(6)
    (theirs, other), *same = plain.tokens_after(images, [0, 1])
    assert grid == same
    agree("after the first block", first, theirs, 3e-5)
    agree("after the last block", last, other, 3e-5)
    for ours, theirs in zip(fused.eval()(images), plain.eval()(images), strict=True):
        agree("evaluation, with the statistics of training", ours, theirs, 1e-4)


def test_network_in_bf16_is_as_close_to_float32_as_the_plain_path():
    exact = network(96, 2)
    plain, fused = copy.deepcopy(exact), copy.deepcopy(exact)
    fused.fused = True
    images = torch.randn(3, 3, 20, 28)
    expected = walk(exact, images, False)
    allowed, found = walk(plain, images, True), walk(fused, images, True)
    for name, right in expected.items():
        off, bound = ((x[name] - right).norm() / right.norm() for x in (found, allowed))
        assert off <= 1.5 * bound + 5e-3, f"{name}: {off:.4f}, the plain path {bound:.4f}"


def test_what_the_kernels_do_not_take_stays_plain(monkeypatch):
    from xdino.kernels import blocks

    def refuse(*arguments):
        raise AssertionError("fused")

    monkeypatch.setattr(blocks, "tokens_after", refuse)
    model = network(32, 2)
    model.fused = True
    images = torch.randn(2, 3, 8, 8)
    with pytest.raises(AssertionError, match="fused"):
        model(images)
    copy.deepcopy(model).double()(images.double())
    model.eval()(images)
    model.train().fused = False
    model(images)


@pytest.mark.parametrize(
    "name", ["xcit_p16", pytest.param("xcit_p8_cls_norm", marks=pytest.mark.slow)]
)
def test_golden_network(name, golden, agree, monkeypatch):
    checks = file_of("xcit")
    tensors, facts = golden(name)
    model = XCiT(**facts["config"])
    model.load_state_dict(checks.part(tensors, "state/"), strict=True)
    model.fused = True
    checks.test_gradients_and_batch_norm((model, tensors), agree)


@pytest.mark.slow
def test_golden_steps(golden, agree, monkeypatch):
    checks = file_of("dino")
    build = checks.learner_of

    def fused_learner(facts, tensors):
        learner = build(facts, tensors)
        acceleration.use_kernels((learner.student, learner.teacher), True)
        return learner

    monkeypatch.setattr(checks, "learner_of", fused_learner)
    checks.test_six_steps("dino_steps", 1e-5, 1e-4, checks.plain, golden, agree)


# Views


def crops_of(N, h, w, C):
    noise = torch.rand(N, C, 9, 9, generator=torch.Generator().manual_seed(3)) * 255
    smooth = F.interpolate(noise, (h, w), mode="bicubic").round().clamp(0, 255)
    return smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize(
    ("h", "w", "C", "dtype", "bound"),
    [
        (61, 35, 3, torch.float32, 1e-3),  # more than one window
        (28, 28, 1, torch.float32, 1e-3),
        (9, 5, 3, torch.bfloat16, 1.1),  # smaller than the blur's reach
    ],
)
def test_views(h, w, C, dtype, bound):
    spec = augment.multi_crop(mean=(0.4, 0.5, 0.3)[:C], std=(0.2, 0.3, 0.25)[:C])
    table = augment.draw_batch(spec, 0, 0, np.arange(4))[:2].reshape(-1).copy()
    table["flip"], table["gray"] = np.arange(8) % 2, np.arange(8) % 4 == 3
    table["solarize"], table["jitter"][:7] = np.arange(8) % 3 == 0, True
    table["blur"] = [0.1, 0, 2.0, 0.9, 1.5, 0, 1.4, 0]
    crops = crops_of(8, h, w, C)
    plain = photometric.photometric(crops, table, spec, dtype)
    fused = photometric.photometric(crops, table, spec, dtype, fused=True)
    assert fused.dtype == dtype
    levels = (fused - plain).float().abs() * 255 * torch.tensor(spec.std).view(-1, 1, 1)
    assert levels.max() < bound
    assert levels.mean() < bound / 5


def test_views_that_the_kernels_do_not_support_stay_plain():
    spec = augment.multi_crop(mean=(0.5,) * 2, std=(0.2,) * 2)
    table = augment.draw_batch(spec, 0, 0, np.arange(2))[0]
    crops = crops_of(2, 12, 12, 2)
    plain = photometric.photometric(crops, table, spec)
    assert torch.equal(plain, photometric.photometric(crops, table, spec, fused=True))


# The check at the start


def test_the_check_passes_and_finds_a_wrong_kernel(monkeypatch):
    from xdino.kernels import photometric

    model, device = network(32, 2), torch.device("cpu")
    state = torch.get_rng_state()
    assert acceleration.check_network(model, device) is None
    assert torch.equal(state, torch.get_rng_state())
    with monkeypatch.context() as patch:
        right = xca.attend
        patch.setattr(xca, "attend", lambda *a: right(*a) * 1.01)
        assert "away from the plain path" in acceleration.check_network(model, device)
        patch.setattr(xca, "attend", lambda *a: torch.zeros(()).view(3))
        assert "do not run here (RuntimeError" in acceleration.check_network(model, device)
    crops = augment.multi_crop()
    assert acceleration.check_views(crops, device) is None
    right_views = photometric.views
    monkeypatch.setattr(photometric, "views", lambda *a: right_views(*a) + 0.01)
    assert "levels away" in acceleration.check_views(crops, device)


def test_statistics_of_all_processes(agree, monkeypatch):
    """Two processes in turn in one: what each would hand to the other is worked out beforehand."""
    x = torch.randn(2, 40, 16) * 2 + 1
    halves = [batch_norm.merge(moments(part)) for part in x]
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(
        torch.distributed,
        "all_gather_into_tensor",
        lambda gathered, local: gathered.copy_(torch.cat(halves)),
    )
    together, alone = distributed.GlobalBatchNorm(16), nn.BatchNorm1d(16)
    statistics = batch_norm.finish_statistics(moments(x[0]), together)
    rows = x.flatten(0, 1)
    alone(rows)
    agree("mean", statistics[0], rows.mean(0), 1e-6)
    agree("rstd", statistics[1], (rows.var(0, correction=0) + alone.eps).rsqrt(), 1e-6)
    agree("running mean", together.running_mean, alone.running_mean, 1e-6)
    agree("running variance", together.running_var, alone.running_var, 1e-6)


def moments(rows):
    """As the kernel leaves them: [programs, 3, C]."""
    parts = [rows[:11], rows[11:]]
    return torch.stack(
        [
            torch.stack(
                (
                    torch.full_like(p[0], len(p)),
                    p.mean(0),
                    (p - p.mean(0)).square().sum(0),
                )
            )
            for p in parts
        ]
    )
