"""A full checkpoint of the published trainer and six steps that it makes from there, recorded.

    python tests/checkpoint/record_published.py --reference DINO_DIR --xcit XCIT_DIR --out FOLDER

writes published_full.pth, as `main_dino.py` saves it after two epochs of three steps, and
published_full.safetensors: the crops of the six steps that follow, their losses and centres, and both
networks at the end. The published `train_one_epoch`, loss, heads, schedules and parameter groups run
as they are, on a CPU: `.cuda()` and `torch.cuda.synchronize` do nothing, the metric logger does not
ask a GPU, and what `xdino_launch.bench.reference` says of the networks holds here, too.
"""

import argparse
import contextlib
import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from safetensors.torch import save_file
from torch import nn

from xdino_launch.bench import reference

NETWORK = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "eta": 1.0,
           "tokens_norm": True}  # fmt: skip
HEAD = {"hidden_dim": 32, "bottleneck_dim": 8, "norm_last_layer": False}
SIZES, BATCH, STEPS, PROTOTYPES = (24, 16), 3, 3, 32
ARGUMENTS = {
    "arch": "xcit_tiny", "patch_size": 8, "out_dim": PROTOTYPES, "norm_last_layer": False,
    "momentum_teacher": 0.99, "use_bn_in_head": False, "warmup_teacher_temp": 0.04,
    "teacher_temp": 0.07, "warmup_teacher_temp_epochs": 3, "use_fp16": False, "weight_decay": 0.04,
    "weight_decay_end": 0.4, "clip_grad": 0.3, "batch_size_per_gpu": BATCH, "epochs": 4,
    "freeze_last_layer": 1, "lr": 0.1, "warmup_epochs": 1, "min_lr": 1e-5, "optimizer": "adamw",
    "drop_path_rate": 0.0, "global_crops_scale": (0.4, 1.0), "local_crops_number": 2,
    "local_crops_scale": (0.05, 0.4), "world_size": 1, "seed": 0,
}  # fmt: skip


def networks(dino, xcit) -> tuple[nn.Module, nn.Module]:
    def wrapped() -> nn.Module:
        with mock.patch.object(nn, "SyncBatchNorm", nn.BatchNorm2d):
            backbone = xcit.XCiT(**NETWORK, num_classes=0)
        return dino.utils.MultiCropWrapper(backbone, dino.main.DINOHead(16, PROTOTYPES, **HEAD))

    student, teacher = wrapped(), wrapped()
    teacher.load_state_dict(student.state_dict())
    for p in teacher.parameters():
        p.requires_grad = False
    return nn.parallel.DistributedDataParallel(student), teacher


def record(dino, xcit, out: Path) -> None:
    torch.manual_seed(11)
    args = argparse.Namespace(**ARGUMENTS)
    student, teacher = networks(dino, xcit)
    loss = dino.main.DINOLoss(args.out_dim, 4, args.warmup_teacher_temp, args.teacher_temp,
                              args.warmup_teacher_temp_epochs, args.epochs)  # fmt: skip
    optimizer = torch.optim.AdamW(dino.utils.get_params_groups(student))
    peak, shape = args.lr * BATCH / 256, (args.epochs, STEPS)
    scheduled = dino.utils.cosine_scheduler
    plans = (
        scheduled(peak, args.min_lr, *shape, warmup_epochs=args.warmup_epochs),
        scheduled(args.weight_decay, args.weight_decay_end, *shape),
        scheduled(args.momentum_teacher, 1, *shape),
    )
    # Whole numbers of 1 / 256 have no rounding in half precision, in which they are kept.
    batches = [
        [(torch.randint(-512, 512, (BATCH, 3, size, size)) / 256) for size in SIZES for _ in "ab"]
        for _ in range(args.epochs * STEPS)
    ]
    losses, centres = [], []

    def told(loss_of, *arguments):
        value = loss_of(*arguments)
        losses.append(value.detach())
        centres.append(loss.center[0].clone())
        return value

    plain = loss.forward
    loss.forward = lambda *arguments: told(plain, *arguments)
    for epoch in range(args.epochs):
        of_epoch = [(crops, None) for crops in batches[epoch * STEPS : (epoch + 1) * STEPS]]
        dino.main.train_one_epoch(
            student, teacher, teacher, loss, of_epoch, optimizer, *plans, epoch, None, args
        )
        if epoch == 1:
            torch.save(
                {
                    "student": student.state_dict(), "teacher": teacher.state_dict(),
                    "optimizer": optimizer.state_dict(), "epoch": epoch + 1, "args": args,
                    "dino_loss": loss.state_dict(),
                },
                out / "published_full.pth",
            )  # fmt: skip
    tensors = {"losses": torch.stack(losses[6:]), "centres": torch.stack(centres[6:])}
    for i, crops in enumerate(batches[6:]):
        tensors |= {f"global/{i}": torch.stack(crops[:2]).half()}
        tensors |= {f"local/{i}": torch.stack(crops[2:]).half()}
    for role, network in (("student", student.module), ("teacher", teacher)):
        tensors |= {f"{role}/{k}": v.detach().clone() for k, v in network.state_dict().items()}
    facts = {"network": NETWORK, "head": HEAD, "arguments": ARGUMENTS, "steps_per_epoch": STEPS}
    save_file(tensors, out / "published_full.safetensors", {"facts": json.dumps(facts)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("--reference", "--xcit", "--out"):
        parser.add_argument(name, type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", FutureWarning)
    dino = reference.load_dino(options.reference)
    xcit = reference.load_xcit(options.xcit)
    idle = SimpleNamespace(synchronize_between_processes=lambda self: None)
    with contextlib.ExitStack() as stack:
        stack.enter_context(reference.group_of_one(torch.device("cpu")))
        for target, name, value in (
            (torch.Tensor, "cuda", lambda self, **options: self),
            (torch.cuda, "synchronize", lambda: None),
            (dino.utils.MetricLogger, "synchronize_between_processes",
             idle.synchronize_between_processes),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(target, name, value))
        record(dino, xcit, options.out)


if __name__ == "__main__":
    main()
