"""What 4 bits cost is measured as it will be, and layers that stay in 16 bits do so in memory, in files and when read again."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from oribi.environment import detect
from oribi.errors import ConfigError, ModelError
from oribi.memory.architecture import architecture_of
from oribi.models.adapter_files import read_record
from oribi.models.load import load_model
from oribi.models.open import open_model
from oribi.run import load_run
from oribi.save.four_bits import AUTO_BUDGET, four_bit_loss
from oribi.save.gguf import save_gguf
from oribi.save.probes import rows_of
from oribi.save.verify import mean_kl
from tests.models.tiny_checkpoint import checkpoint, mxfp4_checkpoint
from tests.save.test_adapter_files import adapted, load, logits, write_wrapper

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}
KEPT = ["o_proj", "layers.1.mlp"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four") / "llama"
    checkpoint(folder, num_hidden_layers=2)
    return folder


def packed(model) -> set[str]:
    return {name for name, module in model.named_modules() if type(module).__name__ == "Linear4bit"}


# mixers of their own, keys and values shared between layers, values that are keys, experts by themselves and in stacks
OTHERS = (
    "qwen3_5_text", "gemma4_text", "gemma4_unified_text", "lfm2", "muse_glimmer_text", "granitemoehybrid", "ministral3",
    "cohere2", "qwen3_moe", "gpt_oss", "granitemoe",
)  # fmt: skip


@pytest.mark.parametrize(
    "model_type", ["llama", *(pytest.param(name, marks=pytest.mark.long) for name in OTHERS)]
)
def test_the_measured_divergence_is_that_of_the_loaded_models(model_type, tmp_path):
    checkpoint(tmp_path, model_type, vocab_size_per_layer_input=384)  # Gemma 4's
    opened = open_model(str(tmp_path))
    tokenizer = opened.tokenizer()
    found = four_bit_loss(opened, tokenizer, **CPU)
    rows = rows_of(tokenizer, None, opened.config.vocab_size)
    places = (rows.targets() != -100).nonzero().flatten()

    def logprobs(**options):
        model, _ = load_model(
            str(tmp_path), max_seq_length=None, dtype="float32", device_map="cpu", **options
        )
        with torch.no_grad():
            out = model.eval()(input_ids=rows.ids, position_ids=rows.positions, use_cache=False)
        return out.logits[0, places].log_softmax(-1)

    exact = logprobs(load_in_4bit=False)
    assert found.kl == pytest.approx(mean_kl(logprobs(load_in_4bit=True), exact), rel=1e-3)
    assert {kind.name for kind in found.kinds} >= ({"experts"} if model_type.endswith("moe") else {"q_proj"})
    for kind in found.kinds[:2]:
        assert kind.kl == pytest.approx(mean_kl(logprobs(keep_in_16bit=[kind.name]), exact), rel=1e-3)
    names = [kind.name for kind in found.kept]
    if names:
        assert found.kl_kept == pytest.approx(mean_kl(logprobs(keep_in_16bit=names), exact), rel=1e-3)
        assert sum(kind.extra_bytes for kind in found.kept) <= AUTO_BUDGET * found.packed_bytes
        sizes = architecture_of(str(tmp_path), dtype=torch.bfloat16)
        more = sizes.weight_bytes(True, names) - sizes.weight_bytes(True)
        assert more == pytest.approx(sum(kind.extra_bytes for kind in found.kept), rel=0.01)
    model, _ = load(tmp_path, load_in_4bit=True, keep_in_16bit="auto")
    here = detect().dtype
    chosen = (
        found if here == torch.float32 else four_bit_loss(opened, tokenizer, device=CPU["device"], dtype=here)
    )
    assert list(model.oribi.kept_in_16bit) == [kind.name for kind in chosen.kept]
    assert any("keep_in_16bit: auto keeps" in note for note in model.oribi.notes)
    assert len(found.layers) == opened.config.num_hidden_layers
    assert all(0.001 < layer < 1 for layer in found.layers)


@pytest.mark.long
def test_what_keeps_the_codes_that_it_has_is_not_measured_in_nf4(llama, tmp_path):
    model, tokenizer = load(llama)
    file = save_gguf(model, tmp_path / "g", tokenizer, "q8_0", verify=False)["gguf_files"][0]
    opened = open_model(str(file))
    with pytest.raises(ConfigError, match="loading packs nothing in NF4"):
        four_bit_loss(opened, opened.tokenizer(), **CPU)
    model, _ = load(file, load_in_4bit=True, keep_in_16bit="auto")
    assert any(note.startswith("keep_in_16bit: auto keeps nothing: ") for note in model.oribi.notes)
    mxfp4_checkpoint(tmp_path / "gpt_oss")
    opened = open_model(str(tmp_path / "gpt_oss"))
    kinds = four_bit_loss(opened, opened.tokenizer(), ["the red fox runs"], **CPU).kinds
    assert {kind.name for kind in kinds} == {"q_proj", "k_proj", "v_proj", "o_proj"}


def test_the_text_decoder_of_a_multimodal_model_is_measured(tmp_path):
    write_wrapper("gemma3", tmp_path)
    opened = open_model(str(tmp_path))
    assert four_bit_loss(opened, opened.tokenizer(), ["the red fox runs"], **CPU).kl > 0


def test_what_cannot_be_measured_is_refused(llama, tmp_path):
    write_wrapper("paligemma", tmp_path / "foreign")
    opened = open_model(str(tmp_path / "foreign"))
    opened.config.model_type = "unknown"
    with pytest.raises(ConfigError, match="outside oribi's family table"):
        four_bit_loss(opened, opened.tokenizer(), **CPU)
    model, tokenizer = load(llama, load_in_4bit=True)
    model.save_pretrained_merged(str(tmp_path / "packed"), tokenizer, save_method="merged_4bit", verify=False)
    opened = open_model(str(tmp_path / "packed"))
    with pytest.raises(ModelError, match="packed in NF4 already"):
        four_bit_loss(opened, tokenizer, **CPU)
    with pytest.raises(ConfigError, match="packed in NF4 already"):
        load(tmp_path / "packed", load_in_4bit=True, keep_in_16bit=["o_proj"])


@pytest.mark.parametrize("kind", ["llama", "gemma3", pytest.param("paligemma", marks=pytest.mark.slow)])
def test_named_layers_stay_in_16_bits_in_memory_and_in_files(kind, llama, tmp_path):
    base = llama
    if kind != "llama":
        base = tmp_path / "base"
        write_wrapper(kind, base)
    model, tokenizer = load(base, load_in_4bit=True, keep_in_16bit=KEPT)
    names = packed(model)
    assert names
    assert not any(name.endswith("o_proj") or ".layers.1.mlp." in f".{name}." for name in names)
    model = adapted(model)
    expected = logits(model)
    model.save_pretrained(str(tmp_path / "adapter"))
    assert read_record(tmp_path / "adapter").kept_in_16bit == tuple(KEPT)
    for load_in_4bit in (None, True):  # as a run's folder is opened, too
        again, _ = load(tmp_path / "adapter", load_in_4bit=load_in_4bit)
        assert torch.equal(logits(again), expected)
    model.save_pretrained_merged(
        str(tmp_path / "m"), tokenizer, save_method="merged_4bit", dtype="float32", verify=False
    )
    config = json.loads((tmp_path / "m/config.json").read_text())
    skipped = config["quantization_config"]["llm_int8_skip_modules"]
    assert sum(name.endswith("o_proj") for name in skipped) == 2
    merged, _ = load(tmp_path / "m", load_in_4bit=True)
    assert packed(merged) == {
        name.replace(".base_layer", "").removeprefix("base_model.model.") for name in names
    }
    if kind == "llama":
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert packed(theirs) == packed(merged)


def test_a_name_of_no_layer_is_refused_and_a_kept_layers_bytes_are_counted(llama):
    for options in ({"load_in_4bit": True}, {}):
        with pytest.raises(ConfigError, match=r"no linear layer 'o_prj'; did you mean o_proj\?"):
            load(llama, keep_in_16bit=["o_prj"], **{"load_in_4bit": True, **options})
    found = architecture_of(str(llama), dtype=torch.float32)
    weight = found.decoder.model.layers[0].self_attn.o_proj.weight
    more = found.weight_bytes(True, ["layers.0.self_attn.o_proj"]) - found.weight_bytes(True)
    assert weight.numel() * 3.4 < more < weight.numel() * 3.5


@pytest.mark.slow
def test_auto_keeps_what_was_measured_and_a_resumed_run_keeps_the_same(oribi, config_file, tmp_path):
    flags = [
        "--output_dir",
        tmp_path / "run",
        "--keep_in_16bit",
        "auto",
        "--save_steps",
        "1",
        "--report",
        "false",
    ]
    first = oribi("train", config_file, *flags, "--max_steps", "2")
    assert first.code == 0, first.err
    assert "keep_in_16bit: auto keeps" in first.out + first.err
    record = read_record(tmp_path / "run/adapter")
    again = oribi("train", config_file, *flags, "--max_steps", "3", "--resume")
    assert again.code == 0, again.err
    assert read_record(tmp_path / "run/adapter").kept_in_16bit == record.kept_in_16bit


def test_a_run_of_merged_weights_is_loaded_with_the_layers_that_it_kept(oribi, config_file, tmp_path):
    flags = ["--output_dir", tmp_path / "run", "--keep_in_16bit", "o_proj", "--save_method", "merged_16bit"]
    trained = oribi("train", config_file, *flags, "--max_steps", "1", "--report", "false")
    assert trained.code == 0, trained.err
    layer = load_run(tmp_path / "run").model.model.layers[0]
    assert layer.self_attn.o_proj.weight.is_floating_point()
    assert not layer.self_attn.q_proj.weight.is_floating_point()


def test_the_command_shows_what_keeping_buys(oribi, llama, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "the red fox runs over the old hills"}\n' * 2)
    found = oribi(
        "inspect", "model", llama, "--four-bits", "--texts", tmp_path / "rows.jsonl", "--json"
    ).records[0]
    assert found["kl"] > 0
    assert {kind["name"] for kind in found["kinds"]} >= {"q_proj", "down_proj"}
    assert "2 held-out rows" in found["origin"]
    shown = oribi("inspect", "model", llama, "--four-bits")
    assert "layers whose output NF4 moves most" in shown.out
    assert oribi("inspect", "model", llama, "--texts", "x").code == 2
