"""Rows of preferences become the tokens that supervised fine-tuning would make of the same conversations."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from oribi.chat.named_templates import get_chat_template
from oribi.chat.template import render_chat
from oribi.data.encoding import UNTRAINED
from oribi.data.preferences import prepare_preferences, stage_of_source
from oribi.data.prepare import prepare_dataset
from oribi.errors import ConfigError, DataError
from tests.data.tokenizers_small import WEATHER, assistant, call, user

HH = "\n\nHuman: What is it?\n\nAssistant: "
ASKED = "<|im_start|>user\nWhat is it?<|im_end|>\n<|im_start|>assistant\n"
SYSTEM = "<|im_start|>system\nBe brief.<|im_end|>\n"
# one row per shape, and the prompt that the model sees; the answers are "this" and "that"
SHAPES = {
    "texts": ({"prompt": "What is it?", "chosen": "this", "rejected": "that"}, ASKED),
    "messages": (
        {"prompt": [user("What is it?")], "chosen": [assistant("this")], "rejected": [assistant("that")]},
        ASKED,
    ),
    "implicit prompt": (
        {
            "chosen": [user("What is it?"), assistant("this")],
            "rejected": [user("What is it?"), assistant("that")],
        },
        ASKED,
    ),
    "UltraFeedback": (
        {
            "prompt": "What is it?",
            "prompt_id": "a1",
            "messages": [user("What is it?"), assistant("this")],
            "chosen": [user("What is it?"), assistant("this")],
            "rejected": [user("What is it?"), assistant("that")],
            "score_chosen": 8.0,
            "score_rejected": 5.0,
        },
        ASKED,
    ),  # fmt: skip
    "Orca": (
        {"system": "Be brief.", "question": "What is it?", "chosen": "this", "rejected": "that"},
        SYSTEM + ASKED,
    ),
    "HH-RLHF": ({"chosen": f"{HH}this", "rejected": f"{HH}that"}, ASKED),
    "HH-RLHF with a prompt": ({"prompt": HH, "chosen": " this", "rejected": " that"}, ASKED),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "What is it?", "input": "", "chosen": "this", "rejected": "that"},
        ASKED,
    ),
    "LLaMA-Factory, ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "What is it?"}],
            "chosen": {"from": "gpt", "value": "this"},
            "rejected": {"from": "gpt", "value": "that"},
        },
        ASKED,
    ),  # fmt: skip
    "Axolotl, chatml.argilla": (
        {
            "system": "Be brief.",
            "instruction": "What is it?",
            "chosen_response": "this",
            "rejected_response": "that",
        },
        SYSTEM + ASKED,
    ),
    "Axolotl, chatml.icr": ({"input": "What is it?", "chosen": "this", "rejected": "that"}, ASKED),
    "OpenAI": (
        {
            "input": {"messages": [user("What is it?")], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [assistant("this")],
            "non_preferred_output": [assistant("that")],
        },
        ASKED,
    ),  # fmt: skip
    "ms-swift": (
        {"messages": [user("What is it?"), assistant("this")], "rejected_response": "that"},
        ASKED,
    ),
    "other names": ({"Query": "What is it?", "Preferred": "this", "Dispreferred": "that"}, ASKED),
    "messages as JSON text": (
        {
            "prompt": json.dumps([user("What is it?")]),
            "chosen": json.dumps([assistant("this")]),
            "rejected": json.dumps(assistant("that")),
        },
        ASKED,
    ),  # fmt: skip
    "columns of datasets": (
        {
            "prompt": {"role": ["user"], "content": ["What is it?"]},
            "chosen": {"role": ["assistant"], "content": ["this"]},
            "rejected": {"role": ["assistant"], "content": ["that"]},
        },
        ASKED,
    ),
    "a list of one text": ({"prompt": "What is it?", "chosen": ["this"], "rejected": ["that"]}, ASKED),
    "rendered before": ({"prompt": ASKED, "chosen": "this<|im_end|>\n", "rejected": "that<|im_end|>"}, ASKED),
}


PAGE = Path(__file__).parents[2] / "docs" / "data-formats.md"
DOCUMENTED = [
    (stage, line)
    for stage, block in re.findall(
        r"^\*\*`(\w+)`.*?```json\n(.*?)```", PAGE.read_text(), re.DOTALL | re.MULTILINE
    )
    for line in block.splitlines()
]


@pytest.fixture
def prefer(chatml_tokenizer):
    def run(rows, stage="dpo", tokenizer=chatml_tokenizer, **settings):
        defaults = {"max_seq_length": 512, "use_cache": False, "progress": False, "announce": None}
        return prepare_preferences(rows, tokenizer, stage=stage, **{**defaults, **settings})

    return run


def texts(row, *names):
    return tuple(row[name] for name in names)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_tokens(shape, prefer, chatml_tokenizer):
    row, prompt = SHAPES[shape]
    made = prefer([row]).dataset[0]
    assert texts(made, "prompt", "chosen", "rejected") == (prompt, "this<|im_end|>", "that<|im_end|>")
    for name in ("prompt", "chosen", "rejected"):
        assert chatml_tokenizer.decode(made[f"{name}_ids"]) == made[name]
    assert made["origin"] == "row 1"


def test_unused_columns_are_named_once(prefer):
    said = []
    report = prefer([SHAPES["UltraFeedback"][0]] * 3, announce=said.append).report
    assert said.count("list: columns not used: prompt_id, score_chosen, score_rejected") == 1
    assert said[-1].startswith("list: a row repeats an earlier one: 2 times")
    assert report.unused_columns == ["prompt_id", "score_chosen", "score_rejected"]
    assert prefer([SHAPES["OpenAI"][0]]).report.unused_columns == []


FAMILIES = (
    "chatml", "llama-2", "llama-3.1", "gemma-3", "gemma-4", "mistral", "mistral-v7", "phi-3", "zephyr", "qwen-2.5", "qwen-3",
    "deepseek-r1", "gpt-oss", "vicuna",
)  # fmt: skip


@pytest.mark.parametrize("with_bos", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_supervised_fine_tuning(
    family, with_bos, prefer, family_tokenizer, family_tokenizer_without_bos
):
    tokenizer = get_chat_template(family_tokenizer if with_bos else family_tokenizer_without_bos, family)
    asked = [user("Hello?"), assistant("Hello."), user("What is it?")]
    row = {"prompt": asked, "chosen": [assistant("It is this.")], "rejected": [assistant("that")]}
    made = prefer([row], tokenizer=tokenizer).dataset[0]
    judged = prefer([{"messages": [*asked, assistant("It is this.")], "label": 1}], "kto", tokenizer).dataset[
        0
    ]
    scored = prefer([row], "reward", tokenizer).dataset[0]
    assert judged["prompt_ids"] + judged["completion_ids"] == made["prompt_ids"] + made["chosen_ids"]
    for name in ("chosen", "rejected"):
        supervised = prepare_dataset(
            [{"messages": [*asked, *row[name]]}], tokenizer, max_seq_length=512, train_on="last_response", use_cache=False,
            progress=False, announce=None,
        ).dataset[0]  # fmt: skip
        trained = [i for i, label in enumerate(supervised["labels"]) if label != UNTRAINED]
        assert made["prompt_ids"] == supervised["input_ids"][: trained[0]]
        assert made[f"{name}_ids"] == supervised["input_ids"][trained[0] : trained[-1] + 1]
        assert scored[f"{name}_ids"] == made["prompt_ids"] + made[f"{name}_ids"]
    # the generation prompt belongs to the prompt, and BOS begins it once
    rendered = render_chat(tokenizer, asked, add_generation_prompt=True)
    assert tokenizer.decode(made["prompt_ids"]).removeprefix("<s>").startswith(rendered.removeprefix("<s>"))
    assert made["prompt_ids"][:2] != [tokenizer.bos_token_id] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_trl_makes_the_same_tokens_of_the_texts(family, prefer, family_tokenizer):
    """The texts alone, in TRL's own preparation, where the tokenizer's EOS is what ends a turn."""
    dpo = pytest.importorskip("trl").DPOTrainer
    tokenizer = get_chat_template(family_tokenizer, family)
    row = {
        "prompt": [user("What is it?")],
        "chosen": [assistant("It is this.")],
        "rejected": [assistant("that")],
    }
    made = prefer([row], tokenizer=tokenizer).dataset
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(made[0]["chosen_ids"][-1])
    given = made.select_columns(["prompt", "chosen", "rejected"])
    settings = SimpleNamespace(dataset_num_proc=None, max_length=None, truncation_mode="keep_start")
    theirs = dpo._prepare_dataset(SimpleNamespace(_tokenizer=tokenizer), given, tokenizer, settings, "train")[
        0
    ]
    assert {name: theirs[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} == {
        name: made[0][name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")
    }


BROKEN = {
    "equal answers": (
        "dpo",
        {"prompt": "x", "chosen": "this", "rejected": "this "},
        "'chosen' and 'rejected' are equal, so nothing is preferred: remove the row.",
    ),
    "an empty answer": (
        "dpo",
        {"prompt": "x", "chosen": " ", "rejected": "that"},
        "'chosen' is empty: fill it in, or remove the row.",
    ),
    "a null answer": (
        "orpo",
        {"prompt": "x", "chosen": "this", "rejected": None},
        "row has an empty (null) 'rejected'",
    ),
    "the user's last turn": (
        "dpo",
        {"prompt": "x", "chosen": [assistant("a"), user("b")], "rejected": "that"},
        "'chosen' ends with a message of the role 'user'; the last one must be the assistant's.",
    ),
    "different prompts": (
        "dpo",
        {"chosen": [user("What?"), assistant("a")], "rejected": [user("Where?"), assistant("b")]},
        "'chosen' and 'rejected' differ in message 1 (user), before the answer: both must answer the same prompt.",
    ),
    "a prompt that ends with an answer": (
        "dpo",
        {"messages": [user("a"), assistant("b")], "chosen": "c", "rejected": "d"},
        "'messages' ends with a message of the assistant, so nothing is asked that an answer could follow.",
    ),
    "no prompt": (
        "dpo",
        {"chosen": "this", "rejected": "Another."},
        "no prompt, and 'chosen' and 'rejected' do not begin alike.",
    ),
    "several answers": (
        "dpo",
        {"prompt": "x", "chosen": ["a", "b"], "rejected": "c"},
        "'chosen' holds 2 texts; it must hold one answer, or a list of messages.",
    ),
    "a label that is none": (
        "kto",
        {"prompt": "x", "completion": "this", "label": 3},
        "'label' is int 3; it must be true or false (or 1 or 0).",
    ),
    "tools of a prompt": (
        "grpo",
        {"prompt": [user("x")], "tools": [WEATHER]},
        "row has 'tools', which stage grpo cannot give to the chat template row by row",
    ),
    "a name that TRL uses": (
        "grpo",
        {"prompt": [user("x")], "completions": 1},
        "row has a column 'completions', under which reward functions get something else: rename it in the file.",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_rows_that_cannot_be_used_are_named(case, prefer, tmp_path):
    stage, row, message = BROKEN[case]
    good = {
        "kto": {"prompt": "x", "completion": "this", "label": True},
        "grpo": {"prompt": [user("x")]},
        "a prompt that ends with an answer": {**row, "messages": [user("x")]},
        "no prompt": {"chosen": "It is this.", "rejected": "It is that."},
    }  # fmt: skip
    good = good.get(case) or good.get(stage) or SHAPES["texts"][0]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(one) + "\n" for one in (good, row)))
    with pytest.raises(DataError) as caught:
        prefer(str(file), stage)
    assert str(caught.value).startswith("rows.jsonl:2: ")
    assert message in str(caught.value)
    kept = prefer(str(file), stage, malformed="drop")
    assert (len(kept.dataset), kept.report.rows_malformed) == (1, 1)
    assert message in kept.report.malformed_rows[0]


OTHER_STAGES = {
    "sft for dpo": ("dpo", {"messages": [user("a"), assistant("b")]}, "write stage: sft."),
    "pair for sft's neighbours": ("kto", {"question": "a", "answer": "b"}, "write stage: sft."),
    "labels for dpo": ("reward", {"prompt": "a", "completion": "b", "label": True}, "write stage: kto."),
    "prompts for orpo": ("orpo", {"prompt": "a"}, "write stage: grpo."),
}


@pytest.mark.parametrize("case", OTHER_STAGES)
def test_rows_of_another_stage_say_which(case, prefer):
    stage, row, message = OTHER_STAGES[case]
    with pytest.raises(DataError, match=message):
        prefer([row], stage)


def test_labels_are_read_in_every_form(prefer):
    forms = [True, False, 1, 0, 1.0, "true", "False", "0", "desirable", "bad"]
    rows = [{"prompt": "x", "completion": f"answer {i}", "label": form} for i, form in enumerate(forms)]
    made = prefer(rows, "kto")
    assert made.dataset["label"][:] == [True, False, True, False, True, True, False, False, True, False]
    assert texts(made.dataset[0], "prompt", "completion") == (
        ASKED.replace("What is it?", "x"),
        "answer 0<|im_end|>",
    )
    assert made.report.preferences["desirable"] == made.report.preferences["undesirable"] == 5


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [user("x"), assistant("y")], "kto_tag": True},
        {"instruction": "x", "output": "y", "kto_tag": True},
        {"question": "x", "completion": "y", "label": True},
        {"prompt": [user("x")], "completion": [assistant("y")], "label": True},
        {"prompt": "\n\nHuman: x\n\nAssistant:", "completion": " y", "label": True},
    ],
)
def test_judged_answers_come_in_every_shape(row, prefer):
    made = prefer([row], "kto")
    assert texts(made.dataset[0], "prompt", "completion", "label") == (
        ASKED.replace("What is it?", "x"),
        "y<|im_end|>",
        True,
    )
    assert "all 1 answers are labelled good" in str(made.report)
    assert made.report.unused_columns == []


def test_pairs_become_judged_answers(prefer):
    made = prefer([SHAPES["texts"][0]], "kto")
    assert [texts(row, "completion", "label") for row in made.dataset] == [
        ("this<|im_end|>", True),
        ("that<|im_end|>", False),
    ]
    assert "a pair became two rows" in str(made.report)


def test_prompts_keep_every_other_column(prefer):
    rows = [
        {"question": "What?", "answer": 5, "system": "Be brief.", "tests": {"a": 1}, "mixed": 1},
        {"question": "Who?", "answer": 6, "tests": {"b": [2.5]}, "mixed": "2", "late": None},
    ]
    made = prefer(rows, "grpo").dataset
    assert made[0]["prompt"] == [{"role": "system", "content": "Be brief."}, user("What?")]
    assert [row["tests"] for row in made] == [{"a": 1}, {"b": [2.5]}]
    assert [row["mixed"] for row in made] == [1, "2"]
    assert made["answer"][:] == [5, 6]
    assert (made[1]["system"], made[1]["question"], made[1]["late"]) == (None, "Who?", None)


def test_the_last_answer_is_no_part_of_a_prompt(prefer):
    made = prefer([{"messages": [user("What?"), assistant("this")]}], "grpo")
    assert made.dataset[0]["prompt"] == [user("What?")]
    assert made.dataset[0]["answer"] == "this"
    assert "reward functions get it as 'answer'" in str(made.report)


def test_tools_of_a_row_are_rendered(prefer, family_tokenizer):
    tokenizer = get_chat_template(family_tokenizer, "qwen-2.5")
    row = {
        "messages": [user("Weather?")], "tools": json.dumps([WEATHER]),
        "chosen": [assistant("", tool_calls=[call("weather", city="Bern")])], "rejected": "I do not know.",
    }  # fmt: skip
    made = prefer([row], tokenizer=tokenizer).dataset[0]
    assert "Tell the weather." in made["prompt"]
    assert '"city": "Bern"' in made["chosen"]


def test_long_answers_are_cut_counted_and_named(prefer):
    rows = [SHAPES["texts"][0], {"prompt": "What is it?", "chosen": "this " * 60, "rejected": "that"}]
    limit = 60
    made = prefer(rows, max_seq_length=limit)
    long = made.dataset[1]
    assert len(long["prompt_ids"]) + len(long["chosen_ids"]) == limit
    assert (made.report.rows_cut, made.report.rows_kept) == (1, 2)
    assert made.report.overlong_rows[0].startswith("row 2 (")
    assert len(prefer(rows, max_seq_length=limit, overlong="drop").dataset) == 1
    assert len(prefer(rows, "reward", max_seq_length=limit).dataset) == 1
    with pytest.raises(DataError, match="1 of 2 rows are longer than max_seq_length = 60: row 2"):
        prefer(rows, max_seq_length=limit, overlong="error")


def test_a_row_without_an_answer_left_is_left_out(prefer):
    rows = [SHAPES["texts"][0], {"prompt": "why " * 90, "chosen": "this", "rejected": "that"}]
    made = prefer(rows, max_seq_length=40)
    assert made.report.dropped_rows == ["row 2 (its answers lie beyond max_seq_length)"]
    alike = {"prompt": "x", "chosen": "this " * 60 + "a", "rejected": "this " * 60 + "b"}
    made = prefer([rows[0], alike], max_seq_length=40)
    assert made.report.dropped_rows == ["row 2 (its answers are equal up to max_seq_length)"]


def test_a_length_bias_and_repeated_rows_are_remarked_upon(prefer):
    rows = [{"prompt": f"{i}?", "chosen": "this and that", "rejected": "no"} for i in range(20)]
    report = prefer([*rows, rows[3]]).report
    assert report.preferences["chosen_longer"] == 1.0
    assert "the chosen answer is the longer one in 100 % of the pairs" in str(report)
    assert "a row repeats an earlier one: 1 times, first in row 21" in report.notes
    assert report.preferences["chosen"]["p50"] > report.preferences["rejected"]["p50"]


def test_names_and_roles_can_be_mapped(prefer):
    row = {"ask": [{"role": "client", "content": "What is it?"}], "good": "this", "weak": "that", "id": 1}
    made = prefer(
        [row],
        columns={"prompt": "ask", "chosen": "good", "rejected": "weak"},
        role_aliases={"client": "user"},
    )
    assert made.dataset[0]["prompt"] == ASKED
    assert made.report.unused_columns == ["id"]


def test_a_prompt_can_be_used_as_it_is(prefer):
    row = {"prompt": "The sky is", "chosen": " blue", "rejected": " green"}
    assert prefer([row], text_field="prompt").dataset[0]["prompt"] == "The sky is"
    made = prefer([{"chosen": "The sky is blue", "rejected": "The sky is green"}]).dataset[0]
    assert texts(made, "prompt", "chosen") == ("The sky is", " blue<|im_end|>")


def test_files_of_every_kind_are_read(prefer, tmp_path):
    (tmp_path / "a.csv").write_text("question,chosen,rejected\nWhat is it?,this,that\n")
    (tmp_path / "b.jsonl").write_text(json.dumps(SHAPES["HH-RLHF"][0]) + "\n")
    made = prefer([str(tmp_path / "a.csv"), str(tmp_path / "b.jsonl")])
    assert [row["prompt"] for row in made.dataset] == [ASKED, ASKED]
    assert made.dataset["origin"][:] == ["a.csv:2", "b.jsonl:1"]


def test_prepared_preferences_are_kept(prefer, tmp_path):
    for stage in ("dpo", "reward"):
        first = prefer([SHAPES["texts"][0]], stage, use_cache=True, cache_dir=tmp_path)
        again = prefer([SHAPES["texts"][0]], stage, use_cache=True, cache_dir=tmp_path)
        assert (first.report.from_cache, again.report.from_cache) == (False, True)
        assert again.dataset[0] == first.dataset[0]


def test_settings_without_effect_are_named(prefer):
    report = prefer([SHAPES["texts"][0]], train_on="everything", turns="split").report
    assert [note.partition(" ")[0] for note in report.notes] == ["train_on_responses_only", "turns"]
    with pytest.raises(ConfigError, match="overlong = 'split': stage dpo compares whole answers"):
        prefer([SHAPES["texts"][0]], overlong="split")


@pytest.mark.parametrize(
    ("row", "stage"),
    [
        (SHAPES["HH-RLHF"][0], "dpo"),
        ({"prompt": "x", "completion": "y", "label": 0}, "kto"),
        ({"messages": [user("a"), assistant("b")]}, "sft"),
        ({"prompt": [user("a")], "target": 3}, "grpo"),
        ({"prompt": "x", "reference": None}, "grpo"),
    ],
)
def test_the_stage_of_a_source_is_recognised(row, stage):
    assert stage_of_source([{**row, "id": 1}]) == stage


def test_an_answer_that_is_missing_makes_no_prompt_of_a_row():
    for row in ({"question": "x", "answer": None}, {"instruction": "x", "output": None}):
        with pytest.raises(DataError, match=r"row 1: row has an empty \(null\) "):
            stage_of_source([row])
        whole = dict.fromkeys(row, "y")
        assert stage_of_source([row, whole]) == "sft"


@pytest.mark.parametrize(("stage", "line"), DOCUMENTED)
def test_documented_rows_are_read_as_they_stand(stage, line, prefer, tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(line + "\n")
    for one in ("dpo", "orpo", "reward") if stage == "dpo" else (stage,):
        made = prefer(str(file), one)
        assert made.dataset[0]["prompt"]
        assert made.report.unused_columns in ([], ["score_chosen", "score_rejected"])


def test_every_stage_is_documented():
    assert {stage for stage, _ in DOCUMENTED} == {"dpo", "kto", "grpo"}
    assert len(DOCUMENTED) >= 18


def test_an_answer_in_json_stays_text(prefer):
    made = prefer([{"prompt": "x", "chosen": '{"text": "a", "mood": "good"}', "rejected": "[1, 2]"}]).dataset[
        0
    ]
    assert texts(made, "chosen", "rejected") == (
        '{"text": "a", "mood": "good"}<|im_end|>',
        "[1, 2]<|im_end|>",
    )


def test_numbers_and_half_characters_are_written_and_counted(prefer):
    made = prefer([{"prompt": "2 + 2?", "chosen": 4, "rejected": "5\ud83d"}])
    assert texts(made.dataset[0], "chosen", "rejected") == ("4<|im_end|>", "5�<|im_end|>")
    assert "'chosen' holds int values, which are written as text: 1 times" in str(made.report)
    assert "half of a character (a lone surrogate) is replaced by U+FFFD: 1 times" in str(made.report)


def test_the_end_of_a_turn_is_written_once(prefer):
    made = prefer([{"prompt": "x", "chosen": "this<|im_end|>", "rejected": "that<|im_end|>\n"}])
    assert texts(made.dataset[0], "chosen", "rejected") == ("this<|im_end|>", "that<|im_end|>")
    assert "an answer ends with '<|im_end|>', which the chat template writes; it is written once" in str(
        made.report
    )


def test_a_token_that_opens_no_turn_leaves_a_prompt_a_question(prefer, family_tokenizer):
    tokenizer = get_chat_template(family_tokenizer, "chatml")
    row = {"prompt": "What does <s> do in HTML, and <|endoftext|>?", "chosen": "this", "rejected": "that"}
    assert prefer([row], tokenizer=tokenizer).dataset[0]["prompt"].endswith("<|im_start|>assistant\n")


def test_dialogues_as_text_may_have_other_line_ends(prefer):
    row = {
        "chosen": "Human: What is it?\r\n\r\nAssistant: this",
        "rejected": "Human: What is it?\r\n\r\nAssistant: that",
    }
    assert prefer([row]).dataset[0]["prompt"] == ASKED


@pytest.mark.parametrize(
    ("row", "stage"),
    [
        ({"prompt": "x", "chosen": None, "rejected": "b"}, "dpo"),
        ({"prompt": "x", "completion": "y", "label": None}, "kto"),
        ({"prompt": None, "answer": 1}, "grpo"),
    ],
)
def test_a_null_in_the_first_row_is_named(row, stage, prefer):
    with pytest.raises(DataError, match="row 1: row has an empty \\(null\\) '(chosen|label|prompt)'"):
        prefer([row], stage)


def test_columns_for_reward_functions_keep_their_types(prefer):
    kept = {
        "unit_tests": ["a", "b"],
        "share": 1 / 3,
        "blob": b"\xff",
        "pairs": [[1], [2, 3]],
        "turns_left": [user("x")],
    }
    made = prefer([{"prompt": "q", **kept}, {"prompt": "r", "share": 0.5}], "grpo").dataset
    assert {name: made[0][name] for name in kept} == kept
    assert made[1]["unit_tests"] is None
    with pytest.raises(DataError, match="the column 'big' holds int 1180591620717411303424"):
        prefer([{"prompt": "q", "big": 2**70}], "grpo")
