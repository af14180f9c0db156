"""Every export is checked against the trained model: a good one passes with its figures, a wrong one is refused."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

import oribi.save.export as export
from oribi.errors import ConfigError, ExportError
from oribi.save.gguf import save_gguf
from oribi.save.merged import save_merged
from oribi.save.probes import prompts_of, rows_of
from oribi.save.reference import Trained
from oribi.save.trained import MergedModel
from tests.save.tiny_export import (
    VOCAB,
    adapted,
    byte_level_tokenizer,
    export_config,
    sentencepiece_tokenizer,
    tiny_model,
)

llama_cpp = pytest.importorskip("xllamacpp", reason="llama.cpp is one of the judges")


def tuned_model(**changes):
    return adapted(tiny_model(export_config("llama", **changes)))


def test_a_good_gguf_export_reports_every_check(tmp_path):
    result = save_gguf(tuned_model(), tmp_path / "gguf", byte_level_tokenizer(), ["f16", "q8_0"])
    report = json.loads((tmp_path / "gguf" / "export_report.json").read_text())
    assert report["passed"]
    assert report["base"] == "dequantized"
    names = [check["name"] for check in report["checks"]]
    assert names == [
        f"{method}: {check}"
        for method in ("f16", "q8_0")
        for check in (
            "weights read back",
            "greedy answers",
            "ends of answers",
            "tokenizer rebuilt from the file",
            "tokenizer in llama.cpp",
            "end token in llama.cpp",
            "probabilities in llama.cpp",
            "greedy answers in llama.cpp",
            "ends of answers in llama.cpp",
        )
    ]
    figures = {check["name"]: check["figures"] for check in report["checks"]}
    assert 0 <= figures["f16: weights read back"]["kl"] < figures["q8_0: weights read back"]["kl"] < 0.03
    assert figures["f16: tokenizer in llama.cpp"] == {"same": 10, "of": 10}
    card = (tmp_path / "gguf" / "README.md").read_text()
    assert "| q8_0: end token in llama.cpp | equal | '&lt;\\|im_end\\|&gt;' ends an answer |" in card
    outcomes = {check["name"]: check["outcome"] for check in report["checks"]}
    assert outcomes["f16: weights read back"] == "equal"
    assert outcomes["f16: ends of answers"] == "not tested"  # random weights end nothing
    assert report["outcome"] == "close"
    assert "ollama create" in card
    assert result["modelfile_location"] == str(tmp_path / "gguf" / "Modelfile")
    assert set(result) == {
        "save_directory", "gguf_directory", "gguf_files", "modelfile_location", "want_full_precision", "is_vlm",
        "fix_bos_token", "report",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("save", "form", "words"),
    [
        (save_merged, "merged_16bit", "writing merged_16bit, 67 tensors in bfloat16, 0.4 MB"),
        (save_gguf, ["q8_0", "f16"], "GGUF f16 ("),
    ],
)
def test_sizes_are_printed_and_too_little_disk_stops_before_any_work(
    save, form, words, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr("oribi.save.folder.shutil.disk_usage", lambda _: SimpleNamespace(free=150_000))
    monkeypatch.setattr("oribi.save.export.Trained", None)  # would be asked for the model's answers
    with pytest.raises(ExportError, match=r"needs 0\.[3-8] MB and its disk has 0\.1 MB free"):
        save(tuned_model(), tmp_path / "a/b", byte_level_tokenizer(), form)
    assert words in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_merged_export_reports_its_loss(tmp_path):
    report = save_merged(tuned_model(), tmp_path / "merged", byte_level_tokenizer(), dtype="float32")
    check, answers, ends, tokenizer = report.checks
    assert check.figures["kl"] < 1e-6
    assert check.figures["loss"] == pytest.approx(check.figures["loss_of_trained"], rel=1e-5)
    assert check.figures["same_top_token"] == 1.0
    assert tokenizer.figures == {"same": 15, "of": 15}
    assert answers.says.startswith("20 of 20 greedy answers are token for token the same")
    assert [check.outcome, answers.outcome, ends.outcome] == ["equal", "equal", "not tested"]
    assert report.verdict == "equal (1 check not tested)"


def test_held_out_rows_are_what_it_is_checked_on(tmp_path):
    rows = [
        {"input_ids": list(range(30, 60)), "labels": list(range(30, 60))},
        "a text of 12 words",
        [5, 6, 7],
    ]
    report = save_merged(tuned_model(), tmp_path / "m", byte_level_tokenizer(), held_out=rows)
    assert report.checked_on == "3 held-out rows"


def test_wrong_weights_are_refused_and_kept_aside(tmp_path, monkeypatch):
    class Shifted(MergedModel):
        def read(self, name, device, dtype):
            tensor = super().read(name, device, dtype)
            return tensor.roll(1, 0) if name.endswith("layers.2.mlp.down_proj.weight") else tensor

    monkeypatch.setattr(export, "MergedModel", Shifted)
    with pytest.raises(ExportError, match="different  f16: weights read back: the likeliest") as error:
        save_gguf(tuned_model(), tmp_path / "gguf", byte_level_tokenizer(), "f16")
    assert "not those that were trained" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["gguf.rejected"]
    assert not json.loads((tmp_path / "gguf.rejected" / "export_report.json").read_text())["passed"]


def test_a_file_that_llama_cpp_does_not_load_is_refused(tmp_path, monkeypatch):
    extra = {"unknown.weight": torch.zeros(32)}
    monkeypatch.setattr("oribi.gguf.writer.rope_tensors", lambda config: extra)
    with pytest.raises(ExportError, match="different  f16: loads in llama.cpp: .*wrong number of tensors"):
        save_gguf(tuned_model(), tmp_path / "gguf", byte_level_tokenizer(), "f16")
    assert [path.name for path in tmp_path.iterdir()] == ["gguf.rejected"]


def test_a_format_that_loses_too_much_is_refused(tmp_path):
    with pytest.raises(ExportError, match="q2_k: weights read back: .* use q4_k_m, q5_k_m or q8_0"):
        save_gguf(
            tuned_model(hidden_size=256, intermediate_size=512),
            tmp_path / "g",
            byte_level_tokenizer(),
            "q2_k",
        )


def test_a_changed_chat_template_is_noticed(tmp_path):
    class Forgetful(PreTrainedTokenizerFast):
        """Saves another template than it has."""

        def save_pretrained(self, folder, **keywords):
            other = byte_level_tokenizer()
            other.chat_template = other.chat_template.replace("<|im_start|>assistant", "<|im_start|>bot")
            return other.save_pretrained(folder, **keywords)

    good = byte_level_tokenizer()
    tokenizer = Forgetful(
        tokenizer_object=good.backend_tokenizer, eos_token="<|im_end|>", chat_template=good.chat_template
    )
    with pytest.raises(
        ExportError, match=r"tokenizer read by transformers: 10 of 15 .*; other ids: prompt about"
    ):
        save_merged(tuned_model(), tmp_path / "m", tokenizer, dtype="float32")


def test_auto_takes_the_base_with_the_lower_loss(tmp_path):
    good, bad = tiny_model(export_config("llama")), tiny_model(export_config("llama"), seed=9)
    save_merged(good, tmp_path / "original", dtype="float32")
    tuned = adapted(bad)
    tuned.config._name_or_path = str(tmp_path / "original")
    with torch.no_grad():  # an adapter that does nothing on either
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.zero_()
    # rows that the original model finds likely
    start = torch.arange(20, 30)[None]
    rows = good.generate(input_ids=start, max_new_tokens=40, do_sample=False, eos_token_id=None).tolist()
    report = save_merged(
        tuned, tmp_path / "auto", byte_level_tokenizer(), base="auto", held_out=rows, dtype="float32"
    )
    assert report.base == "original"
    assert "base='auto' chose original: loss dequantized" in report.notes[0]
    assert report.checks[0].figures["loss"] < report.checks[0].figures["loss_of_trained"]


def test_auto_without_the_original_stays_with_what_was_trained(tmp_path):
    tuned = tuned_model()
    tuned.config._name_or_path = "someone/somewhere"
    save = partial(save_merged, tuned, tmp_path / "auto", byte_level_tokenizer(), base="auto")
    report = save(held_out=["the cat on the mat"], dtype="float32")
    assert report.base == "dequantized"
    assert "not on this machine" in report.notes[0]


def test_auto_without_held_out_rows_stays_with_what_was_trained(tmp_path):
    save_merged(tiny_model(export_config("llama")), tmp_path / "original", dtype="float32")
    tuned = tuned_model()
    tuned.config._name_or_path = str(tmp_path / "original")
    report = save_merged(tuned, tmp_path / "auto", byte_level_tokenizer(), base="auto", dtype="float32")
    assert report.base == "dequantized"
    assert report.notes == ["base='auto' chose dequantized: no held-out rows were given to compare bases on"]


def test_a_base_that_does_not_suit_the_adapter_is_refused(tmp_path):
    save_merged(tiny_model(export_config("llama"), seed=9), tmp_path / "other", dtype="float32")
    tuned = tuned_model()
    start = torch.arange(20, 30)[None]
    rows = tuned.generate(input_ids=start, max_new_tokens=40, do_sample=False, eos_token_id=None).tolist()
    with pytest.raises(ExportError, match="this base does not suit the adapter"):
        save_merged(tuned, tmp_path / "m", base=str(tmp_path / "other"), held_out=rows, dtype="float32")


def test_a_streamed_model_equals_the_model():
    for family in ("llama", "gemma3_text", "phi3"):
        tuned = adapted(tiny_model(export_config(family, tie_word_embeddings=family != "phi3")))
        rows = rows_of(byte_level_tokenizer(), None, VOCAB)
        merged = MergedModel(tuned)
        trained = Trained(tuned, rows, prompts_of(byte_level_tokenizer(), None, VOCAB))
        logits, likeliest = trained.split(trained.streamed(merged))
        assert (logits.log_softmax(-1) - trained.logprobs).abs().max() < 1e-4
        assert likeliest == [answer.tokens for answer in trained.answers]
        assert len(likeliest) == 20


def test_a_template_without_bos_keeps_llama_cpp_from_adding_one(tmp_path):
    tokenizer = sentencepiece_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    result = save_gguf(tuned_model(), tmp_path / "gguf", tokenizer, "f32")
    assert result["fix_bos_token"]
    assert result["report"].passed


def test_a_template_with_bos_gets_one_bos_in_llama_cpp(tmp_path):
    tokenizer = sentencepiece_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    result = save_gguf(tuned_model(), tmp_path / "gguf", tokenizer, "f32")
    assert not result["fix_bos_token"]
    assert "<s>" not in (tmp_path / "gguf" / "Modelfile").read_text()


def test_rows_of_unknown_kind_are_named():
    with pytest.raises(ConfigError, match="a held-out row is '3.5'; expected a text, messages, or token ids"):
        rows_of(byte_level_tokenizer(), [3.5], VOCAB)
    with pytest.raises(ConfigError, match="no row of two tokens"):
        rows_of(byte_level_tokenizer(), [[1]], VOCAB)
