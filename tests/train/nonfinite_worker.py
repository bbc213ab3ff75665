"""Started by test_nonfinite: small runs of two processes; step 3 breaks on the second of them."""

import sys

import torch

from xdino import config, pretraining
from xdino.errors import RunFailed
from xdino.runtime import distributed

images, folder, *policies = sys.argv[1:]
tree = {
    "model": {"arch": "xcit_nano_12_p8", "embed_dim": 32, "depth": 1, "num_heads": 2},
    "head": {"prototypes": 32, "hidden_dim": 32, "bottleneck_dim": 8},
    "crops": {"global_size": 24, "local_size": 16, "local_count": 2},
    "data": {"path": images},
    "train": {"epochs": 2, "batch_size": 5},
    "optim": {"warmup_epochs": 0},
    "runtime": {"device": "cpu", "workers": 1, "keep_every": 0},
}
plain = pretraining.to_device


def to_device(batch, *rest):
    groups = plain(batch, *rest)
    if batch.iteration == 2 and distributed.rank() == 1:
        groups[0][0, 0, 0, 0, 0] = float("nan")
    return groups


pretraining.to_device = to_device
distributed.start(torch.device("cpu"))
for policy in policies:
    tree["train"]["nonfinite"] = policy
    try:
        pretraining.pretrain(config.parse(tree), f"{folder}/{policy}")
        print("done")
    except RunFailed as error:
        print(error)
distributed.stop()
