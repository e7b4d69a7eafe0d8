"""Constitutional AI: python -m experiments.constitutional --config=configs/constitutional.py:tiny --workdir=DIR.

A helpful model's answers are criticised and revised by principles, a model fine-tuned on the revisions, its answers
compared by a model, and DPO or PPO learns from that; report.html says what became of harm and of helpfulness.
docs/constitutional.md has more.
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
from rlhf_jax.constitutional import blocks, stages
from rlhf_jax.constitutional.config import Constitutional
from rlhf_jax.constitutional.measure import Measured, measure
from rlhf_jax.evaluate.scorers import plain


@dataclasses.dataclass(frozen=True)
class Program:
    """Runs critique and revision, a model's labels, and DPO or PPO; compares what comes of it; writes report.html."""

    config: Constitutional
    workdir: Annotated[str, "folder that everything is written to; the same command goes on where it stopped"]


def run_all(whole: Constitutional, workdir: str, command: str) -> dict[str, Any]:
    """All stages, then report.html and results.json, whose content it returns. What is finished is not done again."""
    place = epath.Path(os.path.expanduser(workdir))
    if (done := finished(whole, place)) is not None:
        print(f"finished: {place} holds all stages and {place / 'report.html'}; there is nothing left to do")
        return done
    products = stages.train(whole, workdir)
    print(f"\nevaluation: answers to prompts that nothing was trained on, in {place}", flush=True)
    found = measure(whole, products)
    told, said = blocks.table(found), blocks.verdict(found)
    evaluation.tell(told)
    print("\n".join(said))
    made = [
        report.Text("What came out", said), told, *blocks.pictures(found), blocks.story(whole),
        *blocks.revisions(found), *blocks.preferences(place, whole), *blocks.learning(place, whole),
        blocks.made_by(command, whole),
    ]  # fmt: skip
    write_answers(place / "answers.jsonl", found)
    print(f"wrote {report.write(place / 'report.html', 'Constitutional AI', made)}")
    results = {"config": fields.to_dict(whole), "verdict": said, **blocks.as_json(found)}
    part = place / "results.json.part"  # written last: it says that all is done
    part.write_text(json.dumps(results, indent=2) + "\n")
    part.replace(place / "results.json")
    return results


def write_answers(file: epath.Path, found: Measured) -> None:
    """Every answer with its score, a line each."""
    lines = [
        json.dumps({"side": side, "prompt": plain(prompt), "model": name, "completion": text, "score": float(value)})
        for side, view in (("harmless", found.harmless), ("helpful", found.helpful))
        for place, prompt in enumerate(view.prompts)
        for name, texts in view.texts.items()
        for text, value in zip(texts[place], view.scores[name][place], strict=True)
    ]
    file.write_text("\n".join(lines) + "\n")


def finished(whole: Constitutional, place: epath.Path) -> dict[str, Any] | None:
    """What a run of the same config has left, if it came to its end."""
    file = place / "results.json"
    whole_there = all(stages.begun(place, stage) for stage in whole.made)
    if not file.exists() or not (place / "report.html").exists() or not whole_there:
        return None
    found = json.loads(file.read_text())
    return found if found["config"] == fields.to_dict(whole) else None


def main(program: Program) -> None:
    """Runs it."""
    run.use_compile_cache()
    run_all(program.config, program.workdir, f"python -m experiments.constitutional {shlex.join(sys.argv[1:])}")


if __name__ == "__main__":
    flags.run(main, Program)
