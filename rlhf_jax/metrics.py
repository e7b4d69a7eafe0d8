"""Where figures go: JSON lines, TensorBoard, Weights & Biases, the terminal."""

import dataclasses
import importlib.util
import json
import time
from collections.abc import Mapping
from typing import Annotated, Any

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from rlhf_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is written besides the JSON lines of steps and evaluations."""

    tensorboard: Annotated[bool, "write TensorBoard event files"] = True
    wandb: Annotated[bool, "send metrics to Weights & Biases (pip install -e '.[wandb]')"] = False
    wandb_project: Annotated[str, "project the run belongs to there"] = "rlhf_jax"
    progress: Annotated[bool, "show a progress bar, or a line now and then where there is no terminal"] = True


def check(config: LogConfig) -> None:
    """Errors: UserError for a place that can't be written to here."""
    if config.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError("--config.log.wandb=true needs the package wandb; run: pip install -e '.[wandb]'.")


class Lines:
    """One JSON object a line; a run that resumes first drops the lines it is about to write again."""

    def __init__(self, path: epath.Path, keep_below: int):
        self._path = path
        kept = []
        if path.exists():
            for line in path.read_text().splitlines():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError:  # the line that a kill cut short
                    continue
                if row["step"] < keep_below:
                    kept.append(line)
        part = path.parent / (path.name + ".part")
        part.write_text("".join(line + "\n" for line in kept))
        part.replace(path)

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends and flushes, every number in full precision."""
        with self._path.open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")


class _TensorBoard:
    def __init__(self, folder: epath.Path, start: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        events: Any = event_pb2  # made by protobuf, which type checkers do not see through
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        self._writer = EventFileWriter(str(folder))
        log = events.SessionLog(status=events.SessionLog.START)  # hides what an earlier try wrote from here on
        self._writer.add_event(self._event(step=start, wall_time=time.time(), session_log=log))

    def write(self, row: Mapping[str, float]) -> None:
        values = [self._summary.Value(tag=name, simple_value=x) for name, x in row.items() if name != "step"]
        event = self._event(step=int(row["step"]), wall_time=time.time(), summary=self._summary(value=values))
        self._writer.add_event(event)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, folder: epath.Path, config: LogConfig, resolved: dict[str, Any]):
        import wandb  # pyright: ignore[reportMissingImports]

        name = folder.name
        self._run = wandb.init(project=config.wandb_project, name=name, id=name, resume="allow", config=resolved)

    def write(self, row: Mapping[str, float]) -> None:
        self._run.log({name: x for name, x in row.items() if name != "step"}, step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


class Log:
    """Everything that records a run; on other processes than the first it records nothing."""

    def __init__(
        self, workdir: epath.Path, config: LogConfig, *, start: int, steps: int, resolved: dict[str, Any], main: bool,
        progress: bool = True,
    ):  # fmt: skip
        """Args: progress: False keeps it off the terminal, whatever the config says: of several runs one is shown."""
        self._main = main
        self._sinks: list[Any] = []
        self._bar = Bar(steps, start, config.progress and main and progress)
        if main:
            self._steps = Lines(workdir / "metrics.jsonl", start)
            # The evaluation at a checkpoint's own step came before the checkpoint.
            self._evaluations = Lines(workdir / "eval.jsonl", start + 1 if start else 0)
            if config.tensorboard:
                self._sinks.append(_TensorBoard(workdir / "tensorboard", start))
            if config.wandb:
                self._sinks.append(_Wandb(workdir, config, resolved))

    def step(self, row: dict[str, float], tokens: int) -> None:
        """One line of a step's metrics; `tokens` is how many real tokens it read, prompts too."""
        if self._main:
            self._steps.write(row)
            self._bar.advance(row, tokens)
            for sink in self._sinks:
                sink.write(row)

    def evaluation(self, row: dict[str, float]) -> None:
        """One line of an evaluation on held-out rows."""
        if self._main:
            self._evaluations.write(row)
            for sink in self._sinks:
                sink.write(row)

    def close(self) -> None:
        """Flushes all."""
        self._bar.close()
        for sink in self._sinks:
            sink.close()


class Bar:
    """Steps done, the loss and real tokens a second: a bar on a terminal, else a line every ten seconds."""

    def __init__(self, steps: int, start: int, shown: bool):
        self._console = Console(stderr=True)
        self._steps, self._shown = steps, shown
        self._live = shown and self._console.is_terminal
        self._rate, self._last, self._said = 0.0, None, time.monotonic()
        columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"), TimeRemainingColumn())
        self._progress = Progress(*columns, console=self._console)
        if self._live:
            self._task = self._progress.add_task("compiling", total=steps, completed=start)
            self._progress.start()

    def advance(self, row: Mapping[str, float], tokens: int) -> None:
        """Counts one step of `tokens` tokens; the rate is a moving average that leaves out the first step."""
        now = time.monotonic()
        if self._last is not None:
            rate = tokens / max(now - self._last, 1e-9)
            self._rate = rate if self._rate == 0 else 0.9 * self._rate + 0.1 * rate
        self._last = now
        done = int(row["step"]) + 1
        text = f"loss {row['loss']:.4f}  {self._rate:,.0f} tokens/s"
        if self._live:
            self._progress.update(self._task, completed=done, description=text)
        elif self._shown and (now - self._said > 10 or done == self._steps):
            self._said = now
            print(f"step {done}/{self._steps}  {text}", flush=True)

    def close(self) -> None:
        """Leaves the terminal as it was."""
        if self._live:
            self._progress.stop()
