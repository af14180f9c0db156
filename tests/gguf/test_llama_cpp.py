"""llama.cpp is asked in a process of its own: where it cannot be, a check is not run, and neither model nor export is lost."""

import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest

import oribi.gguf.llama_cpp as llama_cpp
from oribi.chat.named_templates import get_chat_template
from oribi.errors import ExportError
from oribi.gguf import llama_cpp_process
from oribi.gguf.llama_cpp import LlamaCpp, LlamaCppUnavailable
from oribi.save import verify_gguf
from oribi.save.gguf import save_gguf
from tests.save.tiny_export import TEMPLATE, adapted, byte_level_tokenizer, export_config, tiny_model

pytest.importorskip("xllamacpp", reason="llama.cpp is the judge")


@pytest.fixture(scope="module")
def tuned():
    return adapted(tiny_model(export_config("llama", num_hidden_layers=2)))


@pytest.fixture(scope="module")
def file(tuned, tmp_path_factory):
    folder = tmp_path_factory.mktemp("file")
    return save_gguf(tuned, folder, byte_level_tokenizer(), "f32", verify=False)["gguf_files"][0]


def crash(peer, *_, **__):
    peer._process.send_signal(signal.SIGSEGV)
    return peer._post("/tokenize", {"content": "x"})


@pytest.mark.parametrize(
    ("step", "change", "words"),
    [
        ("tokenize", crash, "process ended with signal 11"),
        ("generate", crash, "process ended with signal 11"),
        ("_post", lambda *_: {"unknown": 1}, "in an unknown form"),
        ("_post", lambda *_: None, "in an unknown form"),
        ("_post", lambda *_: [], "in an unknown form"),
    ],
)
def test_llama_cpp_that_fails_is_a_check_not_run_and_the_export_stays(
    step, change, words, tuned, tmp_path, monkeypatch
):
    monkeypatch.setattr(LlamaCpp, step, change)
    report = save_gguf(tuned, tmp_path / "g", byte_level_tokenizer(), "f32")["report"]
    not_run = [check for check in report.checks if check.outcome == "not run"]
    assert len(not_run) == 1
    assert words in not_run[0].says
    assert report.passed
    assert "not run" in report.verdict
    assert (tmp_path / "g" / "model.F32.gguf").is_file()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import sys; sys.exit(3)", "ended with exit code 3"),
        ("import os; os.abort()", "ended with signal 6"),
        ("import sys; sys.stdin.readline(); print('{\"unavailable\": \"OSError: no loopback\"}')", "no loopback"),
        ("import sys; sys.stdin.readline(); raise ImportError('libgomp')", "libgomp"),
        ("import time; time.sleep(60)", "no answer within"),
    ],
)  # fmt: skip
def test_a_process_that_does_not_come_up_is_unavailable(source, words, file, tmp_path, monkeypatch):
    script = tmp_path / "child.py"
    script.write_text(source)
    monkeypatch.setattr(llama_cpp_process, "__file__", str(script))
    monkeypatch.setattr(llama_cpp, "_LOAD_SECONDS", 3 if "sleep" in source else 60)
    with pytest.raises(LlamaCppUnavailable, match=words):
        LlamaCpp(file)


def test_a_blocked_loopback_is_unavailable(file, tmp_path, monkeypatch):
    source = Path(llama_cpp_process.__file__).read_text()
    blocked = source.replace(
        'probe.bind(("127.0.0.1", 0))', 'raise PermissionError(1, "Operation not permitted")'
    )
    assert blocked != source
    (tmp_path / "child.py").write_text(blocked)
    monkeypatch.setattr(llama_cpp_process, "__file__", str(tmp_path / "child.py"))
    with pytest.raises(LlamaCppUnavailable, match="Operation not permitted"):
        LlamaCpp(file)


def test_without_xllamacpp_the_checks_are_not_run(tuned, tmp_path, monkeypatch):
    monkeypatch.setattr(llama_cpp, "is_installed", lambda: False)
    report = save_gguf(tuned, tmp_path, byte_level_tokenizer(), "f32")["report"]
    assert "not run" in report.verdict
    assert "xllamacpp is not installed" in report.checks[-1].line()


def test_a_file_that_is_damaged_is_different_and_not_unavailable(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ExportError, match="llama.cpp does not load x.gguf") as raised:
        LlamaCpp(tmp_path / "x.gguf")
    assert not isinstance(raised.value, LlamaCppUnavailable)


def test_the_server_takes_no_request_without_its_key_and_ends_with_the_block(file):
    listening = "import sys; print([c.laddr for c in __import__('psutil').Process(int(sys.argv[1])).net_connections()])"
    with LlamaCpp(file) as peer:
        process = peer._process
        assert peer.tokenize("the") == byte_level_tokenizer()("the", add_special_tokens=False)["input_ids"]
        found = subprocess.run(
            [sys.executable, "-c", listening, str(process.pid)], capture_output=True, text=True
        )
        port = int(re.search(r"ip='127\.0\.0\.1', port=(\d+)", found.stdout)[1])
        assert "0.0.0.0" not in found.stdout
        request = urllib.request.Request(f"http://127.0.0.1:{port}/tokenize", b'{"content": "x"}')
        with pytest.raises(urllib.error.HTTPError, match="401"):
            urllib.request.urlopen(request, timeout=10)
    assert process.poll() is not None


DATED = {
    "a fixed date": "{% if not date_string is defined %}{% set date_string = '26 Jul 2024' %}{% endif %}Today {{ date_string }}\n",
    "strftime_now": "Current date: {{ strftime_now('%Y-%m-%d') }}\n",
    "guarded strftime_now": "{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}{% else %}{% set d = '1' %}{% endif %}{{ d }}\n",
    "datetime": "{% if datetime is defined %}{{ datetime }}{% else %}Jan 01 2020{% endif %}\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", DATED)
def test_both_sides_of_a_dated_template_have_one_date(kind, tuned, tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = DATED[kind] + TEMPLATE
    checks = {c.name: c for c in save_gguf(tuned, tmp_path, tokenizer, "f32")["report"].checks}
    found = checks["f32: tokenizer in llama.cpp"]
    assert found.outcome == "equal"
    assert ("in place of the template's fixed one" in found.says) == (kind in ("a fixed date", "datetime"))


def test_the_llama_3_1_template_with_its_fixed_date_passes(tuned, tmp_path):
    tokenizer = get_chat_template(byte_level_tokenizer(), "llama-3.1")
    report = save_gguf(tuned, tmp_path, tokenizer, "f32")["report"]
    found = next(c for c in report.checks if c.name == "f32: tokenizer in llama.cpp")
    assert found.outcome == "equal", found.says


def test_a_clock_that_moves_between_the_two_is_no_difference(tuned, file, monkeypatch):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{{ date_string }}\n" + TEMPLATE
    days = iter(["29 Nov 2026", "30 Nov 2026", "30 Nov 2026"])

    class Midnight:
        def render(self, messages, **values):
            return (
                f"30 Nov 2026\n<|im_start|>user\n{messages[0]['content']}<|im_end|>\n<|im_start|>assistant\n"
            )

        def tokenize(self, text, **_):
            return tokenizer(text, add_special_tokens=False)["input_ids"]

    def rendered_ids(*arguments, **values):
        values["date_string"] = next(days)
        return real(*arguments, **values)

    real = verify_gguf.rendered_ids
    monkeypatch.setattr(verify_gguf, "rendered_ids", rendered_ids)
    same, _ = verify_gguf._same_prompt(Midnight(), tokenizer, [{"role": "user", "content": "hi"}])
    assert same


def test_an_end_token_that_the_file_does_not_mark_is_different(tuned, tmp_path, monkeypatch):
    """Tested on what is made to end, where random weights end nothing."""
    monkeypatch.setattr(verify_gguf, "turn_end_id", lambda tokenizer: 40)
    with pytest.raises(ExportError, match="end token in llama.cpp: .* does not end an answer"):
        save_gguf(tuned, tmp_path / "g", byte_level_tokenizer(), "f32")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages['x'] + 1 }}",
        "{{ 1 // 0 }}",
        "{{ raise_exception('no') }}",
        "{% for m in 5 %}{% endfor %}",
    ],
)
def test_a_template_that_fails_is_exported_and_said(template, tuned, tmp_path):
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = template
    report = save_gguf(tuned, tmp_path, tokenizer, "f32")["report"]
    assert report.passed
    assert "the chat template fails on a plain conversation and is left out of the files" in report.notes
    assert any(note.startswith("no Modelfile for Ollama was written: ") for note in report.notes)
    assert "without a chat template that renders" in next(
        c.says for c in report.checks if "in llama.cpp" in c.name
    )


@pytest.mark.parametrize(
    ("tokens", "given", "places"),
    [
        ([5, 6, 7], [5, 6, 7], [5, 6, 7]),
        ([5, 9, 6, 7], [5, 6, 7], [5, None, 6, 7]),  # 9 ends within a character
        ([5, 6, 6, 7], [5, 6, 7], [5, None, None, 7]),  # which 6 was withheld cannot be told
        ([8, 8, 8], [], [None] * 3),
    ],
)
def test_probabilities_are_taken_for_a_place_only_where_it_is_certain(tokens, given, places):
    found = [{"id": one, "top_logprobs": [{"id": one, "logprob": -0.5}]} for one in given]
    answer = llama_cpp._read_answer({"tokens": tokens, "completion_probabilities": found})
    assert [None if one is None else next(iter(one)) for one in answer.logprobs] == places
