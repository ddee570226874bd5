"""A byte-level BPE for one small world: every constant frame of the chat format is one token, and so are both halves
of a rule (`fry the _ ->`, ` cook _ with stove`), which makes looking a rule up a matter of one token.

Any text can be encoded (bytes are the fallback); text of the world is short. An action takes about ten tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from optimizer.pretraining.chat import CALL_HEAD, CALL_TAIL, TEMPLATE

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


def train_tokenizer(
    texts: Iterable[str], *, header: str, phrases: Sequence[str], vocab_size: int
) -> PreTrainedTokenizerFast:
    """Train on `texts`. Each of `phrases` is one token, and so is all of the system message `header` but its ends."""
    frame = header.removeprefix(START).removesuffix(f"{END}\n")
    frames = [frame, CALL_HEAD, CALL_TAIL, "user\n<tool_response>\n", "\n</tool_response>", "assistant\n", *phrases]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        # the frames are added afterwards and count in the size of the vocabulary
        vocab_size=vocab_size - len(frames),
        special_tokens=[PAD, START, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )

    def without_frames() -> Iterable[str]:
        for text in texts:
            for constant in (*frames, START, END):
                # cut out, so that no merge is spent on a text that becomes one token anyway
                text = text.replace(constant, "\n")
            yield text

    tokenizer.train_from_iterator(without_frames(), trainer)
    # Frames hold spaces and newlines: normalized=False, or they would never match; not special, or vLLM hides them.
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in frames])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=PAD,
        chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def token_id(tokenizer: PreTrainedTokenizerFast, token: str) -> int:
    """Return the id of one token."""
    return cast(int, tokenizer.convert_tokens_to_ids(token))


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(str(directory))
