"""The log of a run: a progress line, `log.jsonl` and TensorBoard events."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sicot_jax.common.files import write_text
from sicot_jax.parallel import distributed

_SMOOTHING = 0.3  # weight of the newest interval in the rate


class RunLog:
    """Writes numbers to `log.jsonl` (and TensorBoard) and one progress line to the terminal.

    A resumed run appends; records beyond the step it resumes from are dropped first, so that each
    step is there once. Of several processes the primary one writes.
    """

    def __init__(
        self,
        workdir: Path,
        *,
        start_step: int,
        total_steps: int,
        photos_before: Callable[[int], int],
        tensorboard: bool,
    ):
        """Opens the log.

        Args:
          workdir: the run folder.
          start_step: updates done before.
          total_steps: updates of the complete run.
          photos_before: step -> photos that the steps before it take.
          tensorboard: whether TensorBoard events are written too, where tensorboardX is installed.
        """
        self.total_steps, self.photos_before = total_steps, photos_before
        self.writes = distributed.is_primary()
        self.start_step = self.last_step = start_step
        self.last_time = time.perf_counter()
        self.seconds_per_photo: float | None = None
        self.is_warm = False  # whether the first interval, which compiles, is over
        self.is_terminal = sys.stderr.isatty()
        if not self.writes:
            return
        path = workdir / "log.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        kept = [line for line in lines if _step_of(line) <= start_step]
        write_text(path, "".join(line + "\n" for line in kept))
        self.file = path.open("a", buffering=1)
        self.writer: Any = None
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:  # a bare accelerator image
                print("no tensorboardX here: numbers go to log.jsonl alone", file=sys.stderr)
            else:
                self.writer = SummaryWriter(str(workdir / "tensorboard"), purge_step=start_step + 1)

    def write_scalars(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Writes one record of numbers.

        Args:
          step: updates done.
          kind: "train" or "validation".
          values: name -> number.
        """
        if not self.writes:
            return
        self.file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
        if self.writer is not None:
            for name, value in values.items():
                self.writer.add_scalar(f"{kind}/{name}", value, step)

    def progress(self, step: int, losses: Mapping[str, float]) -> None:
        """Writes the losses of a step, with the rate since the last call and the time to go.

        Args:
          step: updates done.
          losses: name -> number.
        """
        self._measure_rate(step)
        rate = 1 / self.seconds_per_photo if self.seconds_per_photo else 0.0
        photos_left = self.photos_before(self.total_steps) - self.photos_before(step)
        seconds_left = int(photos_left * (self.seconds_per_photo or 0))
        detail = "  ".join(f"{name} {value:.3f}" for name, value in losses.items())
        self.write_scalars(step, "train", {**losses, "images_per_second": round(rate, 1)})
        self._line(
            f"step {step}/{self.total_steps}  {detail}  {rate:.0f} images/s  "
            f"{seconds_left // 60}:{seconds_left % 60:02d} to go"
        )

    def _measure_rate(self, step: int) -> None:
        now = time.perf_counter()
        if step > self.last_step:
            photos = self.photos_before(step) - self.photos_before(self.last_step)
            current, before = (now - self.last_time) / photos, self.seconds_per_photo
            # The first interval holds what happens once: the second one replaces it.
            self.seconds_per_photo = (
                (1 - _SMOOTHING) * before + _SMOOTHING * current
                if before and self.is_warm
                else current
            )
            self.is_warm = self.last_step > self.start_step
        self.last_step, self.last_time = step, now

    def pause_clock(self) -> None:
        """Stops the clock of the rate, for work that is not training."""
        self._paused = time.perf_counter()

    def resume_clock(self) -> None:
        """Lets the clock of the rate go on."""
        self.last_time += time.perf_counter() - self._paused

    def message(self, text: str) -> None:
        """Prints a line that stays on the terminal.

        Args:
          text: the line.
        """
        if self.is_terminal and self.writes:
            print("\r\x1b[K", end="", file=sys.stderr)
        distributed.print_primary(text)

    def _line(self, text: str) -> None:
        if self.is_terminal and self.writes:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        else:
            distributed.print_primary(text)

    def close(self) -> None:
        """Closes the files."""
        if not self.writes:
            return
        if self.is_terminal:
            print(file=sys.stderr)
        self.file.close()
        if self.writer is not None:
            self.writer.close()


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return sys.maxsize  # a line that a kill has cut off
