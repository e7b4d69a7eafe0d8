"""Chat templates of well-known models, each with a tokenizer that has its special tokens, and what comes of them."""

import dataclasses
import json
import pathlib
import re

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf_jax.data.rows import Message
from rlhf_jax.data.tokens import Encoder, Tokens

TEMPLATES = pathlib.Path(__file__).parent / "templates"

SYSTEM = Message("system", "Be brief.")
TALK = (
    Message("user", "Hello?"),
    Message("assistant", "Good day."),
    Message("user", "How are you?"),
    Message("assistant", "Fine, thanks."),
    Message("user", "Will it rain?"),
    Message("assistant", "It will."),
)
THOUGHT = Message("assistant", "It will.", json.dumps({"reasoning_content": "Clouds."}))
CALL = json.dumps(
    {"tool_calls": [{"type": "function", "id": "abcdefgh1", "function": {"name": "sky", "arguments": {"at": "Oslo"}}}]}
)
USE = (
    Message("user", "Will it rain in Oslo?"),
    Message("assistant", "", CALL),
    Message("tool", "clouds", json.dumps({"name": "sky", "tool_call_id": "abcdefgh1"})),
    Message("assistant", "It will."),
)
TOOLS = json.dumps(
    [{"type": "function", "function": {"name": "sky", "description": "Looks up.", "parameters": {"type": "object"}}}]
)


@dataclasses.dataclass(frozen=True)
class Refused:
    """The reason, or what is in it."""

    why: str


@dataclasses.dataclass(frozen=True)
class Case:
    """A template, its tokens, and what is trained of each kind of row: a text, or a refusal.

    Attributes:
      answer: of an answer {}, in every turn but as said below.
      talk: None, or why three answers can't be trained together; the last can.
      system: None, or why a system message is refused.
      tools: what is trained of each turn of `USE`.
      thought: what is trained of `THOUGHT`.
      bos, eos: of the tokenizer.
      special, added: the tokens of the template, and of those the ones that aren't special.
      swallow: special tokens with `rstrip`, which take in the white space behind them.
    """

    answer: str | Refused
    tools: list[str] | Refused
    thought: str | Refused
    talk: Refused | None = None
    system: Refused | None = None
    bos: str | None = None
    eos: str = "</s>"
    special: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    swallow: bool = False


CHATML = ("<|im_start|>", "<|im_end|>")
HERMES = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")
LLAMA3 = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>")
GEMMA = ("<start_of_turn>", "<end_of_turn>")
DEEPSEEK = ("<|User|>", "<|Assistant|>", "<|tool▁calls▁begin|>", "<|tool▁outputs▁end|>")
HERMES_CALL = '<tool_call>\n{"name": "sky", "arguments": {"at": "Oslo"}}\n</tool_call><|im_end|>'
NO_TOOLS = Refused("leaves out the tools on offer")
NO_CALLS = Refused("leaves out calls of tools")
ALTERNATE = Refused("fails on the row (Conversation roles must alternate")
EARLIER = Refused("renders an answer differently when more follows it: '<think>")
THINKS = Refused("renders the prompt differently when its answer follows it: '<think>")
NO_END = Refused("writes no end token behind an answer")

CASES = {
    "chatml": Case("{}<|im_end|>", NO_TOOLS, "It will.<|im_end|>", eos="<|im_end|>", special=CHATML),
    "command_r": Case(
        "{}<|END_OF_TURN_TOKEN|>", ALTERNATE, "It will.<|END_OF_TURN_TOKEN|>", bos="<BOS_TOKEN>",
        eos="<|END_OF_TURN_TOKEN|>", special=("<|START_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>", "<|USER_TOKEN|>"),
    ),
    "deepseek_r1": Case(
        THINKS, NO_TOOLS, THINKS, talk=THINKS, bos="<|begin▁of▁sentence|>",
        eos="<|end▁of▁sentence|>", special=DEEPSEEK, added=("<think>", "</think>"),
    ),
    "deepseek_r1_first": Case(
        "{}<|end▁of▁sentence|>", NO_TOOLS, "It will.<|end▁of▁sentence|>", bos="<|begin▁of▁sentence|>",
        eos="<|end▁of▁sentence|>", special=DEEPSEEK, added=("<think>", "</think>"),
    ),
    "falcon": Case(NO_END, NO_TOOLS, NO_END, talk=NO_END, eos="<|endoftext|>"),
    "gemma2": Case(
        "{}<end_of_turn>", ALTERNATE, "It will.<end_of_turn>", system=Refused("System role not supported"),
        bos="<bos>", eos="<eos>", special=GEMMA, added=("\n\n", "  "),
    ),
    "gemma3": Case(
        "{}<end_of_turn>", ALTERNATE, "It will.<end_of_turn>", bos="<bos>", eos="<eos>", special=GEMMA,
        added=("\n\n", "  "),
    ),
    "llama2": Case(" {} </s>", ALTERNATE, " It will. </s>", bos="<s>"),
    "llama3": Case(
        "{}<|eot_id|>", NO_TOOLS, "It will.<|eot_id|>", bos="<|begin_of_text|>", eos="<|eot_id|>", special=LLAMA3
    ),
    "llama31": Case(
        "{}<|eot_id|>", ['{"name": "sky", "parameters": {"at": "Oslo"}}<|eot_id|>', "It will.<|eot_id|>"],
        "It will.<|eot_id|>", bos="<|begin_of_text|>", eos="<|eot_id|>", special=LLAMA3,
    ),
    "minimind": Case(
        "{}<|im_end|>", [HERMES_CALL, "It will.<|im_end|>"],
        Refused("renders the prompt differently when its answer follows it: '\\n</think>"),
    ),
    "mistral1": Case(
        "{}</s>", ALTERNATE, "It will.</s>", system=ALTERNATE, bos="<s>",
    ),
    "mistral3": Case(
        " {}</s>",
        ['[TOOL_CALLS] [{"name": "sky", "arguments": {"at": "Oslo"}, "id": "abcdefgh1"}]</s>', " It will.</s>"],
        " It will.</s>", system=Refused("leaves out messages of the role system"), bos="<s>",
        special=("[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]"),
    ),
    "olmo2": Case("{}<|endoftext|>", NO_TOOLS, "It will.<|endoftext|>", bos="<|endoftext|>", eos="<|endoftext|>"),
    "phi3": Case(
        "{}<|end|>", NO_TOOLS, "It will.<|end|>", bos="<s>", eos="<|endoftext|>",
        special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), swallow=True,
    ),
    "qwen25": Case(
        "{}<|im_end|>", [HERMES_CALL, "It will.<|im_end|>"], "It will.<|im_end|>", eos="<|im_end|>",
        special=CHATML, added=HERMES[:2],
    ),
    "qwen3": Case(
        "<think>\n\n</think>\n\n{}<|im_end|>", EARLIER,
        "<think>\nClouds.\n</think>\n\nIt will.<|im_end|>", talk=EARLIER, eos="<|im_end|>", special=CHATML,
        added=HERMES,
    ),
    "smollm2": Case("{}<|im_end|>", NO_TOOLS, "It will.<|im_end|>"),
    "smollm3": Case(
        "{}<|im_end|>", NO_CALLS, "It will.<|im_end|>", eos="<|im_end|>", special=CHATML, added=("<think>", "</think>")
    ),
    "vicuna": Case(" {}</s>", ALTERNATE, " It will.</s>", bos="<s>"),
    "zephyr": Case("{}</s>", NO_TOOLS, "It will.</s>", bos="<s>"),
}  # fmt: skip
SHARED = ("minimind", "smollm2")  # have files of their own


def base() -> Tokenizer:
    """A byte-level tokenizer with a few merges, without special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    texts = [file.read_text() for file in sorted(TEMPLATES.glob("*.jinja"))]
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def tokenizer(case: Case, plain: Tokenizer) -> PreTrainedTokenizerFast:
    """A copy of `plain` with the tokens of the template."""
    whole = Tokenizer.from_str(plain.to_str())
    names = dict.fromkeys((*filter(None, (case.bos, case.eos)), *case.special))
    whole.add_special_tokens([AddedToken(t, normalized=False, special=True, rstrip=case.swallow) for t in names])
    whole.add_tokens([AddedToken(t, normalized=False) for t in case.added])
    return PreTrainedTokenizerFast(tokenizer_object=whole, bos_token=case.bos, eos_token=case.eos)


DATES = {"%b": "Jul", "%B": "July"}


class Kit:
    """A template with its tokenizer, and encoders that train all turns or the last."""

    def __init__(self, tokenizer, template: str | None):
        self.tokenizer = tokenizer
        self.all, self.last = (Encoder(tokenizer, template, train_on=on) for on in ("all", "last"))
        source = tokenizer.chat_template if template is None else pathlib.Path(template).read_text()
        self.source = re.sub(r'strftime_now\("%d (%b|%B) %Y"\)', lambda m: f'"26 {DATES[m[1]]} 2024"', source)

    def rendered(self, messages, generation: bool) -> str:
        """What transformers makes of the messages, on the day of the encoder."""
        given = [{"role": m.role, "content": m.content, **json.loads(m.more or "{}")} for m in messages]
        return self.tokenizer.apply_chat_template(
            given, chat_template=self.source, add_generation_prompt=generation, tokenize=False
        )

    def special(self, row: Tokens) -> list[int]:
        """The tokens of a row that aren't made of its text, in order."""
        return [i for i in row.ids.tolist() if i in self.tokenizer.added_tokens_decoder]

    def trained(self, tokens: Tokens) -> list[str]:
        """The text of each stretch of trained tokens."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], tokens.mask.astype(np.int8), [0]])))
        pairs = zip(edges[::2], edges[1::2], strict=True)
        return [self.tokenizer.decode(tokens.ids[a:b], skip_special_tokens=False) for a, b in pairs]


def chatml(plain: Tokenizer, folder: pathlib.Path, source: str) -> Kit:
    """A template with the tokens of ChatML and of thinking."""
    file = folder / "template.jinja"
    file.write_text(source)
    return Kit(tokenizer(CASES["qwen3"], plain), str(file))
