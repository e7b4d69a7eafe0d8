"""What a run reads, and how rows become token rows."""

import dataclasses
from typing import Annotated, Literal

FormatName = Literal[
    "auto",
    "self_instruct",
    "oasst",
    "oasst_ranking",
    "scored_transcripts",
    "domain_normal",
    "domain_academy",
    "domain_business",
    "domain_entertainment",
    "domain_literature",
    "pandalm",
    "graded_pair",
    "judged_pair",
    "finegrained",
    "finegrained_pairs",
    "finegrained_ranking",
    "finegrained_spans",
    "first_error",
    "mistake_index",
    "prm800k",
    "solutions",
    "problem",
    "first_turn",
    "preference",
    "ranking",
    "stepwise",
    "rated_steps",
    "labelled",
    "labelled_messages",
    "sharegpt_preference",
    "hh",
    "implicit_preference",
    "prompt_completion",
    "alpaca",
    "sharegpt",
    "messages",
    "question_answer",
    "prompt",
    "text",
]


@dataclasses.dataclass(frozen=True)
class Data:
    """Files, their format, the held-out share and the length policy."""

    path: Annotated[tuple[str, ...], "data files, folders or Hub names; several are mixed"] = ()
    weights: Annotated[
        tuple[float, ...], "share of the rows drawn from each path; empty: in proportion to its size"
    ] = ()
    format: Annotated[FormatName, "the columns of the rows; auto finds out from the first rows"] = "auto"
    split: Annotated[str, "split of a Hub data set that is read"] = "train"
    eval_path: Annotated[tuple[str, ...], "held-out files, folders or Hub names; their prompts are not trained"] = ()
    eval_share: Annotated[float, "share of prompts held out of path when eval_path is empty, 0 to below 1"] = 0.05
    split_seed: Annotated[int | None, "of the held-out split; none: the run's seed"] = None
    length: Annotated[int | None, "most tokens a row may have; none: the context of the model"] = None
    too_long: Annotated[
        Literal["cut_prompt", "refuse", "stop"],
        "rows over the length: cut the oldest prompt tokens, leave the row out, or stop the run",
    ] = "cut_prompt"
    train_on: Annotated[
        Literal["all", "last"], "assistant turns of a conversation that are trained: all of them, or the last"
    ] = "all"
    special: Annotated[
        Literal["text", "tokens"],
        "special tokens written out in rows of strings: they stay text, or are tokens, as in rows rendered ahead",
    ] = "text"
    max_refused: Annotated[float, "largest share of unusable rows that a run accepts, 0 to 1"] = 0.05
    chat_template: Annotated[str | None, "Jinja file used in the place of the tokenizer's chat template"] = None
    probability: Annotated[
        str | None, "column of pairs: the chance that chosen is better, 0 to 1, or a list of votes; none: 1"
    ] = None
    margin: Annotated[
        str | None, "column of pairs: a number that the loss takes as its margin; none: the loss's own"
    ] = None
    merge: Annotated[
        bool,
        "rows of one prompt with the same answers, of several labellers, become one whose labels are soft: "
        "the share of them",
    ] = False
    ties: Annotated[
        bool, "answers of equal rank are labels too: each is as likely the better; else they say nothing"
    ] = False
    bootstrap: Annotated[
        bool, "draw the training rows with replacement, by the seed: for the members of an ensemble"
    ] = False
    buckets: Annotated[
        tuple[int, ...], "row lengths batches are padded to; empty: powers of two from 64, and length"
    ] = ()
    pack: Annotated[
        bool, "put several examples into each row of data.length tokens; a batch then counts rows, not examples"
    ] = False
    threads: Annotated[int, "threads that build batches ahead; 0: none"] = 2
