"""What a chain's report says of whose judgements its models rest on: a sentence, a table, figures."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rlhf_jax import report
from rlhf_jax.chain.config import Chain
from rlhf_jax.chain.labelled import JUDGE, PERSON, SCORER, SIMULATED, UNKNOWN, Rests, Share

SEVERAL = {PERSON: "people", SIMULATED: "simulated people", JUDGE: "judges"}
LISTED, SHOWN = 5, 30  # labellers in the sentence, and in the table
NAMES = (
    "Names are as the rows have them, and nothing here tells whether a person stands behind one. Judgements: a ranking "
    "each, or what one labeller said of a pair; comparisons: of two different answers. With ties: judgements that put "
    "two different answers in one place."
)


def verdict(found: Rests | None, chain: Chain) -> str:
    """Whose judgements the models rest on, as it is printed."""
    first, *_ = sentences(found, chain)
    return " ".join((first, *_given(chain)))


def sentences(found: Rests | None, chain: Chain) -> list[str]:
    """All that can be said of it; the first sentence says the most."""
    if found is None:
        return ["Nothing was trained on judgements here.", *_given(chain)]
    if not found.judgements:
        return [f"Nobody knows whose judgements this rests on: {found.file} holds none that could be counted."]
    names = {"reward": "the reward model", "dpo": chain.dpo.loss.name}
    said = [f"Whose judgements this rests on: {_what(found)}, {_whom(found, chain)}.", *_trained(found, names)]
    if {"reward", "ppo"} <= {*chain.made}:
        said.append("PPO learned from that reward model's scores, and so rests on the same judgements.")
    return said + _when(found) + _given(chain)


def _given(chain: Chain) -> list[str]:
    """What was named and not trained here."""
    names = {"reward": "the reward model", "ppo": "ppo", "dpo": "dpo"}
    given = {names[stage]: path for stage in names if (path := getattr(chain.inputs, stage)) is not None}
    return [f"Nothing here says whose judgements {name} rests on, which was given: {p}." for name, p in given.items()]


def _what(found: Rests) -> str:
    kinds = ((found.rankings, "ranking"), (found.others, "judgement" if found.comparisons else "labelled answer"))
    counted = " and ".join(_count(number, one) for number, one in kinds if number)
    return f"{counted} of the answers to {_count(found.prompts, 'prompt')}"


def _whom(found: Rests, chain: Chain) -> str:
    """By whom, kind by kind, with how many were each kind's where there are several."""
    told: list[str] = []
    kinds = list(dict.fromkeys(one.kind for one in found.people if one.judgements))
    for kind in kinds:
        of = [one for one in found.people if one.kind == kind and one.judgements]
        number = f"{sum(one.judgements for one in of):,} " if len(kinds) > 1 else ""
        if kind == UNKNOWN:
            told.append(f"{number}by nobody knows whom: {'their' if number else 'the'} rows don't name who judged")
            continue
        listed = ", ".join(f"{one.name} {one.judgements:,}" for one in of[:LISTED])
        listed += f" and {len(of) - LISTED:,} more" if len(of) > LISTED else ""
        if kind == SCORER:
            made = f", {chain.labels.by} with noise of the scale {chain.labels.scale}" if "labels" in chain.made else ""
            told.append(f"{number}by a scorer{made} ({_count(len(of), 'draw')} of its noise: {listed})")
        else:
            named = " whom the rows name" if kind == PERSON else ""
            told.append(f"{number}by {len(of):,} {kind if len(of) == 1 else SEVERAL[kind]}{named} ({listed})")
    return "; ".join(told)


def _trained(found: Rests, names: Mapping[str, str]) -> list[str]:
    """What became of the judgements in each stage; in one sentence where it was the same."""
    if len({*found.stages.values()}) > 1:
        return [_became(names[stage], share) for stage, share in found.stages.items()]
    return [_became(" and ".join(names[stage] for stage in found.stages), next(iter(found.stages.values())))]


def _became(who: str, share: Share) -> str:
    left = f", {share.left_out:,} stand in rows that can't be used" if share.left_out else ""
    said = f"{who} learned from {share.trained:,} of the file's {sum(share):,} judgements; "
    return f"{said[0].upper()}{said[1:]}{share.held_out:,} are of prompts that were held out{left}."


def _when(found: Rests) -> list[str]:
    """The span of time, the seconds and the guidelines, as far as the rows say them."""
    parts: list[str] = []
    if found.since and found.until:
        since, until = (time[:16].replace("T", " ") for time in (found.since, found.until))
        some = "" if found.timed == found.judgements else f" ({found.timed:,} of them say when)"
        parts.append(f"given from {since} to {until} UTC{some}")
    if found.seconds is not None:
        parts.append(f"in {found.seconds:.3g} seconds each, by the median")
    if found.guidelines:
        under = ", ".join(f"{version} ({number:,})" for version, number in found.guidelines.items())
        parts.append(f"under the guidelines of the version{'s' if len(found.guidelines) > 1 else ''} {under}")
    return [f"They were {', '.join(parts)}."] if parts else []


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def blocks(found: Rests | None, chain: Chain) -> list[report.Block]:
    """What the report shows of it."""
    made: list[report.Block] = [report.Text("Whose judgements this rests on", sentences(found, chain))]
    if found is None or not found.people:
        return made
    timed = any(one.seconds is not None for one in found.people)
    columns = ["labeller", "who", "judgements", "share", "prompts", "comparisons", "with ties", "held out"]
    rows = [
        [one.name or "-", one.kind, one.judgements, f"{one.judgements / max(1, found.judgements):.0%}", one.prompts]
        + [one.comparisons, one.ties, one.held_out]
        + ([] if not timed else ["-" if one.seconds is None else f"{one.seconds:.3g}"])
        for one in found.people[:SHOWN]
    ]
    more = len(found.people) - SHOWN
    note = f"{NAMES} {_count(more, 'labeller')} more with fewer judgements." if more > 0 else NAMES
    return [*made, report.Table("Labellers", columns + ["median seconds"] * timed, rows, note)]


def as_json(found: Rests | None, chain: Chain) -> dict[str, Any]:
    """All of it, for results.json."""
    told: dict[str, Any] = {"said": sentences(found, chain)}
    if found is None:
        return told
    whole = told | dataclasses.asdict(found)
    whole["people"] = [one._asdict() for one in found.people]
    return whole | {"stages": {stage: share._asdict() for stage, share in found.stages.items()}}
