"""oribi's decoding loop gives the tokens of transformers' loop, for every family, and leaves to it what it does not do."""

import copy
import logging
import threading

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TextIteratorStreamer
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerationMixin, GenerationMode

from oribi.families import FAMILIES
from oribi.models.decoding import generation, loop, prefill, request
from tests.data.tokenizers_small import byte_level
from tests.models.tiny import KINDS, ROPES, tiny_config, tiny_pair

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


def tiny(model_type: str = "llama", **changes):
    return tiny_pair(tiny_config(model_type, **changes))[0].eval()


def with_lora(model, model_type: str = "llama"):
    torch.manual_seed(1)
    wrapped = get_peft_model(
        model, LoraConfig(r=4, target_modules=FUSED if model_type == "phi3" else TARGETS)
    )
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3)
    return wrapped.eval()


def padded(prompts: list[list[int]]) -> dict[str, torch.Tensor]:
    width = max(map(len, prompts))
    return {
        "input_ids": torch.tensor([[0] * (width - len(p)) + p for p in prompts]),
        "attention_mask": torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts]),
    }


def some_prompts(count: int, longest: int = 14, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(3, 128, (n,), generator=generator).tolist() for n in lengths]


@pytest.fixture
def theirs(monkeypatch):
    """Calls `generate` with transformers' loop."""

    def call(model, **settings):
        with monkeypatch.context() as patch:
            patch.setattr(
                "oribi.models.decoding.generation.read_request", lambda *_: "a test compares with it"
            )
            return model.generate(**settings)

    return call


@pytest.fixture
def ours(monkeypatch):
    """Calls `generate`, and fails if transformers' loop answers."""

    def call(model, **settings):
        def refuse(reason):
            raise AssertionError(f"transformers' loop: {reason}")

        with monkeypatch.context() as patch:
            patch.setattr("oribi.models.decoding.generation.say_once", refuse)
            return model.generate(**settings)

    return call


GREEDY = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}


def same_tokens(model, prompts, mine: torch.Tensor, expected: torch.Tensor) -> bool:
    """Whether rows are equal; one may part from the other where two tokens are as likely, to float32's rounding."""
    assert mine.shape == expected.shape
    for row, real in enumerate(prompts["attention_mask"]):
        (parted,) = (mine[row] != expected[row]).nonzero(as_tuple=True)
        if len(parted):
            first = int(parted[0])
            ids = mine[row, len(real) - int(real.sum()) : first]
            both = model(input_ids=ids[None]).logits[0, -1, [mine[row, first], expected[row, first]]]
            if abs(float(both[0] - both[1])) > 1e-5:
                return False
    return True


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_greedy_tokens_equal_transformers_loop(model_type, lora, ours, theirs):
    model = tiny(model_type)
    model = with_lora(model, model_type) if lora else model
    prompts = padded(some_prompts(5))
    assert same_tokens(model, prompts, ours(model, **prompts, **GREEDY), theirs(model, **prompts, **GREEDY))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KINDS)
def test_greedy_tokens_of_100_prompts_equal_transformers_loop(model_type, ours, theirs):
    model = with_lora(tiny(model_type), model_type)
    for seed in range(2):
        prompts = padded(some_prompts(50, 20, seed))
        settings = {**GREEDY, "max_new_tokens": 24}
        mine, reference = ours(model, **prompts, **settings), theirs(model, **prompts, **settings)
        assert same_tokens(model, prompts, mine, reference), seed


@pytest.mark.parametrize("rope", sorted(set(ROPES) - {"dynamic"}))
@pytest.mark.parametrize("length", [3, 40])
def test_every_rope_kind_equals_transformers_loop(rope, length, ours, theirs):
    model = tiny(rope_parameters=ROPES[rope], max_position_embeddings=128)
    ids = {"input_ids": torch.randint(3, 128, (2, length))}
    assert torch.equal(ours(model, **ids, **GREEDY), theirs(model, **ids, **GREEDY))


def test_left_padded_batches_equal_single_prompts(ours):
    model = tiny("gemma3_text")
    prompts = some_prompts(6)
    together = ours(model, **padded(prompts), **GREEDY)[:, -12:]
    for prompt, row in zip(prompts, together):
        assert torch.equal(ours(model, input_ids=torch.tensor([prompt]), **GREEDY)[0, -12:], row)


@pytest.mark.parametrize("tokens", [1, 20])
def test_portions_of_the_prompts_change_nothing(tokens, ours, monkeypatch):
    model, prompts = tiny("gemma2"), padded(some_prompts(6))
    whole = ours(model, **prompts, **GREEDY)
    monkeypatch.setattr(prefill, "PACK_TOKENS", tokens)
    assert torch.equal(ours(model, **prompts, **GREEDY), whole)


def test_equal_prompts_are_computed_once(ours, theirs, monkeypatch):
    model, seen = tiny("mistral"), []
    forward = model.model.forward
    ids = torch.tensor([[5, 6, 7, 8, 9, 10, 11]] * 3 + [[9, 8, 7, 6, 5, 4, 3]] * 2)
    expected = theirs(model, input_ids=ids, num_return_sequences=2, do_sample=True, top_k=1, max_new_tokens=6)
    monkeypatch.setattr(
        type(model.model), "forward", lambda self, **k: seen.append(k["input_ids"].shape) or forward(**k)
    )
    got = ours(model, input_ids=ids, num_return_sequences=2, do_sample=True, top_k=1, max_new_tokens=6)
    assert torch.equal(got, expected)
    assert seen == [(1, 14)]


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "gemma3_text"])
def test_what_all_prompts_begin_with_is_read_once(model_type, ours, theirs, monkeypatch):
    model, seen = with_lora(tiny(model_type)), []
    decoder = model.get_base_model().model
    forward = decoder.forward
    beginning = some_prompts(1, 40, seed=2)[0] + list(range(20, 60))
    endings = some_prompts(5, seed=3)
    prompts = padded([beginning + ending for ending in [*endings, endings[0]]])
    expected = theirs(model, **prompts, **GREEDY)
    monkeypatch.setattr(
        type(decoder), "forward", lambda self, **k: seen.append(k["input_ids"].shape) or forward(**k)
    )
    assert same_tokens(model, prompts, ours(model, **prompts, **GREEDY), expected)
    if model_type == "gemma3_text":  # a layer with a window does not hold the beginning
        assert seen[0] == (1, len(endings) * len(beginning) + sum(map(len, endings)))
    else:
        assert seen[0] == (1, len(beginning))
        assert sum(rows for rows, _ in seen[1:]) == len(endings)
        # endings of about one length are read together, so that little is padding
        tokens = sum(map(len, endings))
        assert tokens <= sum(rows * length for rows, length in seen[1:]) <= 1.3 * tokens


def test_rows_end_at_their_own_end_tokens(ours, theirs):
    model, prompts = tiny("qwen3"), padded(some_prompts(8))
    free = theirs(model, **prompts, **{**GREEDY, "max_new_tokens": 30})
    ends = sorted({int(free[0, -25]), int(free[1, -20]), int(free[2, -10]), int(free[3, -2])})
    for count in (1, 4):
        settings = {**GREEDY, "max_new_tokens": 30, "eos_token_id": ends[:count], "pad_token_id": 0}
        assert torch.equal(ours(model, **prompts, **settings), theirs(model, **prompts, **settings))
    one = {
        "input_ids": free[:1, :-30],
        "eos_token_id": int(free[0, -25]),
        "max_new_tokens": 30,
        "do_sample": False,
    }
    one["attention_mask"] = prompts["attention_mask"][:1]
    assert ours(model, **one).shape[1] == free.shape[1] - 24


@pytest.mark.parametrize(
    "processors",
    [
        {"repetition_penalty": 1.7},
        {"min_new_tokens": 5, "eos_token_id": list(range(3, 60))},
        {"min_length": 18, "eos_token_id": list(range(3, 60))},
        {"suppress_tokens": list(range(3, 90))},
        {
            "repetition_penalty": 0.7,
            "suppress_tokens": [5, 6],
            "min_new_tokens": 3,
            "eos_token_id": [7, 9, 11],
        },
    ],
    ids=lambda p: "+".join(p),
)
def test_greedy_processors_equal_transformers(processors, ours, theirs):
    model, prompts = tiny("qwen2"), padded(some_prompts(5))
    settings = {**GREEDY, "pad_token_id": 0, **processors}
    assert torch.equal(ours(model, **prompts, **settings), theirs(model, **prompts, **settings))


def test_a_stop_string_ends_each_row(ours, theirs):
    tokenizer = copy.deepcopy(byte_level(("<|im_start|>",)))
    model = tiny(vocab_size=len(tokenizer))
    prompts = padded([tokenizer(text)["input_ids"] for text in ("Hello there", "Tea", "A b")])
    free = theirs(model, **prompts, **GREEDY)
    for ends in (None, int(free[1, -3])):
        settings = {**GREEDY, "eos_token_id": ends, "pad_token_id": 0, "tokenizer": tokenizer}
        settings["stop_strings"] = [tokenizer.decode(free[0, -9]), tokenizer.decode(free[2, -5])]
        assert torch.equal(ours(model, **prompts, **settings), theirs(model, **prompts, **settings))


class Recorder(BaseStreamer):
    def __init__(self):
        self.got = []

    def put(self, value):
        self.got.append(value.tolist())

    def end(self):
        self.got.append("end")


@pytest.mark.parametrize("rows", [1, 3])
def test_a_streamer_gets_the_prompt_each_token_and_the_end(rows, ours, theirs):
    model, prompts = tiny(), padded(some_prompts(rows))
    free = theirs(model, **prompts, **GREEDY)
    for ends in (None, [int(free[0, -6]), int(free[-1, -4])]):
        mine, reference = Recorder(), Recorder()
        settings = {**GREEDY, "eos_token_id": ends, "pad_token_id": 0}
        ours(model, **prompts, streamer=mine, **settings)
        theirs(model, **prompts, streamer=reference, **settings)
        assert mine.got == reference.got


def test_an_iterator_streams_from_another_thread(ours):
    tokenizer = copy.deepcopy(byte_level(("<|im_start|>",)))
    model = tiny(vocab_size=len(tokenizer))
    ids = torch.tensor([tokenizer("Hello")["input_ids"]])
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    thread = threading.Thread(
        target=model.generate, kwargs={"input_ids": ids, "streamer": streamer, **GREEDY}
    )
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed == tokenizer.decode(ours(model, input_ids=ids, **GREEDY)[0, ids.shape[1] :])


def test_trained_factors_count_and_generating_leaves_training_as_it_was(ours, theirs):
    """Also: the loop runs on a model in training, and with its adapter disabled."""
    ids = torch.randint(3, 128, (2, 9))
    losses, answers = [], []
    for generates in (False, True):
        torch.manual_seed(2)
        model = with_lora(tiny("qwen3"))
        model.train()
        model.gradient_checkpointing_enable()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            if generates:
                ours(model, input_ids=ids, **GREEDY)
                assert model.training
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        answers.append(ours(model, input_ids=ids, **GREEDY))
    assert losses[:3] == losses[3:]
    assert len(set(losses)) == 3
    assert torch.equal(*answers)
    assert torch.equal(answers[0], theirs(model, input_ids=ids, **GREEDY))
    with model.disable_adapter():
        bare = ours(model, input_ids=ids, **GREEDY)
    assert torch.equal(bare, ours(tiny("qwen3"), input_ids=ids, **GREEDY))
    assert not torch.equal(bare, answers[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_model_trains_after_it_generated_without_gradients(mode):
    model = with_lora(tiny("gemma3_text")).train()
    with mode():
        out = model.generate(input_ids=torch.randint(3, 128, (2, 5)), **GREEDY)
    ids = out.clone()  # what was made in inference mode is no input of a training
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_greedy_generation_draws_no_random_numbers(ours):
    model = tiny()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    ours(model, **padded(some_prompts(2)), **GREEDY)
    assert torch.equal(torch.rand(3), expected)


def reasons(**cases):
    return pytest.mark.parametrize(("settings", "reason"), list(cases.values()), ids=list(cases))


@reasons(
    no_cache=({"use_cache": False}, "use_cache is off"),
    right_padding=({"attention_mask": torch.tensor([[1, 1, 1, 0]])}, "padding lies behind"),
    positions=({"position_ids": torch.tensor([[0, 2, 4, 6]])}, "position_ids do not count"),
    embeddings=({"inputs_embeds": torch.randn(1, 4, 64), "input_ids": None}, "inputs_embeds"),
)
def test_what_the_loop_does_not_do_is_left_to_transformers(settings, reason, theirs, caplog):
    model = tiny()
    settings = {"input_ids": torch.tensor([[5, 6, 7, 8]]), **GREEDY, **settings}
    generation.say_once.cache_clear()
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, logger="oribi"):
        model.generate(**settings)
        torch.manual_seed(0)
        got = model.generate(**settings)
    named = [record.message for record in caplog.records if "transformers' own loop" in record.message]
    assert len(named) == 1
    assert reason in named[0]
    torch.manual_seed(0)
    expected = theirs(model, **settings)
    if torch.is_tensor(got):
        assert torch.equal(got, expected)


def changed_models():
    def dora():
        return get_peft_model(tiny(), LoraConfig(r=4, target_modules=TARGETS, use_dora=True)).eval()

    def hook():
        model = tiny()
        model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
        return model

    def replaced():
        model = tiny()
        model.model.norm.forward = lambda x: x
        return model

    def wrapped():
        model = tiny()
        forward = model.forward
        model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
        return model

    def dynamic():
        return tiny(rope_parameters=ROPES["dynamic"])

    def crossing():
        return tiny(rope_parameters=ROPES["longrope"], max_position_embeddings=128)

    return {
        "dora": (dora, "something else than at most one LoRA pair"),
        "hook": (hook, "model.layers.1.mlp is wrapped or has a hook"),
        "replaced": (replaced, "model.norm is wrapped"),
        "wrapped": (wrapped, "the model's forward is wrapped"),
        "dynamic": (dynamic, "RoPE is dynamic"),
        "longrope": (crossing, "longrope changes"),
    }


@pytest.mark.parametrize("change", changed_models())
def test_changed_models_are_left_to_transformers(change, caplog):
    make, reason = changed_models()[change]
    model = make()
    generation.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="oribi"):
        model.generate(input_ids=torch.tensor([[5, 6, 7, 8]]), **{**GREEDY, "max_new_tokens": 13})
    assert reason in caplog.text


def test_a_forward_that_trl_and_accelerate_wrap_for_training_keeps_the_loop():
    utils = pytest.importorskip("trl.trainer.utils")
    if not hasattr(utils, "add_fused_lm_head"):
        pytest.skip("this TRL wraps no forward")
    model, device = tiny(), torch.device("cpu")
    utils.add_fused_lm_head(model, temperature=0.5)
    assert request._unusual_model(model, device) is None
    model._original_forward = model.forward  # as accelerate keeps it
    model.forward = lambda *args, **kwargs: model._original_forward(*args, **kwargs)
    assert request._unusual_model(model, device) is None


def test_hooks_for_all_modules_and_autocast_are_left_to_transformers():
    model, ids = tiny(), torch.tensor([[5, 6, 7, 8]])
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert "all modules" in request._unusual_model(model, ids.device)
    finally:
        handle.remove()
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in request._unusual_model(model, ids.device)
    assert request._unusual_model(model, ids.device) is None
    assert "synced_gpus" in request._unusual_call(ids, model.generation_config, True, {})
    assert "the prompts lie on meta" in request._unusual_model(model, torch.device("meta"))


def test_a_head_trained_whole_and_trained_tokens_are_used(ours, theirs):
    model = get_peft_model(
        tiny(), LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head", "embed_tokens"])
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter))
    ids = {"input_ids": torch.randint(3, 128, (2, 6))}
    assert torch.equal(ours(model, **ids, **GREEDY), theirs(model, **ids, **GREEDY))


def test_transformers_still_looks_for_the_loop_by_its_name():
    wanted = {GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE}
    assert {GENERATION_MODES_MAPPING[mode] for mode in wanted} == {"_sample"}
    assert hasattr(GenerationMixin, "_sample")


def test_a_16_bit_model_reads_its_weights_where_they_lie(ours, monkeypatch):
    """With an adapter too: no group is written to a buffer again for a token."""
    model = with_lora(tiny()).to(torch.bfloat16)
    copies = []
    whole = loop.DecodingStep.__call__

    def watched(self, *args):
        with monkeypatch.context() as patch:
            patch.setattr("oribi.models.decoding.groups.augmented_weight", lambda *_: copies.append(1))
            patch.setattr("oribi.kernels.lora.augmented_weight", lambda *_: copies.append(1))
            return whole(self, *args)

    monkeypatch.setattr(loop.DecodingStep, "__call__", watched)
    out = ours(model, input_ids=torch.randint(3, 128, (2, 6)), **GREEDY)
    assert out.shape == (2, 18)
    assert not copies
