"""On a CUDA device: the recorded loop gives the tokens of the steps as they are, and sees what training has changed."""

import copy
import importlib
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from oribi.families import FAMILIES
from oribi.kernels.dispatch import reference_only
from oribi.lora.attach import attach_lora
from oribi.models.decoding import loop
from oribi.models.load import load_model
from oribi.models.unwrap import base_model
from tests.models import test_decoding_settings as settings
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

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

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
    width, unlikely = prompts["input_ids"].shape[1], 0
    for row, mask in zip(out, prompts["attention_mask"]):
        ids = row[width - int(mask.sum()) :][None]
        with torch.no_grad(), reference_only():
            truth, rounded = (one.eval()(input_ids=ids).logits[0, -13:-1].float() for one in (exact, model))
        # at most twice PyTorch's own error, of the token that was chosen and of the one that was not
        missed = truth.amax(1) - truth.gather(1, row[width:, None])[:, 0]
        unlikely += int((missed > 4 * (rounded - truth).abs().max()).sum())
    # rounding changes the experts of a few tokens, and with them all that they say: 4 in 96 of PyTorch's own GLM-4.5 in bfloat16
    assert unlikely <= (out[:, width:].numel() // 24 if FAMILIES[model_type].experts else 0)


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


@pytest.mark.parametrize("load_in_4bit", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 16, 64])
@pytest.mark.parametrize(("name", "layers"), [("llama-3.2-1b", 3), ("llama-3.1-8b", 1), ("gemma-2-2b", 2)])
def test_probabilities_in_bfloat16_are_those_of_the_eager_path(name, layers, rows, load_in_4bit, tmp_path, monkeypatch, ours):  # noqa: F811  # fmt: skip
    """At real widths: the divergence stays under 1e-3, and the best token is the same unless two are as near as rounding."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    random_model = importlib.import_module("random_model")
    sizes = {**random_model.MODELS[name], "num_hidden_layers": layers}
    if "layer_types" in sizes:
        sizes["layer_types"] = sizes["layer_types"][:layers]
    monkeypatch.setitem(random_model.MODELS, "short", sizes)
    random_model.write("short", tmp_path)
    model, _ = load_model(str(tmp_path), max_seq_length=512)
    model = attach_lora(model, r=16).eval()
    if not load_in_4bit:
        model = dequantized(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(0, 0.02)
    lengths = torch.randint(20, 200, (rows,), generator=generator).tolist()
    prompts = [torch.randint(3, 30_000, (n,), generator=generator).tolist() for n in lengths]
    inputs = on_gpu(padded(prompts))
    out = ours(
        model, **inputs, **{**GREEDY, "max_new_tokens": 48}, output_logits=True, return_dict_in_generate=True
    )
    found = torch.stack(out.logits, dim=1)  # [rows, 48, V]
    for row, length in enumerate(lengths):
        ids = out.sequences[row, -(length + 48) :][None]
        with torch.no_grad():
            eager = model(input_ids=ids).logits[0, -49:-1].float()
        divergence = (eager.softmax(-1) * (eager.log_softmax(-1) - found[row].log_softmax(-1))).sum(-1)
        assert divergence.mean() < 1e-3
        best = eager.topk(2).values
        step = torch.finfo(torch.bfloat16).eps * best[:, 0].abs()
        clear = best[:, 0] - best[:, 1] > 4 * step
        assert torch.equal(found[row].argmax(-1)[clear], eager.argmax(-1)[clear])


def dequantized(model):
    """The model with its 4-bit weights written out in 16 bits."""
    from bitsandbytes.functional import dequantize_4bit

    for module in list(base_model(model).modules()):
        base = getattr(module, "base_layer", None)
        if base is not None and hasattr(base.weight, "quant_state"):
            weight = dequantize_4bit(base.weight.data, base.weight.quant_state).to(torch.bfloat16)
            linear = torch.nn.Linear(*weight.shape[::-1], bias=False, device="meta")
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
            module.base_layer = linear
    return model


@pytest.mark.parametrize(
    "name", ["processor drawn", "no_repeat_ngram_size", "criterion with end", "scores drawn"]
)
def test_what_the_host_chooses_from_a_recorded_step_is_what_transformers_chooses(name, ours, theirs):  # noqa: F811
    model = tiny(vocab_size=len(settings.TOKENIZER)).cuda()
    free = model.generate(**on_gpu(settings.PROMPTS), **settings.SETTINGS).cpu()
    made = {n: v(free) if callable(v) else v for n, v in {**settings.SETTINGS, **settings.OWN[name]}.items()}
    found = []
    for generate in (ours, theirs, ours):  # the last on the recording of the first
        torch.manual_seed(0)
        found.append(generate(model, **on_gpu(settings.PROMPTS), **made))
    for each in found[::2]:
        settings.compare(each, found[1])
    assert len(base_model(model).model.sessions._kept) <= 2
