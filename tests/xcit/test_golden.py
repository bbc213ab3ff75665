"""XCiT against the published code: outputs, attention, gradients, BatchNorm statistics."""

import pytest

from xdino.xcit import XCiT


def part(tensors, prefix):
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


@pytest.fixture(params=["xcit_p16", "xcit_p8_cls_norm"])
def case(request, golden):
    tensors, facts = golden(request.param)
    model = XCiT(**facts["config"])
    model.load_state_dict(part(tensors, "state/"), strict=True)
    return model, tensors


def test_features_and_class_attention(case, agree):
    model, tensors = case
    model.eval()
    for i in range(2):
        images = tensors[f"input/{i}"]
        agree(f"output {i}", model(images), tensors[f"output/{i}"], 1e-5)
        for j, weights in enumerate(model.class_attention(images)):
            agree(f"attention {i}/{j}", weights, tensors[f"class_attention/{i}/{j}"], 1e-5)


def test_gradients_and_batch_norm(case, agree):
    model, tensors = case
    model.train()
    output = model(tensors["train/input"])
    agree("output", output, tensors["train/output"], 1e-5)
    (output * tensors["train/weight"]).sum().backward()
    expected = part(tensors, "train/grad/")
    named = dict(model.named_parameters())
    assert set(expected) == set(named)
    for name, gradient in expected.items():
        ours = named[name].grad
        if name.startswith("cls_attn_blocks") and name.endswith("qkv.bias"):
            # The key bias shifts every logit of a row alike: its gradient is zero but for noise.
            D = len(gradient) // 3
            assert ours[D : 2 * D].abs().max() < 1e-6
            ours, gradient = ours.clone(), gradient.clone()
            ours[D : 2 * D] = gradient[D : 2 * D] = 0
        agree(name, ours, gradient, 1e-4)
    state = model.state_dict()
    for name, value in part(tensors, "train/state_after/").items():
        agree(name, state[name], value, 1e-5)
