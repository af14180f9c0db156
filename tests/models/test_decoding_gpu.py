"""On a CUDA device: the recorded loop gives the tokens of the steps as they are, and sees what training has changed."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model

from oribi.families import FAMILIES
from oribi.kernels.dispatch import reference_only
from oribi.lora.attach import attach_lora
from oribi.models.decoding import loop
from oribi.models.load import load_model
from oribi.models.unwrap import base_model
from tests.models.test_decoding import (  # noqa: F401 (fixtures)
    FUSED,
    GREEDY,
    Recorder,
    ours,
    padded,
    some_prompts,
    theirs,
    tiny,
    with_lora,
)
from tests.models.tiny_checkpoint import checkpoint

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def on_gpu(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.cuda() for name, value in inputs.items()}


def recorded(model) -> int:
    """Recorded steps that a model keeps."""
    kept = base_model(model).model.sessions._kept.values()
    assert all(session.graph is not None for session in kept)
    return len(kept)


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_greedy_tokens_in_float32_equal_transformers_loop(model_type, lora, ours, theirs):  # noqa: F811
    model = tiny(model_type)
    model = (with_lora(model, model_type) if lora else model).cuda()
    for seed in range(2):
        prompts = on_gpu(padded(some_prompts(5, seed=seed)))
        assert torch.equal(ours(model, **prompts, **GREEDY), theirs(model, **prompts, **GREEDY))
    assert recorded(model) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_in_16_bits_the_chosen_tokens_are_the_likeliest_but_for_rounding(model_type, dtype, ours):  # noqa: F811
    model = with_lora(tiny(model_type), model_type).to("cuda", dtype)
    exact = copy.deepcopy(model).float()
    prompts = on_gpu(padded(some_prompts(8)))
    out = ours(model, **prompts, **GREEDY)
    width = prompts["input_ids"].shape[1]
    for row, mask in zip(out, prompts["attention_mask"]):
        ids = row[width - int(mask.sum()) :][None]
        with torch.no_grad(), reference_only():
            truth, rounded = (one.eval()(input_ids=ids).logits[0, -13:-1].float() for one in (exact, model))
        # at most twice PyTorch's own error, of the token that was chosen and of the one that was not
        missed = truth.amax(1) - truth.gather(1, row[width:, None])[:, 0]
        assert missed.max() <= 4 * (rounded - truth).abs().max()


@pytest.mark.parametrize("settings", [{"do_sample": False}, {"do_sample": True, "top_k": 20, "top_p": 0.9}])
def test_a_recorded_step_gives_the_tokens_of_the_step_as_it_is(settings, ours, monkeypatch):  # noqa: F811
    model = with_lora(tiny("gemma2")).to("cuda", torch.bfloat16)
    prompts, found = on_gpu(padded(some_prompts(5))), []
    for records in (True, True, False):
        if not records:
            model.base_model.model.release()
            monkeypatch.setattr(loop.DecodingStep, "refresh", lambda self: None)
            monkeypatch.setattr("oribi.models.decoding.session.Session.record", lambda self, pool: None)
        torch.manual_seed(3)
        found.append(ours(model, **prompts, max_new_tokens=40, eos_token_id=5, pad_token_id=0, **settings))
    assert torch.equal(
        found[0], found[1]
    )  # equal seeds agree, whether or not the step was recorded in between
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_trained_factors_are_seen_without_recording_again(load_in_4bit, tmp_path, ours):  # noqa: F811
    checkpoint(tmp_path)
    model, _ = load_model(str(tmp_path), max_seq_length=64, load_in_4bit=load_in_4bit)
    model = attach_lora(model, r=8)
    ids = torch.randint(3, 380, (3, 9), device="cuda")
    before = ours(model, input_ids=ids, **GREEDY)
    session = next(iter(base_model(model).model.sessions._kept.values()))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=5.0)
    model.train()
    for _ in range(3):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = ours(model, input_ids=ids, **GREEDY)
    assert next(iter(base_model(model).model.sessions._kept.values())) is session
    assert recorded(model) == 1
    base_model(model).release()
    assert torch.equal(after, ours(model, input_ids=ids, **GREEDY))
    assert not torch.equal(before, after)
    with model.disable_adapter():
        ours(model, input_ids=ids, **GREEDY)
    assert recorded(model) == 2
    copy.deepcopy(base_model(model))
    taken = torch.cuda.memory_allocated()
    base_model(model).release()
    assert torch.cuda.memory_allocated() < taken


def test_rows_end_at_different_steps_and_streamers_get_each_token(ours, theirs):  # noqa: F811
    model = tiny("qwen3").cuda()
    prompts = on_gpu(padded(some_prompts(7)))
    free = theirs(model, **prompts, **{**GREEDY, "max_new_tokens": 30})
    ends = sorted({int(free[row, -25 + 3 * row]) for row in range(7)})
    settings = {**GREEDY, "max_new_tokens": 30, "eos_token_id": ends, "pad_token_id": 0}
    assert torch.equal(ours(model, **prompts, **settings), theirs(model, **prompts, **settings))
    for rows in (slice(0, 1), slice(0, 7)):
        some = {name: value[rows] for name, value in prompts.items()}
        mine, reference = Recorder(), Recorder()
        ours(model, **some, streamer=mine, **settings)
        theirs(model, **some, streamer=reference, **settings)
        assert mine.got == reference.got


def test_nothing_waits_for_the_device_between_the_tokens(monkeypatch):
    model = get_peft_model(tiny("phi3"), LoraConfig(r=4, target_modules=FUSED)).to("cuda", torch.bfloat16)
    settings = {
        **GREEDY,
        "max_new_tokens": 20,
        "do_sample": True,
        "top_k": 8,
        "eos_token_id": 5,
        "pad_token_id": 0,
    }
    ids = torch.randint(3, 128, (2, 9), device="cuda")
    model.generate(input_ids=ids, **settings)
    from oribi.models.decoding.session import Session

    advance = Session.advance

    def watched(self):
        torch.cuda.set_sync_debug_mode("error")
        try:
            advance(self)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Session, "advance", watched)
    model.generate(input_ids=ids, **settings)


def test_a_shortage_of_memory_splits_the_rows(ours, monkeypatch):  # noqa: F811
    model = tiny().cuda()
    ids = torch.randint(3, 128, (9, 6), device="cuda")
    whole = ours(model, input_ids=ids, **GREEDY)
    real, calls = loop._on_gpu, []

    def short(decoder, part):
        calls.append(len(part.prompts))
        if len(part.prompts) > 4:
            raise torch.OutOfMemoryError("as if")
        return real(decoder, part)

    monkeypatch.setattr(loop, "_on_gpu", short)
    assert torch.equal(ours(model, input_ids=ids, **GREEDY), whole)
    assert calls == [9, 4, 4, 1]
