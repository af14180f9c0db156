"""LoRA attached by oribi is PEFT's LoRA: same files, same function, in float32, and every argument does what it says."""

from pathlib import Path

import pytest
import torch
from peft import EvaConfig, LoraConfig, PeftModel
from peft import get_peft_model as peft_get_peft_model
from transformers import AutoModelForCausalLM

from oribi.errors import ConfigError
from oribi.lora.attach import PROJECTIONS, attach_lora
from oribi.models.load import load_model
from tests.models.tiny_checkpoint import checkpoint

IDS = torch.arange(3, 43)[None]
LINEARS = {"llama": 7, "phi3": 4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    checkpoint(path)
    return path


def load(path: Path, **arguments):
    return load_model(
        str(path), **{"dtype": "float32", "device_map": "cpu", "max_seq_length": 64, **arguments}
    )[0]


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits.float()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found - expected).norm() / expected.norm()).item()


def perturb(model, scale: float = 0.05) -> None:
    """Moves every trained weight off its initial value; B = 0 would hide A's errors."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# -- what is trained -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_pairs_on_the_seven_projections_are_trained_in_float32_and_nothing_else(llama, load_in_4bit):
    model = attach_lora(load(llama, load_in_4bit=load_in_4bit, dtype="bfloat16"), r=4)
    names = trained(model)
    assert len(names) == 2 * 7 * 4
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert {p.dtype for p in names.values()} == {torch.float32}
    assert isinstance(model, PeftModel)
    assert model.training
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in names.values())


def test_the_seed_decides_the_pairs_and_leaves_the_global_state_alone(llama):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, again, other = (trained(attach_lora(load(llama), r=4, random_state=s)) for s in (7, 7, 8))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ("all-linear", set(PROJECTIONS)),
        (None, set(PROJECTIONS)),
        ("q_proj", {"q_proj"}),
        (r".*\.mlp\.(gate|up)_proj", {"gate_proj", "up_proj"}),
        (["self_attn.o_proj"], {"o_proj"}),
        (["q_proj", "lm_head"], {"q_proj", "lm_head"}),
    ],
)
def test_targets_by_name_expression_or_word(llama, targets, expected):
    model = attach_lora(load(llama), r=4, target_modules=targets)
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained(model)} == expected


def test_projections_asked_of_a_fused_family_become_its_own(tmp_path):
    checkpoint(tmp_path, "phi3")
    model = attach_lora(load(tmp_path), r=4, target_modules=["q_proj", "k_proj", "up_proj", "down_proj"])
    found = {name.split(".lora_")[0].rpartition(".")[2] for name in trained(model)}
    assert found == {"qkv_proj", "gate_up_proj", "down_proj"}
    assert any(
        "keeps q_proj, k_proj, up_proj in qkv_proj, gate_up_proj" in note for note in model.oribi.notes
    )


@pytest.mark.parametrize(
    ("arguments", "layers"),
    [
        ({"layers_to_transform": [0, 2]}, {0, 2}),
        ({"layers_to_transform": 1}, {1}),
        ({"finetune_last_n_layers": 3}, {1, 2, 3}),
        ({"finetune_last_n_layers": 2, "layers_pattern": "layers"}, {2, 3}),
        ({"finetune_last_n_layers": 1, "target_modules": "all-linear"}, {3}),
    ],
)
def test_layers_can_be_chosen(llama, arguments, layers):
    model = attach_lora(load(llama), r=4, **arguments)
    assert {int(name.split(".layers.")[1].split(".")[0]) for name in trained(model)} == layers


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 8.0), (True, 16.0)])
def test_rslora_divides_by_the_root_of_the_rank(llama, use_rslora, scale):
    model = attach_lora(load(llama), r=4, lora_alpha=32, use_rslora=use_rslora)
    assert model.base_model.model.model.layers[0].mlp.up_proj.scaling["default"] == scale


def test_rank_and_alpha_patterns_reach_peft(llama):
    model = attach_lora(load(llama), r=4, rank_pattern={"q_proj": 8}, alpha_pattern={"q_proj": 32})
    layer = model.base_model.model.model.layers[0].self_attn
    assert (layer.q_proj.r["default"], layer.k_proj.r["default"]) == (8, 4)
    assert layer.q_proj.scaling["default"] == 4.0


def test_biases_can_be_trained(tmp_path):
    checkpoint(tmp_path, "qwen2")
    model = attach_lora(load(tmp_path), r=4, bias="lora_only")
    assert sum(name.endswith("_proj.base_layer.bias") for name in trained(model)) == 3 * 4
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None for p in trained(model).values())


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_modules_trained_whole_are_float32_and_get_gradients(tied, dtype, tmp_path):
    checkpoint(tmp_path, tie_word_embeddings=tied)
    saved = ["embed_tokens", "lm_head"]
    model = attach_lora(load(tmp_path, dtype=dtype), r=4, target_modules=["q_proj"], modules_to_save=saved)
    whole = {name: p for name, p in trained(model).items() if "modules_to_save" in name}
    assert len(whole) == (1 if tied else 2)
    model(IDS, labels=IDS).loss.backward()
    assert all(p.dtype == torch.float32 and p.grad.abs().sum() > 0 for p in whole.values())
    assert logits(model).isfinite().all()
    assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape[1] > IDS.shape[1]


def test_embeddings_among_the_targets_are_trained_whole(llama):
    model = attach_lora(load(llama), r=4, target_modules=["q_proj", "embed_tokens"])
    assert sum("embed_tokens.modules_to_save" in name for name in trained(model)) == 1
    assert "embed_tokens is trained whole (modules_to_save), not through LoRA" in model.oribi.notes


def test_names_that_the_model_lacks_are_told_and_the_others_taken(llama):
    model = attach_lora(load(llama), r=4, target_modules=["q_proj", "in_proj_qkv", "w1"])
    assert {name.split(".lora_")[0].rpartition(".")[2] for name in trained(model)} == {"q_proj"}
    notes = [note for note in model.oribi.notes if note.startswith("target_modules")]
    assert notes == ["target_modules: the model has no in_proj_qkv, w1; LoRA is attached to q_proj"]


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_and_head_are_trained_as_continued_pretraining_asks(tied, tmp_path):
    checkpoint(tmp_path, "qwen2", tie_word_embeddings=tied)
    model = attach_lora(load(tmp_path), r=4, target_modules=[*PROJECTIONS, "embed_tokens", "lm_head"])
    model(IDS, labels=IDS).loss.backward()
    assert all(p.grad.abs().sum() > 0 for name, p in trained(model).items() if "embed_tokens" in name)
    assert any("lm_head.lora_" in name for name in trained(model)) is not tied
    perturb(model)
    model.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits(load(tmp_path / "adapter")), logits(model))


def test_lora_biases_are_taken_where_every_target_has_a_bias(tmp_path):
    checkpoint(tmp_path, "qwen2")
    targets = ["q_proj", "k_proj", "v_proj"]
    assert attach_lora(load(tmp_path), r=4, target_modules=targets, lora_bias=True)
    with pytest.raises(
        ConfigError, match="4 target layers have no bias, model.layers.0.mlp.up_proj the first"
    ):
        attach_lora(load(tmp_path), r=4, target_modules=[*targets, "up_proj"], lora_bias=True)


@pytest.mark.parametrize(
    "field", ["alora_invocation_tokens", "layer_replication", "use_qalora", "megatron_config"]
)
def test_settings_that_no_export_can_hold_are_refused_before_training(field, llama):
    with pytest.raises(ConfigError, match=f"{field}="):
        attach_lora(load(llama), r=4, **{field: [[0, 2], [1, 4]]})


def test_lora_on_the_head_is_trained_and_used(llama):
    model = attach_lora(load(llama), r=4, target_modules=["lm_head"])
    before = logits(model)
    model.train()(IDS, labels=IDS).loss.backward()
    grads = {name: p.grad for name, p in trained(model).items()}
    assert grads[next(n for n in grads if "lora_B" in n)].abs().sum() > 0
    perturb(model)
    assert relative(logits(model), before) > 1e-3


def test_a_fully_finetuned_model_is_returned_as_it_is(llama):
    model = load(llama, full_finetuning=True)
    assert attach_lora(model, r=4) is model
    assert any("no LoRA is attached" in note for note in model.oribi.notes)


@pytest.mark.parametrize(
    ("choice", "name"),
    [
        (False, "off"),
        (True, "auto"),
        ("oribi", "auto"),
        ("unsloth", "auto"),
        ("auto", "auto"),
        ("memory", "memory"),
        ("balanced", "balanced"),
        ("speed", "speed"),
        ("off", "off"),
    ],
)
def test_checkpointing_is_set_and_changes_no_gradient(llama, choice, name):
    def gradients(choice):
        model = attach_lora(load(llama), r=4, use_gradient_checkpointing=choice)
        perturb(model)
        model(IDS, labels=IDS).loss.backward()
        return model, [p.grad for p in trained(model).values()]

    model, found = gradients(choice)
    assert model.base_model.model.is_gradient_checkpointing == (name not in ("speed", "off"))
    assert model.oribi.checkpointing == name
    told = [note for note in model.oribi.notes if "use_gradient_checkpointing" in note]
    assert told == (
        [] if choice == name else [f"use_gradient_checkpointing = {choice!r} is read as {name!r}"]
    )
    assert all(torch.equal(a, b) for a, b in zip(found, gradients("off")[1]))


# -- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"r": 0}, "r = 0: must be an integer of at least 1"),
        ({"r": 4.0}, "r = 4.0"),
        ({"lora_alpha": 0}, "lora_alpha = 0: must be above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout = 1.0"),
        ({"bias": "some"}, "bias = 'some'"),
        ({"use_gradient_checkpointing": "some"}, "use_gradient_checkpointing = 'some'"),
        ({"target_modules": ["q_prj"]}, "has no module 'q_prj'; did you mean q_proj?"),
        ({"target_modules": "q_.*_nothing"}, "matches no module as a regular expression"),
        ({"target_modules": "(q_proj"}, "is not a regular expression"),
        ({"modules_to_save": ["embed"]}, "modules_to_save: the model has no module 'embed'"),
        ({"layers_to_transform": [4]}, "are not among the model's layers 0 to 3"),
        ({"finetune_last_n_layers": 5}, "must be 1 to 4"),
        ({"finetune_last_n_layers": 1, "layers_to_transform": [0]}, "not both"),
        ({"use_rslor": True}, "unknown argument use_rslor; did you mean use_rslora?"),
        ({"init_lora_weights": "corda"}, "needs gradients or activations of your data"),
        ({"eva_config": EvaConfig()}, "eva_config needs 'eva'"),
        ({"inference_mode": True}, "pairs that are attached are trained"),
        ({"fan_in_fan_out": True}, "oribi's layers are linear ones"),
        ({"exclude_modules": ["o_porj"]}, "no target is named 'o_porj'; did you mean o_proj"),
        ({"init_lora_weights": "magic"}, "allowed are True, False"),
        ({"init_lora_weights": "orthogonal"}, "on 16-bit weights only"),
        ({"init_lora_weights": "pissa", "use_dora": True}, "goes without use_dora"),
        ({"init_lora_weights": "olora"}, "on 16-bit weights only"),
        ({"loftq_config": {"loftq_bits": 4}}, "LoftQ needs 'loftq'"),
    ],
)
def test_arguments_out_of_range_are_refused(llama, arguments, words):
    model = load(llama)
    with pytest.raises(ConfigError, match=words):
        attach_lora(model, **arguments)
    assert not any("lora_" in name for name, _ in model.named_parameters())


def test_the_same_call_again_passes_through_and_another_is_refused(llama):
    model = attach_lora(load(llama), r=4, target_modules=list(PROJECTIONS), modules_to_save=["lm_head"])
    assert (
        attach_lora(model, r=4, target_modules=list(reversed(PROJECTIONS)), modules_to_save=["lm_head"])
        is model
    )
    with pytest.raises(ConfigError, match="r is 4, asked for 8"):
        attach_lora(model, r=8, modules_to_save=["lm_head"])
    linear = attach_lora(load(llama), r=4, target_modules="all-linear")
    assert attach_lora(linear, r=4, target_modules="all-linear") is linear


# -- initialisation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [True, "gaussian", "pissa", "pissa_niter_4", "olora"])
def test_every_start_leaves_the_function_of_a_16_bit_model_as_it_was(llama, how):
    before = logits(load(llama, load_in_4bit=False))
    model = attach_lora(load(llama, load_in_4bit=False), r=4, lora_alpha=4, init_lora_weights=how)
    assert relative(logits(model), before) < 1e-5


@pytest.mark.parametrize("how", [False, "orthogonal"])
def test_starts_that_are_no_zero_are_not(llama, how):
    model = attach_lora(load(llama, load_in_4bit=False), r=4, init_lora_weights=how)
    assert all(p.abs().sum() > 0 for p in trained(model).values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_loftq_without_a_gpu_is_refused(llama):
    with pytest.raises(ConfigError, match="PEFT computes it on a GPU only"):
        attach_lora(load(llama, load_in_4bit=False), r=4, init_lora_weights="loftq")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_loftq_starts_from_a_16_bit_model(llama):
    pytest.importorskip("scipy", reason="PEFT's LoftQ needs scipy")
    model = attach_lora(
        load(llama, load_in_4bit=False), r=4, init_lora_weights="loftq", loftq_config={"loftq_bits": 4}
    )
    assert all(p.abs().sum() > 0 for name, p in trained(model).items() if "lora_B" in name)


# -- the same files and functions as PEFT --------------------------------------------------------------------------

VARIANTS = [
    {},
    {"use_rslora": True},
    {"use_dora": True},
    {"modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj", "lm_head"]},
    {"bias": "all"},
]


def test_a_tied_matrix_trained_whole_says_the_same_in_plain_peft(tmp_path):
    checkpoint(tmp_path / "base", tie_word_embeddings=True)
    ours = attach_lora(load(tmp_path / "base", load_in_4bit=False), r=4, modules_to_save=["embed_tokens"])
    perturb(ours)
    ours.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert relative(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), logits(ours)) < 1e-5
    assert relative(logits(load(tmp_path / "adapter", load_in_4bit=False)), logits(ours)) < 1e-5


def test_the_usual_targets_are_every_linear_layer_where_mixers_have_others_than_attention(tmp_path):
    checkpoint(tmp_path / "base", "lfm2")
    ours = attach_lora(load(tmp_path / "base", load_in_4bit=False), r=4)
    assert sum(".lora_A" in name for name, _ in ours.named_parameters()) == 3 * 5 + 7
    perturb(ours)
    ours.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    assert relative(logits(PeftModel.from_pretrained(base, tmp_path / "adapter")), logits(ours)) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_our_adapter_says_the_same_in_plain_peft(model_type, variant, tmp_path):
    checkpoint(tmp_path / "base", model_type, tie_word_embeddings=False)
    ours = attach_lora(load(tmp_path / "base", load_in_4bit=False), r=4, **variant)
    perturb(ours)
    ours.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    theirs = PeftModel.from_pretrained(base, tmp_path / "adapter")
    assert relative(logits(ours), logits(theirs)) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
@pytest.mark.parametrize("model_type", ["llama", "phi3"])
def test_pefts_adapter_says_the_same_here(model_type, variant, tmp_path):
    theirs = checkpoint(tmp_path / "base", model_type, tie_word_embeddings=False)
    theirs.name_or_path = str(tmp_path / "base")
    config = LoraConfig(
        r=4, lora_alpha=16, **{"target_modules": "all-linear", "task_type": "CAUSAL_LM", **variant}
    )
    tuned = peft_get_peft_model(theirs, config)
    perturb(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    assert relative(logits(load(tmp_path / "adapter", load_in_4bit=False)), logits(tuned)) < 1e-5


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}], ids=str)
def test_an_adapter_on_packed_weights_says_the_same_in_plain_peft(variant, llama, tmp_path):
    import bitsandbytes as bnb
    from transformers import BitsAndBytesConfig

    ours = attach_lora(load(llama), r=4, **variant)
    perturb(ours)
    ours.save_pretrained(tmp_path)
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(
        llama, quantization_config=settings, dtype=torch.float32, device_map="cpu"
    )
    for layer in base.modules():
        if isinstance(layer, bnb.nn.Linear4bit):
            layer.support_avx512bf16_for_cpu = False
    theirs = PeftModel.from_pretrained(base, tmp_path)
    assert relative(logits(ours), logits(theirs)) < 1e-5


# -- evaluating and generating between steps -----------------------------------------------------------------------


@pytest.mark.parametrize("variant", [{}, {"use_dora": True}, {"lora_dropout": 0.2}], ids=str)
def test_an_evaluation_in_between_changes_no_gradient(llama, variant):
    """bitsandbytes' own eval forward repacks weights on CPUs with AVX512-BF16, which spoils later gradients."""

    def gradients(evaluate: bool) -> list[torch.Tensor]:
        model = attach_lora(load(llama, dtype="bfloat16"), r=4, **variant)
        perturb(model)
        if evaluate:
            logits(model)
            model.generate(IDS, max_new_tokens=2)
            model.train()
        torch.manual_seed(0)
        model(IDS, labels=IDS).loss.backward()
        return [p.grad for p in trained(model).values()]

    for before, after in zip(gradients(False), gradients(True)):
        assert torch.equal(before, after)


def test_generate_in_training_is_generate_in_inference(llama):
    model = attach_lora(load(llama), r=4, lora_dropout=0.5)
    perturb(model, 0.3)
    arguments = {"max_new_tokens": 8, "do_sample": False}
    training = model.train().generate(IDS, **arguments)
    modes = [module.training for module in model.modules()]
    assert all(modes)
    assert torch.equal(training, model.eval().generate(IDS, **arguments))
    assert not any(module.training for module in model.modules())


def test_generate_takes_what_a_tokenizer_returns(llama):
    model, tokenizer = load_model(str(llama), dtype="float32", device_map="cpu")
    messages = [{"role": "user", "content": "hello"}]
    encoded = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    encoded["token_type_ids"] = torch.zeros_like(encoded["input_ids"])
    arguments = {"max_new_tokens": 5, "do_sample": False}
    expected = model.generate(encoded["input_ids"], attention_mask=encoded["attention_mask"], **arguments)
    assert torch.equal(model.generate(encoded, **arguments), expected)
    assert torch.equal(model.generate(input_ids=encoded, **arguments), expected)
    assert torch.equal(model.generate(**encoded, **arguments), expected)


def test_a_left_padded_batch_answers_as_each_prompt_alone(llama):
    model, tokenizer = load_model(str(llama), dtype="float32", device_map="cpu")
    model = attach_lora(model, r=4)
    perturb(model, 0.2)
    prompts = ["the cat", "a much longer prompt than the other one", "x"]
    batch = tokenizer(prompts, return_tensors="pt", padding=True)
    assert batch["attention_mask"][0, 0] == 0
    arguments = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": []}
    together = model.generate(**batch, **arguments)[:, batch["input_ids"].shape[1] :]
    for prompt, answer in zip(prompts, together):
        alone = tokenizer(prompt, return_tensors="pt")
        assert torch.equal(model.generate(**alone, **arguments)[0, alone["input_ids"].shape[1] :], answer)
