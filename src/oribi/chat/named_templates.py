"""get_chat_template and its named templates.

The vocabulary is never changed: where the tokenizer lacks a template's end token, turns end with the tokenizer's own EOS.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from oribi.chat import template_texts as texts
from oribi.chat.tokenizer import prefix_ids
from oribi.errors import ConfigError

EOS_WORD = "eos_token"  # stands for the tokenizer's own EOS in a (template, end) pair


@dataclass(frozen=True, slots=True)
class Template:
    """A named template.

    `end` closes a turn (None: the tokenizer's EOS). `bos` is True where the format itself begins with BOS; elsewhere BOS is
    written only if the tokenizer adds one to every text. `system` stands in for a missing system message.
    """

    text: texts.TemplateText
    end: str | None
    bos: bool = False
    system: str | None = None


_ALPACA = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
_VICUNA = (
    "A chat between a curious {} and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
)
_QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
_SMOLLM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"

_CHATML = Template(texts.chatml, "<|im_end|>")
_LLAMA_2 = Template(texts.llama_2, None, bos=True)
_LLAMA_3 = Template(texts.llama_3, "<|eot_id|>", bos=True)
_LLAMA_3_1 = Template(texts.llama_3_1, "<|eot_id|>", bos=True)
_MISTRAL = Template(texts.mistral, None, bos=True)
_TEKKEN = Template(texts.mistral_tekken, None, bos=True)
_GEMMA = Template(texts.gemma, "<end_of_turn>", bos=True)
_GEMMA_CHATML = Template(texts.chatml, "<|im_end|>", bos=True)
_GEMMA_4 = Template(texts.gemma_4, "<turn|>", bos=True)
_GEMMA_4_THINKING = Template(texts.gemma_4_thinking, "<turn|>", bos=True)
_QWEN_2_5 = Template(texts.qwen_2_5, "<|im_end|>", system=_QWEN)
_QWEN_3 = Template(texts.qwen_3, "<|im_end|>")
_PHI_3 = Template(texts.phi_3, "<|end|>")
_LFM_2 = Template(texts.lfm_2, "<|im_end|>", bos=True)
_GPT_OSS = Template(texts.gpt_oss, "<|return|>")
_VICUNA_OLD = Template(texts.vicuna_old, None, system=_VICUNA.format("human", "human"))

TEMPLATES: dict[str, Template] = {
    "unsloth": Template(texts.plain_chat, None, system="You are a helpful assistant to the user"),
    "chatml": _CHATML,
    "yi-chat": _CHATML,
    "zephyr": Template(texts.zephyr, None),
    "alpaca": Template(texts.alpaca, None, system=_ALPACA),
    "vicuna": Template(texts.vicuna, None, system=_VICUNA.format("user", "user")),
    "vicuna_old": _VICUNA_OLD,
    "vicuna old": _VICUNA_OLD,
    "starling": Template(texts.starling, "<|end_of_turn|>", bos=True),
    "llama": _LLAMA_2,
    "llama-2": _LLAMA_2,
    "llama-3": _LLAMA_3,
    "llama3": _LLAMA_3,
    **dict.fromkeys(("llama-3.1", "llama-3.2", "llama-3.3", "llama-31", "llama-32", "llama-33"), _LLAMA_3_1),
    "mistral": _MISTRAL,
    **dict.fromkeys(("mistral-tekken", "mistral-nemo", "mistral-v7"), _TEKKEN),
    **dict.fromkeys(("gemma", "gemma2", "gemma-2", "gemma3", "gemma-3", "gemma3n", "gemma-3n"), _GEMMA),
    "gemma_chatml": _GEMMA_CHATML,
    "gemma2_chatml": _GEMMA_CHATML,
    "gemma-4": _GEMMA_4,
    "gemma4": _GEMMA_4,
    "gemma-4-thinking": _GEMMA_4_THINKING,
    "gemma4-thinking": _GEMMA_4_THINKING,
    **dict.fromkeys(("qwen-2.5", "qwen2.5", "qwen-25", "qwen25"), _QWEN_2_5),
    **dict.fromkeys(("qwen-3", "qwen3"), _QWEN_3),
    "qwen3-instruct": Template(texts.qwen_2_5, "<|im_end|>"),
    "qwen3-thinking": Template(texts.qwen_3_thinking, "<|im_end|>"),
    **dict.fromkeys(("phi-3", "phi-3.5", "phi-35"), _PHI_3),
    "phi-4": Template(texts.phi_4, "<|im_end|>"),
    "granite": Template(texts.granite, "<|end_of_text|>"),
    **dict.fromkeys(("smollm", "smollm2"), Template(texts.chatml, "<|im_end|>", system=_SMOLLM)),
    "command-r": Template(texts.command_r, "<|END_OF_TURN_TOKEN|>", bos=True),
    **dict.fromkeys(("olmo", "olmo-2", "olmo2"), Template(texts.olmo, None, bos=True)),
    "deepseek-r1": Template(texts.deepseek_r1, "<｜end▁of▁sentence｜>", bos=True),
    **dict.fromkeys(("gpt-oss", "gptoss"), _GPT_OSS),
    **dict.fromkeys(("lfm-2", "lfm-2.5", "lfm2", "lfm2.5"), _LFM_2),
}
NAMES = tuple(TEMPLATES)


def get_chat_template(
    tokenizer: Any,
    chat_template: str | tuple[str, str] | list[str] = "chatml",
    mapping: Mapping[str, str] | None = None,
    map_eos_token: bool = True,
    system_message: str | None = None,
    **ignored: Any,
) -> Any:
    """Give a tokenizer a named chat template, or one of your own.

    Args:
        tokenizer: it is changed in place: chat_template, and eos_token if `map_eos_token`.
        chat_template: a name (`NAMES`), or (Jinja text, end of a turn); "eos_token" as the end means the tokenizer's EOS.
        mapping: names in your messages, e.g. {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}; the
            template then takes both these and the usual names.
        map_eos_token: make the end of a turn the tokenizer's EOS, so that generation stops there. If the vocabulary has no such
            token, turns end with the tokenizer's EOS instead; the vocabulary stays as it is.
        system_message: stands in for a missing system message; named templates only.
        ignored: `patch_saving` and `use_zoo_tokenizer_patch`, which other callers pass and which mean nothing here.

    Returns:
        The tokenizer.

    Raises:
        ConfigError: unknown name, an end that the vocabulary lacks with map_eos_token=False, or unknown arguments.
    """
    unknown = set(ignored) - {"patch_saving", "use_zoo_tokenizer_patch"}
    if unknown:
        raise ConfigError(f"get_chat_template: unknown arguments {sorted(unknown)}.")
    if isinstance(chat_template, str):
        source, end = _named(tokenizer, chat_template, system_message)
    elif isinstance(chat_template, tuple | list) and len(chat_template) == 2:
        source, end = chat_template
        end = None if end == EOS_WORD else end
        if system_message is not None:
            raise ConfigError(
                "get_chat_template: system_message works with named templates; write yours into the template."
            )
    else:
        raise ConfigError(
            f"get_chat_template: chat_template is {chat_template!r}; give a name or a pair (Jinja text, end of a turn)."
        )
    if mapping:
        source = _mapped(source, mapping)
    if end is not None and end not in tokenizer.get_vocab():
        source = _with_own_end(tokenizer, source, end, map_eos_token)
    elif end is not None and map_eos_token and tokenizer.eos_token != end:
        print(f"get_chat_template: the tokenizer's EOS is now {end!r} (it was {tokenizer.eos_token!r}).")
        tokenizer.eos_token = end
    tokenizer.chat_template = source
    return tokenizer


def template_source(tokenizer: Any, name: str, system_message: str | None = None) -> str:
    """The Jinja text of a named template for this tokenizer, which stays as it is."""
    source, end = _named(tokenizer, name, system_message)
    return source if end is None or end in tokenizer.get_vocab() else source.replace(end, tokenizer.eos_token)


def _named(tokenizer: Any, name: str, system_message: str | None) -> tuple[str, str | None]:
    template = TEMPLATES.get(name.lower())
    if template is None:
        near = difflib.get_close_matches(name.lower(), NAMES, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(near)}?" if near else ""
        raise ConfigError(f"get_chat_template: no template {name!r}.{hint} Names: {', '.join(NAMES)}.")
    adds_bos = tokenizer.bos_token is not None and (template.bos or bool(prefix_ids(tokenizer)))
    system = template.system if system_message is None else system_message
    literal = "none" if system is None else json.dumps(system, ensure_ascii=False)
    return template.text("{{- bos_token -}}" if adds_bos else "", literal), template.end


def _with_own_end(tokenizer: Any, source: str, end: str, map_eos_token: bool) -> str:
    """The template with the tokenizer's EOS in the place of an end that is no token of it."""
    if not map_eos_token:
        raise ConfigError(
            f"get_chat_template: the tokenizer has no token {end!r}, so generation could not stop at it. Add it with "
            f"add_new_tokens(model, tokenizer, [{end!r}]) first, or let map_eos_token=True put the tokenizer's EOS in its place."
        )
    if not tokenizer.eos_token:
        raise ConfigError(
            f"get_chat_template: the tokenizer has neither {end!r} nor an EOS token; set tokenizer.eos_token."
        )
    print(
        f"get_chat_template: the tokenizer has no {end!r}; turns end with its EOS {tokenizer.eos_token!r} instead."
    )
    return source.replace(end, tokenizer.eos_token)


def _mapped(source: str, mapping: Mapping[str, str]) -> str:
    """A template that also takes messages with other names of keys and roles."""
    unknown = set(mapping) - {"role", "content", "user", "assistant", "system", "tool"}
    if unknown:
        raise ConfigError(
            f"get_chat_template: mapping has keys {sorted(unknown)}; known are role, content, user, assistant, system, tool."
        )
    role, content = (json.dumps(mapping.get(key, key)) for key in ("role", "content"))
    roles = json.dumps({theirs: ours for ours, theirs in mapping.items() if ours not in ("role", "content")})
    head = f"""
{{%- set renamed = namespace(messages=[]) -%}}
{{%- for message in messages -%}}
    {{%- set role = message[{role}] if {role} in message else message['role'] -%}}
    {{%- set content = message[{content}] if {content} in message else message['content'] -%}}
    {{%- set renamed.messages = renamed.messages + [dict(message, role={roles}.get(role, role), content=content)] -%}}
{{%- endfor -%}}
{{%- set messages = renamed.messages -%}}"""
    return head + source
