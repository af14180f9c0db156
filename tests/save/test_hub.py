"""Pushing uploads the finished, checked folder; keywords of other libraries' calls are honoured, refused or harmless."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from oribi.errors import ConfigError, ExportError
from oribi.save import print_quantization_methods, push_gguf, push_merged, save_gguf, save_merged
from tests.save.tiny_export import adapted, byte_level_tokenizer, export_config, tiny_model


class FakeHub:
    """Takes what would be uploaded; no network."""

    def __init__(self):
        self.created, self.commits = [], []

    def create_repo(self, repo_id, **keywords):
        self.created.append((repo_id, keywords))
        return SimpleNamespace(repo_id=repo_id if "/" in repo_id else f"me/{repo_id}")

    def upload_folder(self, *, repo_id, folder_path, **keywords):
        names = sorted(path.name for path in Path(folder_path).iterdir())
        self.card = (Path(folder_path) / "README.md").read_text()
        self.commits.append({"repo_id": repo_id, "names": names, **keywords})
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1")


@pytest.fixture
def tuned():
    return adapted(tiny_model(export_config("llama")))


def test_a_merged_model_is_pushed_whole(tuned):
    hub = FakeHub()
    url = push_merged(
        tuned, "me/model", byte_level_tokenizer(), save_method="merged_16bit", token="", private=True,
        commit_message="First", create_pr=True, tags=["cron"], api=hub,
    )  # fmt: skip
    assert url == "https://hub/me/model/commit/1"
    assert hub.created == [("me/model", {"private": True, "exist_ok": True})]
    (commit,) = hub.commits
    assert commit["commit_message"] == "First"
    assert commit["create_pr"] is True
    assert "tags:\n- oribi\n- cron\n---" in hub.card
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "export_report.json"} <= set(
        commit["names"]
    )


def test_gguf_files_are_pushed_with_their_modelfile(tuned):
    hub = FakeHub()
    push_gguf(tuned, "model", byte_level_tokenizer(), ["q8_0", "f16"], api=hub, verify=False)
    (commit,) = hub.commits
    assert commit["repo_id"] == "me/model"
    assert commit["commit_message"] == "Trained with oribi"
    assert commit["names"] == [
        "Modelfile",
        "README.md",
        "export_report.json",
        "model.F16.gguf",
        "model.Q8_0.gguf",
    ]


def test_a_failed_check_uploads_nothing():
    hub = FakeHub()
    wide = adapted(tiny_model(export_config("llama", hidden_size=256, intermediate_size=512)))
    with pytest.raises(ExportError, match="q2_k"):
        push_gguf(wide, "me/model", byte_level_tokenizer(), "q2_k", api=hub)
    assert not hub.created
    assert not hub.commits


def test_keywords_of_other_libraries_run(tuned, tmp_path):
    save_merged(
        tuned, tmp_path / "m", byte_level_tokenizer(), save_method="merged_16bit", push_to_hub=False, token=None,
        is_main_process=True, state_dict=None, max_shard_size="5GB", safe_serialization=True, variant=None,
        save_peft_format=True, tags=None, temporary_location="_temporary", maximum_memory_usage=0.75, verify=False,
    )  # fmt: skip
    save_gguf(
        tuned, tmp_path / "g", byte_level_tokenizer(), quantization_method="Q8_0", first_conversion=None,
        maximum_memory_usage=0.85, imatrix_file=None, merge_is_disposable=True, verify=False,
    )  # fmt: skip
    assert (tmp_path / "g" / "model.Q8_0.gguf").exists()


def test_gguf_with_save_method_lora_writes_the_adapter(tuned, tmp_path):
    result = save_gguf(tuned, tmp_path / "g", byte_level_tokenizer(), "f16", save_method="lora")
    assert [Path(path).name for path in result["gguf_files"]] == ["model-lora.F16.gguf"]


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"push_to_hubb": True}, "no keyword 'push_to_hubb'; did you mean push_to_hub?"),
        ({"state_dict": {"a": 1}}, "state_dict = .* load the state into the model first"),
        ({"safe_serialization": False}, "oribi writes safetensors"),
        ({"variant": "fp16"}, "standard names"),
    ],
)
def test_keywords_that_would_change_the_result_are_refused(keywords, words, tuned, tmp_path):
    with pytest.raises(ConfigError, match=words):
        save_merged(tuned, tmp_path / "m", None, **keywords)


def test_an_importance_matrix_is_refused(tuned, tmp_path):
    with pytest.raises(ConfigError, match="without an importance matrix"):
        save_gguf(tuned, tmp_path / "g", byte_level_tokenizer(), "q4_k_m", imatrix_file="imatrix.dat")


def test_other_processes_write_nothing(tuned, tmp_path):
    assert save_merged(tuned, tmp_path / "m", None, is_main_process=False) is None
    assert save_gguf(tuned, tmp_path / "g", byte_level_tokenizer(), is_main_process=False) is None
    assert not list(tmp_path.iterdir())


def test_a_gguf_needs_a_tokenizer(tuned, tmp_path):
    with pytest.raises(ConfigError, match="give tokenizer="):
        save_gguf(tuned, tmp_path / "g")


def test_the_methods_are_listed(capsys):
    print_quantization_methods()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 18
    assert "q4_k_m   4.9 bits, recommended" in lines
