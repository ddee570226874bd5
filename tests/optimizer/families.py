"""Families of models for tests: each one's own chat template, a small tokenizer with its special tokens, and its format
of thoughts and calls. `python -m tests.optimizer.families` parses replies with vLLM's own parsers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

NAMES = ("qwen2_5", "qwen3", "llama3_1", "llama3_2", "mistral_v7", "mistral_v11")
PARSERS = {"qwen": "hermes", "llama": "llama3_json", "mistral": "mistral"}
SPECIAL = {
    "qwen": ("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    "llama": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|python_tag|>", "<|eot_id|>"),
    "mistral": (
        *("<unk>", "<s>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CALLS]"),
        *("[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CONTENT]", "</s>"),
    ),
}
"""The last one ends a turn."""
CORPUS = (
    'Thinking about it, I will now take the carrot and cook it.\n{"name": "act", "arguments": {"command": "take"}}',
    "Given the following functions, please respond with a JSON for a function call that best answers the prompt.",
    "You may call one or more functions to assist with the user query. <tool_call> </tool_call> <think> </think>",
)
Call = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """One family, named like its template."""

    name: str

    @property
    def kind(self) -> str:
        return self.name.split("_")[0].rstrip("0123456789")

    @property
    def parser(self) -> str:
        return PARSERS[self.kind]

    def write(self, thought: str, calls: Sequence[Call], *, compact: bool = False) -> str:
        """Return a reply as the family's models write it, without the token that ends the turn."""
        separators = (",", ":") if compact else (", ", ": ")
        key = "parameters" if self.kind == "llama" else "arguments"
        if self.name == "mistral_v11":
            return thought + "".join(
                f"[TOOL_CALLS]{name}[ARGS]{json.dumps(a, separators=separators)}" for name, a in calls
            )
        written = [json.dumps({"name": name, key: arguments}, separators=separators) for name, arguments in calls]
        if not calls:
            return thought
        if self.name == "mistral_v7":
            return f"{thought}[TOOL_CALLS][{', '.join(written)}]"
        newline = "\n" if thought and not thought.endswith("\n") else ""
        if self.kind == "llama":
            return thought + newline + "; ".join(written)
        return thought + newline + "\n".join(f"<tool_call>\n{each}\n</tool_call>" for each in written)


def make_tokenizer(name: str) -> Any:
    """Return a byte-level BPE with a few hundred merges, the special tokens of the family and its chat template."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(CORPUS, trainer)
    kind = Family(name).kind
    special = [*SPECIAL[kind], *(["[ARGS]"] if name == "mistral_v11" else [])]
    inner.add_special_tokens([AddedToken(token, special=True) for token in special])
    if kind == "qwen":
        marks = ["<tool_call>", "</tool_call>", "<think>", "</think>"]
        inner.add_tokens([AddedToken(token, special=False) for token in marks])
    bos = {"llama": "<|begin_of_text|>", "mistral": "<s>"}.get(kind)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=SPECIAL[kind][-1], bos_token=bos, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = read_template(name)
    return tokenizer


def read_template(name: str) -> str:
    """Return the chat template that the family ships, from the packages that carry it."""
    if not name.startswith("mistral"):
        return files("trl").joinpath("chat_templates", f"{name}.jinja").read_text(encoding="utf-8")
    from mistral_common.integrations.chat_templates.template_generator import TemplateConfig, build_chat_template
    from mistral_common.tokens.tokenizers.base import TokenizerVersion

    return build_chat_template(
        TemplateConfig(
            version=TokenizerVersion(name.removeprefix("mistral_")),
            spm=False,
            image_support=False,
            audio_support=False,
            thinking_support=False,
            plain_thinking_support=False,
            use_special_token_variables=False,
            model_settings_fields=None,
            reasoning_effort_values=None,
            reasoning_effort_default=None,
        )
    )


def main() -> None:
    """Read [family, text] pairs from stdin; print vLLM's result for each, `{"content", "tool_calls"}`.

    It runs in a separate process, because vLLM changes logging and warnings of the one that imports it.
    """
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    from tests.optimizer.worlds import ACT

    request = ChatCompletionRequest(model="m", messages=[{"role": "user", "content": "?"}], tools=[ACT])
    tokenizers: dict[str, Any] = {}
    replies = []
    for name, text in json.load(sys.stdin):
        tokenizer = tokenizers.setdefault(name, make_tokenizer(name)) if name not in tokenizers else tokenizers[name]
        parser = ToolParserManager.get_tool_parser(Family(name).parser)(tokenizer, request.tools)
        parsed = parser.extract_tool_calls(text, request)
        calls = [call.model_dump(include={"id", "type", "function"}) for call in parsed.tool_calls]
        replies.append({"content": parsed.content or "", "tool_calls": calls})
    print("\n" + json.dumps(replies))


if __name__ == "__main__":
    main()
