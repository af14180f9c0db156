"""Small tokenizers of the kinds that models use, and conversations of every shape."""

from functools import lru_cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from oribi.data import converters
from oribi.data.columns import Columns
from oribi.data.encoding import UNTRAINED
from oribi.data.messages import ROLE_ALIASES

LINES = [
    "Hello there, what is it? It is this and that; the user asks, the assistant answers.",
    "system user assistant model tool ipython Below is an instruction ### Instruction: ### Response:",
    "USER: ASSISTANT: [INST] [/INST] <<SYS>> You are a helpful assistant. Cutting Knowledge Date",
] * 4

# every token that a named template writes
FAMILY_TOKENS = [
    "<|im_start|>",
    "<|im_end|>",
    "<|im_sep|>",
    "<|endoftext|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|python_tag|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|turn>",
    "<turn|>",
    "<|channel>",
    "<channel|>",
    "<|think|>",
    "<|end|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_CALLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "<|start_of_role|>",
    "<|end_of_role|>",
    "<|end_of_text|>",
    "<|START_OF_TURN_TOKEN|>",
    "<|END_OF_TURN_TOKEN|>",
    "<|SYSTEM_TOKEN|>",
    "<|USER_TOKEN|>",
    "<|CHATBOT_TOKEN|>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>",
    "<|end_of_turn|>",
    "<|start|>",
    "<|message|>",
    "<|channel|>",
    "<|return|>",
    "<|call|>",
    "<|tool_call_start|>",
    "<|tool_call_end|>",
    "<|tool_list_start|>",
    "<|tool_list_end|>",
    "<|tool_response_start|>",
    "<|tool_response_end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
]

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def from_messages(messages, tools=None):
    """A conversation from a list of messages ({"role", "content"} or {"from", "value"})."""
    row = Columns({"messages": messages, "tools": tools})
    return converters.from_messages(row, "messages", ROLE_ALIASES)


def call(name, **arguments):
    return {"type": "function", "id": "call00001", "function": {"name": name, "arguments": arguments}}


ONE_TURN = [user("What is it?"), assistant("It is this.")]
TWO_TURNS = [user("What is it?"), assistant("It is this."), user("And that?"), assistant("That, too.")]
WITH_SYSTEM = [{"role": "system", "content": "Be brief."}, *TWO_TURNS]
WITH_TOOLS = [
    user("Weather?"),
    assistant("", tool_calls=[call("weather", city="Bern")]),
    {"role": "tool", "content": "sunny", "name": "weather", "tool_call_id": "call00001"},
    assistant("It is sunny."),
]
WITH_THINKING = [
    user("What is it?"),
    assistant("It is this.", reasoning_content="First thought"),
    user("And that?"),
    assistant("That, too.", reasoning_content="Second thought"),
]


@lru_cache
def byte_level(extra=(), bos=None, eos="<|im_end|>", add_bos=False):
    """A byte-level BPE, as of GPT-2, Llama 3 and Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys([*extra, *([bos] if bos else []), eos]))
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(LINES, trainer)
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token=eos, clean_up_tokenization_spaces=False
    )


@lru_cache
def sentence_piece(kind="bpe"):
    """A SentencePiece-like tokenizer that adds BOS, as of Llama 2 ("bpe", with byte fallback) or T5 ("unigram")."""
    special = ["<unk>", "<s>", "</s>"]
    if kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=300, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    else:
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        steps = [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        tokenizer.decoder = decoders.Sequence(steps)
        alphabet = [f"<0x{i:02X}>" for i in range(256)]
        trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special + alphabet, show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def trained_runs(tokenizer, encoded):
    """The texts of the unbroken runs of trained tokens."""
    runs, before = [], UNTRAINED
    for token, label in zip(encoded.ids, encoded.labels):
        if label != UNTRAINED:
            runs = [*runs, []] if before == UNTRAINED else runs
            runs[-1].append(token)
        before = label
    return [tokenizer.decode(run) for run in runs]
