"""A few rows, a tokenizer made from them, and a checkpoint to train."""

# pyright: reportMissingImports=false

import pathlib
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.parity.checkpoints import LLAMA, LLAMA3, draw

# As ChatML, with the newline between turns: TRL trains one that stands behind the last turn, ours does not.
CHATML = (
    "{{ bos_token }}{% for m in messages %}{{ '' if loop.first else '\n' }}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<pad>", "<s>", "<|im_end|>", "<|im_start|>"]

# Prompts and answers of very uneven length. String prompts end in a newline, so that tokenising prompt and
# completion together or apart is the same.
PAIRS = [
    ("What grows here?\n", "Oats, and a little barley on the north slope.", "Nothing."),
    ("Name a colour.\n", "Blue.", "I would rather not say anything about colours at all, if you don't mind."),
    ("How far is the sea? I have been walking since the morning and the map is wet.\n", "Two miles.", "Far."),
    ("Why?\n", "Because the bridge was closed in the spring and no one told the carriers.", "Why not?"),
    ("Is it raining?\n", "A little: take a coat, and boots if you mean to cross the field.", "It is raining."),
    ("Count to five.\n", "1, 2, 3, 4, 5", "5 4 3 2 1 0 and then down again until you are tired of it"),
    ("Who wrote the letter that came on Monday?\n", "My sister did.", "A man; a woman; nobody knows who."),
    ("Écris « oui ».\n", "oui", "Non, je n'écris pas ça."),
]


def _messages(role: str, text: str) -> list[dict[str, str]]:
    return [{"role": role, "content": text.rstrip("\n")}]


def pairs(chat: bool) -> list[dict[str, Any]]:
    """prompt, chosen and rejected, as messages or as strings."""
    if not chat:
        return [dict(prompt=p, chosen=c, rejected=r) for p, c, r in PAIRS]
    roles = ("user", "assistant", "assistant")
    columns = ("prompt", "chosen", "rejected")
    return [dict(zip(columns, map(_messages, roles, pair), strict=True)) for pair in PAIRS]


def demonstrations(chat: bool) -> list[dict[str, Any]]:
    """prompt and completion."""
    return [dict(prompt=row["prompt"], completion=row["chosen"]) for row in pairs(chat)]


def labelled(chat: bool) -> list[dict[str, Any]]:
    """prompt, completion and label: three good answers in eight."""
    rows = [(row, i % 3 == 0) for i, row in enumerate(pairs(chat))]
    return [
        dict(prompt=row["prompt"], completion=row["chosen" if good else "rejected"], label=good) for row, good in rows
    ]


def write_checkpoint(folder: pathlib.Path) -> None:
    """A small Llama with every parameter random, and a byte-level tokenizer that begins texts with <s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for pair in PAIRS for text in pair], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="<|im_end|>", pad_token="<pad>",
        chat_template=CHATML,
    ).save_pretrained(folder)  # fmt: skip
    config: dict[str, Any] = LLAMA | LLAMA3 | {"vocab_size": tokenizer.get_vocab_size()}
    model = LlamaForCausalLM(LlamaConfig(**config))
    draw(model)
    model.save_pretrained(folder)
