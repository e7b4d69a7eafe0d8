"""Rows brought to a length."""

from collections.abc import Sequence

import numpy as np

from rlhf_jax.data.tokens import Tokens


def fit(rows: Sequence[Tokens], length: int) -> tuple[Tokens, ...] | None:
    """Rows with one prompt, cut to `length` tokens: the oldest prompt tokens go, the same from every row.

    A beginning token stays first, and one prompt token at least is kept, so that the first completion token
    keeps something to be predicted from. None if the longest completion doesn't fit even so. A prompt alone keeps its
    newest tokens: from a `length` of 2 on, at least one besides the beginning token.
    """
    over = max(len(row) for row in rows) - length
    if over <= 0:
        return tuple(rows)
    if over > min(row.start for row in rows) - 1:
        return None
    return tuple(_without(row, slice(row.head, row.head + over)) for row in rows)


def pieces(text: Tokens, length: int) -> tuple[Tokens, ...]:
    """A text without a prompt in pieces of `length` tokens, of which the last may be shorter.

    A piece begins with the last token of the one before it, which is not trained again: so each token is trained
    once, the first of a piece but the first from that one token alone.
    """
    spans = [slice(start, start + length) for start in range(0, max(len(text) - 1, 1), length - 1)]
    first, *others = (
        Tokens(text.ids[span], text.mask[span], text.head, text.ends[within] - span.start)
        for span in spans
        for within in [(text.ends >= span.start) & (text.ends < span.stop)]
    )
    # A step that ends with the token that two pieces share has ended in the first of them.
    return first, *(
        Tokens(one.ids, one.mask & (np.arange(len(one)) > 0), ends=one.ends[one.ends > 0]) for one in others
    )


def _without(row: Tokens, gone: slice) -> Tokens:
    ends = row.ends - (gone.stop - gone.start)  # an answer, and so a step's end, stands behind what is cut
    return Tokens(np.delete(row.ids, gone), np.delete(row.mask, gone), row.head, ends)
