"""train_on_responses_only on tokenised data: the same answers as from rendering, with markers or without."""

from types import SimpleNamespace

import datasets
import pytest

from oribi.chat.named_templates import get_chat_template
from oribi.compat.responses_only import find_markers, train_on_responses_only
from oribi.data.encoding import UNTRAINED
from oribi.data.prepare import prepare_dataset
from oribi.errors import ConfigError, DataError
from tests.data.tokenizers_small import TWO_TURNS, WITH_SYSTEM


def trainer_for(tokenizer, rows, **more):
    ids = [tokenizer.apply_chat_template(m, tokenize=True)["input_ids"] for m in rows]
    dataset = datasets.Dataset.from_dict({"input_ids": ids})
    return SimpleNamespace(train_dataset=dataset, eval_dataset=None, processing_class=tokenizer, **more)


def trained(tokenizer, dataset):
    return [tokenizer.decode([x for x in labels if x != UNTRAINED]) for labels in dataset["labels"]]


NAMES = [
    "chatml",
    "llama-3",
    "llama-3.1",
    "gemma-3",
    "qwen-2.5",
    "qwen-3",
    "qwen3-thinking",
    "phi-3",
    "phi-4",
    "granite",
    "mistral-tekken",
    "zephyr",
    "alpaca",
    "vicuna",
    "mistral",
    "llama",
    "command-r",
    "olmo",
    "lfm-2",
    "gemma-4",
    "starling",
    "deepseek-r1",
]


@pytest.mark.parametrize("name", NAMES)
def test_without_markers_the_answers_are_those_of_rendering(name, family_tokenizer, tmp_path):
    get_chat_template(family_tokenizer, name)
    rows = [TWO_TURNS, WITH_SYSTEM]
    trainer = train_on_responses_only(trainer_for(family_tokenizer, rows))
    exact = prepare_dataset(
        [{"messages": m} for m in rows],
        family_tokenizer,
        max_seq_length=999,
        use_cache=False,
        progress=False,
        announce=None,
    ).dataset
    assert trainer.train_dataset["input_ids"][:] == exact["input_ids"][:]
    assert trainer.train_dataset["labels"][:] == exact["labels"][:]


def test_gpt_oss_answers_begin_with_their_channel(family_tokenizer_without_bos):
    tokenizer = get_chat_template(family_tokenizer_without_bos, "gpt-oss")
    trainer = train_on_responses_only(trainer_for(tokenizer, [TWO_TURNS]))
    channel = "<|channel|>final<|message|>"
    assert trained(tokenizer, trainer.train_dataset) == [
        f"{channel}It is this.<|end|>{channel}That, too.<|return|>"
    ]


def test_given_markers_are_honoured(chatml_tokenizer):
    trainer = trainer_for(chatml_tokenizer, [TWO_TURNS])
    train_on_responses_only(
        trainer, instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n"
    )
    assert trained(chatml_tokenizer, trainer.train_dataset) == ["It is this.<|im_end|>That, too.<|im_end|>"]


def test_plain_markers_without_a_template(plain_tokenizer):
    text = "User: What is it?\nAssistant: It is this.\nUser: And that?\nAssistant: That, too."
    dataset = datasets.Dataset.from_dict(
        {"input_ids": [plain_tokenizer(text)["input_ids"] + [plain_tokenizer.eos_token_id]]}
    )
    trainer = SimpleNamespace(train_dataset=dataset, processing_class=plain_tokenizer)
    train_on_responses_only(trainer, "User:", "Assistant:")
    runs = trained(plain_tokenizer, trainer.train_dataset)[0]
    assert "It is this." in runs
    assert "That, too.</s>" in runs
    assert "What" not in runs
    assert "User" not in runs


def test_only_the_last_response(chatml_tokenizer):
    trainer = train_on_responses_only(trainer_for(chatml_tokenizer, [TWO_TURNS]), last_response_only=True)
    assert trained(chatml_tokenizer, trainer.train_dataset) == ["That, too.<|im_end|>"]


def test_labels_that_are_there_are_only_narrowed(chatml_tokenizer):
    trainer = trainer_for(chatml_tokenizer, [TWO_TURNS])
    ids = trainer.train_dataset["input_ids"][0]
    first_half = [x if n < len(ids) // 2 else UNTRAINED for n, x in enumerate(ids)]
    trainer.train_dataset = trainer.train_dataset.add_column("labels", [first_half])
    train_on_responses_only(trainer)
    labels = trainer.train_dataset["labels"][0]
    assert all(new in (old, UNTRAINED) for new, old in zip(labels, first_half))
    assert trained(chatml_tokenizer, trainer.train_dataset) == ["It is this.<|im_end|>"]


def test_evaluation_sets_are_masked_too(chatml_tokenizer):
    trainer = trainer_for(chatml_tokenizer, [TWO_TURNS])
    trainer.eval_dataset = {"a": trainer.train_dataset, "b": trainer.train_dataset}
    train_on_responses_only(trainer)
    for dataset in trainer.eval_dataset.values():
        assert trained(chatml_tokenizer, dataset) == ["It is this.<|im_end|>That, too.<|im_end|>"]


def test_one_evaluation_set_is_masked(chatml_tokenizer):
    trainer = trainer_for(chatml_tokenizer, [TWO_TURNS])
    trainer.eval_dataset = trainer.train_dataset
    train_on_responses_only(trainer)
    assert trained(chatml_tokenizer, trainer.eval_dataset) == ["It is this.<|im_end|>That, too.<|im_end|>"]


def test_markers_that_do_not_find_the_answers_again_are_an_error(chatml_tokenizer):
    chatml_tokenizer.chat_template = (
        "{% for m in messages %}{{ 'is it' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'is it' }}{% endif %}"
    )
    with pytest.raises(DataError, match="answers should begin after 'is it', but in the tokens"):
        find_markers(chatml_tokenizer)


def test_packs_keep_their_lengths(chatml_tokenizer):
    trainer = trainer_for(chatml_tokenizer, [TWO_TURNS])
    ids = trainer.train_dataset["input_ids"][0]
    packs = datasets.Dataset.from_dict({"input_ids": [ids + ids], "seq_lengths": [[len(ids)] * 2]})
    trainer.train_dataset = packs
    train_on_responses_only(trainer)
    assert trainer.train_dataset["seq_lengths"][0] == [len(ids)] * 2
    assert trained(chatml_tokenizer, trainer.train_dataset) == [
        "It is this.<|im_end|>That, too.<|im_end|>" * 2
    ]


def test_a_stream_is_masked(chatml_tokenizer):
    trainer = trainer_for(chatml_tokenizer, [TWO_TURNS])
    trainer.train_dataset = trainer.train_dataset.to_iterable_dataset()
    train_on_responses_only(trainer)
    (row,) = trainer.train_dataset
    assert chatml_tokenizer.decode([x for x in row["labels"] if x != UNTRAINED]).count("<|im_end|>") == 2


def test_the_function_alone(chatml_tokenizer):
    trainer = trainer_for(chatml_tokenizer, [TWO_TURNS])
    function = train_on_responses_only(None, tokenizer=chatml_tokenizer, return_function=True)
    labels = function(trainer.train_dataset[:])["labels"][0]
    assert (
        chatml_tokenizer.decode([x for x in labels if x != UNTRAINED])
        == "It is this.<|im_end|>That, too.<|im_end|>"
    )


def test_rows_without_an_answer_are_left_out_and_all_of_them_are_an_error(chatml_tokenizer, capsys):
    trainer = train_on_responses_only(trainer_for(chatml_tokenizer, [TWO_TURNS, TWO_TURNS[:1]]))
    assert len(trainer.train_dataset) == 1
    assert "1 of 2 rows train nothing and are left out" in capsys.readouterr().out
    with pytest.raises(
        DataError, match="no token of 1 rows would be trained; '<.im_start.>assistant.n' was looked for"
    ):
        train_on_responses_only(trainer_for(chatml_tokenizer, [TWO_TURNS[:1]]))
    with pytest.raises(DataError, match="'<bot>' was looked for .* The first row begins '<.im_start.>user"):
        train_on_responses_only(trainer_for(chatml_tokenizer, [TWO_TURNS]), "<user>", "<bot>")


def test_markers_come_in_pairs_and_on_tokens(chatml_tokenizer):
    trainer = trainer_for(chatml_tokenizer, [TWO_TURNS])
    with pytest.raises(ConfigError, match="give instruction_part and response_part, or neither"):
        train_on_responses_only(trainer, instruction_part="<|im_start|>user\n")
    trainer.train_dataset = datasets.Dataset.from_list([{"text": "x"}])
    with pytest.raises(ConfigError, match="the data set has columns \\['text'\\]"):
        train_on_responses_only(trainer)
    with pytest.raises(ConfigError, match="give the tokenizer"):
        train_on_responses_only(SimpleNamespace(train_dataset=None))


def test_a_template_without_markers_is_an_error(chatml_tokenizer):
    chatml_tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    with pytest.raises(DataError, match="writes nothing before an answer or a question"):
        find_markers(chatml_tokenizer)
