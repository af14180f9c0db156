"""GGUF files of tiny models, each written once per session."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """Returns an adapted tiny model and its GGUF file; both are shared by tests, which leave them as they are.

    Its arguments: `model_type`, `method`, whether the tokenizer is SentencePiece (`pieces`; "gemma4": as Gemma 4 has it), and changes of
    the config.
    """
    from oribi.save.gguf import save_gguf
    from tests.save import tiny_export as tiny

    made: dict[str, tuple] = {}

    def export(model_type: str = "llama", method: str = "f32", pieces: bool | str = False, **changes):
        key = repr((model_type, method, pieces, sorted(changes.items())))
        if key not in made:
            model = tiny.adapted(tiny.tiny_model(tiny.export_config(model_type, **changes)))
            tokenizer = tiny.sentencepiece_tokenizer() if pieces else tiny.byte_level_tokenizer()
            if pieces == "gemma4":
                tokenizer = tiny.gemma4_tokenizer()
            folder = tmp_path_factory.mktemp(model_type)
            made[key] = (
                model,
                Path(save_gguf(model, folder, tokenizer, method, verify=False)["gguf_files"][0]),
            )
        return made[key]

    return export
