"""Reward functions are found by file or module, and what is wrong with one is told with its row."""

import pytest

from oribi.config_file import read_run_config
from oribi.errors import ConfigError, TrainingError
from oribi.train.rewards import load_reward_functions

CODE = """
NUMBER = 3

def good(completions, answer):
    return [float(a == c) for a, c in zip(answer, completions)]

def raises(completions, answer, **kwargs):
    return [1 / len(c) for c in completions]

def few(completions, **kwargs):
    return [1.0]

def words(completions, **kwargs):
    return ["high"] * len(completions)

def silent(completions, **kwargs):
    return [None] * len(completions)

async def later(completions, **kwargs):
    return [2.0] * len(completions)
"""
ASKED = {
    "prompts": ["a", "b"], "completions": ["x", ""], "completion_ids": [[1], []], "answer": ["x", "y"],
    "trainer_state": None, "origin": ["rows.jsonl:1", "rows.jsonl:2"],
}  # fmt: skip


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rewards.py"
    path.write_text(CODE)
    return path


def load(file, name):
    (found,) = load_reward_functions([f"{file}:{name}"])
    return found


def test_a_function_gets_the_keywords_that_it_takes(file):
    assert load(file, "good")(**ASKED) == [1.0, 0.0]
    assert load(file, "silent")(**ASKED) == [None, None]
    assert load(file, "later")(**ASKED) == [2.0, 2.0]


def test_a_module_is_found_by_its_name():
    (found,) = load_reward_functions(["textwrap:dedent"])
    assert found.__name__ == "dedent"


def test_a_failure_names_line_and_row(file):
    with pytest.raises(
        TrainingError, match=r"raises failed in line 8: ZeroDivisionError.*rows.jsonl:2, prompt 'b'"
    ):
        load(file, "raises")(**ASKED)


def test_what_is_no_reward_is_told(file):
    with pytest.raises(TrainingError, match="few returned 1 rewards for 2 answers"):
        load(file, "few")(**ASKED)
    with pytest.raises(
        TrainingError, match="words returned 'high' for rows.jsonl:1.*a finite number, or None"
    ):
        load(file, "words")(**ASKED)


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("absent.py:f", "there is no file .*absent.py"),
        ("rewards.py:god", "has no god; did you mean good"),
        ("rewards.py:NUMBER", "NUMBER is a int, which cannot be called"),
        ("rewards.py", "must be file.py:function or module:function"),
        ("no_such_module:f", "cannot be imported: ModuleNotFoundError"),
        ("broken.py:f", "broken.py fails when it is run: NameError"),
    ],
)
def test_what_cannot_be_loaded_is_told_before_anything_else(source, told, file):
    (file.parent / "broken.py").write_text("undefined_name")
    where = f"{file.parent}/{source}" if ".py" in source else source
    with pytest.raises(ConfigError, match=told):
        load_reward_functions([where])


def test_a_path_counts_from_the_config_file(file):
    config = file.parent / "run.yaml"
    config.write_text("stage: grpo\nmodel: m\ndataset: d\nreward_funcs: rewards.py:good\n")
    assert read_run_config(config)[0].reward_funcs == [f"{file}:good"]


def test_the_fingerprint_follows_the_file(file):
    before = load(file, "good").fingerprint
    other = file.with_name("other.py")
    other.write_text(CODE + "\n# changed\n")
    assert load(other, "good").fingerprint != before
