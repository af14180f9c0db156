"""Importing oribi is quick, quiet and local: it changes no other package, no environment variable, and asks no network."""

import json
import subprocess
import sys

import pytest

# every public attribute of the peers' modules and classes, by identity of the object behind it
SNAPSHOT = """
import json, os, sys
import transformers, trl, peft, torch, bitsandbytes, datasets, accelerate
PEERS = ("transformers", "trl", "peft", "torch", "bitsandbytes", "datasets", "accelerate")

def snapshot():
    state = {}
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] not in PEERS:
            continue
        for key, value in list(vars(module).items()):
            state[f"{name}.{key}"] = id(value)
            if isinstance(value, type) and getattr(value, "__module__", "").partition(".")[0] in PEERS:
                for inner, member in list(vars(value).items()):
                    state[f"{name}.{key}.{inner}"] = id(member)
    return state

def touch():
    # the modules that anything of oribi would have to go through
    from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, AutoTokenizer, GenerationMixin
    from transformers.models.llama import modeling_llama
    from trl import SFTTrainer, SFTConfig
    from peft import PeftModel, LoraConfig
    from peft.tuners.lora import layer, bnb
"""


def run(script: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments, "-c", script], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# what each callable of the peers says of its home
NAMES = """
def names():
    state = {}
    for name, module in sorted(sys.modules.items()):
        if name.partition(".")[0] in PEERS[:3]:
            for key, value in sorted(vars(module).items()):
                if callable(value):
                    state[f"{name}.{key}"] = [getattr(value, "__module__", ""), getattr(value, "__qualname__", "")]
    return state
"""
USE = "import oribi\n[getattr(oribi, name) for name in oribi.__all__]\n"


@pytest.fixture(scope="module")
def after_peers() -> list:
    """The peers' names without oribi; what importing and using oribi changes in them; and whether the environment stays."""
    script = f"""{SNAPSHOT}{NAMES}
touch()
alone, before, environment = names(), snapshot(), dict(os.environ)
{USE}
after = snapshot()
changed = [name for name, value in before.items() if after.get(name) != value]
print(json.dumps([alone, changed, dict(os.environ) == environment]))
"""
    return json.loads(run(script).splitlines()[-1])


def test_importing_oribi_after_its_peers_changes_nothing_in_them(after_peers):
    _, changed, same_environment = after_peers
    assert changed == []
    assert same_environment


def test_importing_oribi_before_its_peers_changes_nothing_in_them_and_touches_no_network(after_peers):
    offline = """
import socket
def refuse(*arguments, **keywords):
    raise AssertionError(f"network: {arguments}")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
"""
    script = offline + USE + SNAPSHOT + NAMES + "touch()\nprint(json.dumps(names()))"
    beside = json.loads(run(script).splitlines()[-1])
    alone = after_peers[0]
    assert {name: value for name, value in beside.items() if name in alone} == alone
    assert not [value for value in beside.values() if value[0].startswith("oribi")]


def test_importing_oribi_takes_less_than_a_second_and_no_torch():
    seconds, heavy = json.loads(
        run(
            "import time, sys, json; start = time.perf_counter(); import oribi; "
            "print(json.dumps([time.perf_counter() - start, sorted({'torch', 'transformers', 'numpy'} & set(sys.modules))]))"
        )
    )
    assert seconds < 1
    assert heavy == []


def test_an_unknown_name_is_an_attribute_error():
    import oribi

    with pytest.raises(AttributeError, match="has no attribute 'FastLanguageModle'"):
        oribi.FastLanguageModle  # noqa: B018
    assert {"FastLanguageModel", "ModelError", "__version__"} <= set(dir(oribi))
    assert len(oribi.__all__) > 15  # the tests above import each


@pytest.mark.parametrize("line", ["from oribi import FastLanguageModel", "from oribi.trl import SFTTrainer"])
def test_a_script_begins_without_advice_that_does_not_concern_it(line):
    done = subprocess.run([sys.executable, "-c", line], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr) == (0, "")
