"""`oribi verify` passes what answers as the trained model and names what is wrong with what does not."""

import json

import pytest

from oribi.errors import ConfigError
from oribi.save.merged import save_merged
from oribi.save.probe_file import PROBES_FILE, mean_divergence, read_probes
from oribi.verify.call import verify_target
from tests.save.tiny_export import TEMPLATE
from tests.verify.planted import FAULTS, faulty, llama_server, tokenizer, tuned, write_checkpoint, write_gguf
from tests.verify.protocol import Answering, served

pytest.importorskip("xllamacpp", reason="llama.cpp is one of those that answer")

# fault -> the findings that name it, in a file and in what a server says
NAMED = {
    "wrong base": ({"base"}, {"weights"}),
    "missing adapter": ({"adapter"}, {"weights"}),
    "other template": ({"chat template"}, {"chat template"}),
    "doubled BOS": ({"BOS"}, {"BOS"}),
    "wrong stop": ({"stops"}, {"stops"}),
    "truncated vocabulary": ({"vocabulary"}, {"vocabulary"}),
    "swapped layers": ({"layers"}, {"weights"}),
    "older adapter": ({"adapter"}, {"weights"}),
    "wrong scale": ({"adapter"}, {"weights"}),
    "other quantisation": ({"quantisation"}, {"quantisation"}),
}
WORDS = {
    "wrong base": "another base",
    "missing adapter": "the adapter is missing",
    "swapped layers": "model.layers.0.self_attn.q_proj.weight those of model.layers.1",
    "older adapter": "another or an older adapter",
    "wrong scale": "the adapter acts at 2 times its strength",
}
SERVED_WORDS = {
    "missing adapter": "the base answers, without the adapter",
    "wrong scale": "the adapter acts at about 2 times its strength",
    "doubled BOS": "begins a prompt twice",
}
SOME = [
    fault if fault == "missing adapter" else pytest.param(fault, marks=pytest.mark.long) for fault in FAULTS
]


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    """The GGUF file of an export with its probes."""
    return write_gguf(tmp_path_factory.mktemp("right"))


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """The checkpoint of the same model with its probes."""
    return write_checkpoint(tmp_path_factory.mktemp("merged") / "merged")


def different(checks):
    return {check.name for check in checks if not check.passed}


def words(checks):
    return "\n".join(check.line() for check in checks if not check.passed)


def test_the_export_itself_passes_as_a_file_and_in_llama_cpps_server(right):
    checks = verify_target(str(right))
    assert different(checks) == set()
    assert {check.name for check in checks if check.outcome == "equal"} == {
        "tensors", "weights", "chat template", "BOS", "stops", "vocabulary",
    }  # fmt: skip
    with llama_server(right) as address:
        checks = verify_target(address, probes=right.parent)
    assert different(checks) == set()
    assert {"weights", "answers in chat", "stops"} <= {
        check.name for check in checks if check.outcome == "equal"
    }


@pytest.mark.parametrize("fault", SOME)
def test_a_fault_is_named_in_a_file_and_in_llama_cpps_server(fault, right, tmp_path):
    file = write_gguf(tmp_path, fault)
    in_file, in_server = NAMED[fault]
    checks = verify_target(str(file), probes=right.parent, file="f16")
    assert in_file <= different(checks), words(checks)
    assert WORDS.get(fault, "") in words(checks)
    with llama_server(file) as address:
        checks = verify_target(address, probes=right.parent)
    assert different(checks) == in_server, words(checks)
    assert SERVED_WORDS.get(fault, "") in words(checks)


@pytest.mark.long
def test_a_checkpoint_passes_in_transformers_and_in_a_file_of_another_form(merged, right):
    assert different(verify_target(str(merged))) == set()
    assert different(verify_target(str(right), probes=merged)) == set()


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_in_a_checkpoint(fault, merged, tmp_path):
    checks = verify_target(str(write_checkpoint(tmp_path / "m", fault)), probes=merged)
    assert NAMED[fault][0] <= different(checks), words(checks)
    assert WORDS.get(fault, "") in words(checks)


@pytest.mark.long
def test_an_adapter_passes_in_plain_peft_on_its_base_and_not_at_another_strength(tmp_path):
    model = tuned()
    folder, base = tmp_path / "adapter", tmp_path / "base"
    save_merged(tuned(strength=0.0), base, tokenizer(), dtype="float32", verify=False)
    save_merged(model, folder, tokenizer(), "lora")
    assert different(verify_target(str(folder), base=str(base))) == set()
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(
        json.dumps({**settings, "lora_alpha": settings["lora_alpha"] * 2})
    )
    checks = verify_target(str(folder), base=str(base))
    assert different(checks) == {"adapter's strength", "weights"}
    assert "lora_alpha is 16, was 8 in training" in words(checks)
    assert "the adapter acts at about 2 times its strength" in words(checks)


@pytest.mark.parametrize("style", ["vllm", "sglang", "ollama", "bare"])
@pytest.mark.long
def test_servers_of_the_protocols_shape(style, right):
    probes = read_probes(right.parent)
    tokens = tokenizer()

    def found(fault=None, stops=probes.stops, **faults):
        model, used = (tuned(), tokens) if fault is None else faulty(fault)
        with served(Answering(model, used, stops, style, **faults)) as address:
            return verify_target(address, probes=right.parent, model="tuned")

    assert different(found()) == set()
    for fault in ("missing adapter", "wrong base"):
        assert different(found(fault)) & {"weights", "answers in chat"}, fault
    assert different(found("other template")) & {"chat template", "answers in chat"}
    assert "BOS" in different(found(bos_twice=True))
    if style != "bare":  # random weights end no answer, and a server without a bias shows no end
        assert "stops" in different(found(stops=[0]))


@pytest.mark.long
def test_what_a_server_cannot_show_is_not_called_right(right):
    probes = read_probes(right.parent)
    with served(Answering(tuned(), tokenizer(), probes.stops, "bare")) as address:
        checks = {check.name: check for check in verify_target(address, probes=right.parent)}
    assert checks["weights"].outcome == "not tested"
    assert checks["chat template"].outcome == "close"
    assert "gives no log-probabilities" in checks["answers in chat"].says


def test_the_command_says_it_and_its_exit_code_too(oribi, right, tmp_path):
    ran = oribi("verify", right)
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == f"{right}: equal"
    other = write_gguf(tmp_path / "g", "other template")
    ran = oribi("verify", other, "--probes", right.parent, "--json")
    assert ran.code == 1
    assert ran.records[-1] == {"target": str(other), "outcome": "different", "passed": False}


def test_a_folder_of_gguf_files_means_its_only_one_or_the_one_that_is_named(right, tmp_path):
    assert different(verify_target(str(right.parent))) == set()
    for path in (right, right.parent / PROBES_FILE):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "other.gguf").write_bytes(right.read_bytes())
    with pytest.raises(ConfigError, match=rf"2 GGUF files; .* --file: other.gguf, {right.name}"):
        verify_target(str(tmp_path))
    for name in (right.name, "f16"):
        assert different(verify_target(str(tmp_path), file=name)) == set()


def test_what_cannot_be_verified_is_one_error(right, tmp_path, oribi):
    with pytest.raises(ConfigError, match="no server of the OpenAI protocol answers there"):
        verify_target("http://127.0.0.1:9/v1", probes=right.parent)
    with pytest.raises(
        ConfigError, match=r"probes.json cannot be read .*Export the model again, without --no-verify"
    ):
        verify_target(str(tmp_path))
    with pytest.raises(ConfigError, match="--file q8_0: probes.json has no such file"):
        verify_target(str(right), file="q8_0")
    (tmp_path / PROBES_FILE).write_text('{"schema": 1, "probes": []}')
    with pytest.raises(ConfigError, match="probes.json is damaged"):
        verify_target(str(tmp_path))
    no_such_model = pytest.raises(ConfigError, match="--model other: .* has no such model; must be tuned")
    with served(Answering(None, None, [], "bare")) as address, no_such_model:
        verify_target(address, probes=right.parent, model="other")


@pytest.mark.long
def test_probes_go_with_the_files_that_they_describe(right, merged, tmp_path):
    probes = read_probes(merged)
    assert set(probes.files) == {"."}
    assert probes.probes[0].messages is not None
    apart = {name: mean_divergence(probes.says["trained"], said) for name, said in probes.says.items()}
    assert apart["trained"] == 0.0
    assert apart["x0.5"] < apart["x0.25"] < apart["base"]
    folder = write_checkpoint(tmp_path / "m")
    assert (folder / PROBES_FILE).is_file()
    save_merged(tuned(), folder, tokenizer(), verify=False)
    assert not (folder / PROBES_FILE).exists()


@pytest.mark.long
def test_a_template_that_writes_the_date_is_not_compared_on_another_day(right, tmp_path):
    values = json.loads((right.parent / PROBES_FILE).read_text())
    (tmp_path / PROBES_FILE).write_text(json.dumps({**values, "dated": True}))
    other, tokens = tuned(), tokenizer(TEMPLATE.replace("<|im_start|>assistant", "<|im_start|>helper"))
    with served(Answering(other, tokens, [2], "vllm")) as address:
        checks = {check.name: check for check in verify_target(address, probes=tmp_path)}
    assert checks["chat template"].outcome == "not tested"
