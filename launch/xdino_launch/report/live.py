"""A run watched while it goes: its page redrawn, a frame of its film strip an evaluation, alarms over
its scores, and a verdict at its end.

All of it is for whoever looks, so none of it may cost the run: what fails is said once and left out,
and no more than a hundredth of the time goes into the page (but for one drawing at the beginning and
one at the end).
"""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL.Image import Image

from xdino.backbone import Backbone
from xdino.config import RunConfig
from xdino.data.sources import Source
from xdino.errors import Stopped, reason
from xdino.job import Listener
from xdino.metrics import METRICS_FILE, read_rows
from xdino.runtime.atomic import write_text
from xdino_eval.during_training import Remembering
from xdino_launch.console import ConsoleListener
from xdino_launch.report.film_strip import FOLDER, FilmStrip
from xdino_launch.report.next_commands import next_commands, next_of_labelled
from xdino_launch.report.page import write_report
from xdino_launch.report.run import VERDICT_FILE, Run
from xdino_launch.report.verdict import BelowUntrained

SHARE = 0.01  # of the time since the start that drawing the page may take
FIRST = 5.0  # seconds from the start before which no page is drawn
OFTEN = 180.0  # seconds after which it is drawn again, whatever happened


class Watcher(Listener):
    """Tells `listener` what it hears, and adds to it.

    Args:
        run: the run's folder.
        splits: what the run is judged on, if it is.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        listener: ConsoleListener,
        splits: tuple[Source, Source] | None,
    ) -> None:
        self.config, self.run, self.listener, self.splits = config, run, listener, splits
        self.film: FilmStrip | None = None
        if config.runtime.report and splits is not None and config.evaluate.every:
            self.film = FilmStrip(run / FOLDER, *splits, config.evaluate.limit)
        self._frame: Image | None = None
        self._alarm = BelowUntrained()
        self._scored: list[dict[str, Any]] = []  # rows of evaluations
        self._began = self._drawn = time.monotonic()
        self._spent, self._epoch, self._steps = 0.0, 0, 1
        self._going, self._failed = False, set[str]()

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, *exception: object) -> None:
        """The page as the run leaves it; of a run that never began, none."""
        if self._going and self.config.runtime.report:
            self._going = False
            self._draw()

    # --- what the loop says ---

    def started(self, facts: dict[str, Any]) -> None:
        self.listener.started(facts)
        self._going, self._steps = True, facts["steps_per_epoch"]
        self._began = self._drawn = time.monotonic()
        self._epoch = facts["iteration"] // self._steps
        with self._or_without("the scores so far"):
            rows, _ = read_rows(self.run / METRICS_FILE)
            for row in rows:
                if self._is_evaluation(row):
                    self._look_at(row)
            self.listener.untrained = next((r for r in self._scored if r["iteration"] == 0), {})
        if self.film is not None:
            self.film.forget_after(facts["iteration"])
        if self.config.runtime.report:
            self.notice(f"how it goes, in a browser: {self.run / 'report.html'}")

    def step(self, row: dict[str, Any]) -> None:
        self.listener.step(row)
        scored = self._is_evaluation(row)
        if scored:
            alarm = self._look_at(row)
            if alarm is not None:
                self.notice(alarm)
            self._keep_frame(row["iteration"])
        epoch = row["iteration"] // self._steps
        if self.config.runtime.report and self._is_due(scored or epoch > self._epoch):
            self._draw()
            self._epoch = epoch

    def notice(self, sentence: str) -> None:
        self.listener.notice(sentence)

    def look(self, backbone: Backbone, evaluation: Remembering) -> None:
        """A frame of the network that was just judged; kept when its row comes."""
        self._frame = None
        if self.film is not None:
            with self._or_without("the film strip"):
                self._frame = self.film.draw(backbone, evaluation.remembered)

    # --- at the end ---

    def conclude(self, commands: bool = True) -> None:
        """Say what the run came to, and what to type next; verdict.json and the page say it, too."""
        with self._or_without("the verdict"):
            run = Run.open(self.run)
            verdict = run.verdict
            told = {**verdict.plain(), "commands": [line for _, line in self._next()]}
            write_text(self.run / VERDICT_FILE, json.dumps(told, indent=2) + "\n")
            self.notice(verdict.sentence)
            if verdict.advice:
                self.notice(verdict.advice)
            if commands:
                self.notice("next:\n" + "\n".join(f"  {line}" for _, line in self._next()))
        self._going = True  # a run that was finished before: its page may be older than its results

    def _next(self) -> list[tuple[str, str]]:
        if self.config.kind != "pretrain":
            told = self.config.data
            images = getattr(told, "val_images", None)  # a detector's files may be named one by one
            data = told.path if images is None else told.val_json
            return next_of_labelled(self.config.kind, self.run, data, images)
        labelled = None if self.splits is None else self.splits[1].labels is not None
        data = self.config.evaluate.data or self.config.data.path
        return next_commands(self.run, data, labelled)

    # --- how ---

    @staticmethod
    def _is_evaluation(row: dict[str, Any]) -> bool:
        return not {"loss", "skipped", "linear_top1"} & row.keys()

    def _look_at(self, row: dict[str, Any]) -> str | None:
        # A run that went back tells iterations again.
        self._scored = [old for old in self._scored if old["iteration"] < row["iteration"]]
        self._scored.append(row)
        return self._alarm.look(self._scored)

    def _keep_frame(self, iteration: int) -> None:
        frame, self._frame = self._frame, None
        if frame is not None and self.film is not None:
            with self._or_without("the film strip"):
                self.film.keep(frame, iteration)

    def _is_due(self, turned: bool) -> bool:
        now = time.monotonic()
        wanted = turned or now - self._drawn >= OFTEN
        return wanted and now - self._began >= FIRST and self._spent <= SHARE * (now - self._began)

    def _draw(self) -> None:
        began = time.monotonic()
        with self._or_without("the page report.html"):
            write_report([self.run], live=self._going)
        self._drawn = time.monotonic()
        self._spent += self._drawn - began

    @contextlib.contextmanager
    def _or_without(self, what: str) -> Iterator[None]:
        """Whatever fails inside costs `what`, never the run."""
        try:
            yield
        except Stopped:
            raise
        except Exception as error:  # noqa: BLE001 -- pictures of anything may fail in any way
            if what not in self._failed:
                self._failed.add(what)
                self.notice(f"{what} failed ({reason(error)}): the run goes on without")
