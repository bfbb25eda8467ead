"""The tiny model's tokenizer: byte-level BPE trained on the fly, Qwen's special tokens, one token per small integer."""

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Qwen's, in the order of their ids here (0 to 6)."""

TAGS = (
    "<think>",
    "</think>",
    "<tool>",
    "</tool>",
    "<answer>",
    "</answer>",
    "<tool_response>",
    "</tool_response>",
)
"""One token each, but ordinary text: they survive ``skip_special_tokens`` and user text may contain them."""

INTEGERS = 300
"""0 to 299 are one token each, with or without being part of JSON."""

# the fixed parts of a tool call are one pre-token each, so that a call takes about 20 tokens
_SPLIT = (
    r'\{"region":\[\{"index":|,"bbox_2d":\[|\]\},\{"index":|\]\}\],"query":"|"\}'
    r"| ?\p{L}+| ?\d+|[^\s\p{L}\d]+|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""ChatML without a default system turn."""


def train_tokenizer(corpus: Iterable[str]) -> Tokenizer:
    """Learn the merges from `corpus` (conversation texts without special tokens)."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    numbers = [str(i) for i in range(INTEGERS)] * 40
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        min_frequency=20,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*corpus, *numbers], trainer)
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer, *, query: bool = False) -> PreTrainedTokenizerFast:
    """The transformers tokenizer; with `query`, the one of the query encoder, which appends ``<|endoftext|>``."""
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    if query:
        end = SPECIAL_TOKENS[0]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"$A {end}", special_tokens=[(end, tokenizer.token_to_id(end))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|endoftext|>" if query else "<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS[1:]),
        padding_side="right" if query else "left",
        model_max_length=50 if query else 4096,
        chat_template=None if query else CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
