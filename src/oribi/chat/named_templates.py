"""get_chat_template and its named templates.

The vocabulary is never changed: where the tokenizer lacks a template's end token, turns end with the tokenizer's own EOS.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

from oribi.chat.tokenizer import prefix_ids
from oribi.errors import ConfigError
from oribi.text import did_you_mean, say_notes

FOLDER = resources.files("oribi.chat").joinpath("templates")
DEFAULT_SYSTEM = "DEFAULT_SYSTEM"  # in a file: a Jinja literal of what stands in for a missing system message
EOS_WORD = "eos_token"  # stands for the tokenizer's own EOS in a (template, end) pair


@dataclass(frozen=True, slots=True)
class Template:
    """A named template, written from the format that the model family publishes.

    A template takes messages with role, content, reasoning_content and tool_calls.

    Args:
        file: its name in `templates/`, without ".jinja".
        end: closes a turn; None is the tokenizer's EOS.
        bos: the format itself begins with BOS; elsewhere BOS is written only if the tokenizer adds one to every text.
        system: stands in for a missing system message.
    """

    file: str
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

# names, separated by commas -> the template
_BY_NAMES = {
    "unsloth": Template("unsloth", None, system="You are a helpful assistant to the user"),
    "chatml, yi-chat": Template("chatml", "<|im_end|>"),
    "zephyr": Template("zephyr", None),
    "alpaca": Template("alpaca", None, system=_ALPACA),
    "vicuna": Template("vicuna", None, system=_VICUNA.format("user", "user")),
    "vicuna_old, vicuna old": Template("vicuna_old", None, system=_VICUNA.format("human", "human")),
    "starling": Template("starling", "<|end_of_turn|>", bos=True),
    "llama, llama-2": Template("llama-2", None, bos=True),  # every question has its own BOS
    "llama-3, llama3": Template("llama-3", "<|eot_id|>", bos=True),
    "llama-3.1, llama-3.2, llama-3.3, llama-31, llama-32, llama-33": Template(
        "llama-3.1", "<|eot_id|>", bos=True
    ),
    "mistral": Template("mistral", None, bos=True),
    "mistral-tekken, mistral-nemo, mistral-v7": Template("mistral-tekken", None, bos=True),
    "gemma, gemma2, gemma-2, gemma3, gemma-3, gemma3n, gemma-3n": Template(
        "gemma", "<end_of_turn>", bos=True
    ),
    "gemma_chatml, gemma2_chatml": Template("chatml", "<|im_end|>", bos=True),
    "gemma-4, gemma4": Template("gemma-4", "<turn|>", bos=True),
    "gemma-4-thinking, gemma4-thinking": Template("gemma-4-thinking", "<turn|>", bos=True),
    "qwen-2.5, qwen2.5, qwen-25, qwen25": Template("qwen-2.5", "<|im_end|>", system=_QWEN),
    "qwen-3, qwen3": Template("qwen-3", "<|im_end|>"),
    "qwen3-instruct": Template("qwen-2.5", "<|im_end|>"),
    "qwen3-thinking": Template("qwen-3-thinking", "<|im_end|>"),
    "phi-3, phi-3.5, phi-35": Template("phi-3", "<|end|>"),
    "phi-4": Template("phi-4", "<|im_end|>"),
    "granite": Template("granite", "<|end_of_text|>"),
    "smollm, smollm2": Template("chatml", "<|im_end|>", system=_SMOLLM),
    "command-r": Template("command-r", "<|END_OF_TURN_TOKEN|>", bos=True),
    "olmo, olmo-2, olmo2": Template("olmo", None, bos=True),
    "deepseek-r1": Template("deepseek-r1", "<｜end▁of▁sentence｜>", bos=True),
    "gpt-oss, gptoss": Template("gpt-oss", "<|return|>"),
    "lfm-2, lfm-2.5, lfm2, lfm2.5": Template("lfm-2", "<|im_end|>", bos=True),
}
TEMPLATES = {name: template for names, template in _BY_NAMES.items() for name in names.split(", ")}
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
        ignored: `patch_saving` and `use_zoo_tokenizer_patch`, which callers of other libraries pass; they have no effect.

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
        say_notes(
            [f"get_chat_template: the tokenizer's EOS is now {end!r} (it was {tokenizer.eos_token!r})."]
        )
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
        raise ConfigError(
            f"get_chat_template: no template {name!r}{did_you_mean(name, NAMES) or '.'} Names: {', '.join(NAMES)}."
        )
    source = FOLDER.joinpath(f"{template.file}.jinja").read_text(encoding="utf-8").rstrip("\n")
    adds_bos = tokenizer.bos_token is not None and (template.bos or bool(prefix_ids(tokenizer)))
    if adds_bos and "bos_token" not in source:
        source = "{{- bos_token -}}\n" + source
    system = template.system if system_message is None else system_message
    literal = "none" if system is None else json.dumps(system, ensure_ascii=False)
    return source.replace(DEFAULT_SYSTEM, literal), template.end


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
    say_notes(
        [
            f"get_chat_template: the tokenizer has no {end!r}; turns end with its EOS {tokenizer.eos_token!r} instead."
        ]
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
