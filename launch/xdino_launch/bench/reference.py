"""The published code, measured from a checkout of it: never copied, never changed.

Adapters around facebookresearch/dino and facebookresearch/xcit. Both were written for older
libraries and for CUDA; what a current machine or a CPU needs is put around them here, and named:

- `timm.models.registry` and `timm.models.layers` are stood in for while `xcit.py` is imported, so
  that it neither warns nor replaces timm's own networks;
- BatchNorm2d stands where SyncBatchNorm was (with one process it computes the same), and a process
  group of one where `torchrun` would make one;
- the class token is copied before the norm of nano's class attention, which otherwise overwrites
  what its own backward pass needs;
- DistributedDataParallel and the metric logger are left out, in favour of the published code.
"""

import importlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import timm
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchvision.datasets import ImageFolder

from xdino.errors import UsageError, nearest

_DINO_FILES = ("utils", "vision_transformer", "main_dino", "eval_knn")


# Importing


@dataclass(frozen=True)
class Dino:
    """The modules of facebookresearch/dino."""

    main: Any
    utils: Any
    knn: Any


def load_dino(folder: str | Path) -> Dino:
    """Import a checkout of facebookresearch/dino. Raises UsageError for any other folder."""
    found = _load(folder, "--reference", "facebookresearch/dino", _DINO_FILES, {})
    for module, name in (("main_dino", "DataAugmentationDINO"), ("eval_knn", "knn_classifier")):
        if not hasattr(found[module], name):
            raise UsageError(f"--reference {folder}: {module}.py has no {name}")
    return Dino(found["main_dino"], found["utils"], found["eval_knn"])


def load_xcit(folder: str | Path) -> Any:
    """Import a checkout of facebookresearch/xcit. Raises UsageError for any other folder."""
    registry = ModuleType("timm.models.registry")
    registry.register_model = lambda function: function  # type: ignore[attr-defined]
    shims = {"timm.models.registry": registry, "timm.models.layers": timm.layers}
    module = _load(folder, "--xcit", "facebookresearch/xcit", ("xcit",), shims)["xcit"]
    if not hasattr(module, "XCiT"):
        raise UsageError(f"--xcit {folder}: xcit.py has no XCiT")
    return module


def _load(
    folder: str | Path,
    option: str,
    repository: str,
    names: Sequence[str],
    shims: Mapping[str, ModuleType],
) -> dict[str, ModuleType]:
    """Import modules `names` from `folder`, and leave the interpreter's own state as it was."""
    root = Path(folder).expanduser().resolve()
    absent = [f"{name}.py" for name in names if not (root / f"{name}.py").is_file()]
    if absent:
        raise UsageError(
            f"{option} {folder} is not a checkout of {repository}: it has no {', '.join(absent)}"
        )
    before = {name: sys.modules.pop(name) for name in (*names, *shims) if name in sys.modules}
    wrote = sys.dont_write_bytecode
    sys.path.insert(0, str(root))
    sys.modules.update(shims)
    sys.dont_write_bytecode = True
    try:
        return {name: importlib.import_module(name) for name in names}
    except (ImportError, AttributeError, SyntaxError, NameError, TypeError) as error:
        raise UsageError(f"{option} {folder} cannot be imported: {error}") from error
    finally:
        sys.path.remove(str(root))
        sys.dont_write_bytecode = wrote
        for name in (*names, *shims):
            sys.modules.pop(name, None)
        sys.modules.update(before)


# Images


class _Listed(ImageFolder):
    """The published data set over a given list of files, in its order."""

    def __init__(self, paths: Sequence[str], transform: Callable[[Any], Any]) -> None:
        self._paths = paths
        super().__init__(str(Path(paths[0]).parent), transform=transform)

    def find_classes(self, directory: Any) -> tuple[list[str], dict[str, int]]:
        return ["0"], {"0": 0}

    def make_dataset(self, *arguments: Any, **options: Any) -> list[tuple[str, int]]:
        return [(path, 0) for path in self._paths]


class _Chosen(torch.utils.data.Sampler[int]):
    """Whatever was chosen last, in that order."""

    indices: Sequence[int] = ()

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


class PublishedPipeline:
    """The published augmentation (2 x 224 and 8 x 96, default scales) on PIL images.

    Args:
        paths: the image files.
        batch: images of a batch of the loader.
        workers: processes of the loader; started with the first batch, kept until `close`.
    """

    def __init__(self, dino: Dino, paths: Sequence[str], batch: int, workers: int) -> None:
        transform = dino.main.DataAugmentationDINO((0.4, 1.0), (0.05, 0.4), 8)
        self._images, self._chosen = _Listed(paths, transform), _Chosen()
        self._loader: torch.utils.data.DataLoader[Any] | None = torch.utils.data.DataLoader(
            self._images,
            sampler=self._chosen,
            batch_size=batch,
            num_workers=workers,
            persistent_workers=True,
            drop_last=True,
            multiprocessing_context="fork",
        )

    def load(self, indices: Sequence[int]) -> int:
        """Images `indices` through the loader, in batches; how many came."""
        assert self._loader is not None
        self._chosen.indices = indices
        return sum(len(crops[0]) for crops, _ in self._loader)

    def augment(self, indices: Sequence[int]) -> None:
        """The same images, one by one in this process: no loader, no batch."""
        for index in indices:
            self._images[index]

    def close(self) -> None:
        """End the worker processes."""
        self._loader = None


# The optimisation step


@contextmanager
def group_of_one(device: torch.device) -> Iterator[None]:
    """A process group of this process alone, which the published loss asks for."""
    if dist.is_initialized():
        yield
        return
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _copied(module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (arguments[0].clone(),)


def build_xcit(xcit: Any, arch: str, drop_path: float = 0.0) -> nn.Module:
    """The published network by its name, ready for one process on any device."""
    names = [name for name in vars(xcit) if name.startswith("xcit_")]
    if arch not in names:
        raise UsageError(f'the published code has no "{arch}": {nearest(arch, names)}')
    network: nn.Module = getattr(xcit, arch)(pretrained=False, drop_path_rate=drop_path)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.SyncBatchNorm):
                setattr(parent, name, nn.BatchNorm2d(child.num_features))
    for block in network.cls_attn_blocks:  # type: ignore[union-attr]
        if not block.tokens_norm:
            block.norm2.register_forward_pre_hook(_copied)
    return network


def published_networks(
    dino: Dino, xcit: Any, arch: str, prototypes: int, drop_path: float, device: torch.device
) -> tuple[nn.Module, nn.Module]:
    """The published student and teacher, with equal weights."""

    def wrapped(drop_path: float) -> nn.Module:
        backbone = build_xcit(xcit, arch, drop_path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # weight_norm has a successor
            head = dino.main.DINOHead(backbone.embed_dim, prototypes)
        return dino.utils.MultiCropWrapper(backbone, head).to(device)

    student, teacher = wrapped(drop_path), wrapped(0.0)
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    return student, teacher


def published_step(
    dino: Dino,
    networks: tuple[nn.Module, nn.Module],
    prototypes: int,
    groups: Sequence[Tensor],
    lr: float,
    precision: str,
) -> Callable[[], float]:
    """One optimisation step of the published `train_one_epoch`, in its order, after the warm-up.

    groups: crops by resolution, each [V_r, B, C, h, w]. The result runs a step and returns the
    loss. Mixed precision is autocast; "fp16" has the published gradient scaler, "bf16" needs none.
    """
    student, teacher = networks
    crops = [view for group in groups for view in group]  # V of [B, C, h, w]
    device = crops[0].device
    loss_of = dino.main.DINOLoss(prototypes, len(crops), 0.04, 0.04, 0, 2).to(device)
    optimizer = torch.optim.AdamW(dino.utils.get_params_groups(student))
    scaler = torch.amp.GradScaler(device.type) if precision == "fp16" else None
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    epoch, clip, momentum = 1, 3.0, 0.996  # an epoch after the last layer was frozen

    def step() -> float:
        for i, group in enumerate(optimizer.param_groups):
            group["lr"] = lr
            if i == 0:
                group["weight_decay"] = 0.04
        mixed = torch.autocast(device.type, autocast) if autocast else nullcontext()
        with mixed:
            teacher_output = teacher(crops[:2])
            student_output = student(crops)
            loss = loss_of(student_output, teacher_output, epoch)
        assert math.isfinite(loss.item())
        optimizer.zero_grad()
        if scaler is None:
            loss.backward()
            dino.utils.clip_gradients(student, clip)
            dino.utils.cancel_gradients_last_layer(epoch, student, 1)
            optimizer.step()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            dino.utils.clip_gradients(student, clip)
            dino.utils.cancel_gradients_last_layer(epoch, student, 1)
            scaler.step(optimizer)
            scaler.update()
        with torch.no_grad():
            for q, k in zip(student.parameters(), teacher.parameters(), strict=True):
                k.data.mul_(momentum).add_((1 - momentum) * q.detach().data)
        return float(loss.item())

    return step
