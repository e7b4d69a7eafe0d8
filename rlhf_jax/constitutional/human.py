"""People's pairs of what is helpful, in the form that a model's labels have, so that both are mixed by their shares."""

import math
from typing import Any

from rlhf_jax.constitutional.config import PROBABILITY
from rlhf_jax.data.rows import Text
from rlhf_jax.errors import UserError
from rlhf_jax.feedback import pairs


def read(path: str, probability: str | None, chat: bool) -> list[dict[str, Any]]:
    """`rows` of `opened`."""
    return rows(opened(path, probability), path, chat)


def opened(path: str, probability: str | None) -> pairs.Read:
    """The pairs of a file.

    Args:
      path: whatever holds pairs or rankings (`feedback.pairs`).
      probability: its column of chances or votes for chosen; None: chosen is better.
    Errors: UserError for a file without such rows, or for evaluation alone, tools on offer, and a column that isn't
      read.
    """
    try:
        found = pairs.read(path, path, probability)
    except UserError as error:
        raise UserError(str(error).replace(pairs.FLAG, "--config.human")) from error
    if found.evaluation:
        raise UserError(f"{path} of --config.human is for evaluation alone; give rows that may be trained on.")
    if probability is not None and not found.chances:
        raise UserError("--config.human_probability is of rows of chosen and rejected, and there are none; drop it.")
    if tools := next((one.where for one in found.pairs if one.tools), None):
        raise UserError(f"{tools} of --config.human offers tools, which no model is shown here; leave it out.")
    return found


def rows(found: pairs.Read, path: str, chat: bool) -> list[dict[str, Any]]:
    """Rows prompt, chosen, rejected and probability, which is at least a half.

    What several people say of one pair becomes the mean of their shares. Ties say nothing and are left out.

    Args:
      path: what they come from, for messages.
      chat: whether questions are written as messages.
    Errors: UserError where nothing is preferred.
    """
    said: dict[tuple[Text, Text, Text], list[float]] = {}
    for one in found.pairs:
        if one.label is not None:
            prompt, first, second = one.pair if chat else one.plain
            turned = (prompt, second, first) in said
            said.setdefault((prompt, second, first) if turned else (prompt, first, second), []).append(
                1 - one.label if turned else one.label
            )
    made = []
    for (prompt, first, second), shares in said.items():
        share = math.fsum(shares) / len(shares)
        if share == 0.5:
            continue
        chosen, rejected = (first, second) if share > 0.5 else (second, first)
        texts: dict[str, Text] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        made.append({name: _plain(text) for name, text in texts.items()} | {PROBABILITY: max(share, 1 - share)})
    if not made:
        raise UserError(f"{path} of --config.human prefers nothing; give rows with a chosen and a rejected answer.")
    return made


def _plain(text: Text) -> str | list[dict[str, Any]]:
    return text if isinstance(text, str) else [turn.fields for turn in text]
