"""`oribi convert` on scripts and notebooks: what changes, what stays byte for byte, and what is said."""

import json
import re

import pytest

import oribi
from oribi.compat.names import NAMES
from oribi.compat.script import convert_script
from oribi.errors import ConfigError


@pytest.fixture
def convert(tmp_path):
    def convert_text(text: str, name: str = "script.py"):
        (tmp_path / name).write_bytes(text.encode())
        return convert_script(tmp_path / name)

    return convert_text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("from unsloth import FastLanguageModel  # é", "from oribi import FastLanguageModel  # é"),
        ("from unsloth.chat_templates import get_chat_template", "from oribi import get_chat_template"),
        ("from unsloth import (\n    FastModel,\n    is_bf16_supported,\n)", "from oribi import (\n    FastModel,\n    is_bf16_supported,\n)"),
        ("import unsloth", "import oribi"),
        ("import unsloth\nunsloth.FastModel", "import oribi as unsloth\nunsloth.FastModel"),
        ("import unsloth as u, os", "import oribi as u, os"),
        ("import unsloth.chat_templates\nunsloth.x", "import oribi.chat_templates, oribi as unsloth\nunsloth.x"),
        ("import trl", "import oribi.trl as trl"),
        ("if x:\n\tfrom trl import SFTTrainer, SFTConfig", "if x:\n\tfrom oribi.trl import SFTTrainer, SFTConfig"),
        ("from trl.experimental.orpo import ORPOConfig", "from oribi.trl import ORPOConfig"),
        ("from trl.models.utils import something", "from trl.models.utils import something"),
        ("from transformers import TrainingArguments", "from oribi.trl import TrainingArguments"),
        ("from transformers import TextStreamer", "from transformers import TextStreamer"),
        ("from vllm import SamplingParams", "from oribi.compat.reinforcement import SamplingParams"),
        ("x = 'from unsloth import y'  # import unsloth", "x = 'from unsloth import y'  # import unsloth"),
    ],
)  # fmt: skip
def test_imports(convert, before, after):
    for end in ("\n", "\r\n"):
        assert convert(before.replace("\n", end) + end).text == after.replace("\n", end) + end


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("n = len(t.apply_chat_template(m))", "n = len(t.apply_chat_template(m, return_dict=False))"),
        ("x = t.apply_chat_template(m, tokenize=True,)\nf(x)", "x = t.apply_chat_template(m, tokenize=True, return_dict=False)\nf(x)"),
        ("x = t.apply_chat_template(\n    m,  # all (of) it\n    return_tensors='pt',\n).to('cuda')\ng(input_ids=x)",
         "x = t.apply_chat_template(\n    m,  # all (of) it\n    return_tensors='pt',\nreturn_dict=False).to('cuda')\ng(input_ids=x)"),
        ("f(lambda r: t.apply_chat_template((r)))", "f(lambda r: t.apply_chat_template((r), return_dict=False))"),
        ("a.b(c).tokenizer.apply_chat_template(\n    m\n)", "a.b(c).tokenizer.apply_chat_template(\n    m, return_dict=False\n)"),
    ],
)  # fmt: skip
def test_a_chat_template_gives_ids_again(convert, before, after):
    assert convert(before).text == after


@pytest.mark.parametrize(
    "line",
    [
        "t.apply_chat_template(m, tokenize=False)",
        "t.apply_chat_template(m, return_dict=True)",
        "t.apply_chat_template(m, **options)",
        "g(**t.apply_chat_template(m).to('cuda'))",
        "x = t.apply_chat_template(m).to('cuda')\ng(**x)",
        "x = t.apply_chat_template(m)\ny = x['input_ids']",
        "t.apply_chat_template(m)['input_ids']",
        "apply_chat_template(rows, tokenizer=t)",
    ],
)
def test_a_chat_template_that_is_used_otherwise_stays(convert, line):
    found = convert(line)
    assert (found.text, found.changed) == (line, [])


def test_what_is_ignored_and_refused_is_said_with_its_line(convert):
    found = convert(
        "import os\n"
        "os.environ['UNSLOTH_RETURN_LOGITS'] = '1'\n"
        "from unsloth import PatchDPOTrainer, UnslothVisionDataCollator, Nothing\n"
        "m = FastLanguageModel.from_pretrained('x',\n"
        "    fast_inference=True, load_in_fp8=True, qat_scheme=None)\n"
        "m.save_pretrained_torchao('y')\n"
        "if False: m.save_pretrained_torchao('y')\n"
    )
    assert [re.match(r"line (\d): (\w+)", line).groups() for line in found.ignored] == [
        ("2", "UNSLOTH_RETURN_LOGITS"), ("3", "PatchDPOTrainer"), ("5", "fast_inference"), ("7", "save_pretrained_torchao"),
    ]  # fmt: skip
    assert [re.match(r"line (\d): (\w+)", line).groups() for line in found.refused] == [
        ("3", "UnslothVisionDataCollator"), ("3", "Nothing"), ("5", "load_in_fp8"), ("6", "save_pretrained_torchao"),
    ]  # fmt: skip


def notebook(*cells, **dump):
    book = {
        "cells": [
            {"cell_type": kind, "metadata": {}, "source": source, "outputs": []} for kind, source in cells
        ],
        "nbformat": 4,
    }
    return json.dumps(book, **dump)


@pytest.mark.parametrize("dump", [{"indent": 1, "ensure_ascii": False}, {}, {"indent": 4}])
def test_a_notebook_changes_in_its_cells_only(convert, dump):
    cells = [
        ("markdown", ["`from unsloth import FastModel` ä\n"]),
        ("code", ["%%capture\n", "!pip install unsloth \\\n", "    trl\n", "%env X=1"]),
        ("code", ["%%bash\n", "from unsloth import FastModel"]),
        ("code", ["x = 'ä'\n", "from unsloth import FastModel # ä\n", "files = !ls"]),
        ("code", "from trl import SFTTrainer\nx = 1"),
    ]
    found = convert(notebook(*cells, **dump), "book.ipynb")
    cells[3][1][1] = "from oribi import FastModel # ä\n"
    cells[4] = ("code", "from oribi.trl import SFTTrainer\nx = 1")
    assert found.text == notebook(*cells, **dump)
    assert found.ignored == ["cell 2, line 2: installs unsloth, which is not needed"]
    assert found.changed[0] == "cell 4, line 2: from unsloth -> from oribi"
    assert found.refused == []


def test_a_cell_that_is_no_python_is_named_and_stays(convert):
    text = notebook(("code", ["from unsloth import FastModel\n", "x = ="]))
    found = convert(text, "book.ipynb")
    assert found.text == text
    assert found.refused[0].startswith("cell 1, line 2: no Python")


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.py", "x = =", "line 1: no Python"),
        ("a.ipynb", "{}", "no notebook"),
        ("a.ipynb", "{", "no notebook"),
    ],
)
def test_a_file_that_is_neither_is_an_error(convert, name, text, words):
    with pytest.raises(ConfigError, match=words):
        convert(text, name)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_every_name_of_unsloths_is_there_or_says_why_not(name):
    if NAMES[name].home:
        assert getattr(oribi, name) is not None
    else:
        with pytest.raises(ImportError, match=f"oribi has no {name}: "):
            getattr(oribi, name)


@pytest.mark.parametrize("place", ["chat_templates", "trainer", "dataprep"])
def test_places_of_unsloths_modules(place):
    module = getattr(oribi, place)
    assert module.get_chat_template is oribi.get_chat_template
