"""Pages of a run beside its metrics.jsonl, each made where it is asked for: wandb, TensorBoard.

Whatever fails there costs the page, never the run. What they need is imported for them alone.
"""

import abc
import contextlib
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from xdino.errors import reason
from xdino.runtime.atomic import write_text

WANDB_SECONDS = 30.0  # that a run waits for wandb at its start, and at its end
TENSORBOARD_FOLDER = "tensorboard"


class Page(abc.ABC):
    """What all pages are: `run` is None once it has failed, and the page stays silent then."""

    name = ""

    def __init__(self, notice: Callable[[str], None]) -> None:
        self._notice = notice
        self.run: Any = None

    @abc.abstractmethod
    def log(self, row: dict[str, Any]) -> None:
        """A row of metrics.jsonl."""

    @abc.abstractmethod
    def finish(self) -> None:
        """Nothing more comes."""

    @contextlib.contextmanager
    def _or_without(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # noqa: BLE001 -- services and their clients raise nearly anything
            self._failed(error)

    def _failed(self, error: Exception) -> None:
        self.run = None
        self._notice(f"{self.name} failed ({reason(error)}): the run goes on without its page")


class TensorBoardPage(Page):
    """A run's scalars for `tensorboard --logdir RUNS`, in the run's folder tensorboard/.

    A continued run hides what was logged beyond the iteration it continues from, as metrics.jsonl
    drops it.
    """

    name = "TensorBoard"

    def __init__(self, run_dir: Path, iteration: int, notice: Callable[[str], None]) -> None:
        super().__init__(notice)
        try:
            from torch.utils.tensorboard import SummaryWriter  # only wanted here
        except ImportError as error:
            notice(
                f"TensorBoard is not installed ({reason(error)}; pip install 'xdino[tensorboard]'): "
                "the run goes on without its page"
            )
            return
        folder = run_dir / TENSORBOARD_FOLDER
        purged = iteration + 1 if folder.is_dir() else None
        with self._or_without():
            self.run = SummaryWriter(str(folder), purge_step=purged)

    def log(self, row: dict[str, Any]) -> None:
        if self.run is not None:
            with self._or_without():
                for key, value in row.items():
                    if isinstance(value, int | float) and key != "iteration":
                        self.run.add_scalar(key, value, row["iteration"])

    def finish(self) -> None:
        if self.run is not None:
            with self._or_without():
                self.run.close()


class WandbPage(Page):
    """A run's page at wandb."""

    name = "wandb"

    def __init__(
        self,
        run_dir: Path,
        mode: str,
        project: str,
        config: dict[str, Any] | None,
        notice: Callable[[str], None],
    ) -> None:
        super().__init__(notice)
        try:
            import wandb  # slow to import, and only wanted here
        except ImportError as error:
            notice(
                f"wandb is not installed ({reason(error)}; pip install wandb): the run goes "
                "on without its page"
            )
            return
        if mode == "online" and not _has_key(wandb):
            # wandb would ask for one, or raise where nobody can be asked.
            notice(
                "wandb has no API key: the page is kept offline in the run's folder wandb/ "
                "(`wandb login`, then `wandb sync`, sends it)"
            )
            mode = "offline"
        try:
            self.run = self._start(wandb, run_dir, mode, project, config)
        except Exception as error:  # noqa: BLE001 -- see `_or_without`
            if mode == "offline":
                self._failed(error)
                return
            notice(
                f"wandb cannot be reached ({reason(error)}): the page is kept offline in the run's "
                "folder wandb/ (`wandb sync` sends it)"
            )
            with self._or_without():
                wandb.teardown()  # its service still holds the page that could not be begun
                self.run = self._start(wandb, run_dir, "offline", project, config)

    @staticmethod
    def _start(
        wandb: Any, run_dir: Path, mode: str, project: str, config: dict[str, Any] | None
    ) -> Any:
        id_file = run_dir / "wandb-id.txt"
        if not id_file.exists():
            write_text(id_file, secrets.token_hex(4))
        told = id_file.read_text(errors="replace").strip()
        settings = {"console": "off", "silent": True, "init_timeout": WANDB_SECONDS}
        known = wandb.Settings.model_fields
        settings |= {"finish_timeout": WANDB_SECONDS} if "finish_timeout" in known else {}
        run = wandb.init(
            project=project,
            id=told,
            name=run_dir.name,
            resume="allow",
            mode=mode,
            dir=str(run_dir),
            config=config,
            settings=wandb.Settings(**settings),
        )
        # Rows lie at their iteration, in whatever order they come: by its own counter wandb drops
        # what a continued run, or an evaluation after the last step, says of an earlier one.
        run.define_metric("iteration")
        run.define_metric("*", step_metric="iteration")
        return run

    def log(self, row: dict[str, Any]) -> None:
        if self.run is not None:
            with self._or_without():
                self.run.log(row)

    def finish(self) -> None:
        """Send what is left, for `WANDB_SECONDS` at most."""
        if self.run is not None:
            with self._or_without():
                self.run.finish()


def _has_key(wandb: Any) -> bool:
    """Whether somebody is logged in; nobody is asked and nothing is sent."""
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except TypeError:  # before wandb had `prompt`
        return bool(wandb.api.api_key)
    except (wandb.Error, OSError, ValueError):
        return True  # what is wrong with the key is said when it is used
