"""Started by test_kernels: gradients and statistics of one pass, its images shared by processes.

two_processes_fused.py OUT WORLD_SIZE [RANK PORT]
"""

import os
import subprocess
import sys

import torch
import torch.distributed as dist

from xdino.runtime import distributed
from xdino.xcit import XCiT

out, world = sys.argv[1], int(sys.argv[2])
if len(sys.argv) == 3:
    port = 20_000 + os.getpid() % 20_000
    workers = [
        subprocess.Popen([sys.executable, "-W", "ignore", *sys.argv, str(rank), str(port)])
        for rank in range(world)
    ]
    codes = [worker.wait(timeout=600) for worker in workers]
    sys.exit(any(codes))

rank = int(sys.argv[3])
address = {
    "RANK": rank,
    "WORLD_SIZE": world,
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": sys.argv[4],
}
os.environ |= {name: str(value) for name, value in address.items()}
torch.manual_seed(0)
torch.set_num_threads(1)
device = torch.device("cpu")
distributed.start(device)
model = XCiT(4, 48, 2, 2).train()
distributed.synchronise_batch_norm(model, device)
model.fused = True
share = 4 // world
images = torch.randn(4, 3, 12, 20)[rank * share : (rank + 1) * share]
tokens = model.patch_tokens(images)[0]
weight = torch.randn(4, *tokens.shape[1:])[rank * share : (rank + 1) * share]
(tokens * weight).sum().backward()
found = {n: b.clone() for n, b in model.named_buffers()}
for name, parameter in model.named_parameters():
    if parameter.grad is not None:
        if world > 1:
            dist.all_reduce(parameter.grad)
        found[f"gradient of {name}"] = parameter.grad
if rank == 0:
    torch.save(found, out)
distributed.stop()
