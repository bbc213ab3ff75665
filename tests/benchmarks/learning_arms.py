"""What learns on the learning board: each arm trained for so many CPU minutes in a process of its own.

Minutes are those of the process on its cores, all threads together (`time.process_time`): what else
the machine does costs none, and a thread that reads ahead is paid for. Evaluations are left out. Ten
steps of a pilot say how many whole epochs the minutes buy, at least one; schedules are laid out for
as many, so that every arm ends where its schedule ends.

The published arm is facebookresearch/dino and facebookresearch/xcit, imported from checkouts with the
shims of `xdino_launch.bench.reference`: their augmentation at the crop sizes of the configuration,
networks, head, loss, schedules and order of a step. Without a scaler, for bf16 needs none. A stem of
patch 4, which xcit.py does not have, is made of its own `conv3x3`.
"""

import abc
import contextlib
import itertools
import random
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from PIL import Image
from sklearn.decomposition import PCA
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import transforms

from xdino import checkpoint, config, data, student_teacher
from xdino.forecast.choosing import Asked, Choosing
from xdino.job import Listener
from xdino.plan import Plan, make_plan
from xdino.pretraining import pretrain
from xdino_eval import knn
from xdino_eval.features import Features, extract, pixels
from xdino_eval.linear import logistic_probe
from xdino_eval.transform import EvalTransform
from xdino_launch.bench import reference
from xdino_launch.local import evaluator_of

NEIGHBOURS = 20
STRENGTHS = (1e-2, 1.0, 1e2)  # of the linear probe: a held-out tenth of train chooses
COMPONENTS = 1024  # of features wider than that: raw pixels
PILOT = (3, 13)  # steps between which the clock runs
TRAINED = ("ours", "auto", "published", "supervised")


@dataclass(frozen=True)
class Arm:
    """kind: "pixels", "untrained", "supervised", "published", "ours" or "auto".

    settings: dotted keys of the configuration that differ from the board's. change: of `CHANGES`,
    what no key says.
    """

    kind: str
    settings: Mapping[str, str] = field(default_factory=dict)
    change: str = ""


@dataclass(frozen=True)
class Job:
    """One arm on one data set by one seed. settings: of the board, for every arm."""

    arm: Arm
    path: str
    seed: int
    minutes: float
    points: int  # evaluations along the way, about
    settings: Mapping[str, str]
    dino: str | None = None
    xcit: str | None = None

    def configured(self, epochs: int = 1) -> config.Config:
        own = {"data.path": self.path, "train.seed": str(self.seed), "train.epochs": str(epochs)}
        quiet = {"runtime.device": "cpu", "runtime.workers": "1", "runtime.prefetch": "1"}
        tree: dict[str, dict[str, str]] = {}
        for key, value in (quiet | {**self.settings, **self.arm.settings} | own).items():
            section, _, leaf = key.partition(".")
            tree.setdefault(section, {})[leaf] = value
        return config.parse(tree)

    def epochs(self, seconds_a_step: float, steps: int) -> int:
        """Whole epochs of `steps` steps that the minutes buy, at least one."""
        return max(1, int(60 * self.minutes / (seconds_a_step * steps)))


Say = Callable[[dict[str, Any]], None]  # a row for the board; returns when it is this arm's turn


# Judging, the same for every arm


class Judge:
    """k-NN, and at the end a linear probe, of features of whole images."""

    def __init__(self, plan: Plan) -> None:
        self.splits = data.open_splits(plan.config.data.path, channels=plan.spec.in_chans)
        self.size = plan.spec.input_size

    def features(self, backbone: nn.Module | None) -> list[Features]:
        """Of the training and the validation images; None: their pixels."""
        if backbone is None:
            return [pixels(source, self.size) for source in self.splits]
        transform = EvalTransform.of(backbone)
        return [extract(backbone, source, transform, workers=1) for source in self.splits]

    def __call__(self, backbone: nn.Module | None, at_end: bool = False) -> dict[str, float | None]:
        bank, queries = self.features(backbone)
        found = {"knn": knn.evaluate(bank, queries, [NEIGHBOURS])[0].top1}
        if at_end:
            bank, queries = principal(bank, queries)
            found["linear"] = logistic_probe(bank, queries, STRENGTHS).row.top1
        return found


def principal(bank: Features, queries: Features) -> list[Features]:
    """Their first `COMPONENTS` principal components, where there are more dimensions (raw pixels).

    On 12,288 pixels the probe's L-BFGS takes tens of minutes.
    """
    if bank.features.shape[1] <= COMPONENTS:
        return [bank, queries]
    pca = PCA(COMPONENTS, svd_solver="randomized", random_state=0).fit(bank.features.numpy())
    return [
        replace(each, features=torch.from_numpy(pca.transform(each.features.numpy())))
        for each in (bank, queries)
    ]


class Clock:
    """Seconds of this process, but for what happens in `paused`."""

    def __init__(self) -> None:
        self._since = time.process_time()

    @property
    def seconds(self) -> float:
        return time.process_time() - self._since

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.process_time()
        yield
        self._since += time.process_time() - began


def run(job: Job, say: Say) -> None:
    """Train and judge; a row along the way has "step" and "knn", the last one "linear" too."""
    torch.set_num_threads(1)
    torch.manual_seed(job.seed)
    kind = job.arm.kind
    if kind in TRAINED:
        TRAINERS[kind](job, say)
        return
    plan = make_plan(job.configured())
    backbone = plan.spec.build() if kind == "untrained" else None
    say({"step": 0, "minutes": 0.0, "last": True, **Judge(plan)(backbone, at_end=True)})


# What BatchNorm normalises by: no keys, for none of it is published


@contextlib.contextmanager
def teacher_in_evaluation() -> Iterator[None]:
    """The teacher normalises by the student's running statistics, not by those of its own batch."""

    def follow(
        teacher: nn.Module, student: nn.Module, momentum: float, still: Tensor | None = None
    ) -> None:
        student_teacher.update_teacher(teacher, student, momentum, still)
        theirs = dict(student.named_buffers())
        for name, buffer in teacher.named_buffers():
            buffer.copy_(theirs[name])
        teacher.eval()

    with mock.patch("xdino.learner.update_teacher", follow):
        yield


@contextlib.contextmanager
def statistics_at_rest(after: int = 200) -> Iterator[None]:
    """From step `after` on, student and teacher normalise by the statistics gathered until then."""
    steps = itertools.count(1)

    def follow(
        teacher: nn.Module, student: nn.Module, momentum: float, still: Tensor | None = None
    ) -> None:
        student_teacher.update_teacher(teacher, student, momentum, still)
        if next(steps) == after:
            for module in (*teacher.modules(), *student.modules()):
                if isinstance(module, nn.modules.batchnorm._BatchNorm):
                    module.eval()

    with mock.patch("xdino.learner.update_teacher", follow):
        yield


CHANGES: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {
    "": contextlib.nullcontext,
    "teacher in evaluation": teacher_in_evaluation,
    "statistics at rest": statistics_at_rest,
}


# Ours


class _EnoughSeen(Exception):
    """The pilot has seen enough."""


class _Pilot(Listener):
    """Times the first steps, then ends the run."""

    def step(self, row: dict[str, Any]) -> None:
        if row["iteration"] == PILOT[0]:
            self.clock = Clock()
        elif row["iteration"] == PILOT[1]:
            self.seconds = self.clock.seconds / (PILOT[1] - PILOT[0])
            raise _EnoughSeen


def train_ours(job: Job, say: Say) -> None:
    """`pretrain`, unchanged; checkpoints are written as ever, and paid for."""
    steps = make_plan(job.configured()).steps_per_epoch
    with tempfile.TemporaryDirectory() as folder:
        pilot = _Pilot()
        told = replaced(job.configured(epochs=1 + PILOT[1] // steps), "runtime", log_every=1)
        with contextlib.suppress(_EnoughSeen):
            pretrain(told, Path(folder) / "pilot", listener=pilot)
        epochs = job.epochs(pilot.seconds, steps)
        every = max(1, epochs // job.points)
        asked = replaced(job.configured(epochs), "evaluate", every=every)
        asked = replaced(asked, "runtime", keep_every=0)
        judge = Judge(make_plan(asked))
        done = itertools.count(0, every * steps)
        clock = Clock()

        def evaluate(backbone: nn.Module) -> dict[str, float]:
            minutes, number = clock.seconds / 60, next(done)
            with clock.paused():
                found = judge(backbone)
                if number < epochs * steps:
                    say({"step": number, "minutes": minutes, **found})
            return {"knn_top1": found["knn"] or 0.0}

        with CHANGES[job.arm.change]():
            path = pretrain(asked, Path(folder) / "run", evaluate)
        minutes = clock.seconds / 60
        found = judge(checkpoint.load_backbone(path), at_end=True)
    say({"step": epochs * steps, "minutes": minutes, "last": True, **found})


def train_auto(job: Job, say: Say) -> None:
    """What `xdino pretrain auto --minutes N` chooses for the images; nothing of the board's settings."""
    given = {"data.path": job.path, "train.seed": str(job.seed), "runtime.device": "cpu"}
    wanted = Asked(job.minutes, None, given)
    device = torch.device("cpu")
    recipe = Choosing(wanted, None, device, time.monotonic(), print, evaluator_of).recipe()
    chosen = {
        choice.key: choice.value
        for choice in recipe.choices
        if not choice.key.startswith(("runtime.", "evaluate.", "data.", "train.epochs"))
    }
    train_ours(replace(job, arm=Arm("ours", chosen), settings={}), say)


def replaced(settings: config.Config, section: str, **values: Any) -> config.Config:
    """The configuration with some keys of a section changed."""
    return replace(settings, **{section: replace(getattr(settings, section), **values)})


# A plain loop, for the arms that are not ours


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


TRAINERS: dict[str, Callable[[Job, Say], None]] = {
    "ours": train_ours,
    "auto": train_auto,
    "published": train_published,
    "supervised": train_supervised,
}
