"""Tasks and judgements that the tests of the record share."""

from rlhf_jax.feedback.judgement import Judgement, Task


def task(number: int = 0, count: int = 3, **more) -> Task:
    answers = tuple(f"answer {k} to {number}" for k in range(count))
    return Task(prompt=f"question {number}?", answers=answers, **more)


def say(one: Task, who: str, id: str, ranks=(0.0, 1.0, 2.0), **more) -> Judgement:
    return Judgement(id=id, task=one.id, labeller=who, ranks=tuple(ranks), **more)
