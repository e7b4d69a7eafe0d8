"""The whole way from one config: python -m experiments.chain --config=configs/chain.py:tiny --workdir=runs/chain.

SFT, rankings of its answers, a reward model, PPO against it and DPO on the same rankings; then all of them and the
best of n answers of the SFT model on prompts that nothing was trained on, in report.html. docs/chain.md has more.
"""

import dataclasses
import json
import os
import shlex
import sys
from typing import Annotated, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # the compiler's own notes are not for the user
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

from etils import epath

from experiments import evaluate as evaluation
from rlhf_jax import fields, flags, report, run
from rlhf_jax.chain import blocks, labelled, stages, whose
from rlhf_jax.chain.config import Chain
from rlhf_jax.chain.measure import BASE, measure


@dataclasses.dataclass(frozen=True)
class Program:
    """Runs SFT, rankings, a reward model, PPO and DPO, compares them and writes report.html."""

    config: Chain
    workdir: Annotated[str, "folder that everything is written to; the same command goes on where it stopped"]


def run_chain(chain: Chain, workdir: str, command: str) -> dict[str, Any] | None:
    """All stages, then report.html and results.json, whose content it returns; None where people have to rank first.

    What is finished is not done again.
    """
    place = epath.Path(os.path.expanduser(workdir))
    if (found := finished(chain, place)) is not None:
        print(f"finished: {place} holds all stages and {place / 'report.html'}; there is nothing left to do")
        return found
    products = stages.train(chain, workdir)
    if products is None:
        return None
    print(f"\nevaluation: answers to prompts that nothing was trained on, in {place}", flush=True)
    found = measure(chain, place, products)
    rests = labelled.rests(chain, place, products.labels)
    title = f"{len(found.prompts)} held-out prompts, {found.score}"
    told = blocks.finish(evaluation.table(found.results, BASE, title), found)
    evaluation.tell(told)
    said = [*blocks.verdict(found), whose.verdict(rests, chain)]
    print("\n".join(said))
    made = [
        report.Text("What came out", said), told, blocks.story(chain), *whose.blocks(rests, chain),
        *blocks.frontiers(found), *blocks.learning(place, chain), *blocks.reward_model(found), *blocks.rollouts(place),
        evaluation.side_by_side(found.results, found.prompts), blocks.made_by(command, chain),
    ]  # fmt: skip
    evaluation.write_answers(place / "answers.jsonl", found.results, found.prompts)
    print(f"wrote {report.write(place / 'report.html', 'From demonstrations to PPO', made)}")
    whole = {
        "config": fields.to_dict(chain), "verdict": said, "table": dataclasses.asdict(told),
        "models": evaluation.as_json(found.results), "proxy": {n: e._asdict() for n, e in found.proxy.items()},
        "frontier": blocks.points(found), "labels": whose.as_json(rests, chain),
    }  # fmt: skip
    part = place / "results.json.part"  # written last: it says that all is done
    part.write_text(json.dumps(whole, indent=2) + "\n")
    part.replace(place / "results.json")
    return whole


def finished(chain: Chain, place: epath.Path) -> dict[str, Any] | None:
    """What a chain of the same config has left, if it came to its end."""
    file = place / "results.json"
    if not file.exists() or not (place / "report.html").exists():
        return None
    found = json.loads(file.read_text())
    return found if found["config"] == fields.to_dict(chain) else None


def main(program: Program) -> None:
    """Runs it."""
    run.use_compile_cache()
    run_chain(program.config, program.workdir, f"python -m experiments.chain {shlex.join(sys.argv[1:])}")


if __name__ == "__main__":
    flags.run(main, Program)
