"""What packing gains: real tokens a second of training, packed and padded in turn.

    python -m benchmarks.packing --model=FOLDER --data=ROWS.jsonl
    python -m benchmarks.packing --model=FOLDER --data=ROWS.jsonl --algorithm=preference --loss=dpo

FOLDER holds a Hugging Face checkpoint. Both sides take the same examples, the same step and 8 rows a batch, for pairs
with the reference's columns at hand; padded ones are cut to the smallest bucket that holds them, as always. A round is
`--steps` updates of each side; the first compiles and doesn't count. Padding counts as no token. The last line of the
output is JSON: medians over the rounds, and the share of padding.
"""

import argparse
import dataclasses
import json
import os
import statistics
import tempfile
import time

import jax
from etils import epath

from rlhf_jax.build import build
from rlhf_jax.config import Config, Evaluate, Loss, ModelConfig, Train
from rlhf_jax.data.config import Data
from rlhf_jax.metrics import LogConfig
from rlhf_jax.run import Run
from rlhf_jax.sharding import MeshShape

SIDES = {"padded": False, "packed": True}


class Side:
    """One way of making batches, with its own state and compiled step."""

    def __init__(self, config: Config, pack: bool, workdir: str):
        data = dataclasses.replace(config.data, pack=pack)
        self.built = build(dataclasses.replace(config, data=data), epath.Path(workdir))
        self.run = Run([self.built], None)
        self.feed = self.run._feed()

    def round(self, steps: int) -> tuple[int, int, float]:
        """Real tokens, all tokens and seconds of some updates, batches made ahead."""
        batches = [next(self.feed)[1] for _ in range(steps)]
        start = time.perf_counter()
        counts = []
        for batch in batches:
            self.run.state, metrics = self.run.step(self.run.state, self.run.frozen, batch)
            counts.append(metrics["tokens"])
        jax.block_until_ready(self.run.state.params)
        seconds = time.perf_counter() - start
        return int(sum(map(int, counts))), sum(batch["tokens"].size for batch in batches), seconds


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description="What packing gains.")
    parser.add_argument("--model", required=True, help="Hugging Face checkpoint")
    parser.add_argument("--data", required=True, help="rows")
    parser.add_argument("--algorithm", default="sft")
    parser.add_argument("--loss", default="nll")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            algorithm=args.algorithm, loss=Loss(name=args.loss), cache=os.path.join(folder, "cache"),
            model=ModelConfig(path=args.model), data=Data(path=(args.data,), eval_share=0.0, threads=0),
            train=Train(steps=args.steps * (args.rounds + 1), batch_size=8), evaluate=Evaluate(every=0),
            mesh=MeshShape(data=1), log=LogConfig(tensorboard=False, progress=False),
        )  # fmt: skip
        sides = {name: Side(config, pack, os.path.join(folder, name)) for name, pack in SIDES.items()}
        found: dict[str, list[tuple[int, int, float]]] = {name: [] for name in sides}
        for number in range(args.rounds + 1):
            for name, side in sides.items():
                tokens, size, seconds = side.round(args.steps)
                if number:
                    found[name].append((tokens, size, seconds))
                    print(f"round {number}, {name}: {tokens / seconds:,.0f} tokens/s", flush=True)
        out = {
            name: {
                "tokens_per_second": round(statistics.median(tokens / seconds for tokens, _, seconds in rows)),
                "padding": round(1 - sum(row[0] for row in rows) / sum(row[1] for row in rows), 3),
            }
            for name, rows in found.items()
        }
        ratio = out["packed"]["tokens_per_second"] / out["padded"]["tokens_per_second"]
        print(json.dumps(out | {"ratio": round(ratio, 2)}))


if __name__ == "__main__":
    main()
