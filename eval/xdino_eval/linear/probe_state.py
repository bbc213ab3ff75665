"""What a long probe leaves behind to go on from: the same command finds it, no other takes it up."""

import hashlib
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from xdino.errors import RunFailed, reason
from xdino.runtime import distributed
from xdino.runtime.atomic import written_beside


@dataclass
class Unfinished:
    """A file with the state of a probe under way, removed at its end.

    Its name follows from all that the probe depends on: another probe never takes it up.
    `seconds`: no state is written sooner after the one before (or after the beginning).
    """

    path: Path
    seconds: float = 0.0
    _written: float = field(default_factory=time.monotonic)

    @classmethod
    def of(
        cls, folder: Path | str | None, *told: object, seconds: float = 0.0
    ) -> "Unfinished | None":
        """The file in `folder` (None = nothing is kept) of the probe that `told` describes.

        Networks and tensors tell by their numbers, everything else by its `repr`.
        """
        if folder is None:
            return None
        digest = hashlib.blake2b(digest_size=8)
        for part in told:
            if isinstance(part, nn.Module):
                for name, value in part.state_dict().items():
                    digest.update(name.encode())
                    digest.update(_bytes(value))
            else:
                digest.update(_bytes(part) if isinstance(part, Tensor) else repr(part).encode())
        return cls(Path(folder) / f"linear-{digest.hexdigest()}.unfinished", seconds)

    def load(self) -> tuple[int, dict[str, Tensor]]:
        """How many epochs (or fits) are done, and the tensors of that moment; (0, {}) without a file.

        Raises:
            RunFailed: the file is damaged.
        """
        if not self.path.exists():
            return 0, {}
        try:
            with safe_open(self.path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                return int(file.metadata()["epoch"]), tensors
        except OSError as error:
            raise RunFailed(f"cannot read {self.path}: {reason(error)}") from error
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise RunFailed(
                f"{self.path}, an unfinished probe, is damaged ({error}): delete it"
            ) from error

    def save(self, epoch: int, tensors: dict[str, Tensor]) -> None:
        """Keep the state after `epoch` epochs; a disk that refuses it costs no more than a warning."""
        if time.monotonic() - self._written < self.seconds:
            return
        kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        try:
            with written_beside(self.path) as beside:
                save_file(kept, beside, {"epoch": str(epoch)})
        except RunFailed as error:
            warnings.warn(
                f"the probe goes on, but {self.path} was not written: {error}", stacklevel=2
            )
        self._written = time.monotonic()

    def done(self) -> None:
        self.path.unlink(missing_ok=True)


class UnfinishedOfAll(Unfinished):
    """The same of a probe that all processes of a group train: the first one keeps the file."""

    def load(self) -> tuple[int, dict[str, Tensor]]:
        return distributed.from_first(super().load)

    def save(self, epoch: int, tensors: dict[str, Tensor]) -> None:
        if distributed.rank() == 0:
            super().save(epoch, tensors)

    def done(self) -> None:
        if distributed.rank() == 0:
            super().done()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
