"""The built wheel carries everything and trains in an environment of its own; versions agree; the image's steps are sound."""

import ast
import inspect
import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import import_module
from pathlib import Path

import pytest
import yaml

import oribi

ROOT = Path(__file__).parent.parent


def run(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    surroundings = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")
    }
    surroundings |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        list(map(str, words)), cwd=cwd, capture_output=True, text=True, timeout=600, env=surroundings
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel of this checkout, built as pip builds it; setuptools comes from the package registry."""
    folder = tmp_path_factory.mktemp("wheel")
    copied = folder / "source"
    copied.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE", "src"):
        assert run("cp", "-r", ROOT / name, copied).returncode == 0
    done = run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, copied)
    if done.returncode and re.search(r"No matching distribution found for setuptools", done.stderr):
        pytest.skip("setuptools cannot be fetched: there is no package registry")
    assert done.returncode == 0, done.stderr[-3000:]
    return next(folder.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_has_every_file_of_the_package(wheel):
    source = ROOT / "src" / "oribi"
    wanted = {
        f"oribi/{path.relative_to(source).as_posix()}"
        for path in source.rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not wanted - names
    assert {"oribi/py.typed", "oribi/chat/templates/chatml.jinja"} <= names
    assert not {name for name in names if name.startswith(("tests/", "docs/", "examples/"))}


@pytest.mark.slow
def test_the_installed_wheel_trains(wheel, tiny_folder, data_file, tmp_path):
    place = tmp_path / "env"
    venv.create(place, with_pip=False)
    python = place / "bin" / "python"
    packages = next(place.glob("lib/python*/site-packages"))
    done = run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    assert done.returncode == 0, done.stderr[-2000:]
    # what it depends on, after its own packages: large, and installed here already
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    done = run(python, "-c", "import oribi; print(oribi.__file__)", cwd=tmp_path)
    assert done.stdout.startswith(str(place)), done.stdout + done.stderr
    command = place / "bin" / "oribi"
    done = run(command, "--version", cwd=tmp_path)
    assert done.stdout == f"oribi {oribi.__version__}\n"
    done = run(command, "doctor", cwd=tmp_path)
    assert "No problems found." in done.stdout, done.stdout + done.stderr
    words = ["--model", tiny_folder, "--dataset", data_file, "--max_seq_length", "128", "--max_steps", "1"]
    words += [
        "--dtype",
        "float32",
        "--chat_template",
        "chatml",
        "--output_dir",
        "run",
        "--quantization_method",
        "f16",
    ]
    done = run(command, "train", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "report.html").is_file()
    assert list((tmp_path / "run" / "gguf").glob("*.gguf"))


def test_the_version_is_the_same_everywhere():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.search(r'^version = "(.*)"$', project, re.MULTILINE)[1] == oribi.__version__
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert str(citation["version"]) == oribi.__version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)


def test_type_checkers_see_the_names_that_there_are():
    tree = ast.parse((ROOT / "src" / "oribi" / "__init__.pyi").read_text(encoding="utf-8"))
    seen = {
        alias.name: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    del seen["Any"]
    assert set(seen) == set(oribi.__all__) - {"__version__"}
    for name, module in seen.items():
        assert getattr(import_module(module), name) is getattr(oribi, name), name
    (listed,) = [node.value for node in tree.body if isinstance(node, ast.Assign)]
    assert ast.literal_eval(listed) == oribi.__all__


def test_public_functions_say_their_types():
    for name in set(oribi.__all__) - {"__version__"}:
        thing = getattr(oribi, name)
        functions = [thing] if inspect.isfunction(thing) else [
            member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
            for own, member in vars(thing).items()
            if not own.startswith("_") and isinstance(member, (staticmethod, classmethod, type(dockerfile)))
        ]  # fmt: skip
        for function in functions:
            untyped = [
                one.name
                for one in inspect.signature(function).parameters.values()
                if one.annotation is one.empty and one.name not in ("self", "cls")
            ]
            assert not untyped, f"{name}: {function.__qualname__}: {untyped}"
            assert inspect.signature(function).return_annotation is not inspect.Signature.empty, (
                f"{name}: {function}"
            )


def test_issue_forms_ask_for_the_doctor():
    folder = ROOT / ".github" / "ISSUE_TEMPLATE"
    forms = [path for path in folder.glob("*.yml") if path.name != "config.yml"]
    assert len(forms) == 2
    for path in forms:
        form = yaml.safe_load(path.read_text(encoding="utf-8"))
        required = [
            part["attributes"]["label"]
            for part in form["body"]
            if part.get("validations", {}).get("required")
        ]
        assert any("oribi doctor" in label for label in required), path.name


def dockerfile() -> list[tuple[str, str]]:
    """(instruction, rest) of each step."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines]


def test_the_dockerfile_follows_hadolints_rules():
    steps = dockerfile()
    assert steps[0][0] == "FROM"
    assert re.search(r":[\w.-]*\d", steps[0][1]), "DL3006, DL3007: the base has a version"
    for instruction, rest in steps:
        assert instruction != "ADD", "DL3020: COPY, not ADD"
        assert instruction != "MAINTAINER", "DL4000"
        if instruction == "WORKDIR":
            assert rest.startswith("/"), "DL3000: an absolute folder"
        if instruction in ("CMD", "ENTRYPOINT"):
            assert rest.startswith("["), "DL3025: as a list, so that signals arrive"
        if instruction == "RUN":
            assert not re.search(r"\b(sudo|cd)\b", rest), "DL3003, DL3004"
            if "apt-get install" in rest:
                assert "--no-install-recommends" in rest, "DL3015"
                assert " -y" in rest, "DL3014"
                assert "rm -rf /var/lib/apt/lists/*" in rest, "DL3009"
            if "pip install" in rest:
                assert "--no-cache-dir" in rest, "DL3042"
    assert sum(instruction == "CMD" for instruction, _ in steps) == 1, "DL4003"


def test_the_image_gets_what_it_copies():
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word for step, rest in dockerfile() if step == "COPY" for word in rest.split()[:-1]}
    assert copied == kept
    assert all((ROOT / name).exists() for name in copied)
