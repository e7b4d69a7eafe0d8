"""Two answers of which people say the better one: whether a model holds it for likelier, judges it so, or scores it."""

from collections.abc import Sequence

from rlhf_jax.data.rows import Refusal
from rlhf_jax.evaluate.suite.choice import hit, weigh
from rlhf_jax.evaluate.suite.items import Against, Examinee, Found, Item, figure, unjudged
from rlhf_jax.feedback.judges import Pair

WRITTEN = ("likelier", "likelier_per_byte", "judged")  # figures of a language model
SCORED = "scored"  # that of a reward model


def preferred(items: Sequence[Item], examinee: Examinee, seed: int = 0, against: Against | None = None) -> Found:
    """The share of pairs whose better answer is ahead; equal ones count a half.

    Of a reward model `scored`, by its score. Of a language model `likelier` by the sum over tokens,
    `likelier_per_byte` by the mean over bytes, and `judged`: it is asked which one is better, in both orders.

    References: Askell et al. 2021, arXiv:2112.00861; Zeng et al. 2023, arXiv:2310.07641.
    """
    return _written(items, examinee, seed) if examinee.writes else _scored(items, examinee, seed)


def _written(items: Sequence[Item], examinee: Examinee, seed: int) -> Found:
    weighed, left = weigh(items, examinee)
    known = {one.item.where: one for one in weighed}
    verdicts = examinee.verdicts([Pair(item.prompt, *item.options) for item in items])
    ahead = {
        item.where: hit((verdict.probability, 1 - verdict.probability), item.right)
        for item, verdict in zip(items, verdicts, strict=True)
        if verdict.probability is not None and unjudged(verdict) is None
    }
    lines = []
    for item, verdict in zip(items, verdicts, strict=True):
        one, values = known.get(item.where), {}
        if one is not None:
            values |= {"likelier": hit(one.logprobs, item.right), "likelier_per_byte": hit(one.per_byte, item.right)}
        if item.where in ahead:
            values["judged"] = ahead[item.where]
        else:
            left[item.where] = "; ".join(filter(None, [left.get(item.where), f"not judged, {unjudged(verdict)}"]))
        if values:
            line = {"where": item.where, "group": item.group, "prompt": item.prompt, "options": item.options}
            said = verdict.probability if item.where in ahead else None
            line |= {"right": item.right, "logprobs": one and one.logprobs, "judged_first": said}
            lines.append(line | {"values": values})
    figures = []
    for name in WRITTEN:
        own = {line["where"]: line["values"][name] for line in lines if name in line["values"]}
        some = [item for item in items if item.where in own]
        figures += figure(name, some, [own[item.where] for item in some], 0.5, seed=seed)
    return Found(figures, lines, left)


def _scored(items: Sequence[Item], examinee: Examinee, seed: int) -> Found:
    told = iter(examinee.scores([item.asked(option) for item in items for option in item.options]))
    kept, values, lines, left = [], [], [], {}
    for item in items:
        scores = [next(told) for _ in item.options]
        if why := next((x for x in scores if isinstance(x, Refusal)), None):
            left[item.where] = str(why)
            continue
        numbers = [x for x in scores if not isinstance(x, Refusal)]
        kept.append(item)
        values.append(hit(numbers, item.right))
        line = {"where": item.where, "group": item.group, "prompt": item.prompt, "options": item.options}
        lines.append(line | {"right": item.right, "scores": numbers, "values": {SCORED: values[-1]}})
    return Found(figure(SCORED, kept, values, 0.5, seed=seed), lines, left)
