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
        ("from unsloth import *\nFastModel, unsloth_train", "from oribi import FastModel, unsloth_train\nFastModel, unsloth_train"),
        ("from trl import *  # all\nSFTTrainer, DPOConfig", "from trl import *; from oribi.trl import DPOConfig, SFTTrainer  # all\nSFTTrainer, DPOConfig"),
        ("from transformers import (\n    AutoModel,\n    Trainer as T,\n)", "from transformers import (\n    AutoModel,\n    Trainer as T,\n); from oribi.trl import Trainer as T"),
        ("import transformers as tf\ntf.TrainingArguments()", "import transformers as tf, oribi.trl\noribi.trl.TrainingArguments()"),
        ("m, p = FastModel.from_pretrained('x')\np.tokenizer.eos_token", "m, p = FastModel.from_pretrained('x')\np.eos_token"),
        ("import vllm\nvllm.SamplingParams", "import oribi.compat.reinforcement\noribi.compat.reinforcement.SamplingParams"),
        ("u = importlib.import_module('unsloth')", "u = importlib.import_module('oribi')"),
        ("x = '\f'\nfrom unsloth import FastModel", "x = '\f'\nfrom oribi import FastModel"),
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
        ("m = dict(tokenize=True)\nx = t.apply_chat_template(c, **m)\nlen(x)", "m = dict(tokenize=True)\nx = t.apply_chat_template(c, **m, return_dict=False)\nlen(x)"),
        ("f = t.apply_chat_template\nlen(f(m))", "f = t.apply_chat_template\nlen(f(m, return_dict=False))"),
        ("x = t.apply_chat_template(m)\ng(x)\nx = t(y)\ng(**x)", "x = t.apply_chat_template(m, return_dict=False)\ng(x)\nx = t(y)\ng(**x)"),
        ("def f():\n    return t.apply_chat_template(m)\nlen(f())", "def f():\n    return t.apply_chat_template(m, return_dict=False)\nlen(f())"),
        ("a.b(c).tokenizer.apply_chat_template(\n    m\n)", "a.b(c).tokenizer.apply_chat_template(\n    m, return_dict=False\n)"),
    ],
)  # fmt: skip
def test_a_chat_template_gives_ids_again(convert, before, after):
    assert convert(before).text == after


@pytest.mark.parametrize(
    "line",
    [
        "x = p.apply_chat_template(m{})\np([x], return_tensors='pt')",
        "p(p.apply_chat_template(m, add_generation_prompt=True{}))",
        "x = [p.apply_chat_template(c{}) for c in m]\ny = {'text': x}",
        "p.apply_chat_template(m{}).removeprefix('<bos>')",
        "p.apply_chat_template(m{}) + tokenizer.eos_token",
        "def f():\n    return p.apply_chat_template(m{})\np(f())",
    ],
)
def test_a_processors_text_stays_text(convert, line):
    assert convert(line.replace("{}", "")).text == line.replace("{}", ", tokenize=False")


@pytest.mark.parametrize(
    "line",
    [
        "t.apply_chat_template(m, tokenize=False)",
        "def f():\n    return t.apply_chat_template(m)\ng(**f())",
        "x = t.apply_chat_template(m)\nx = x.to('cuda')\ng(**x)",
        "m = {'tokenize': False}\nt.apply_chat_template(c, **m)",
        "t.apply_chat_template(m, return_dict=True)",
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
        "    fast_inference=True, whisper_task='x', qat_scheme=None)\n"
        "m.save_pretrained_torchao('y')\n"
        "if False: m.save_pretrained_torchao('y')\n"
    )
    assert [re.match(r"line (\d): (\w+)", line).groups() for line in found.ignored] == [
        ("2", "UNSLOTH_RETURN_LOGITS"), ("3", "PatchDPOTrainer"), ("5", "fast_inference"), ("7", "save_pretrained_torchao"),
    ]  # fmt: skip
    assert [re.match(r"line (\d): (\w+)", line).groups() for line in found.refused] == [
        ("3", "UnslothVisionDataCollator"), ("3", "Nothing"), ("5", "whisper_task"), ("6", "save_pretrained_torchao"),
    ]  # fmt: skip


@pytest.mark.parametrize("quote", ["'", '"""'])
def test_a_call_within_a_string_is_changed_in_its_place_or_refused(convert, quote):
    before = f"x = f{quote}é {{len(t.apply_chat_template(m))}}{quote}\n"
    lines = before if quote == "'" else before.replace("é", "é\n\n  é")
    found = convert(lines)
    if found.changed:
        assert found.text == lines.replace("template(m)", "template(m, return_dict=False)")
    else:
        assert (found.text, len(found.refused)) == (lines, 1)


def test_what_cannot_be_seen_of_a_call_is_said(convert):
    found = convert("t.apply_chat_template(m, **options)\nmap(t.apply_chat_template, rows)\n")
    assert found.changed == []
    assert "line 1: apply_chat_template stays: what its ** holds is not seen" in found.ignored[0]
    assert "line 2: apply_chat_template is passed on uncalled" in found.refused[0]


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        ("SFTConfig(learning_rat=1)", "refused", "learning_rat; did you mean learning_rate"),
        ("SFTTrainer(m, max_seq_length=3, packing=True, learning_rate=1)", None, ""),
        ("SFTTrainer(m, infinite=True)", "ignored", "infinite: max_steps bounds the training"),
        ("UnslothTrainingArguments(embedding_learning_rate=1e-5, warmup_ratio=0.1)", None, ""),
        (
            "UnslothTrainingArguments(use_ipex=True, logging_dir=None)",
            "ignored",
            "use_ipex: the device is found",
        ),
        ("FastModel.from_pretrained('x', 2048, load_in_4bits=True)", "refused", "did you mean load_in_4bit"),
        ("FastModel.get_peft_model(m, r=8, finetune_mlp_modules=True, use_dora=True)", None, ""),
        ("FastModel.get_peft_model(m, rank=8)", "refused", "get_peft_model: unknown keyword rank"),
        ("other(learning_rat=1)", None, ""),
        (
            "m.save_pretrained_merged('x', t, save_method='mxfp4')",
            "refused",
            "oribi writes merged_16bit, merged_4bit",
        ),
        ("m.save_pretrained_merged('x', t, save_method='merged_4bit')", None, ""),
    ],
)
def test_keywords_are_checked_before_the_script_runs(convert, call, kind, words):
    found = convert("from unsloth import *\nfrom trl import SFTConfig, SFTTrainer\n" + call)
    said = [("refused", line) for line in found.refused] + [("ignored", line) for line in found.ignored]
    said = [(kind, line) for kind, line in said if line.startswith("line 3: ")]
    assert [kind for kind, _ in said] == ([kind] if kind else [])
    assert all(words in line for _, line in said)


def test_what_never_runs_or_is_caught_is_an_aside(convert):
    found = convert(
        "try:\n    from unsloth.kernels import nothing\nexcept ImportError:\n    pass\n"
        "if False:\n    m.save_pretrained_torchao('y')\n"
    )
    assert found.refused == []
    assert found.ignored[0].endswith("(the script has another way for that)")
    assert found.ignored[1].endswith("(this line never runs)")


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
    cells[1][1][1:3] = ["pass  # !pip install unsloth \\\n", "    # trl\n"]
    cells[3][1][1] = "from oribi import FastModel # ä\n"
    cells[4] = ("code", "from oribi.trl import SFTTrainer\nx = 1")
    assert found.text == notebook(*cells, **dump)
    assert found.changed[0].startswith(
        "cell 2, line 2: pip install of unsloth, trl switched off: oribi runs with"
    )
    assert found.changed[1] == "cell 4, line 2: from unsloth -> from oribi"
    assert found.refused == ["cell 3, line 1: a cell in another language imports unsloth, and stays as it is"]


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


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("!pip install unsloth vllm", "pass  # !pip install unsloth vllm"),
        ("!pip install -U langid unsloth", "!pip install -U langid"),
        ("%pip install langid", "%pip install langid"),
        ("!pip install \"datasets==4.3.0\" 'transformers>=4' hf_transfer {xformers}", "!pip install hf_transfer"),
        ("if x:\n    !uv pip install -q git+https://a.b/c/transformers.git@main", "if x:\n    pass  # !uv pip install -q git+https://a.b/c/transformers.git@main"),
        ("!pip install --index-url https://a.b/torch torch && ls", "pass  # !pip install --index-url https://a.b/torch torch && ls"),
        ("!pip install --no-deps \\\n    trl \\\n    langid", "!pip install --no-deps \\\n \\\n    langid"),
        ("!pip uninstall -y unsloth other", "pass  # !pip uninstall -y unsloth other"),
        ("%%bash\npip install trl\nls", "%%bash\ntrue  # pip install trl\nls"),
    ],
)  # fmt: skip
def test_installations_leave_what_oribi_runs_on(convert, before, after):
    found = convert(notebook(("code", before)), "book.ipynb")
    assert json.loads(found.text)["cells"][0]["source"] == after
    assert bool(found.changed) == (before != after)


@pytest.mark.parametrize(
    "line", ["?model", "model.forward??", "%time f(x)", "a = !ls", "!!ls", "%%time", '!echo "it\'s"']
)
def test_lines_for_ipython_are_passed_over(convert, line):
    lines = [f"{line}\n", "from unsloth import FastModel\n", 'x = """\n', "%not a magic\n", '"""']
    found = convert(notebook(("code", lines)), "book.ipynb")
    assert found.refused == []
    assert "".join(json.loads(found.text)["cells"][0]["source"]) == "".join(lines).replace("unsloth", "oribi")


def test_a_cell_that_writes_a_script_is_converted(convert):
    found = convert(notebook(("code", "%%writefile a.py\nimport unsloth")), "book.ipynb")
    assert json.loads(found.text)["cells"][0]["source"] == "%%writefile a.py\nimport oribi"


def test_an_edit_within_strings_that_are_no_lines(convert):
    found = convert(notebook(("code", ["from uns", "loth import FastModel\nx = 1\n", "", "y"])), "book.ipynb")
    assert "".join(json.loads(found.text)["cells"][0]["source"]) == "from oribi import FastModel\nx = 1\ny"


def test_the_third_version_of_the_format(convert):
    cell = {"cell_type": "code", "input": ["import unsloth\n", "x"], "outputs": []}
    text = json.dumps(
        {"worksheets": [{"cells": [{"cell_type": "heading", "source": "a"}, cell]}], "nbformat": 3}
    )
    found = convert(text, "book.ipynb")
    assert found.text == text.replace("unsloth", "oribi")
    assert found.changed == ["cell 2, line 1: import unsloth -> import oribi"]


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8-sig", "utf-8"])
def test_the_encoding_of_a_script_stays(tmp_path, encoding):
    text = f"# -*- coding: {encoding} -*-\n# é\nimport unsloth  # é\n"
    (tmp_path / "a.py").write_bytes(text.encode(encoding))
    found = convert_script(tmp_path / "a.py")
    assert found.text.encode(found.encoding) == text.replace("unsloth", "oribi").encode(encoding)
