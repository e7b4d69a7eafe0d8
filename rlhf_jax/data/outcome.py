"""What became of every row that was read: what a run says at its start, and what rows.jsonl holds."""

import dataclasses
import json

from etils import epath


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of every row that was read.

    Attributes:
      read: rows read (lines of files, also those that are no row).
      train, evaluation: examples used; a ranking gives several.
      refused: rows that can't be used, with the reason.
      cut: rows whose prompt lost its oldest tokens.
      split: texts without a prompt that were cut into pieces.
      too_long: rows left out because they don't fit the length.
      shared: rows of `path` left out because their prompt stands in `eval_path`.
      left: good rows that hold nothing to learn from, such as ties, with the reason.
      tokens, lost: tokens of all rows that could be encoded, and how many of them the length took: cut away, or of
        rows that were left out for it.
      merged: rows that became one with an earlier row of the same prompt and answers; of prompts alone, of the same
        prompt and columns.
      kept_as_text: rows of strings that hold special tokens written out, which stayed text.
    """

    read: int
    train: int
    evaluation: int
    refused: tuple[tuple[str, str], ...]
    cut: tuple[str, ...]
    too_long: tuple[str, ...]
    shared: tuple[str, ...] = ()
    left: tuple[tuple[str, str], ...] = ()
    tokens: int = 0
    lost: int = 0
    kept_as_text: int = 0
    split: tuple[str, ...] = ()
    merged: tuple[str, ...] = ()

    @property
    def used(self) -> int:
        """Examples for training and evaluation."""
        return self.train + self.evaluation

    def lines(self, first: int = 5) -> list[str]:
        """Sentences for the start of a run, naming the `first` rows of each kind."""
        said = [f"{self.read} rows read: {self.train} examples to train on, {self.evaluation} held out"]
        refused, left = ([f"{where} ({why})" for where, why in rows] for rows in (self.refused, self.left))
        for rows, what in (
            (refused, "refused"),
            (left, "left out: nothing to learn from"),
            (self.cut, "cut to the length (oldest prompt tokens)"),
            (self.split, "texts cut into pieces of the length"),
            (self.too_long, "left out: longer than the length"),
            (self.shared, "left out: prompt also in the held-out rows"),
            (self.merged, "merged with an earlier row of the same prompt and, where they are read, answers"),
        ):
            if rows:
                more = ", ..." if len(rows) > first else ""
                said.append(f"{len(rows)} {what}: {', '.join(rows[:first])}{more}")
        if self.kept_as_text:
            said.append(
                f"{self.kept_as_text} rows hold special tokens written out, which stay text; if these rows were "
                "rendered ahead, give --config.data.special=tokens"
            )
        said.append(f"{self.lost:,} of {self.tokens:,} tokens lost to the length")
        return said

    def write(self, path: str) -> None:
        """Every row that was refused, cut or left out, one JSON object a line: where, what, reason."""
        rows = [{"where": where, "what": "refused", "reason": reason} for where, reason in self.refused]
        rows += [{"where": where, "what": "left", "reason": reason} for where, reason in self.left]
        for places, what in (
            (self.cut, "cut"),
            (self.split, "split"),
            (self.too_long, "too long"),
            (self.shared, "prompt held out"),
            (self.merged, "merged"),
        ):
            rows += [{"where": where, "what": what, "reason": ""} for where in places]
        epath.Path(path).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
