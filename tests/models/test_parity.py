"""oribi's decoder computes what transformers computes: logits, loss, every gradient, generation, padding, packing."""

from dataclasses import replace
from itertools import product

import pytest
import torch
from transformers import DynamicCache

from oribi import families as table
from oribi.errors import ModelError
from oribi.families import FAMILIES
from oribi.models.config_file import check_decoder
from oribi.models.decoder import CACHE
from tests.models.tiny import MIXED, ROPES, VARIANTS, as_ours, precise, tiny_config, tiny_pair

TOLERANCE = 1e-5  # relative, float32


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm().clamp_min(1e-12)).item()


def errors_against_transformers(ours, theirs, length: int = 24) -> dict[str, float]:
    """Relative errors of logits, loss and every parameter's gradient on one random batch."""
    ids = torch.randint(3, 128, (2, length))
    labels = ids.clone()
    labels[:, :5] = -100
    mine = ours(input_ids=ids, labels=labels, output_logits=True)
    reference = theirs(input_ids=ids, labels=labels)
    mine.loss.backward()
    reference.loss.backward()
    errors = {"logits": relative(mine.logits, reference.logits), "loss": relative(mine.loss, reference.loss)}
    expected = as_ours(ours, {name: parameter.grad for name, parameter in theirs.named_parameters()})
    for name, parameter in ours.named_parameters():
        error = relative(parameter.grad, expected[name])
        if name.endswith("k_proj.bias") and expected[name].norm() < 1e-6:
            # without rotation a key bias moves all scores of a query alike: its gradient is 0, both sides give noise
            error = parameter.grad.norm().item()
        errors[name] = error
    return errors


@pytest.mark.parametrize("model_type", FAMILIES)
def test_logits_loss_and_every_gradient_equal_transformers(model_type, monkeypatch):
    pair = tiny_pair(tiny_config(model_type))
    precise(monkeypatch, *pair)
    errors = errors_against_transformers(*pair)
    assert max(errors.values()) < TOLERANCE, {k: v for k, v in errors.items() if v >= TOLERANCE}


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("length", [12, 40])
def test_every_rope_kind_equals_transformers(rope, length):
    positions = 32 if rope == "dynamic" else 128
    config = tiny_config("llama", rope_parameters=ROPES[rope], max_position_embeddings=positions)
    errors = errors_against_transformers(*tiny_pair(config), length=length)
    assert max(errors.values()) < TOLERANCE


# with these flags switched off a model cannot be built from the checkpoint; any other gives wrong numbers
OTHER_TENSORS = (
    RuntimeError,
    r"(Unexpected|Missing) key\(s\) in state_dict|size mismatch for model\.layers|is a per-layer attribute",
)
PARTS = ["kv_sharing", "wide_mlp", "keys_as_values", "layer_scalar", "per_layer_inputs"]
FAILS = {
    **dict.fromkeys(
        [
            "attention_bias",
            "mlp_bias",
            "names",
            "qk_norm",
            "qk_norm_weights",
            "norms",
            "fused_projections",
            "output_bias",
            "config_fields",
            *PARTS,
            "output_gate",
            "qk_norm_field",
            "unread",
        ],
        OTHER_TENSORS,
    ),
    "rope_by_layer_type": (KeyError, "rope_type"),
    "mixers": ((RuntimeError, ModelError), OTHER_TENSORS[1] + "|outside oribi's family table"),
    "experts": ((RuntimeError, ModelError), OTHER_TENSORS[1] + "|outside oribi's family table"),
    "norm_eps": (AttributeError, "rms_norm_eps"),
    ("lfm2", "activation"): (AttributeError, "hidden_act"),
    ("glm4_moe", "qk_norm"): (ModelError, "outside oribi's family table"),
    "sinks": OTHER_TENSORS,
    "adjusts_mlp": (RuntimeError, "size mismatch"),
}
WHERE_IT_MATTERS = {
    "qk_norm_field": {"use_qk_norm": False},
    "unread": {"use_bias": True},
    ("qwen2_moe", "output_bias"): {"attention_bias": True},
}


@pytest.mark.parametrize(
    ("model_type", "flag"), [(name, flag) for name, row in FAMILIES.items() for flag in row.flags()]
)
def test_each_family_flag_switched_off_breaks_parity(model_type, flag, monkeypatch):
    row = FAMILIES[model_type]
    monkeypatch.setitem(table.FAMILIES, model_type, replace(row, **{flag: row.flags()[flag]}))
    changes = WHERE_IT_MATTERS.get((model_type, flag)) or WHERE_IT_MATTERS.get(flag, {})
    config = tiny_config(model_type, **changes)
    fails = FAILS.get((model_type, flag)) or FAILS.get(flag)
    if fails and (flag != "qk_norm" or row.qk_norm_weights):
        error, message = fails
        with pytest.raises(error, match=message):
            tiny_pair(config)
    else:
        assert max(errors_against_transformers(*tiny_pair(config)).values()) > 1e-3


@pytest.mark.parametrize("model_type", FAMILIES)
def test_greedy_generation_with_cache_and_left_padding_equals_transformers(model_type):
    ours, theirs = (model.eval() for model in tiny_pair(tiny_config(model_type)))
    ids = torch.randint(3, 128, (3, 9))
    mask = torch.ones_like(ids)
    for row, pad in enumerate((0, 3, 6)):
        ids[row, :pad], mask[row, :pad] = 0, 0
    arguments = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "eos_token_id": 127}
    assert torch.equal(ours.generate(ids, **arguments), theirs.generate(ids, **arguments))


@pytest.mark.parametrize("name", ["past_key_values", "cache"])  # transformers' before and from 5.24 on
@pytest.mark.parametrize("model_type", FAMILIES)
def test_cached_logits_equal_uncached(model_type, name):
    model = tiny_pair(tiny_config(model_type))[0].eval()
    ids = torch.randint(3, 128, (2, 14))
    whole = model(input_ids=ids).logits
    cache, parts = None, []
    for piece in ids.split([6, 1, 3, 4], dim=1):
        out = model(input_ids=piece, use_cache=True, **{name: cache})
        cache = getattr(out, CACHE)
        parts.append(out.logits)
    assert relative(torch.cat(parts, 1), whole) < TOLERANCE


@pytest.mark.parametrize("model_type", FAMILIES)
def test_right_padding_changes_no_real_token(model_type):
    model = tiny_pair(tiny_config(model_type))[0].eval()
    ids = torch.randint(3, 128, (2, 11))
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    padded = model(input_ids=ids, attention_mask=mask).logits
    alone = model(input_ids=ids[1:, :7]).logits
    assert relative(padded[1:, :7], alone) < TOLERANCE


def packed(lengths: list[int]) -> dict[str, torch.Tensor | int]:
    ids = torch.randint(3, 128, (1, sum(lengths)))
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return {
        "input_ids": ids,
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }


@pytest.mark.parametrize("model_type", FAMILIES)
@pytest.mark.parametrize("lengths", [[5, 9, 1, 7], [6, 6, 6]])
def test_packed_rows_equal_each_document_alone(model_type, lengths):
    model = tiny_pair(tiny_config(model_type))[0].eval()
    batch = packed(lengths)
    together = model(**batch).logits
    for piece, logits in zip(batch["input_ids"].split(lengths, 1), together.split(lengths, 1)):
        assert relative(logits, model(input_ids=piece).logits) < TOLERANCE


@pytest.mark.parametrize("model_type", FAMILIES)
def test_changing_one_document_leaves_the_others_bit_identical(model_type):
    model = tiny_pair(tiny_config(model_type))[0].eval()
    lengths = [5, 9, 7]
    batch = packed(lengths)
    before = model(**batch).logits
    batch["input_ids"][:, 5:14] = torch.randint(3, 128, (1, 9))
    after = model(**batch).logits
    if FAMILIES[model_type].experts is not None:
        # a CPU's product of a row depends, in the last bit, on how many rows the expert has
        assert relative(before[:, :5], after[:, :5]) < TOLERANCE
        assert relative(before[:, 14:], after[:, 14:]) < TOLERANCE
        return
    assert torch.equal(before[:, :5], after[:, :5])
    assert torch.equal(before[:, 14:], after[:, 14:])
    assert not torch.equal(before[:, 5:14], after[:, 5:14])


def test_documents_are_found_from_positions_alone():
    model = tiny_pair(tiny_config("llama"))[0].eval()
    batch = packed([5, 9, 1, 7])
    explicit = model(**batch).logits
    derived = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits
    assert torch.equal(explicit, derived)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_checkpointed_gradients_are_bit_equal(model_type):
    ours, _ = tiny_pair(
        tiny_config(model_type, layer_types=MIXED) if model_type == "gemma2" else tiny_config(model_type)
    )
    ids = torch.randint(3, 128, (2, 16))

    def gradients() -> list[torch.Tensor]:
        ours.zero_grad()
        ours(input_ids=ids, labels=ids).loss.backward()
        return [p.grad.clone() for p in ours.parameters()]

    plain = gradients()
    ours.gradient_checkpointing_enable()
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients()))


WINDOW = 5
WINDOWS = {
    "unset": {"sliding_window": None, "layer_types": None},
    "set": {"sliding_window": WINDOW, "layer_types": None},
    "set and switched off": {"sliding_window": WINDOW, "use_sliding_window": False, "layer_types": None},
    "set and switched on": {
        "sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2, "layer_types": None
    },
    "layer types": {"sliding_window": WINDOW, "use_sliding_window": True, "layer_types": MIXED},
    "layer types without a window": {"sliding_window": None, "layer_types": MIXED},
    "chunks": {"sliding_window": None, "layer_types": None, "attention_chunk_size": WINDOW},
}  # fmt: skip


# transformers makes no config or no mask of these: its layers of Granite's hybrids are recurrent unless said otherwise, and
# Gemma 4's last layers need some of each type before them,
# EXAONE and Ministral cannot do without a window unless layer_types say so
IMPOSSIBLE = {
    (name, windows)
    for name in ("granitemoehybrid", "gemma4_text", "gemma4_text+experts", "gemma4_unified_text")
    for windows in WINDOWS
} | {(name, windows) for name in ("exaone4", "ministral") for windows in ("unset", "chunks")}
# and Qwen 3's image-text models have no layer_types
IMPOSSIBLE |= {("qwen3_vl_text", name) for name, fields in WINDOWS.items() if fields["layer_types"] is None}


# of families that never slide, llama's are in every run of the tests
CASES = [
    pytest.param(
        *pair, marks=pytest.mark.long if FAMILIES[pair[0]].windows is None and pair[0] != "llama" else ()
    )
    for pair in product(VARIANTS, WINDOWS)
    if pair not in IMPOSSIBLE
]


@pytest.mark.parametrize(("model_type", "windows"), CASES)
def test_a_cache_keeps_what_each_layer_sees_whatever_a_config_says_of_windows(model_type, windows, tmp_path):
    config = tiny_config(model_type, **WINDOWS[windows])
    family = FAMILIES[model_type]
    kinds = config.layer_types if family.windows == "layer_types" else []
    if family.mixers and family.windows is None and "sliding_attention" in (config.layer_types or ()):
        with pytest.raises(ModelError, match="layer_types: must be"):
            check_decoder(tmp_path / "config.json", config)
        return
    if (
        "sliding_attention" in kinds and config.sliding_window is None
    ):  # transformers has no mask for it either
        with pytest.raises(ModelError, match="no sliding_window is set"):
            check_decoder(tmp_path / "config.json", config)
        return
    check_decoder(tmp_path / "config.json", config)
    ours, theirs = tiny_pair(config)
    ours.eval(), theirs.eval()
    ids = torch.randint(3, config.vocab_size, (1, 3 * WINDOW))
    with torch.no_grad():
        whole = ours(input_ids=ids, use_cache=False).logits
        assert relative(whole, theirs(input_ids=ids, use_cache=False).logits) < TOLERANCE
        for first in (1, WINDOW + 2):
            cache, logits = None, []
            for part in (ids[:, :first], *ids[:, first:].split(1, dim=1)):
                output = ours(input_ids=part, past_key_values=cache, use_cache=True)
                cache = output[CACHE]
                logits.append(output.logits)
            assert relative(torch.cat(logits, dim=1), whole) < TOLERANCE
        answer = ours.generate(ids[:, :4], max_new_tokens=3 * WINDOW, do_sample=False, eos_token_id=None)
        uncached = ours(input_ids=answer, use_cache=False).logits[:, 3:-1]
    assert torch.equal(answer[:, 4:], uncached.argmax(-1))


def test_a_cache_made_for_shorter_windows_is_refused():
    config = tiny_config("llama", sliding_window=WINDOW)
    ours, _ = tiny_pair(config)
    ids = torch.ones(1, 2, dtype=torch.int64)
    with pytest.raises(
        ModelError, match="layer 0 of the cache keeps 5 tokens, and the model's layer sees all"
    ):
        ours.eval()(input_ids=ids, past_key_values=DynamicCache(config=config))
    ours(input_ids=ids, past_key_values=DynamicCache(config=ours.config))


@pytest.mark.parametrize(
    ("model_type", "fields", "note"),
    [
        ("llama", {"sliding_window": 5}, "sliding_window of config.json: not followed, a llama model sees everything"),
        ("mistral", {"layer_types": MIXED}, "layer_types of config.json: not followed, a mistral model slides in every"),
        ("phi3", {"use_sliding_window": False}, "use_sliding_window = false of config.json: not followed"),
        ("seed_oss", {"residual_dropout": 0.1}, "residual_dropout = 0.1 of config.json: not applied"),
        ("mistral", {}, None),
        ("qwen2", {"use_sliding_window": False, "layer_types": None}, None),
    ],
)  # fmt: skip
def test_fields_of_windows_that_a_family_does_not_read_are_named(model_type, fields, note, tmp_path):
    notes = []
    check_decoder(tmp_path / "config.json", tiny_config(model_type, **fields), notes)
    assert not notes if note is None else notes[0].startswith(note)
