"""The tokenizer that belongs to a model, and one that is made from texts."""

import os
from collections.abc import Sequence
from typing import Any

from etils import epath

from rlhf_jax.errors import UserError
from rlhf_jax.models import checkpoint
from rlhf_jax.models.start import Start


def tokenizer_folder(found: Start, other: str | None = None) -> epath.Path:
    """Where the tokenizer is: in `other` if given, else with the adapter if it has one of its own, or the model."""
    if other:
        return checkpoint.folder(other, "--config.model.tokenizer")
    return found.with_file("tokenizer.json", "tokenizer_config.json")


def load_tokenizer(folder: epath.Path) -> Any:
    """The tokenizer of a model folder. Errors: UserError where there is none."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it advises to install torch
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(os.fspath(folder))
    except Exception as error:  # a broken tokenizer.json raises whatever its reader stumbled over
        reason = f"{type(error).__name__}: {error}".split("\n")[0]
        raise UserError(
            f"{folder} holds no tokenizer that transformers can read ({reason}); "
            "give one with --config.model.tokenizer=FOLDER."
        ) from error


def make_tokenizer(texts: Sequence[str], size: int) -> Any:
    """A byte-level tokenizer of `size` tokens made from texts, with the tokens <|start|> and <|end|>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<|start|> $A", special_tokens=[("<|start|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|start|>", eos_token="<|end|>", pad_token="<|end|>"
    )
