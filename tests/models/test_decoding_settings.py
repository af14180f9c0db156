"""What scripts set of `generate` gives the tokens of a plain transformers model: by oribi's loop, or by theirs and a reason."""

import copy
import gc
import logging
import weakref
from types import SimpleNamespace

import pytest
import torch
from transformers import LogitsProcessor, StoppingCriteria

from oribi.models.decoding import generation, loop, session
from tests.data.tokenizers_small import byte_level
from tests.models.tiny import tiny_config, tiny_pair

TOKENIZER = copy.deepcopy(byte_level(("<|im_start|>",)))
PROMPTS = {
    "input_ids": torch.tensor([[0, 0, 0, 41, 52, 63], [33, 44, 60, 71, 82, 93]]),
    "attention_mask": torch.tensor([[0, 0, 0, 1, 1, 1], [1] * 6]),
}
SETTINGS = {"max_new_tokens": 12, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
SAMPLED = {"do_sample": True, "top_k": 0}


class LastIsLessLikely(LogitsProcessor):
    """Also keeps what it is given, as scripts do."""

    def __init__(self):
        self.seen = []

    def __call__(self, input_ids, scores):
        self.seen.append((input_ids, scores))
        scores[torch.arange(len(scores)), input_ids[:, -1]] -= 1.0
        scores[:, 5] += 2.0
        return scores


class AtLength(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] > 10, device=input_ids.device)


@pytest.fixture(scope="module")
def pair():
    mine, reference = tiny_pair(tiny_config("llama", vocab_size=len(TOKENIZER)))
    free = reference.eval().generate(**PROMPTS, **SETTINGS)
    return mine.eval(), reference, free


OWN = {
    "typical_p": {**SAMPLED, "typical_p": 0.5},
    "epsilon_cutoff": {**SAMPLED, "epsilon_cutoff": 0.005},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": lambda free: [[5], free[0, 7:9].tolist(), [int(free[1, 8])]]},
    "sequence_bias": {"sequence_bias": [[[5], 2.0], [[7, 8], 3.0]]},
    "stop_strings": {
        "stop_strings": lambda free: [TOKENIZER.decode(free[0, -5:-3])],
        "tokenizer": lambda _: TOKENIZER,
    },
    "num_return_sequences": {**SAMPLED, "num_return_sequences": 3},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": lambda free: free[0, 6:10].tolist()},
    "max_length": {"max_new_tokens": None, "max_length": 15},
    "max_time": {"max_time": 100.0},
    "exponential_decay": {"exponential_decay_length_penalty": (3, 1.5), "eos_token_id": 9},
    "forced_eos": {"forced_eos_token_id": 5},
    "begin_suppress": {"begin_suppress_tokens": lambda free: [int(free[0, 6])]},
    "guidance": {"guidance_scale": 1.5},
    "watermark": {"watermarking_config": {"greenlist_ratio": 0.25, "bias": 2.0}},
    "prefix": {"prefix_allowed_tokens_fn": lambda _: lambda row, ids: [3 + row, 9, 20]},
    "processor": {"logits_processor": lambda _: [LastIsLessLikely()]},
    "processor drawn": {**SAMPLED, "logits_processor": lambda _: [LastIsLessLikely()]},
    "criterion": {"stopping_criteria": [AtLength()]},
    "criterion with end": {"stopping_criteria": [AtLength()], "eos_token_id": lambda free: int(free[0, 8])},
    "static": {"cache_implementation": "static"},
    "scores": {"return_dict_in_generate": True, "output_scores": True, "repetition_penalty": 1.4},
    "scores drawn": {
        **SAMPLED,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    },
    "logits to an end": {
        "return_dict_in_generate": True,
        "output_logits": True,
        "eos_token_id": lambda free: [int(free[0, 8]), int(free[1, 9])],
    },
}
THEIRS = {
    "beams": ({"num_beams": 3, "num_return_sequences": 2}, "num_beams"),
    "drawn beams": ({**SAMPLED, "num_beams": 2}, "num_beams"),
    "static beams": ({"num_beams": 2, "cache_implementation": "static"}, "num_beams"),
    "lookup": ({"prompt_lookup_num_tokens": 3, "rows": 1}, "drafted tokens"),
    "assistant": ({"assistant_model": lambda _: None, "rows": 1}, "drafted tokens"),
    "early exit": ({"assistant_early_exit": 1, "rows": 1}, "drafted tokens"),
    "a cache to go on with": ({"return_dict_in_generate": True}, "asks for the cache"),
    "hidden states": (
        {"return_dict_in_generate": True, "output_hidden_states": True},
        "output_hidden_states",
    ),
}


def call(model, free, settings):
    """`generate` with seed 0; what of the settings is a function is made anew."""
    made = {n: v(free) if callable(v) else v for n, v in {**SETTINGS, **settings}.items()}
    rows = made.pop("rows", 2)
    if "assistant_model" in made:
        made["assistant_model"] = model
    torch.manual_seed(0)
    return model.generate(**{n: v[-rows:] for n, v in PROMPTS.items()}, **made), made


def compare(found, expected):
    if torch.is_tensor(expected):
        assert torch.equal(found, expected)
        return
    assert type(found) is type(expected)
    assert torch.equal(found.sequences, expected.sequences)
    for name in ("scores", "logits"):
        mine, theirs = found.get(name), expected.get(name)
        assert (mine is None) == (theirs is None)
        for one, other in zip(mine or (), theirs or (), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", OWN)
def test_settings_of_scripts_give_transformers_tokens_by_the_own_loop(name, pair, monkeypatch):
    mine, reference, free = pair
    monkeypatch.setattr(generation, "say_once", lambda reason: pytest.fail(reason))
    found, made = call(mine, free, OWN[name])
    compare(found, call(reference, free, OWN[name])[0])
    for processor in made.get("logits_processor", ()):
        assert len(processor.seen) == 12
        assert not any(ids.is_inference() or scores.is_inference() for ids, scores in processor.seen)


@pytest.mark.parametrize("name", THEIRS)
def test_what_is_left_to_transformers_gives_its_tokens_and_says_why_once(name, pair, caplog):
    (mine, reference, free), (settings, reason) = pair, THEIRS[name]
    expected = call(reference, free, settings)[0]
    generation.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="oribi"):
        for _ in range(2):
            compare(call(mine, free, settings)[0], expected)
    said = [record.message for record in caplog.records if "transformers' own loop" in record.message]
    assert reason in said[0]
    assert len(said) == len(set(said))


def test_scores_are_those_that_transition_scores_are_computed_of(pair):
    mine, _, free = pair
    out, _ = call(mine, free, OWN["scores"])
    assert not any(scores.is_inference() for scores in out.scores)
    found = mine.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)
    assert found.shape == (2, 12)
    assert (found < 0).all()


def test_the_cache_is_freed_after_a_generation_on_a_cpu(pair, monkeypatch):
    mine, _, free = pair
    made, whole = [], loop.DecodingState

    def watched(*args):
        state = whole(*args)
        made.append(weakref.ref(state))
        return state

    monkeypatch.setattr(loop, "DecodingState", watched)
    call(mine, free, {})
    gc.collect()
    assert [state() for state in made] == [None]


def test_a_session_that_a_conversation_outgrows_doubles_within_the_positions(pair):
    mine, _, _ = pair
    request = SimpleNamespace(longest=300, new_tokens=12)
    assert session._sizes(mine, request, 1, None) == (512, 256)
    before = SimpleNamespace(length=512, new_tokens=512)
    mine.config.max_position_embeddings, positions = 4096, mine.config.max_position_embeddings
    try:
        assert session._sizes(mine, request, 1, before) == (1024, 512)
        mine.config.max_position_embeddings = 700
        assert session._sizes(mine, request, 1, before) == (700, 512)
        request.longest = 900  # which a caller may ask for
        assert session._sizes(mine, request, 1, before) == (1024, 512)
        assert session._sizes(mine, request, 10**9, before) == (1024, 512)
    finally:
        mine.config.max_position_embeddings = positions
