"""Arms of the learning board that are not ours, each in a plain loop: the published code, and labels.

The published arm is facebookresearch/dino and facebookresearch/xcit, imported from checkouts with the
shims of `xdino_launch.bench.reference`: their augmentation at the crop sizes of the configuration,
networks, head, loss, schedules and order of a step. Without a scaler, for bf16 needs none. A stem of
patch 4, which xcit.py does not have, is made of its own `conv3x3`.
"""

import abc
import contextlib
import itertools
import random
import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
from learning_judging import PILOT, Clock, Job, Judge, Say
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

from xdino import config
from xdino.plan import make_plan
from xdino_launch.bench import reference


class Loop(abc.ABC):
    """Steps in an order of images of its own, laid out once the pilot has timed some."""

    def __init__(self, job: Job) -> None:
        self.job, self.plan = job, make_plan(job.configured())
        self.config, self.spec = self.plan.config, self.plan.spec
        self.batch, self.steps = self.config.train.batch_size, self.plan.steps_per_epoch
        random.seed(job.seed)
        self.order = torch.Generator().manual_seed(job.seed)
        precision = self.config.train.precision
        self.mixed = {"bf16": torch.bfloat16}.get(precision)

    def images(self, number: int) -> Iterator[tuple[list[Image.Image], Tensor]]:
        """`number` batches of RGB pictures and their labels; an epoch drops its last, short one."""
        source, labels = self.plan.source, self.labels()
        for _ in range(-(-number // self.steps)):
            order = torch.randperm(len(source), generator=self.order)
            for start in range(0, self.steps * self.batch, self.batch):
                chosen = order[start : start + self.batch]
                arrays = (source.read(int(index)) for index in chosen)
                yield [Image.fromarray(array).convert("RGB") for array in arrays], labels[chosen]

    def labels(self) -> Tensor:
        labels = Judge(self.plan).splits[0].labels
        return torch.zeros(len(self.plan.source)).long() if labels is None else torch.tensor(labels)

    def precision(self) -> contextlib.AbstractContextManager[None]:
        if self.mixed is None:
            return contextlib.nullcontext()
        return torch.autocast("cpu", self.mixed)

    @abc.abstractmethod
    def begin(self, epochs: int) -> None:
        """Fresh networks, and schedules for so many epochs."""

    @abc.abstractmethod
    def step(self, number: int, pictures: list[Image.Image], labels: Tensor) -> None:
        """One optimisation step on a batch."""

    @abc.abstractmethod
    def backbone(self) -> nn.Module:
        """What is judged, as a backbone of ours."""


def train_loop(loop: Loop, say: Say) -> None:
    job, steps = loop.job, loop.steps
    torch.manual_seed(job.seed)
    loop.begin(max(2, 1 + PILOT[1] // steps))
    clock = Clock()
    for number, batch in enumerate(itertools.islice(loop.images(PILOT[1]), PILOT[1])):
        if number == PILOT[0]:
            clock = Clock()
        loop.step(number, *batch)
    epochs = job.epochs(clock.seconds / (PILOT[1] - PILOT[0]), steps)
    every = max(1, epochs // job.points)
    judge = Judge(loop.plan)
    torch.manual_seed(job.seed)
    loop.begin(epochs)
    clock = Clock()
    for number, batch in enumerate(loop.images(epochs * steps), start=1):
        loop.step(number - 1, *batch)
        if number % (every * steps) == 0 and number < epochs * steps:
            minutes = clock.seconds / 60
            with clock.paused():
                say({"step": number, "minutes": minutes, **judge(loop.backbone())})
    minutes = clock.seconds / 60
    found = judge(loop.backbone(), at_end=True)
    say({"step": epochs * steps, "minutes": minutes, "last": True, **found})


class Published(Loop):
    """`train_one_epoch` of main_dino.py, in its order."""

    def __init__(self, job: Job) -> None:
        super().__init__(job)
        assert job.dino is not None
        assert job.xcit is not None
        self.dino, self.xcit = reference.load_dino(job.dino), reference.load_xcit(job.xcit)
        self.augment = self._augmentation()

    def _augmentation(self) -> Callable[[Image.Image], list[Tensor]]:
        """DataAugmentationDINO, whose 224 and 96 pixels become the sizes asked for."""
        crops, theirs = self.config.crops, self.dino.main.transforms.RandomResizedCrop
        sizes = {224: crops.global_size, 96: crops.local_size}
        self.dino.main.transforms.RandomResizedCrop = lambda size, **how: theirs(sizes[size], **how)
        try:
            return self.dino.main.DataAugmentationDINO(
                crops.global_scale, crops.local_scale, crops.local_count
            )
        finally:
            self.dino.main.transforms.RandomResizedCrop = theirs

    def _network(self, drop_path: float) -> nn.Module:
        ours = self.spec.build()  # says what the shape is
        width, patch = ours.embed_dim, ours.patch_size
        heads = ours.blocks[0].attn.num_heads
        backbone = self.xcit.XCiT(
            patch_size=max(patch, 8), embed_dim=width, depth=len(ours.blocks), num_heads=heads,
            eta=self.config.model.eta or 1.0, tokens_norm=True, num_classes=0,
            drop_path_rate=drop_path,
        )  # fmt: skip
        if patch == 4:
            first, second = (
                self.xcit.conv3x3(3, width // 2, 2),
                self.xcit.conv3x3(width // 2, width, 2),
            )
            backbone.patch_embed.proj = nn.Sequential(first, nn.GELU(), second)
        for parent in list(backbone.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.SyncBatchNorm):
                    setattr(parent, name, nn.BatchNorm2d(child.num_features))
        head = self.config.head
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # weight_norm has a successor
            projection = self.dino.main.DINOHead(
                width, head.prototypes, use_bn=head.use_bn, norm_last_layer=head.norm_last_layer
            )
        return self.dino.utils.MultiCropWrapper(backbone, projection)

    def begin(self, epochs: int) -> None:
        c, total = self.config, epochs * self.steps
        self.student, self.teacher = self._network(c.model.drop_path), self._network(0.0)
        self.teacher.load_state_dict(self.student.state_dict())
        self.teacher.requires_grad_(False)

        def warm(duration: float | str) -> float:
            return config.in_epochs(duration, epochs)

        self.loss = self.dino.main.DINOLoss(
            c.head.prototypes, 2 + c.crops.local_count, c.loss.warmup_teacher_temp,
            c.loss.teacher_temp, round(warm(c.loss.warmup_teacher_temp_epochs)), epochs,
        )  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.dino.utils.get_params_groups(self.student))
        # An "epoch" of one iteration: a warm-up may then be a share of the run.
        cosine, warmup = (
            self.dino.utils.cosine_scheduler,
            round(warm(c.optim.warmup_epochs) * self.steps),
        )
        lr = c.optim.lr * self.batch / 256
        self.lr = cosine(lr, c.optim.min_lr, total, 1, warmup_epochs=warmup)
        self.decay = cosine(c.optim.weight_decay, c.optim.weight_decay_end, total, 1)
        self.momentum = cosine(c.teacher.momentum, c.teacher.momentum_end, total, 1)

    def step(self, number: int, pictures: list[Image.Image], labels: Tensor) -> None:
        utils, epoch = self.dino.utils, number // self.steps
        views = [torch.stack(view) for view in zip(*map(self.augment, pictures), strict=True)]
        for place, group in enumerate(self.optimizer.param_groups):
            group["lr"] = self.lr[number]
            if place == 0:
                group["weight_decay"] = self.decay[number]
        with self.precision():
            teacher_output = self.teacher(views[:2])
            student_output = self.student(views)
            loss = self.loss(student_output, teacher_output, epoch)
        self.optimizer.zero_grad()
        loss.backward()
        utils.clip_gradients(self.student, self.config.optim.clip_grad)
        utils.cancel_gradients_last_layer(epoch, self.student, self.config.optim.freeze_last_layer)
        self.optimizer.step()
        m = self.momentum[number]
        with torch.no_grad():
            for q, k in zip(self.student.parameters(), self.teacher.parameters(), strict=True):
                k.data.mul_(m).add_((1 - m) * q.detach().data)

    def backbone(self) -> nn.Module:
        ours = self.spec.build()
        ours.load_state_dict(self.teacher.backbone.state_dict())
        return ours


class Supervised(Loop):
    """The same network from scratch by cross-entropy: one random crop an image, AdamW, cosine."""

    def begin(self, epochs: int) -> None:
        c, total = self.config, epochs * self.steps
        self.network = self.spec.build(drop_path=c.model.drop_path)
        self.head = nn.Linear(self.network.embed_dim, int(self.labels().max()) + 1)
        self.augment = transforms.Compose(
            [
                transforms.RandomResizedCrop(c.crops.global_size, (0.3, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(self.spec.mean, self.spec.std),
            ]
        )
        both = nn.ModuleList([self.network, self.head])
        self.optimizer = torch.optim.AdamW(both.parameters(), weight_decay=0.05)
        ramp, shape = np.linspace(0, 1, total), c.optim.lr * self.batch / 256
        self.lr = shape * np.minimum(10 * ramp, 0.5 + 0.5 * np.cos(np.pi * ramp))

    def step(self, number: int, pictures: list[Image.Image], labels: Tensor) -> None:
        images = torch.stack([self.augment(picture) for picture in pictures])
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr[number]
        with self.precision():
            loss = F.cross_entropy(self.head(self.network(images)), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def backbone(self) -> nn.Module:
        return self.network


def train_published(job: Job, say: Say) -> None:
    with reference.group_of_one(torch.device("cpu")):
        train_loop(Published(job), say)


def train_supervised(job: Job, say: Say) -> None:
    train_loop(Supervised(job), say)
