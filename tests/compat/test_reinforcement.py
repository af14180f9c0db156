"""Answers as scripts ask vLLM for them, from the model itself."""

import pytest
import torch

from oribi import FastLanguageModel
from oribi.compat.reinforcement import SamplingParams
from oribi.errors import ConfigError
from tests.train.conftest import write_tiny_model

GREEDY = {"temperature": 0, "max_tokens": 6}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = write_tiny_model(tmp_path_factory.mktemp("model"))
    model, _ = FastLanguageModel.from_pretrained(str(folder), max_seq_length=128, dtype="float32")
    model = FastLanguageModel.get_peft_model(model, r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    return model


def test_an_answer_per_prompt_equals_generate(model):
    found = model.fast_generate(["the red fox", "old hills"], SamplingParams(**GREEDY))
    assert [output.prompt for output in found] == ["the red fox", "old hills"]
    tokenizer = model.get_base_model().loaded_tokenizer
    ids = torch.tensor([tokenizer("old hills")["input_ids"]])
    with model.disable_adapter():
        alone = model.generate(ids, max_new_tokens=6, do_sample=False)[0, ids.shape[1] :].tolist()
    assert found[1].outputs[0].token_ids == alone
    assert found[1].outputs[0].finish_reason in ("stop", "length")


def test_a_request_answers_with_the_saved_adapter_and_leaves_the_trained_one(model, tmp_path):
    model.save_lora(tmp_path / "saved")
    before = {name: p.clone() for name, p in model.named_parameters() if "lora" in name}
    base = model.fast_generate("the red fox", SamplingParams(**GREEDY))[0].outputs[0]
    tuned = model.fast_generate("the red fox", SamplingParams(**GREEDY), model.load_lora(tmp_path / "saved"))[
        0
    ]
    assert tuned.outputs[0].token_ids != base.token_ids
    after = {name: p for name, p in model.named_parameters() if "lora" in name}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) and after[name].requires_grad for name in before)


def test_several_answers_are_drawn_the_same_from_one_seed(model):
    wanted = SamplingParams(temperature=1.0, max_tokens=6, n=3, seed=5, min_p=0.01, top_k=-1, unknown=1)
    first, second = (model.fast_generate("the red fox", wanted)[0].outputs for _ in range(2))
    assert len(first) == 3
    assert first == second
    assert len({tuple(output.token_ids) for output in first}) > 1


def test_a_stop_text_ends_an_answer_and_is_no_part_of_it(model):
    whole = model.fast_generate("the red fox", SamplingParams(**GREEDY))[0].outputs[0].text
    stop = whole[len(whole) // 2]
    (cut,) = model.fast_generate("the red fox", SamplingParams(**GREEDY, stop=stop))[0].outputs
    assert cut.text == whole[: whole.index(stop)]
    assert cut.finish_reason == "stop"


def test_messages_are_refused_with_what_to_do(model):
    with pytest.raises(ConfigError, match=r"apply_chat_template\(tokenize=False\)"):
        model.fast_generate([[{"role": "user", "content": "x"}]])
