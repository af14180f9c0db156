"""Named chat templates: exact text, exact ids, exact trained ids, and the vocabulary left alone."""

import re
import shutil
import zipfile
from importlib import resources
from pathlib import Path

import pytest

from oribi.chat.masking import Masker
from oribi.chat.named_templates import FOLDER, NAMES, TEMPLATES, get_chat_template
from oribi.chat.rendering import ChatTemplate
from oribi.data import converters
from oribi.data.columns import Columns
from oribi.data.encoding import UNTRAINED, Encoder
from oribi.data.messages import ROLE_ALIASES
from oribi.errors import ConfigError, DataError
from tests.data.tokenizers_small import (
    ONE_TURN,
    TWO_TURNS,
    WEATHER,
    WITH_SYSTEM,
    WITH_THINKING,
    WITH_TOOLS,
    assistant,
    call,
    from_messages,
    trained_runs,
    user,
)

DISTINCT = list({id(template): name for name, template in reversed(TEMPLATES.items())}.values())

# What Q, A, Q, A looks like under a system message S: the format as its family publishes it.
RENDERED = {
    "chatml": "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\nB<|im_end|>\n",
    "zephyr": "<s><|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\nA</s>\n<|user|>\nP</s>\n<|assistant|>\nB</s>\n",
    "alpaca": "<s>S\n\n### Instruction:\nQ\n\n### Response:\nA</s>\n\n### Instruction:\nP\n\n### Response:\nB</s>\n\n",
    "vicuna": "<s>S USER: Q ASSISTANT: A</s>USER: P ASSISTANT: B</s>",
    "vicuna_old": "<s>S\n### Human: Q\n### Assistant: A</s>\n### Human: P\n### Assistant: B</s>\n",
    "unsloth": "<s>S\n>>> User: Q\n>>> Assistant: A</s>\n>>> User: P\n>>> Assistant: B</s>\n",
    "starling": "<s>S<|end_of_turn|>GPT4 Correct User: Q<|end_of_turn|>GPT4 Correct Assistant: A<|end_of_turn|>"
    "GPT4 Correct User: P<|end_of_turn|>GPT4 Correct Assistant: B<|end_of_turn|>",
    "llama": "<s>[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST] A </s><s>[INST] P [/INST] B </s>",
    "llama-3": "<s><|start_header_id|>system<|end_header_id|>\n\nS<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nP<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>",
    "llama-3.1": "<s><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
    "S<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nQ<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nA<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nP<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nB<|eot_id|>",
    "mistral": "<s>[INST] S\n\nQ [/INST] A</s>[INST] P [/INST] B</s>",
    "mistral-tekken": "<s>[SYSTEM_PROMPT]S[/SYSTEM_PROMPT][INST]Q[/INST]A</s>[INST]P[/INST]B</s>",
    "gemma": "<s><start_of_turn>user\nS\n\nQ<end_of_turn>\n<start_of_turn>model\nA<end_of_turn>\n<start_of_turn>user\nP<end_of_turn>\n"
    "<start_of_turn>model\nB<end_of_turn>\n",
    "gemma-4": "<s><|turn>system\nS<turn|>\n<|turn>user\nQ<turn|>\n<|turn>model\nA<turn|>\n<|turn>user\nP<turn|>\n<|turn>model\nB<turn|>\n",
    "gemma-4-thinking": "<s><|turn>system\n<|think|>\nS<turn|>\n<|turn>user\nQ<turn|>\n<|turn>model\nA<turn|>\n<|turn>user\nP<turn|>\n"
    "<|turn>model\nB<turn|>\n",
    "qwen-3": "<s><|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
    "<|im_start|>user\nP<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nB<|im_end|>\n",
    "phi-3": "<s><|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n<|user|>\nP<|end|>\n<|assistant|>\nB<|end|>\n",
    "phi-4": "<s><|im_start|>system<|im_sep|>S<|im_end|><|im_start|>user<|im_sep|>Q<|im_end|><|im_start|>assistant<|im_sep|>A<|im_end|>"
    "<|im_start|>user<|im_sep|>P<|im_end|><|im_start|>assistant<|im_sep|>B<|im_end|>",
    "granite": "<s><|start_of_role|>system<|end_of_role|>S<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>Q<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>A<|end_of_text|>\n<|start_of_role|>user<|end_of_role|>P<|end_of_text|>\n"
    "<|start_of_role|>assistant<|end_of_role|>B<|end_of_text|>\n",
    "command-r": "<s><|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>S<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>Q<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>A<|END_OF_TURN_TOKEN|><|START_OF_TURN_TOKEN|><|USER_TOKEN|>P<|END_OF_TURN_TOKEN|>"
    "<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>B<|END_OF_TURN_TOKEN|>",
    "olmo": "<s><|system|>\nS\n<|user|>\nQ\n<|assistant|>\nA</s>\n<|user|>\nP\n<|assistant|>\nB</s>\n",
    "deepseek-r1": "<s>S<｜User｜>Q<｜Assistant｜>A<｜end▁of▁sentence｜><｜User｜>P<｜Assistant｜><think>\n\n</think>\n\nB<｜end▁of▁sentence｜>",
}
RENDERED |= dict.fromkeys(
    ("qwen-2.5", "qwen3-instruct", "smollm", "lfm-2", "gemma_chatml"), RENDERED["chatml"]
)
RENDERED["qwen3-thinking"] = RENDERED["qwen-3"]

# What stands between the generation prompt and the assistant's text, and what the template ends a turn with
LEADING = dict.fromkeys(("vicuna", "vicuna_old", "llama", "mistral", "starling", "unsloth"), " ")
LEADING["gpt-oss"] = "<|channel|>final<|message|>"
LAST_LEADING = {**LEADING, "qwen3-thinking": "\n</think>\n\n", "deepseek-r1": "\n</think>\n\n"}
ENDING = {name: TEMPLATES[name].end or "</s>" for name in DISTINCT} | {"llama": " </s>"}
TOOL_CALLS = {
    **dict.fromkeys(
        ("qwen-2.5", "qwen-3", "qwen3-instruct", "qwen3-thinking", "granite"),
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Bern"}}\n</tool_call>',
    ),
    "llama-3.1": '{"name": "weather", "parameters": {"city": "Bern"}}',
    "mistral-tekken": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Bern"}, "id": "call00001"}]',
    "lfm-2": "<|tool_call_start|>[weather(city='Bern')]<|tool_call_end|>",
}
# Thinking of the last turn as it is trained; earlier turns lose theirs
THOUGHTS = {
    "qwen-3": "<think>\nSecond thought\n</think>\n\n",
    "qwen3-thinking": "Second thought\n</think>\n\n",
    "deepseek-r1": "Second thought\n</think>\n\n",
    "gemma-4": "<|channel>thought\nSecond thought\n<channel|>",
    "gemma-4-thinking": "<|channel>thought\nSecond thought\n<channel|>",
    "gpt-oss": "<|channel|>analysis<|message|>Second thought<|end|><|start|>assistant<|channel|>final<|message|>",
}


def _end(name, last):
    return "<|end|>" if name == "gpt-oss" and not last else ENDING[name]


def _check(tokenizer, name, messages, expected, tools=None):
    """Ids equal transformers' own; the trained runs of ids spell `expected`."""
    get_chat_template(tokenizer, name)
    masker = Masker(ChatTemplate(tokenizer))
    marked = masker.mark(from_messages(messages, tools))
    encoded = Encoder(tokenizer).encode([marked], [False])[0]
    theirs = tokenizer.apply_chat_template(masker.template.adapt(messages), tools=tools, tokenize=True)[
        "input_ids"
    ]
    assert encoded.ids == theirs
    assert masker.ways == {"layout": 1}
    assert all(label in (UNTRAINED, token) for token, label in zip(encoded.ids, encoded.labels))
    assert trained_runs(tokenizer, encoded) == expected
    assert encoded.split_tokens == 0


def test_the_wheel_holds_every_template(tmp_path, monkeypatch):
    build_meta = pytest.importorskip("setuptools.build_meta")
    root = Path(__file__).parents[2]
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(root / name, tmp_path)
    shutil.copytree(
        root / "src", tmp_path / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    wanted = {
        str(path.relative_to(tmp_path / "src"))
        for path in (tmp_path / "src" / "oribi").rglob("*")
        if path.is_file() and path.suffix != ".py"
    }
    monkeypatch.chdir(tmp_path)
    with zipfile.ZipFile(build_meta.build_wheel(str(tmp_path))) as wheel:
        assert wanted <= set(wheel.namelist())
    assert {f"oribi/chat/templates/{template.file}.jinja" for template in TEMPLATES.values()} == {
        name for name in wanted if name.startswith("oribi/chat/")
    }
    assert all(FOLDER.joinpath(f"{template.file}.jinja").is_file() for template in TEMPLATES.values())


@pytest.mark.parametrize("name", sorted(RENDERED))
def test_a_named_template_writes_the_published_format(name, family_tokenizer):
    get_chat_template(family_tokenizer, name)
    messages = [{"role": "system", "content": "S"}, user("Q"), assistant("A"), user("P"), assistant("B")]
    assert family_tokenizer.apply_chat_template(messages, tokenize=False) == RENDERED[name]


def test_every_distinct_template_has_a_published_format_or_an_upstream_copy():
    assert set(DISTINCT) - set(RENDERED) == {"gpt-oss"}


@pytest.mark.parametrize("name", DISTINCT)
def test_one_turn_trains_the_answer_and_its_end(name, family_tokenizer):
    expected = [LAST_LEADING.get(name, "") + "It is this." + _end(name, True)]
    _check(family_tokenizer, name, ONE_TURN, expected)


@pytest.mark.parametrize("messages", [TWO_TURNS, WITH_SYSTEM], ids=["two turns", "system"])
@pytest.mark.parametrize("name", DISTINCT)
def test_two_turns_train_both_answers(name, messages, family_tokenizer):
    first = LEADING.get(name, "") + "It is this." + _end(name, False)
    last = LAST_LEADING.get(name, "") + "That, too." + _end(name, True)
    _check(family_tokenizer, name, messages, [first, last])


@pytest.mark.parametrize("name", sorted(TOOL_CALLS))
def test_tool_calls_are_trained_and_results_are_not(name, family_tokenizer):
    last = LAST_LEADING.get(name, "") + "It is sunny." + _end(name, True)
    first = TOOL_CALLS[name] + _end(name, False)
    thinks = name in ("qwen-3", "qwen3-thinking")
    expected = [first, "It is sunny." + _end(name, True)] if name == "qwen-3" else [first, last]
    assert thinks or LAST_LEADING.get(name) is None
    _check(family_tokenizer, name, WITH_TOOLS, expected, tools=[WEATHER])


@pytest.mark.parametrize("name", sorted(set(DISTINCT) - set(TOOL_CALLS)))
def test_a_template_without_a_form_for_tools_refuses_them(name, family_tokenizer):
    get_chat_template(family_tokenizer, name)
    with pytest.raises(DataError, match="no form for tools"):
        Masker(ChatTemplate(family_tokenizer)).mark(from_messages(WITH_TOOLS, [WEATHER]))


@pytest.mark.parametrize("name", sorted(THOUGHTS))
def test_thinking_of_the_last_turn_is_trained(name, family_tokenizer):
    _check(family_tokenizer, name, WITH_THINKING, [THOUGHTS[name] + "That, too." + _end(name, True)])


@pytest.mark.parametrize("name", sorted(THOUGHTS))
def test_thinking_within_the_content_is_the_same_thinking(name, family_tokenizer):
    inline = [dict(m) for m in WITH_THINKING]
    for message in inline:
        if "reasoning_content" in message:
            message["content"] = (
                f"<think>\n{message.pop('reasoning_content')}\n</think>\n\n{message['content']}"
            )
    _check(family_tokenizer, name, inline, [THOUGHTS[name] + "That, too." + _end(name, True)])


def test_qwen_3_without_thinking_gives_the_empty_thought_as_context(family_tokenizer):
    get_chat_template(family_tokenizer, "qwen-3")
    template = ChatTemplate(family_tokenizer, kwargs={"enable_thinking": False})
    assert template.render(ONE_TURN[:1], add_generation_prompt=True).endswith("<think>\n\n</think>\n\n")
    marked = Masker(template).mark(from_messages(ONE_TURN))
    assert [marked.text[a:b] for a, b in marked.spans] == ["It is this.<|im_end|>"]


UPSTREAM = {
    "cohere.jinja": ("command-r", None),
    "gemma3.jinja": ("gemma-3", None),
    "gemma4_v5.jinja": ("gemma-4", None),
    "gptoss.jinja": ("gpt-oss", None),
    "lfm2_v2.jinja": ("lfm-2", [WEATHER]),
    "llama3.jinja": ("llama-3", None),
    "llama3_1.jinja": ("llama-3.1", [WEATHER]),
    "phi3.jinja": ("phi-3", None),
    "qwen2_5.jinja": ("qwen-2.5", [WEATHER]),
    "qwen3.jinja": ("qwen-3", [WEATHER]),
    "qwen3_instruct_2507.jinja": ("qwen3-instruct", [WEATHER]),
}


@pytest.mark.parametrize("file", sorted(UPSTREAM))
def test_named_templates_render_as_the_models_own_do(file, family_tokenizer_without_bos):
    """TRL ships the templates of the models' repositories."""
    source = resources.files("trl").joinpath("chat_templates", file)
    if not source.is_file():
        pytest.skip(f"this version of trl has no {file}")
    name, tools = UPSTREAM[file]
    get_chat_template(family_tokenizer_without_bos, name)
    conversations = [ONE_TURN, TWO_TURNS, WITH_SYSTEM]
    conversations += [WITH_TOOLS, [*WITH_TOOLS, user("Again?"), assistant("Still sunny.")]] if tools else []
    conversations += [WITH_THINKING] if name in ("qwen-3", "gemma-4") else []
    for messages in conversations:
        given = tools if any("tool_calls" in m for m in messages) else None
        theirs = ChatTemplate(family_tokenizer_without_bos, source.read_text(encoding="utf-8"))
        ours = ChatTemplate(family_tokenizer_without_bos)
        theirs_text = theirs.render(messages, given)
        if (
            name == "phi-3"
        ):  # the model's own closes the whole conversation with EOS, for training from scratch
            theirs_text = theirs_text.removesuffix(family_tokenizer_without_bos.eos_token)
        assert ours.render(messages, given) == theirs_text
        prompt = messages[:-1]
        assert ours.render(prompt, given, add_generation_prompt=True) == theirs.render(
            prompt, given, add_generation_prompt=True
        )


@pytest.mark.parametrize("field", ["thinking", "reasoning_content"])
def test_the_own_template_of_gpt_oss_trains_its_channels(field, family_tokenizer_without_bos):
    source = resources.files("trl").joinpath("chat_templates", "gptoss.jinja")
    if not source.is_file():
        pytest.skip("this version of trl has no gptoss.jinja")
    tokenizer = family_tokenizer_without_bos
    tokenizer.chat_template = source.read_text(encoding="utf-8")
    messages = [
        {"role": "developer", "content": "Be kind."},
        user("What?"),
        {**assistant("It is this."), field: "First thought"},
        user("And now?"),
        {**assistant("It is that."), field: "Second thought"},
    ]
    masker = Masker(ChatTemplate(tokenizer, kwargs={"reasoning_effort": "high"}))
    plain = [{key: value for key, value in one.items() if key != field} for one in messages]
    of_last = "<|channel|>analysis<|message|>Second thought<|end|><|start|>assistant<|channel|>final<|message|>It is that.<|return|>"
    # an earlier answer whose thought the template drops is not trained: the model says none without a thought
    both = [
        "<|channel|>final<|message|>It is this.<|end|>",
        "<|channel|>final<|message|>It is that.<|return|>",
    ]
    for conversation, runs in ((messages, [of_last]), (plain, both)):
        encoded = Encoder(tokenizer).encode([masker.mark(from_messages(conversation))], [False])[0]
        text = tokenizer.decode(encoded.ids)
        assert "# Instructions\n\nBe kind." in text
        assert "Reasoning: high" in text
        assert "First thought" not in text
        assert trained_runs(tokenizer, encoded) == runs


def test_the_end_of_a_turn_becomes_eos_and_the_vocabulary_stays(family_tokenizer, capsys):
    before = dict(family_tokenizer.get_vocab())
    tokenizer = get_chat_template(family_tokenizer, "chatml")
    assert tokenizer is family_tokenizer
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.get_vocab() == before
    assert "EOS is now '<|im_end|>'" in capsys.readouterr().out


def test_eos_stays_without_map_eos_token(family_tokenizer):
    get_chat_template(family_tokenizer, "chatml", map_eos_token=False)
    assert family_tokenizer.eos_token == "</s>"


def test_a_missing_end_token_is_replaced_by_eos_not_swapped_into_the_vocabulary(plain_tokenizer, capsys):
    before = dict(plain_tokenizer.get_vocab())
    get_chat_template(plain_tokenizer, "chatml")
    assert plain_tokenizer.get_vocab() == before
    assert plain_tokenizer.eos_token == "</s>"
    assert "turns end with its EOS '</s>' instead" in capsys.readouterr().out
    marked = Masker(ChatTemplate(plain_tokenizer)).mark(from_messages(ONE_TURN))
    assert [marked.text[a:b] for a, b in marked.spans] == ["It is this.</s>"]


def test_a_missing_end_token_is_an_error_without_map_eos_token(plain_tokenizer):
    with pytest.raises(ConfigError, match=re.escape("add_new_tokens(model, tokenizer, ['<|im_end|>'])")):
        get_chat_template(plain_tokenizer, "chatml", map_eos_token=False)


def test_bos_is_written_once_and_only_where_the_tokenizer_has_one(family_tokenizer, chatml_tokenizer):
    get_chat_template(family_tokenizer, "llama-3")
    ids = family_tokenizer.apply_chat_template(ONE_TURN, tokenize=True)["input_ids"]
    assert ids.count(family_tokenizer.bos_token_id) == 1
    assert ids[0] == family_tokenizer.bos_token_id
    get_chat_template(chatml_tokenizer, "chatml")
    assert chatml_tokenizer.apply_chat_template(ONE_TURN, tokenize=False).startswith("<|im_start|>user")


def test_mapping_takes_sharegpt_messages_and_the_usual_ones(family_tokenizer):
    mapping = {"role": "from", "content": "value", "user": "human", "assistant": "gpt"}
    get_chat_template(family_tokenizer, "chatml", mapping=mapping)
    sharegpt = [{"from": "human", "value": "What is it?"}, {"from": "gpt", "value": "It is this."}]
    text = family_tokenizer.apply_chat_template(sharegpt, tokenize=False)
    assert text == family_tokenizer.apply_chat_template(ONE_TURN, tokenize=False)
    assert "<|im_start|>user\nWhat is it?<|im_end|>" in text


def test_a_template_of_ones_own_with_its_end(family_tokenizer):
    source = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|end|>' }}{% endfor %}"
    get_chat_template(family_tokenizer, (source, "<|end|>"))
    assert family_tokenizer.eos_token == "<|end|>"
    assert (
        family_tokenizer.apply_chat_template(ONE_TURN, tokenize=False)
        == "user: What is it?<|end|>assistant: It is this.<|end|>"
    )


def test_the_word_eos_token_keeps_the_tokenizers_own(family_tokenizer):
    get_chat_template(
        family_tokenizer, ("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}", "eos_token")
    )
    assert family_tokenizer.eos_token == "</s>"


def test_system_message_stands_in_for_a_missing_one(family_tokenizer):
    get_chat_template(family_tokenizer, "chatml", system_message='Say "hi".\n')
    text = family_tokenizer.apply_chat_template(ONE_TURN, tokenize=False)
    assert text.startswith('<s><|im_start|>system\nSay "hi".\n<|im_end|>\n<|im_start|>user')
    assert "Say" not in family_tokenizer.apply_chat_template(WITH_SYSTEM, tokenize=False)


def test_unknown_names_and_arguments_are_named(family_tokenizer):
    with pytest.raises(ConfigError, match="no template 'chat-ml'; did you mean chatml"):
        get_chat_template(family_tokenizer, "chat-ml")
    with pytest.raises(ConfigError, match="unknown arguments \\['mappings'\\]"):
        get_chat_template(family_tokenizer, "chatml", mappings={})
    with pytest.raises(ConfigError, match="give a name or a pair"):
        get_chat_template(family_tokenizer, 3)
    with pytest.raises(ConfigError, match="mapping has keys \\['human'\\]"):
        get_chat_template(family_tokenizer, "chatml", mapping={"human": "user"})
    with pytest.raises(ConfigError, match="write yours into the template"):
        get_chat_template(family_tokenizer, ("x", "eos_token"), system_message="s")
    family_tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither '<unheard>' nor an EOS"):
        get_chat_template(family_tokenizer, ("x", "<unheard>"))


def test_every_name_that_callers_use_is_there():
    asked = [
        "unsloth",
        "zephyr",
        "chatml",
        "mistral",
        "llama",
        "vicuna",
        "vicuna_old",
        "alpaca",
        "gemma",
        "gemma_chatml",
        "gemma2",
        "gemma2_chatml",
        "llama-3",
        "llama3",
        "phi-3",
        "phi-35",
        "phi-3.5",
        "llama-3.1",
        "llama-31",
        "llama-3.2",
        "llama-3.3",
        "llama-32",
        "llama-33",
        "qwen-2.5",
        "qwen-25",
        "qwen25",
        "qwen2.5",
        "phi-4",
        "gemma-3",
        "gemma3",
        "qwen-3",
        "qwen3",
        "gemma-3n",
        "gemma3n",
        "gemma-4",
        "gemma4",
        "gemma-4-thinking",
        "gemma4-thinking",
        "gpt-oss",
        "gptoss",
        "qwen3-instruct",
        "qwen3-thinking",
        "lfm-2",
        "lfm-2.5",
        "starling",
        "yi-chat",
        "llama-2",
        "granite",
        "smollm",
        "command-r",
        "olmo",
        "deepseek-r1",
    ]
    assert set(asked) <= set(NAMES)
    assert "vicuna old" in NAMES


@pytest.mark.parametrize("calls", [1, 2])
def test_the_own_template_of_gpt_oss_loses_no_call_and_reads_a_rows_effort(
    calls, family_tokenizer_without_bos
):
    source = resources.files("trl").joinpath("chat_templates", "gptoss.jinja")
    if not source.is_file():
        pytest.skip("this version of trl has no gptoss.jinja")
    tokenizer = family_tokenizer_without_bos
    tokenizer.chat_template = source.read_text(encoding="utf-8")
    asked = [call("weather", city=city) for city in ("Bern", "Rome")[:calls]]
    results = [{"role": "tool", "content": "sunny", "name": "weather"}] * calls
    messages = [user("Weather?"), assistant("", tool_calls=asked), *results, assistant("It is sunny.")]
    row = Columns({"messages": messages, "tools": [WEATHER], "reasoning_effort": "high"})
    conversation = converters.from_messages(row, "messages", ROLE_ALIASES)
    masker = Masker(ChatTemplate(tokenizer))
    if calls == 2:
        with pytest.raises(DataError, match="2 tool_calls, and the chat template writes the first alone"):
            masker.mark(conversation)
        return
    marked = masker.mark(conversation)
    assert "Reasoning: high" in marked.text
    assert [marked.text[a:b] for a, b in marked.spans] == [
        ' to=functions.weather<|channel|>commentary json<|message|>{"city": "Bern"}<|call|>',
        "<|channel|>final<|message|>It is sunny.<|return|>",
    ]
    with pytest.raises(DataError, match="'reasoning_effort' is int 3; it must be a text"):
        converters.from_messages(
            Columns({"messages": messages, "reasoning_effort": 3}), "messages", ROLE_ALIASES
        )
