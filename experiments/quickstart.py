"""The whole way in five minutes: make quickstart.

Pre-trains a tiny model on a small world (docs/world.md), fine-tunes it on demonstrations, lets simulated people
compare its answers, trains DPO, IPO and KTO on what they said, and writes a report of what each stage changed on
prompts that were never trained on. The people err in 15% of their labels and like long answers; the reward that
the report shows is the known one of the world, which no training saw.

    python -m experiments.quickstart --seeds=0,1,2     # the same three times over, every seed shown
"""

import dataclasses
import json
import os
from typing import Annotated

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from etils import epath
from rich.console import Console

from experiments import evaluate as evaluation
from rlhf_jax import flags, report, run, worlds
from rlhf_jax.checkpoint import CheckpointConfig
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, OptimizerConfig, Train
from rlhf_jax.data import world, world_rows
from rlhf_jax.data.config import Data
from rlhf_jax.errors import UserError
from rlhf_jax.evaluate.answers import Subject
from rlhf_jax.evaluate.compare import Result, compare
from rlhf_jax.metrics import LogConfig

RECIPE = worlds.RECIPES["small"]
# Losses; everything else is the same for all of them.
METHODS = ("dpo", "ipo", "kto")


@dataclasses.dataclass(frozen=True)
class Quickstart:
    """Pre-training, SFT, then DPO, IPO and KTO of a tiny model on the synthetic world, ending in report.html."""

    workdir: Annotated[str, "folder that everything is written to"] = "runs/quickstart"
    seeds: Annotated[tuple[int, ...], "each is a whole run of its own, from the rows to the answers"] = (0,)


class Chain:
    """The stages of one seed, each in its own folder below `root`; what is finished is not done again."""

    def __init__(self, root: epath.Path, seed: int):
        self.root, self.seed = root, seed
        self.rows, self.base = root / "rows", root / "base"
        if not (self.base / "config.json").exists():  # it is written last
            world_rows.write(self.rows, dataclasses.replace(RECIPE.world, seed=seed))
            documents = worlds.read(self.rows / "documents.jsonl")
            worlds.write_model(self.base, [row["completion"] for row in documents])

    def train(self, name: str, start: str | None, config: Config) -> None:
        """One stage, from random weights or from those of the stage before, at its best checkpoint."""
        model = self.base
        if start is not None:
            model = worlds.export(f"{self.root / start}@best", self.root / f"{start}_model")
        section = ModelConfig(path=os.fspath(model), init="random" if start is None else "checkpoint")
        run.train(dataclasses.replace(config, model=section, seed=self.seed), os.fspath(self.root / name), resume=True)

    def likelihood(self, name: str, start: str | None, rows: str, stage: worlds.Stage) -> None:
        """Trains on what is written, until held-out text has not become likelier twice in a row."""
        self.train(name, start, worlds.likelihood(self.rows, rows, stage))

    def ask_people(self) -> None:
        """Two answers of the fine-tuned model to each training prompt, compared by three of five people each."""
        file = self.rows / "answers.jsonl"
        if file.exists():
            return
        prompts = [row["prompt"] for row in worlds.read(self.rows / "prompts.jsonl")]
        rows = worlds.compare_answers(self.subject("sft"), prompts, RECIPE.world, self.seed)
        wrong = sum(row["gold_margin"] < 0 for row in rows) / sum(row["gold_margin"] != 0 for row in rows)
        print(f"people compared {len(rows)} pairs; in {wrong:.0%} of those that differ they chose the worse answer")
        worlds.write(file, rows)

    def prefer(self, name: str) -> None:
        """Trains one method on what people preferred."""
        self.train(name, "sft", Config(
            algorithm="preference", loss=Loss(name=name),
            data=Data(path=(os.fspath(self.rows / "answers.jsonl"),), **worlds.LENGTH),
            optimizer=OptimizerConfig(learning_rate=3e-4, schedule="cosine", warmup=10),
            train=Train(steps=120, batch_size=32), evaluate=Evaluate(every=40),
            checkpoint=CheckpointConfig(every=0, keep_last=1), log=LogConfig(tensorboard=False),
        ))  # fmt: skip

    def subject(self, stage: str) -> Subject:
        best = "@best" if stage in ("pretrain", "sft") else ""
        return worlds.open_subject(stage, f"{self.root / stage}{best}")

    def results(self) -> tuple[list[str], list[Result]]:
        """What every stage answers to the held-out prompts."""
        prompts = [row["prompt"] for row in worlds.read(self.rows / "prompts_held_out.jsonl")]
        subjects = [self.subject(stage) for stage in ("pretrain", "sft", *METHODS)]
        results = compare(
            subjects, prompts, {}, world.gold, baseline="sft", sampling=worlds.SAMPLING, samples=4, seed=self.seed
        )  # fmt: skip
        return prompts, results

    def curves(self) -> list[report.Block]:
        """What the log files of the stages hold."""
        held_out = {stage: self._curve(stage, "eval", "eval/loss") for stage in ("pretrain", "sft")}
        margins = {stage: self._curve(stage, "metrics", "rewards/margins") for stage in METHODS}
        right = {stage: self._curve(stage, "eval", "eval/rewards/accuracies") for stage in METHODS}
        return [
            report.Lines("Held-out loss until it stops falling", "step", "nats a token", held_out, log_y=True),
            report.Lines("Reward margin of the training pairs", "step", "reward, chosen less rejected", margins),
            report.Lines("Held-out pairs ranked as people did", "step", "share of pairs", right),
        ]

    def _curve(self, stage: str, file: str, metric: str) -> tuple[list[float], list[float]]:
        rows = map(json.loads, (self.root / stage / f"{file}.jsonl").read_text().splitlines())
        points = [(row["step"], row[metric]) for row in rows if metric in row]
        return [x for x, _ in points], [y for _, y in points]


def run_seed(root: epath.Path, seed: int, console: Console) -> tuple[Chain, list[str], list[Result]]:
    """All stages of one seed."""
    chain = Chain(root, seed)
    console.rule(f"seed {seed}: 1. pre-training on the documents of the world")
    chain.likelihood("pretrain", None, "documents", RECIPE.pretrain)
    console.rule(f"seed {seed}: 2. supervised fine-tuning on demonstrations")
    chain.likelihood("sft", "pretrain", "demonstrations", RECIPE.sft)
    console.rule(f"seed {seed}: 3. people compare two answers to each prompt")
    chain.ask_people()
    for name in METHODS:
        console.rule(f"seed {seed}: 4. {name.upper()} on what people preferred")
        chain.prefer(name)
    console.rule(f"seed {seed}: 5. answers to prompts that were never trained on")
    return chain, *chain.results()


STORY = (
    "A tiny model was pre-trained on the documents of a small world, fine-tuned on demonstrations until the held-out "
    "loss stopped falling, and then trained with DPO, IPO and KTO on its own answers as simulated people compared "
    f"them. These people err in {RECIPE.world.labeller.noise:.0%} of their labels and like long answers.",
    "The gold reward is the known one of the world, from -3 to 3: 2 for a right answer, 1 for politeness (-1 for "
    "rudeness), less 0.1 for each word too many. Nothing was trained on it, and no prompt below was in any training.",
)


def main(program: Quickstart) -> None:
    """Runs it."""
    if not program.seeds or len(set(program.seeds)) < len(program.seeds) or min(program.seeds) < 0:
        raise UserError(f"--seeds={program.seeds} is not allowed; give different numbers of at least 0, as in 0,1,2.")
    run.use_compile_cache()
    root, console = epath.Path(os.path.expanduser(program.workdir)), Console()
    blocks: list[report.Block] = [report.Text("What was done", STORY)]
    tables = []
    for seed in program.seeds:
        chain, prompts, results = run_seed(root / f"seed{seed}", seed, console)
        title = f"seed {seed}: {len(prompts)} held-out prompts, gold reward"
        tables.append(evaluation.table(results, "sft", title))
        drawn = [*evaluation.pictures(results, "sft", "gold reward"), *chain.curves()]
        blocks += [tables[-1], *drawn, evaluation.side_by_side(results, prompts)]
        file = root / f"seed{seed}" / "results.json"
        file.write_text(json.dumps(evaluation.as_json(results), indent=2) + "\n")
        evaluation.write_answers(root / f"seed{seed}" / "answers.jsonl", results, prompts)
    for table in tables:
        evaluation.tell(table)
    seeds = ",".join(map(str, program.seeds))
    command = f"python -m experiments.quickstart --seeds={seeds}"
    blocks.append(report.Code("How it was made", command))
    print(f"wrote {report.write(root / 'report.html', 'What training changed', blocks)}")


if __name__ == "__main__":
    flags.run(main, Quickstart)
