"""A model read from a GGUF file is the model that was written, its tokenizer cuts text as llama.cpp does."""

import copy
import json
import shutil
import struct
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import GGUFWriter

from oribi.errors import ModelError
from oribi.gguf.file import GGUFFile
from oribi.gguf.names import tensors_to_read
from oribi.gguf.source import GGUFSource
from oribi.gguf.splits import CUT_BY_CASE, RULES
from oribi.gguf.tokenizer_reading import rebuild_tokenizer
from oribi.models.load import load_model
from tests.models.tiny import ROPES, ROUGH_IN_FLOAT32
from tests.save.tiny_export import (
    EXPORTED,
    byte_level_tokenizer,
    pieces_of,
    sentencepiece_tokenizer,
    with_splits,
)

TEXTS = [
    "Hello 12345 world!\n\n  Every 15 minutes at 9:30 don't ünïcode 漢字 🙂<|im_end|>\n",
    "a\tb  c   d\r\n\r\n\n x",
    "I'll we've IT'S they'Re",
    "３４５ ½ ²³ ٣",
    "  leading and trailing  ",
    "<|im_start|>user\nthe other the\nthe<|im_end|>\n<|endoftext|>",
    "def f(x):\n    return x**2  # ok\n",
    "naïve é ﬁ \u200b\u00a0x 👩‍👩‍👧",
    "!!! ... ?! /path/to",
    "CamelCaseWords andMore HTTPServer",
    "<|im_sta",
    "<start_of_turn>user\n the <b>cat</b><end_of_turn>\n\n\n  x    y",
    " ",
    "\n",
    "",
]


def distance(model, file: Path) -> float:
    """Relative distance of the logits of the model written and the model read."""
    again, _ = load_model(
        str(file), dtype="float32", load_in_4bit=False, max_seq_length=None, device_map="cpu"
    )
    ids = torch.randint(3, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    again = again.eval()
    if model.config.model_type in ROUGH_IN_FLOAT32:
        model, again = copy.deepcopy(model).double(), again.double()
    with torch.no_grad():
        expected, found = model(ids).logits, again(ids).logits
    return ((expected - found).norm() / expected.norm()).item()


@pytest.mark.parametrize("model_type", EXPORTED)
def test_each_family_read_back_gives_the_logits_it_was_written_from(model_type, exported):
    assert distance(*exported(model_type, pieces=pieces_of(model_type))) < 1e-5


def test_layers_that_predict_further_tokens_are_left_out(exported, tmp_path):
    model, file = exported("qwen3_5_text")
    changes = {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1}
    source = GGUFSource(rewritten(file, tmp_path / "mtp.gguf", changes))
    assert source.config.num_hidden_layers == 4
    names = ["blk.3.attn_q.weight", "blk.4.attn_q.weight", "blk.4.nextn.eh_proj.weight"]
    assert list(tensors_to_read(source.config, names)) == ["model.layers.3.self_attn.q_proj.weight"]


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "longrope"])
def test_each_rope_read_back_gives_the_logits_it_was_written_from(kind, exported):
    assert distance(*exported(rope_parameters=ROPES[kind], max_position_embeddings=64)) < 1e-5


_YARN = {"rope_parameters": ROPES["yarn"], "max_position_embeddings": 64}


@pytest.mark.parametrize(
    ("model_type", "config", "changes"),
    [
        ("llama", _YARN, {"rope.scaling.attn_factor": 1.5}),
        ("llama", _YARN, {"rope.scaling.yarn_log_multiplier": 0.5, "rope.scaling.yarn_beta_fast": 4.0}),
        ("ministral3", _YARN, {"rope.scaling.yarn_beta_fast": 4.0, "rope.scaling.yarn_beta_slow": 3.0}),
        ("ministral3", _YARN, {"rope.scaling.yarn_log_multiplier": 0.5, "rope.scaling.attn_factor": 1.25}),
        ("llama", {}, {"rope.scale_linear": 4.0}),
        ("llama", {}, {"rope.scaling.factor": 4.0}),
    ],
)
def test_rope_keys_of_others_are_computed_as_llama_cpp_does(model_type, config, changes, exported, tmp_path):
    pytest.importorskip("xllamacpp")
    _, file = exported(model_type, **config)
    architecture = GGUFFile(file).architecture
    changed = {f"{architecture}.{key}": value for key, value in changes.items()}
    other = rewritten(file, tmp_path / "other.gguf", changed)
    assert from_llama_cpp(other) < 1e-4
    # of the longest of these contexts, what the keys say is seen
    before = load_model(str(file), dtype="float32", load_in_4bit=False, device_map="cpu", max_seq_length=None)
    if "rope.scaling.yarn_log_multiplier" not in changes or model_type == "ministral3":
        assert from_llama_cpp(other, before[0]) > 1e-2


def from_llama_cpp(file: Path, model=None) -> float:
    """The largest difference of log-probabilities, behind a prompt of 40 tokens, between oribi's reading and llama.cpp's."""
    from oribi.gguf.llama_cpp import LlamaCpp

    if model is None:
        model, _ = load_model(
            str(file), dtype="float32", load_in_4bit=False, device_map="cpu", max_seq_length=None
        )
    prompt = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    with LlamaCpp(file, 128) as judge:
        found = judge.generate(prompt, 8, top=10)
    with torch.no_grad():
        ours = (
            model.eval()(torch.tensor([prompt + found.tokens])).logits[0].log_softmax(-1)[len(prompt) - 1 :]
        )
    pairs = [
        (ours[i, token].item(), value)
        for i, place in enumerate(found.logprobs)
        for token, value in (place or {}).items()
    ]
    return max(abs(a - b) for a, b in pairs)


def test_llama3_factors_become_the_llama3_kind_again(exported):
    rope = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 500000.0,
    }
    _, file = exported(rope_parameters=rope, head_dim=64, max_position_embeddings=131072)
    assert GGUFSource(file).config.rope_parameters == rope


def test_an_untied_head_and_biases_survive(exported):
    model, file = exported(tie_word_embeddings=False, attention_bias=True, mlp_bias=True)
    read = GGUFSource(file).config
    assert (read.tie_word_embeddings, read.attention_bias, read.mlp_bias) == (False, True, True)
    assert distance(model, file) < 1e-5


@pytest.mark.parametrize("method", ["f16", "bf16", "q8_0", "q4_0"])
def test_quantised_tensors_are_dequantised_as_the_gguf_package_does(method, exported):
    from gguf import GGUFReader
    from gguf.quants import dequantize

    _, file = exported(method=method)
    ours = GGUFFile(file)
    for tensor in GGUFReader(file).tensors:
        theirs = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        assert torch.equal(ours.read(tensor.name, torch.float32), theirs), tensor.name


def test_metadata_equals_the_gguf_packages_reader(exported):
    from gguf import GGUFReader

    _, file = exported()
    ours = GGUFFile(file).metadata
    fields = {k: f.contents() for k, f in GGUFReader(file).fields.items() if not k.startswith("GGUF.")}
    assert ours == fields


@pytest.mark.parametrize("rows_at_once", [1, 7, 1 << 22])
def test_the_size_of_the_portions_changes_nothing(rows_at_once, monkeypatch, exported):
    _, file = exported(method="q8_0")
    whole = GGUFFile(file).read("blk.0.ffn_up.weight", torch.float32)
    monkeypatch.setattr("oribi.gguf.file._AT_ONCE", rows_at_once * 64)
    assert torch.equal(GGUFFile(file).read("blk.0.ffn_up.weight", torch.float32), whole)


def rewritten(source: Path, target: Path, changes: dict[str, object]) -> Path:
    """A copy of a GGUF file with other metadata; None removes a key."""
    file = GGUFFile(source)
    metadata = {**file.metadata, **changes}
    writer = GGUFWriter(target, metadata.pop("general.architecture"))
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
    for name in file.tensors:
        writer.add_tensor(name, file.read(name, torch.float32).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def assert_cut_alike(file: Path) -> None:
    from oribi.gguf.llama_cpp import LlamaCpp

    _, tokenizer = load_model(
        str(file), dtype="float32", load_in_4bit=False, max_seq_length=None, device_map="cpu"
    )
    judge = LlamaCpp(file, 64)
    for text in TEXTS:
        assert tokenizer(text, add_special_tokens=False).input_ids == judge.tokenize(text), text
        assert tokenizer(text).input_ids == judge.tokenize(text, add_special=True), text
        ids = tokenizer(text, add_special_tokens=False).input_ids
        assert tokenizer.decode(ids) == tokenizer.decode(judge.tokenize(text))


# what the rules cut differently, each other's words among them
_CUT = [
    "12345 3.14159 1,000,000", "don't DON'T we'LL I'M", "HTTPServer camelCase XMLHttpRequest", "a/b//c http://x.y/z?q=1",
    "...!!!??? --- ***\n\n", "x  =  1;\t\ty\n \n  z", "_foo__bar_ $x+y=z^2~|", "नमस्ते दुनिया",
]  # fmt: skip
_EACH_RULE = [
    "gpt-2", "smollm", "llama-bpe", "smaug-bpe", "dbrx", "qwen2", "deepseek-r1-qwen", "stablelm2", "tekken", "gpt-4o",
    "starcoder", "refact", "olmo", "qwen35", "default", "lfm2", "pixtral", "falcon-h1", "midm-2.0", "glm4", "chatglm-bpe", "exaone4",
    "megrez",
]  # fmt: skip


@pytest.fixture(scope="module")
def across_words(exported, tmp_path_factory):
    """Writes a file of a rule, whose merges reach across words: where text is cut decides which of them are made."""
    from tokenizers import Tokenizer, pre_tokenizers, trainers
    from tokenizers.models import BPE

    _, file = exported(vocab_size=1024)
    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000, min_frequency=1, initial_alphabet=alphabet, show_progress=False, max_token_length=12
    )
    backend.train_from_iterator([text for text in TEXTS if "<" not in text] + _CUT, trainer)
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    tokens += [f"[PAD{i}]" for i in range(len(tokens), 1023)] + ["<|im_end|>"]
    changes = {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [1] * 1023 + [3],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        **{f"tokenizer.ggml.{name}_token_id": 1023 for name in ("bos", "eos", "eot")},
        # as converters write for want of another: "!", which stays a word
        **{f"tokenizer.ggml.{name}_token_id": 0 for name in ("padding", "unknown")},
    }
    folder = tmp_path_factory.mktemp("rules")
    return lambda rule: rewritten(file, folder / f"{rule}.gguf", {**changes, "tokenizer.ggml.pre": rule})


@pytest.mark.parametrize("rule", _EACH_RULE)
def test_every_cutting_rule_equals_llama_cpp(rule, across_words):
    pytest.importorskip("xllamacpp", reason="llama.cpp judges the tokenizer")
    from oribi.gguf.llama_cpp import LlamaCpp

    file = across_words(rule)
    tokenizer = rebuild_tokenizer(GGUFFile(file))
    with LlamaCpp(file, 64) as judge:
        for text in [*TEXTS, *_CUT]:
            if rule in CUT_BY_CASE and text == _CUT[-1]:  # which llama.cpp cuts in its own way
                continue
            assert tokenizer(text, add_special_tokens=False).input_ids == judge.tokenize(text), text
            assert tokenizer(text).input_ids == judge.tokenize(text, add_special=True), text


def test_no_two_rules_cut_the_texts_alike(across_words):
    tokenizers = [rebuild_tokenizer(GGUFFile(across_words(names[0]))) for names in RULES]
    cuts = {
        str([one(text, add_special_tokens=False).input_ids for text in [*TEXTS, *_CUT]]) for one in tokenizers
    }
    assert len(cuts) == len(RULES)


def with_tokens(file: Path, target: Path, tokens: dict[str, int], changes: dict[str, object]) -> Path:
    """The file with further tokens of the given types in the rows that its model keeps spare."""
    metadata = GGUFFile(file).metadata
    names, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    for place, (token, kind) in enumerate(tokens.items(), start=len(names) - len(tokens)):
        assert types[place] == 5  # unused
        names[place], types[place] = token, kind
    changes = {"tokenizer.ggml.tokens": names, "tokenizer.ggml.token_type": types, **changes}
    return rewritten(file, target, changes)


@pytest.mark.parametrize("prefix", [True, False])
def test_tokens_of_the_users_own_are_cut_as_llama_cpp_does(prefix, exported, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp judges the tokenizer")
    _, file = exported(pieces=True)
    own = dict.fromkeys(["  ", "   ", "\n\n", "<b>", "the"], 4)  # as Gemma has them
    assert_cut_alike(
        with_tokens(file, tmp_path / "other.gguf", own, {"tokenizer.ggml.add_space_prefix": prefix})
    )


def test_phi3_swallows_the_space_after_its_markers_as_llama_cpp_does(exported, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp judges the tokenizer")
    _, file = exported("phi3", pieces=True)
    changes = {"general.name": "Phi-3 mini", "tokenizer.ggml.add_space_prefix": False}
    file = with_tokens(file, tmp_path / "other.gguf", {"<|endoftext|>": 3}, changes)
    assert_cut_alike(file)
    _, tokenizer = load_model(str(file), load_in_4bit=False, device_map="cpu", max_seq_length=None)
    ids = tokenizer("<end_of_turn> \n a", add_special_tokens=False).input_ids
    assert tokenizer.convert_ids_to_tokens(ids) == ["<end_of_turn>", "a"]


def test_gemma_4s_pieces_equal_llama_cpps(exported):
    pytest.importorskip("xllamacpp", reason="llama.cpp judges the tokenizer")
    assert_cut_alike(exported("gemma4_text", pieces="gemma4")[1])


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_equals_llama_cpp(prefix, exported, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp judges the tokenizer")
    _, file = exported(pieces=True)
    changes = {"tokenizer.ggml.add_space_prefix": prefix}
    assert_cut_alike(rewritten(file, tmp_path / "other.gguf", changes))


def test_an_added_bos_and_eos_are_added(exported, tmp_path):
    _, file = exported()
    changes = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    _, tokenizer = load_model(
        str(rewritten(file, tmp_path / "other.gguf", changes)),
        load_in_4bit=False,
        device_map="cpu",
        max_seq_length=None,
    )
    ids = tokenizer("the").input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.eos_token_id
    assert len(ids) == 3


def test_a_tokenizer_json_beside_the_file_is_used_instead(exported, tmp_path):
    file = Path(shutil.copy(exported()[1], tmp_path))
    with_splits("x", whole_words=False).save_pretrained(tmp_path)
    model, tokenizer = load_model(str(file), load_in_4bit=False, device_map="cpu", max_seq_length=None)
    assert "tokenizer: read from the tokenizer.json beside the GGUF file" in model.oribi.notes
    assert tokenizer.backend_tokenizer.pre_tokenizer.__getstate__() != (
        byte_level_tokenizer().backend_tokenizer.pre_tokenizer.__getstate__()
    )


def test_another_models_tokenizer_beside_the_file_is_refused(exported, tmp_path):
    file = Path(shutil.copy(exported()[1], tmp_path))
    sentencepiece_tokenizer().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"tokenizer of another model: \d+ of 384 tokens differ"):
        load_model(str(file), load_in_4bit=False, device_map="cpu")


_TOKENS, _TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        (_TOKENS, None, "0 tokens and 384 types"),
        (_TYPES, [1] * 300, "384 tokens and 300 types"),
        ("tokenizer.ggml.merges", None, "it has no merges"),
        ("tokenizer.ggml.merges", ["ab"], "'ab' is no merge of two tokens"),
        ("tokenizer.ggml.merges", ["zzz yyy"], "out of vocabulary"),
        ("tokenizer.ggml.model", "llama", "384 tokens and 0 scores"),
    ],
)
def test_a_damaged_tokenizer_is_named(key, value, words, exported, tmp_path):
    file = rewritten(exported()[1], tmp_path / "other.gguf", {key: value})
    with pytest.raises(ModelError, match=rf"other.gguf: its tokenizer is damaged \(.*{words}"):
        rebuild_tokenizer(GGUFFile(file))


def test_bos_and_unknown_beyond_the_tokens_are_named(exported, tmp_path):
    changes = {"tokenizer.ggml.bos_token_id": 999, "tokenizer.ggml.add_bos_token": True}
    with pytest.raises(ModelError, match="bos_token_id is 999 of 384"):
        rebuild_tokenizer(GGUFFile(rewritten(exported()[1], tmp_path / "a.gguf", changes)))
    changes = {"tokenizer.ggml.unknown_token_id": 999}
    with pytest.raises(ModelError, match="unknown_token_id is 999 of 384"):
        rebuild_tokenizer(GGUFFile(rewritten(exported(pieces=True)[1], tmp_path / "b.gguf", changes)))


@pytest.mark.long
def test_experts_of_files_that_others_write(exported, tmp_path):
    # llama.cpp's converter gives the width of Granite's experts as that of an MLP alone
    model, file = exported("granitemoe")
    changes = {"granitemoe.expert_feed_forward_length": None}
    assert distance(model, rewritten(file, tmp_path / "other.gguf", changes)) < 1e-5
    _, file = exported("glm4_moe")
    with pytest.raises(ModelError, match=r"glm4moe.expert_gating_func = 1; .* by sigmoid \(2\)"):
        GGUFSource(rewritten(file, tmp_path / "other.gguf", {"glm4moe.expert_gating_func": 1}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"general.architecture": "bert"}, "architecture 'bert'; oribi reads llama, "),
        ({"tokenizer.ggml.pre": "martian"}, "rule 'martian'"),
        ({"tokenizer.ggml.model": "bert"}, "tokenizer of kind 'bert'"),
        ({"llama.expert_count": 8}, "mixture of experts"),
        ({"split.count": 3}, "one of 3 parts"),
        (
            {"llama.rope.scaling.type": "dynamic"},
            "type = 'dynamic'; llama.cpp knows none, linear, yarn, longrope",
        ),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor = 1.5, by which .* scaling is 'none'"),
        ({"llama.attention.causal": False}, "attention.causal is false"),
        ({"llama.block_count": 3}, "block_count = 3, and the file holds blk.3."),
        ({"llama.block_count": None}, "lacks the metadata key llama.block_count"),
        ({"llama.feed_forward_length": [128, 64, 128, 64]}, "differs by layer"),
    ],
)
def test_what_cannot_be_read_is_named(changes, words, exported, tmp_path):
    _, file = exported()
    with pytest.raises(ModelError, match=words):
        load_model(
            str(rewritten(file, tmp_path / "other.gguf", changes)), load_in_4bit=False, device_map="cpu"
        )


def test_damaged_files_are_named(exported, tmp_path):
    _, file = exported()
    whole = file.read_bytes()
    for content, words in [
        (b"version https://git-lfs", "not a GGUF file"),
        (whole[:300], "damaged GGUF header"),
        (whole[:-1000], "cut short"),
        (whole[:4] + b"\x01\x00\x00\x00" + whole[8:], "GGUF version 1"),
    ]:
        broken = tmp_path / "broken.gguf"
        broken.write_bytes(content)
        with pytest.raises(ModelError, match=words):
            GGUFFile(broken)


@pytest.mark.parametrize(("kind", "words"), [(250, "ggml type 250, which"), (Type.Q8_1, "stored as Q8_1")])
def test_types_that_are_no_weights_are_named_with_their_tensor(kind, words, exported, tmp_path):
    whole, name = bytearray(exported()[1].read_bytes()), b"blk.0.ffn_up.weight"
    struct.pack_into("<I", whole, whole.index(name) + len(name) + 4 + 2 * 8, kind)  # behind the shape
    broken = tmp_path / "other.gguf"
    broken.write_bytes(whole)
    with pytest.raises(ModelError, match=f"blk.0.ffn_up.weight.*{words}"):
        GGUFFile(broken).read("blk.0.ffn_up.weight", torch.float32)


def test_the_permutation_of_q_and_k_matters(monkeypatch, exported):
    model, file = exported()
    monkeypatch.setattr("oribi.gguf.tensor.Tensor.from_gguf", lambda tensor, values: values)
    assert distance(model, file) > 1e-2


@pytest.mark.parametrize("text", TEXTS)
def test_smollm2_is_cut_as_llama_cpp_does(text, smollm2, smollm2_llama_cpp):
    tokenizer = smollm2[1]
    assert tokenizer(text, add_special_tokens=False).input_ids == smollm2_llama_cpp.tokenize(text)


def test_smollm2s_tokenizer_survives_saving(smollm2, tmp_path):
    from transformers import AutoTokenizer

    smollm2[1].save_pretrained(tmp_path)
    smollm2[0].config.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert again(text).input_ids == smollm2[1](text).input_ids
    assert again.chat_template == smollm2[1].chat_template


def test_smollm2_chats_as_llama_cpp_renders(smollm2, smollm2_llama_cpp):
    messages = [{"role": "user", "content": "Every day at 5 pm?"}]
    rendered = smollm2[1].apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == smollm2_llama_cpp.render(messages)


@pytest.mark.long
def test_smollm2s_weights_equal_transformers_own_loader(short_smollm2_file):
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(
        short_smollm2_file.parent, gguf_file=short_smollm2_file.name, dtype=torch.float32
    ).state_dict()
    model, _ = load_model(str(short_smollm2_file), load_in_4bit=False, dtype="float32", device_map="cpu")
    ours = model.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_smollm2_answers_sensibly(smollm2):
    model, tokenizer = smollm2
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(prompt, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :])
