"""What a person sees of a training: a forecast after the first steps, then a bar on a terminal, plain lines elsewhere.

All of it goes to stderr.
"""

import sys
import time
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from noisysam.core.text import printable
from noisysam.runs.config import RunConfig
from noisysam.runs.measures import MEASURE

TIMED_STEPS = (3, 13)  # between these, a step is timed for the forecast


QUIET_SECONDS = 10.0  # between two plain lines


SHORT_RUN, SHORT_EPOCHS = 180.0, 5  # seconds and epochs of the variant that is offered on a CPU


TEST_IMAGES = 12_000  # of CIFAR, with some training images, looked at after each of its epochs


def note(text: str) -> None:
    """One line on stderr."""
    click.echo(printable(text), err=True)


def duration(seconds: float) -> str:
    """Seconds as people say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def percent(share: float | None) -> str:
    """A share of 1 in percent; '-' where there is none."""
    return "-" if share is None or share != share else f"{100 * share:.2f}"


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook."""
    shell = sys.modules.get("IPython")
    found = shell.get_ipython() if shell is not None else None
    return type(found).__name__ == "ZMQInteractiveShell"


class NotebookProgress:
    """A bar for each stage below a notebook's cell: tqdm's where it is installed, else a line for each epoch. A
    ``train.ProgressCallback``."""

    def __init__(self) -> None:
        self.bars: dict[int, Any] = {}

    def step(self, stage: int, epoch: int, number: int, of: int) -> None:
        """Nothing: a bar counts epochs."""

    def epoch(self, stage: int, number: int, of: int, line: dict[str, Any]) -> None:
        accuracy = line.get("test_accuracy")
        figures = "" if accuracy is None else f"test {percent(accuracy)} %"
        try:
            from tqdm.auto import tqdm
        except ImportError:
            print(f"stage {stage + 1} epoch {number + 1}/{of} {figures}")
            return
        if stage not in self.bars:
            self.bars[stage] = tqdm(total=of, initial=number, desc=f"stage {stage + 1}", unit="epoch")
        bar = self.bars[stage]
        bar.update()
        bar.set_postfix_str(figures)
        if number + 1 == of:
            bar.close()


class Display:
    """Shows one run. A ``train.ProgressCallback``."""

    def __init__(self, config: RunConfig, cpu: bool, short_command: str | None = None) -> None:
        """``short_command``: what to type for a run like this one, up to its subset and epochs; offered on a CPU."""
        self.config, self.cpu, self.short_command = config, cpu, short_command
        self.started = 0.0
        self.told = 0.0
        self.forecast_done = False
        self.bar: Progress | None = None
        if sys.stderr.isatty():
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=12), MofNCompleteColumn())
            times = (TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.fields[figures]}"))
            self.bar = Progress(*columns, *times, console=Console(stderr=True), transient=True)
            self.bar.start()
            self.tasks: dict[int, Any] = {}

    def step(self, stage: int, epoch: int, number: int, of: int) -> None:
        if self.forecast_done:
            return
        first, last = TIMED_STEPS if of >= TIMED_STEPS[1] else (1, max(2, of))
        if number == first:
            self.started = time.perf_counter()
        elif number == last:
            self.forecast_done = True
            per_step = (time.perf_counter() - self.started) / (last - first)
            self._forecast(per_step, of)

    def _forecast(self, per_step: float, of: int) -> None:
        c = self.config
        total = per_step * of * c.epochs
        rate = c.batch / per_step
        length = f"{c.epochs} epoch{'s' * (c.epochs != 1)}"
        note(f"{rate:.0f} images/s here: about {duration(total)} of training a stage ({length}), and evaluation")
        if self.cpu and self.short_command and total > 2 * SHORT_RUN:
            note(f"three minutes instead: {self.short_command} {self._short(rate)}")

    def _short(self, rate: float) -> str:
        """Flags that make this run a matter of three minutes on this machine; evaluation included."""
        recipe = self.config.recipe()
        gradients = recipe.optimizer.cost(recipe.optimizer_options).backwards
        forward = 3 * gradients * rate  # a forward is about a third of a gradient
        left = SHORT_RUN - SHORT_EPOCHS * TEST_IMAGES / forward
        images = int(left * rate / SHORT_EPOCHS / 500) * 500
        if images >= 500:
            return f"--train-subset {images} --epochs {SHORT_EPOCHS}"
        return f"--model resnet8 --train-subset 2000 --epochs {SHORT_EPOCHS}"

    def epoch(self, stage: int, number: int, of: int, line: dict[str, Any]) -> None:
        loss = float("nan") if line["train_loss"] is None else line["train_loss"]
        accuracy = line.get("test_accuracy")
        figures = f"loss {loss:.3f}" + ("" if accuracy is None else f", test {percent(accuracy)} %")
        if self.bar is not None:
            if stage not in self.tasks:
                self.tasks[stage] = self.bar.add_task(f"stage {stage + 1}", total=of, figures="")
            self.bar.update(self.tasks[stage], completed=number + 1, figures=figures)
        elif number + 1 == of or time.perf_counter() - self.told > QUIET_SECONDS:
            self.told = time.perf_counter()
            memorised = percent(line.get("memorised"))
            if accuracy is not None and memorised != percent(None):
                figures += f", {MEASURE['memorised'].short} {memorised} %"
            note(f"stage {stage + 1} epoch {number + 1}/{of}: {figures} ({line['images_per_second']:.0f} images/s)")

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.bar is not None:
            self.bar.stop()
