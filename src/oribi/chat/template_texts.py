"""Chat templates in Jinja, written from the formats that the model families publish.

Each is a function of `bos` (the Jinja text that writes BOS, or nothing) and `system` (a Jinja literal: what stands in for a
missing system message, or `none`). A template takes messages with role, content, reasoning_content and tool_calls.
"""

from __future__ import annotations

import json
from collections.abc import Callable

TemplateText = Callable[[str, str], str]

EOS = "{eos}"  # in a piece of a turn: the tokenizer's own EOS

# The first message may be the system's; `turns` are all others.
_SPLIT = """
{%- if messages and messages[0]['role'] in ['system', 'developer'] -%}
    {%- set system, turns = messages[0]['content'], messages[1:] -%}
{%- else -%}
    {%- set system, turns = @default@, messages -%}
{%- endif -%}"""

_NO_TOOLS = """
{%- if tools -%}
    {{- raise_exception('this template has no form for tools; use the one of the model itself') -}}
{%- endif -%}"""

_UNKNOWN_ROLE = """
    {%- else -%}
        {{- raise_exception('this template has no form for the role ' + message['role']) -}}
    {%- endif -%}
{%- endfor -%}"""

# Thinking of a turn, apart from its text; it may also stand in the content, between <think> and </think>.
_THOUGHT = """
        {%- set thought, said = message['reasoning_content'] or '', message['content'] or '' -%}
        {%- if not thought and '</think>' in said -%}
            {%- set thought = said.split('</think>')[0].split('<think>')[-1] -%}
            {%- set said = said.split('</think>')[-1].lstrip('\\n') -%}
        {%- endif -%}"""

# Thinking belongs to the answer that is being given: turns before the last question lose theirs.
_LAST_QUESTION = """
{%- set seen = namespace(question=-1) -%}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {%- set seen.question = loop.index0 -%}
    {%- endif -%}
{%- endfor -%}"""


def turns(
    system: str,
    user: str,
    assistant: str,
    prompt: str,
    *,
    trim: bool = False,
    system_in_user: bool = False,
    before_all: str = "",
) -> TemplateText:
    """A template of plain turns, each a text with one `{}` for the content.

    Args:
        system, user, assistant: the turns.
        prompt: what asks for an answer.
        trim: strip the content.
        system_in_user: the system's turn is the beginning of the first user message.
        before_all: written once, behind BOS.
    """
    strip = " | trim" if trim else ""
    write_system = "{%- if system is not none -%}{{- " + _fill(system, "system" + strip) + " -}}{%- endif -%}"
    said = f"message['content']{strip}"
    asked = said
    if system_in_user:
        write_system = (
            "{%- set opening = " + f"({_fill(system, 'system' + strip)}) if system else ''" + " -%}"
        )
        asked = f"(opening if loop.first else '') + {said}"
    middle = "" if system_in_user else _branch("system", _fill(system, said), "elif")
    body = (
        "{%- for message in turns -%}\n    "
        + _branch("user", _fill(user, asked), "if")
        + _branch("assistant", _fill(assistant, said), "elif")
        + middle
    )
    text = (
        _NO_TOOLS
        + _SPLIT
        + "\n"
        + write_system
        + "\n"
        + body
        + _UNKNOWN_ROLE.lstrip("\n")
        + "\n"
        + _prompt(prompt)
    )
    opening = "{{- " + json.dumps(before_all) + " -}}" if before_all else ""
    return lambda bos, system: bos + opening + text.replace("@default@", system)


def _branch(role: str, expression: str, keyword: str) -> str:
    return f"{{%- {keyword} message['role'] == '{role}' -%}}\n        {{{{- {expression} -}}}}\n    "


def _fill(turn: str, expression: str) -> str:
    """Jinja for a turn's text with an expression in the place of `{}`."""
    before, after = turn.split("{}")
    return f"{_text(before)} + ({expression}) + {_text(after)}"


def _text(piece: str) -> str:
    parts = piece.split(EOS)
    return " + eos_token + ".join(json.dumps(part, ensure_ascii=False) for part in parts)


def _prompt(prompt: str) -> str:
    return "{%- if add_generation_prompt -%}{{- " + _text(prompt) + " -}}{%- endif -%}"


def chatml(bos: str, system: str) -> str:
    return _CHATML(bos, system)


_CHATML = turns(
    "<|im_start|>system\n{}<|im_end|>\n",
    "<|im_start|>user\n{}<|im_end|>\n",
    "<|im_start|>assistant\n{}<|im_end|>\n",
    "<|im_start|>assistant\n",
)

zephyr = turns("<|system|>\n{}{eos}\n", "<|user|>\n{}{eos}\n", "<|assistant|>\n{}{eos}\n", "<|assistant|>\n")
vicuna = turns("{} ", "USER: {} ", "ASSISTANT: {}{eos}", "ASSISTANT:")
vicuna_old = turns("{}\n", "### Human: {}\n", "### Assistant: {}{eos}\n", "### Assistant:")
alpaca = turns("{}\n\n", "### Instruction:\n{}\n\n", "### Response:\n{}{eos}\n\n", "### Response:\n")
plain_chat = turns("{}\n", ">>> User: {}\n", ">>> Assistant: {}{eos}\n", ">>> Assistant:")
starling = turns(
    "{}<|end_of_turn|>",
    "GPT4 Correct User: {}<|end_of_turn|>",
    "GPT4 Correct Assistant: {}<|end_of_turn|>",
    "GPT4 Correct Assistant:",
)
llama_3 = turns(
    "<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n{}<|eot_id|>",
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    trim=True,
)
mistral = turns("{}\n\n", "[INST] {} [/INST]", " {}{eos}", "", system_in_user=True)
gemma = turns(
    "{}\n\n",
    "<start_of_turn>user\n{}<end_of_turn>\n",
    "<start_of_turn>model\n{}<end_of_turn>\n",
    "<start_of_turn>model\n",
    trim=True,
    system_in_user=True,
)
phi_3 = turns(
    "<|system|>\n{}<|end|>\n", "<|user|>\n{}<|end|>\n", "<|assistant|>\n{}<|end|>\n", "<|assistant|>\n"
)
phi_4 = turns(
    "<|im_start|>system<|im_sep|>{}<|im_end|>",
    "<|im_start|>user<|im_sep|>{}<|im_end|>",
    "<|im_start|>assistant<|im_sep|>{}<|im_end|>",
    "<|im_start|>assistant<|im_sep|>",
)
command_r = turns(
    "<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>{}<|END_OF_TURN_TOKEN|>",
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>",
    trim=True,
)
olmo = turns("<|system|>\n{}\n", "<|user|>\n{}\n", "<|assistant|>\n{}{eos}\n", "<|assistant|>\n")


def llama_2(bos: str, system: str) -> str:
    """Every question has its own BOS; the system's text stands inside the first one."""
    return (
        _NO_TOOLS
        + _SPLIT.replace("@default@", system)
        + """
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- bos_token + '[INST] ' -}}
        {%- if loop.first and system is not none -%}
            {{- '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' -}}
        {%- endif -%}
        {{- message['content'] + ' [/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- ' ' + message['content'] + ' ' + eos_token -}}"""
        + _UNKNOWN_ROLE
    )


def llama_3_1(bos: str, system: str) -> str:
    """The system's turn always comes, with the dates; tools stand in the first question, a call is one JSON object."""
    header = "'<|start_header_id|>{}<|end_header_id|>\\n\\n'"
    return (
        bos
        + _SPLIT.replace("@default@", system)
        + """
{{- """
        + header.format("system")
        + """ -}}
{%- if tools -%}{{- 'Environment: ipython\\n' -}}{%- endif -%}
{{- 'Cutting Knowledge Date: December 2023\\nToday Date: ' + (date_string or '26 Jul 2024') + '\\n\\n' -}}
{{- (system or '') | trim + '<|eot_id|>' -}}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- """
        + header.format("user")
        + """ -}}
        {%- if loop.first and tools -%}
            {{- 'Given the following functions, please respond with a JSON for a function call with its proper arguments '
                'that best answers the given prompt.\\n\\nRespond in the format {"name": function name, "parameters": '
                'dictionary of argument name and its value}.Do not use variables.\\n\\n' -}}
            {%- for tool in tools -%}{{- tool | tojson(indent=4) + '\\n\\n' -}}{%- endfor -%}
        {%- endif -%}
        {{- message['content'] | trim + '<|eot_id|>' -}}
    {%- elif message['role'] == 'assistant' and message['tool_calls'] -%}
        {%- if message['tool_calls'] | length > 1 -%}
            {{- raise_exception('this template has one tool call in a turn') -}}
        {%- endif -%}
        {%- set call = message['tool_calls'][0]['function'] -%}
        {{- """
        + header.format("assistant")
        + """ -}}
        {{- '{"name": "' + call['name'] + '", "parameters": ' + call['arguments'] | tojson + '}<|eot_id|>' -}}
    {%- elif message['role'] in ['tool', 'ipython'] -%}
        {{- """
        + header.format("ipython")
        + """ + message['content'] | tojson + '<|eot_id|>' -}}
    {%- elif message['role'] in ['assistant', 'system'] -%}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}"""
        + _UNKNOWN_ROLE
        + "\n"
        + _prompt("<|start_header_id|>assistant<|end_header_id|>\n\n")
    )


def mistral_tekken(bos: str, system: str) -> str:
    """No spaces inside the brackets; tools stand before the last question, calls and results are JSON."""
    return (
        bos
        + _SPLIT.replace("@default@", system)
        + """
{%- if system is not none -%}{{- '[SYSTEM_PROMPT]' + system + '[/SYSTEM_PROMPT]' -}}{%- endif -%}"""
        + _LAST_QUESTION
        + """
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {%- if tools and loop.index0 == seen.question -%}
            {{- '[AVAILABLE_TOOLS]' + tools | tojson + '[/AVAILABLE_TOOLS]' -}}
        {%- endif -%}
        {{- '[INST]' + message['content'] + '[/INST]' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- message['content'] or '' -}}
        {%- if message['tool_calls'] -%}
            {{- '[TOOL_CALLS][' -}}
            {%- for call in message['tool_calls'] -%}
                {{- '{"name": "' + call['function']['name'] + '", "arguments": ' + call['function']['arguments'] | tojson -}}
                {{- (', "id": "' + call['id'] + '"' if call['id'] else '') + '}' + ('' if loop.last else ', ') -}}
            {%- endfor -%}
            {{- ']' -}}
        {%- endif -%}
        {{- eos_token -}}
    {%- elif message['role'] == 'tool' -%}
        {{- '[TOOL_RESULTS]{"content": ' + message['content'] | tojson -}}
        {{- (', "call_id": "' + message['tool_call_id'] + '"' if message['tool_call_id'] else '') + '}[/TOOL_RESULTS]' -}}"""
        + _UNKNOWN_ROLE
    )


def _qwen(bos: str, system: str, *, thinks: bool, switch: bool) -> str:
    """ChatML with tools in XML. `thinks`: turns may hold thinking; `switch`: enable_thinking=False gives an empty one."""
    shown = """
        {{- '<|im_start|>assistant\\n' -}}
        {%- if THINKS and loop.index0 > seen.question and (thought or loop.last) -%}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
            {%- set said = said.lstrip('\\n') -%}
        {%- endif -%}
        {{- said -}}"""
    if not thinks:
        shown = "{{- '<|im_start|>assistant\\n' + (message['content'] or '') -}}{%- set said = message['content'] -%}"
    no_thoughts = "{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\\n\\n</think>\\n\\n' -}}{%- endif -%}"
    ask = "<|im_start|>assistant\n" + ("<think>\n" if thinks and not switch else "")
    return (
        bos
        + _SPLIT.replace("@default@", system)
        + """
{%- if tools -%}
    {{- '<|im_start|>system\\n' + (system + '\\n\\n' if system is not none else '') -}}
    {{- '# Tools\\n\\nYou may call one or more functions to assist with the user query.\\n\\nYou are provided with function '
        'signatures within <tools></tools> XML tags:\\n<tools>' -}}
    {%- for tool in tools -%}{{- '\\n' + tool | tojson -}}{%- endfor -%}
    {{- '\\n</tools>\\n\\nFor each function call, return a json object with function name and arguments within '
        '<tool_call></tool_call> XML tags:\\n<tool_call>\\n{"name": <function-name>, "arguments": <args-json-object>}\\n'
        '</tool_call><|im_end|>\\n' -}}
{%- elif system is not none -%}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- endif -%}"""
        + _LAST_QUESTION
        + """
{%- for message in turns -%}
    {%- if message['role'] in ['user', 'system'] -%}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
    {%- elif message['role'] == 'assistant' -%}"""
        + (_THOUGHT if thinks else "")
        + shown.replace("THINKS", "true")
        + """
        {%- for call in message['tool_calls'] or [] -%}
            {{- ('\\n' if said or not loop.first else '') + '<tool_call>\\n{"name": "' + call['function']['name'] -}}
            {{- '", "arguments": ' + call['function']['arguments'] | tojson + '}\\n</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif message['role'] == 'tool' -%}
        {{- '' if loop.previtem and loop.previtem['role'] == 'tool' else '<|im_start|>user' -}}
        {{- '\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' -}}
        {{- '' if loop.nextitem and loop.nextitem['role'] == 'tool' else '<|im_end|>\\n' -}}"""
        + _UNKNOWN_ROLE
        + "\n{%- if add_generation_prompt -%}{{- "
        + _text(ask)
        + " -}}"
        + (no_thoughts if switch else "")
        + "{%- endif -%}"
    )


def qwen_2_5(bos: str, system: str) -> str:
    return _qwen(bos, system, thinks=False, switch=False)


def qwen_3(bos: str, system: str) -> str:
    return _qwen(bos, system, thinks=True, switch=True)


def qwen_3_thinking(bos: str, system: str) -> str:
    return _qwen(bos, system, thinks=True, switch=False)


def granite(bos: str, system: str) -> str:
    """Qwen's form of tools with Granite's role tokens."""
    text = _qwen(bos, system, thinks=False, switch=False)
    for role in ("system", "user", "assistant"):
        text = text.replace(f"<|im_start|>{role}\\n", f"<|start_of_role|>{role}<|end_of_role|>")
    text = text.replace("'<|im_start|>user'", "'<|start_of_role|>user<|end_of_role|>'")
    text = text.replace(
        "'<|im_start|>' + message['role'] + '\\n'",
        "'<|start_of_role|>' + message['role'] + '<|end_of_role|>'",
    )
    return text.replace("<|im_end|>", "<|end_of_text|>")


def lfm_2(bos: str, system: str) -> str:
    """ChatML; the list of tools stands in the system's turn, a call is a list of Python calls."""
    return (
        bos
        + _SPLIT.replace("@default@", system)
        + """
{%- if tools -%}
    {{- '<|im_start|>system\\n' + (system + '\\n' if system else '') + 'List of tools: <|tool_list_start|>[' -}}
    {%- for tool in tools -%}{{- tool | tojson + ('' if loop.last else ', ') -}}{%- endfor -%}
    {{- ']<|tool_list_end|><|im_end|>\\n' -}}
{%- elif system is not none -%}
    {{- '<|im_start|>system\\n' + system + '<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] in ['user', 'system'] -%}
        {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
    {%- elif message['role'] == 'assistant' -%}
        {{- '<|im_start|>assistant\\n' + (message['content'] or '') -}}
        {%- if message['tool_calls'] -%}
            {{- '<|tool_call_start|>[' -}}
            {%- for call in message['tool_calls'] -%}
                {{- call['function']['name'] + '(' -}}
                {%- for name, value in call['function']['arguments'].items() -%}
                    {{- name + '=' -}}
                    {%- if value is string -%}
                        {{- "'" + value.replace('\\\\', '\\\\\\\\').replace("'", "\\\\'").replace('\\n', '\\\\n') + "'" -}}
                    {%- elif value is mapping or value is iterable -%}
                        {{- value | tojson -}}
                    {%- else -%}
                        {{- value | string -}}
                    {%- endif -%}
                    {{- '' if loop.last else ', ' -}}
                {%- endfor -%}
                {{- ')' + ('' if loop.last else ', ') -}}
            {%- endfor -%}
            {{- ']<|tool_call_end|>' -}}
        {%- endif -%}
        {{- '<|im_end|>\\n' -}}
    {%- elif message['role'] == 'tool' -%}
        {{- '<|im_start|>tool\\n<|tool_response_start|>' + message['content'] + '<|tool_response_end|><|im_end|>\\n' -}}"""
        + _UNKNOWN_ROLE
        + "\n"
        + _prompt("<|im_start|>assistant\n")
    )


def _gemma_4(bos: str, system: str, *, thinks: bool) -> str:
    """Thinking stands in a channel of the turn, and <|think|> in the system's turn asks for it."""
    asked = "enable_thinking" if not thinks else "(enable_thinking is not defined or enable_thinking)"
    return (
        bos
        + _NO_TOOLS
        + _SPLIT.replace("@default@", system)
        + """
{%- if system is not none or ASKED -%}
    {{- '<|turn>system\\n' + ('<|think|>\\n' if ASKED else '') + (system or '') | trim + '<turn|>\\n' -}}
{%- endif -%}""".replace("ASKED", asked)
        + _LAST_QUESTION
        + """
{%- for message in turns -%}
    {%- if message['role'] in ['user', 'system'] -%}
        {{- '<|turn>' + message['role'] + '\\n' + message['content'] | trim + '<turn|>\\n' -}}
    {%- elif message['role'] == 'assistant' -%}"""
        + _THOUGHT
        + """
        {{- '<|turn>model\\n' -}}
        {%- if thought and loop.index0 > seen.question -%}
            {{- '<|channel>thought\\n' + thought.strip('\\n') + '\\n<channel|>' -}}
        {%- endif -%}
        {{- said | trim + '<turn|>\\n' -}}"""
        + _UNKNOWN_ROLE
        + "\n"
        + _prompt("<|turn>model\n")
    )


def gemma_4(bos: str, system: str) -> str:
    return _gemma_4(bos, system, thinks=False)


def gemma_4_thinking(bos: str, system: str) -> str:
    return _gemma_4(bos, system, thinks=True)


def deepseek_r1(bos: str, system: str) -> str:
    """The prompt opens the thinking; a turn keeps its thinking until the next question."""
    return (
        bos
        + _NO_TOOLS
        + _SPLIT.replace("@default@", system)
        + """
{{- system or '' -}}"""
        + _LAST_QUESTION
        + """
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- '<｜User｜>' + message['content'] -}}
    {%- elif message['role'] == 'assistant' -%}"""
        + _THOUGHT
        + """
        {{- '<｜Assistant｜>' -}}
        {%- if loop.index0 > seen.question -%}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' -}}
        {%- endif -%}
        {{- said + '<｜end▁of▁sentence｜>' -}}"""
        + _UNKNOWN_ROLE
        + "\n"
        + _prompt("<｜Assistant｜><think>\n")
    )


def gpt_oss(bos: str, system: str) -> str:
    """Harmony: a system turn with date, effort and channels, the developer's instructions, and a channel for each text."""
    return (
        bos
        + _NO_TOOLS
        + _SPLIT.replace("@default@", system)
        + """
{{- '<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\\nKnowledge cutoff: 2024-06\\n' -}}
{{- 'Current date: ' + (current_date or strftime_now('%Y-%m-%d')) + '\\n\\nReasoning: ' + (reasoning_effort or 'medium') -}}
{{- '\\n\\n# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>' -}}
{%- if system -%}
    {{- '<|start|>developer<|message|># Instructions\\n\\n' + system + '\\n\\n<|end|>' -}}
{%- endif -%}
{%- for message in turns -%}
    {%- if message['role'] == 'user' -%}
        {{- '<|start|>user<|message|>' + message['content'] + '<|end|>' -}}
    {%- elif message['role'] == 'assistant' -%}"""
        + _THOUGHT
        + """
        {%- if loop.last and thought -%}
            {{- '<|start|>assistant<|channel|>analysis<|message|>' + thought.strip('\\n') + '<|end|>' -}}
        {%- endif -%}
        {{- '<|start|>assistant<|channel|>final<|message|>' + said + ('<|return|>' if loop.last else '<|end|>') -}}"""
        + _UNKNOWN_ROLE
        + "\n"
        + _prompt("<|start|>assistant")
    )
