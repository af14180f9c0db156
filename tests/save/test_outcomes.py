"""Answers decide: a file whose greedy answers or ends are other ones is different, whatever its format allows of KL."""

import json

import pytest
import torch

from oribi.errors import ConfigError, ExportError
from oribi.save.check import Check, Outcome
from oribi.save.export import AskedOnce
from oribi.save.gguf import save_gguf, save_gguf_adapter
from oribi.save.merged import save_merged
from oribi.save.probes import prompts_of, rows_of
from oribi.save.reference import Trained
from oribi.save.report import ExportReport
from oribi.save.signatures import Signatures
from oribi.save.verify import compare, compare_answers, compare_stops, is_near_tie
from tests.save.tiny_export import VOCAB, adapted, byte_level_tokenizer, export_config, tiny_model


def answers(count: int, length: int, wrong: int, places: int = 1):
    """Answers of which `wrong` differ, in so many places."""
    expected = [[i] * length for i in range(count)]
    found = [[-1] * places + one[places:] if i < wrong else one for i, one in enumerate(expected)]
    return expected, found


@pytest.mark.parametrize(
    ("case", "kl", "outcome"),
    [
        (answers(20, 9, 0), 0.17, "equal"),
        (answers(20, 9, 3), 0.17, "close"),  # SmolLM2-135M taught cron, q4_k_m: 17 of 20
        (answers(20, 9, 8), 0.62, "close"),  # the same in q3_k_m: 60 % of 200
        (answers(20, 9, 18, 2), 0.94, "different"),  # the same in q4_0: 2 of 20, 83 % of tokens
        (answers(5, 24, 5, 4), 0.3875, "different"),  # Gemma-3-270M in q4_k_m: 0 of 5
        (answers(5, 24, 5, 2), 0.12, "different"),
        (answers(20, 20, 17, 2), 0.084, "close"),  # SmolLM2-135M chatting, q5_k_m: 3 of 20, 89 % of tokens
        (answers(20, 20, 17, 3), 0.14, "close"),  # the same in q4_k_m: 3 of 20, 85 to 90 % of tokens
        (answers(20, 20, 17, 4), 0.14, "close"),  # 83 %: the limit lies below the 85 % of that run
        (answers(20, 20, 15, 5), 0.14, "different"),  # 81 %
        (answers(20, 20, 19, 5), 0.62, "different"),  # the same in q3_k_m: 1 of 20, 78 % of tokens
        (answers(20, 20, 20, 2), 0.004, "close"),  # near ties of flat distributions
        (answers(2, 24, 2, 2), 0.3, "close"),  # two answers tell little
        ((([]), ([])), 0.0, "not tested"),
    ],
)
def test_greedy_answers_decide(case, kl, outcome):
    found = compare_answers("answers", *case, kl, "q4_k_m")
    assert found.outcome == outcome, found.says
    if outcome == "different":
        assert found.line().endswith("use q5_k_m or q8_0")
    if outcome not in ("not tested",):
        assert f"of {len(case[0])} greedy answers are token for token the same" in found.says


@pytest.mark.parametrize(
    ("kept", "of", "outcome"),
    [(0, 0, "not tested"), (5, 5, "equal"), (4, 5, "close"), (3, 5, "different"), (0, 1, "different"),
     (0, 3, "different"), (17, 20, "close"), (13, 20, "different")],
)  # fmt: skip
def test_lost_ends_are_no_format_s_due(kept, of, outcome):
    found = compare_stops("ends", [i < kept for i in range(of)], 20, "q4_k_m")
    assert found.outcome == outcome, found.says


def test_an_end_lost_at_a_near_tie_refuses_no_file():
    found = compare_stops("ends", [False], 20, "q8_0", near_ties=1)
    assert found.outcome == "close"
    assert "1 of the others are near ties" in found.says
    flat, other = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.4, 0.5, 0.1]).log()
    assert is_near_tie(flat, other, 1)
    assert not is_near_tie(flat, torch.tensor([1e-9, 0.5, 0.5]).log(), 1)  # the file has lost the end token
    assert not is_near_tie(torch.tensor([0.9, 0.05, 0.05]).log(), other, 1)


def test_several_exports_ask_the_trained_model_once(tmp_path, monkeypatch):
    asked = []

    def counted(kind):
        return lambda *arguments: asked.append(kind.__name__) or kind(*arguments)

    monkeypatch.setattr("oribi.save.export.Trained", counted(Trained))
    monkeypatch.setattr("oribi.save.export.Signatures", counted(Signatures))
    tuned, rows = adapted(tiny_model(export_config("llama", num_hidden_layers=1))), AskedOnce(None)
    for name in ("a", "b"):
        report = save_merged(tuned, tmp_path / name, dtype="float32", held_out=rows)
        assert report.outcome == "equal"
    assert asked == ["Trained", "Signatures"]


class Stopping:
    """A trained model's answers, two of which end."""

    def __init__(self):
        tuned = adapted(tiny_model(export_config("llama")))
        tokenizer = byte_level_tokenizer()
        likely = Trained(tuned, rows_of(tokenizer, None, VOCAB), prompts_of(tokenizer, None, VOCAB))
        # tokens that stand in two answers are made the ones that end answers
        stop = likely.answers[0].tokens[5]
        self.trained = Trained(tuned, likely.rows, prompts_of(tokenizer, None, VOCAB), [stop])
        self.stop = stop


def test_a_file_without_the_end_token_is_different_in_any_format():
    case = Stopping()
    trained = case.trained
    assert any(answer.stopped for answer in trained.answers)
    logits = trained.evaluate(trained.pack, trained.keep).clone()
    same = {check.name: check for check in compare(trained, logits, "q2_k")}
    assert {check.outcome for check in same.values()} == {Outcome.EQUAL}
    logits[:, case.stop] = -100.0
    found = {check.name: check for check in compare(trained, logits, "q2_k")}
    assert found["ends of answers"].outcome == "different"
    assert "continues where the trained model ends its answer" in found["ends of answers"].line()


def test_of_held_out_rows_the_answers_are_compared_and_not_the_prompts():
    row = {"input_ids": list(range(20, 60)), "labels": [-100] * 30 + list(range(50, 60))}
    rows = rows_of(None, [row], VOCAB)
    places = (rows.targets() != -100).nonzero().flatten()
    assert places.tolist() == list(range(29, 39))
    assert prompts_of(None, [row], VOCAB) == [list(range(20, 50))]
    messages = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "on the mat"}]
    tokenizer = byte_level_tokenizer()
    rows, (prompt,) = (
        rows_of(tokenizer, [messages], VOCAB),
        prompts_of(tokenizer, [{"messages": messages}], VOCAB),
    )
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert (rows.targets() != -100).nonzero()[0].item() == len(prompt) - 1


@pytest.mark.parametrize("length", [600, 5000])
def test_prompts_longer_than_the_limit_are_compared_as_texts(length):
    row = {"input_ids": [5] * length, "labels": [-100] * (length - 2) + [5, 5]}
    assert (rows_of(None, [row] * 3, VOCAB).targets() != -100).any()
    assert all(0 < len(prompt) <= 512 for prompt in prompts_of(None, [row] * 3, VOCAB))


def test_a_different_file_is_kept_on_demand_but_never_called_ok(tmp_path):
    tuned = adapted(
        tiny_model(export_config("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2))
    )
    report = save_gguf(tuned, tmp_path / "g", byte_level_tokenizer(), "q2_k", verify="report")["report"]
    assert (tmp_path / "g" / "model.Q2_K.gguf").is_file()
    assert not report.passed
    assert report.outcome == "different"
    assert "**different**" in (tmp_path / "g" / "README.md").read_text()
    with pytest.raises(ConfigError, match="verify = 'maybe'"):
        save_merged(tuned, tmp_path / "m", verify="maybe")


def test_a_trained_model_that_cannot_be_asked_is_written_all_the_same(tmp_path, monkeypatch):
    def no_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("oribi.save.export.Trained", no_memory)
    tuned = adapted(tiny_model(export_config("llama", num_hidden_layers=1)))
    report = save_merged(tuned, tmp_path / "m", byte_level_tokenizer())
    assert (tmp_path / "m" / "model.safetensors").is_file()
    assert [str(check.outcome) for check in report.checks] == ["not run"]
    assert "out of memory" in report.checks[0].says
    assert report.verdict == "not run"


def test_a_check_without_memory_is_not_run_and_a_broken_file_is_different(tmp_path, monkeypatch):
    tuned = adapted(tiny_model(export_config("llama", num_hidden_layers=1)))

    def fail(error):
        def raise_it(*_, **__):
            raise error

        return raise_it

    monkeypatch.setattr("oribi.save.merged.Nf4Source", fail(MemoryError("no memory")))
    report = save_merged(tuned, tmp_path / "m", byte_level_tokenizer(), dtype="float32")
    assert report.verdict == "equal (1 check not run)"
    monkeypatch.setattr("oribi.save.merged.Nf4Source", fail(KeyError("model.norm.weight")))
    with pytest.raises(
        ExportError, match="different  weights read back: it cannot be read back .*model.norm.weight"
    ):
        save_merged(tuned, tmp_path / "n", byte_level_tokenizer(), dtype="float32")


def test_of_several_quantisations_only_those_that_differ_are_set_aside(tmp_path):
    tuned = adapted(
        tiny_model(export_config("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=2))
    )
    folder, aside = tmp_path / "g", tmp_path / "g.rejected"
    with pytest.raises(ExportError) as error:
        save_gguf(tuned, folder, byte_level_tokenizer(), ["q2_k", "q8_0"])
    says = str(error.value)
    assert (
        f"model.Q2_K.gguf: not what was trained, and set aside in {aside}; in place: model.Q8_0.gguf" in says
    )
    assert "q8_0:" not in says
    assert sorted(path.name for path in folder.iterdir()) == [
        "Modelfile", "README.md", "export_report.json", "model.Q8_0.gguf", "probes.json",
    ]  # fmt: skip
    assert "FROM ./model.Q8_0.gguf" in (folder / "Modelfile").read_text()
    report = json.loads((folder / "export_report.json").read_text())
    assert report["passed"]
    assert list(report["files"]) == ["model.Q8_0.gguf"]
    assert {check["name"].split(":")[0] for check in report["checks"]} == {"q8_0"}
    assert "set aside in g.rejected: model.Q2_K.gguf" in " ".join(report["notes"])
    refused = json.loads((aside / "export_report.json").read_text())
    assert not refused["passed"]
    assert list(refused["files"]) == ["model.Q2_K.gguf"]
    assert {check["name"].split(":")[0] for check in refused["checks"]} == {"q2_k"}


def test_of_an_adapter_in_several_types_only_those_that_differ_are_set_aside(tmp_path):
    tuned = adapted(tiny_model(export_config("llama", num_hidden_layers=1)), scale=1e-9)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-9)  # float16 has no such numbers
    with pytest.raises(ExportError, match="F16.gguf: not what was trained.*in place: .*F32.gguf"):
        save_gguf_adapter(tuned, tmp_path / "a", ["f16", "f32"])
    assert [path.name for path in (tmp_path / "a").glob("*.gguf")] == ["model-lora.F32.gguf"]
    assert [path.name for path in (tmp_path / "a.rejected").glob("*.gguf")] == ["model-lora.F16.gguf"]


def test_what_a_report_prints_of_foreign_texts_does_not_command_the_terminal(capsys):
    check = Check("ids \x1b[2J", Outcome.DIFFERENT, "other ids: \x1b]0;title\x07", {})
    ExportReport("m", "gguf", "", {}, "rows \x1b[1m", [check], ["note \x9b31m"]).show()
    printed = capsys.readouterr().out
    assert not set(printed) & {"\x1b", "\x07", "\x9b"}
    assert r"\x1b]0;title" in printed
