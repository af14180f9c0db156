"""SmolLM2, loaded from its GGUF file in NF4 and adapted, says the same as adapter, merged model and GGUF file."""

from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from oribi.gguf.llama_cpp import LlamaCpp
from oribi.lora.attach import attach_lora
from oribi.models.load import load_model
from oribi.save.gguf import save_gguf
from oribi.save.merged import save_merged
from oribi.save.probes import CONVERSATIONS, rendered_ids

pytestmark = pytest.mark.slow
pytest.importorskip("xllamacpp", reason="llama.cpp judges the file")


def adapted(path: Path) -> tuple:
    model, tokenizer = load_model(str(path), dtype=torch.float32)
    model = attach_lora(model, r=8)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.003)
    return model.eval(), tokenizer


@pytest.fixture(scope="module")
def short(short_smollm2_file):
    """Two of its layers are enough where files are compared weight by weight."""
    return adapted(short_smollm2_file)


@pytest.fixture(params=["two layers", pytest.param("whole", marks=pytest.mark.long)])
def tuned(request):
    if request.param == "whole":
        return adapted(request.getfixturevalue("smollm2_file"))
    return request.getfixturevalue("short")


def greedy(model, ids: list[int], tokens: int) -> list[int]:
    answer = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
    return answer[0, len(ids) :].tolist()


def test_llama_cpp_answers_with_the_same_tokens(tuned, tmp_path):
    model, tokenizer = tuned
    result = save_gguf(model, tmp_path, tokenizer, ["f16", "q8_0"])
    figures = {check.name: check.figures for check in result["report"].checks}
    assert figures["f16: weights read back"]["kl"] < 1e-4
    assert figures["q8_0: weights read back"]["kl"] < 0.02
    peer = LlamaCpp(result["gguf_files"][0])
    for messages in CONVERSATIONS[:3]:
        ids = rendered_ids(tokenizer, messages[:1], prompt=True)
        assert peer.tokenize(peer.render(messages[:1])) == ids
        assert peer.generate(ids, 16).tokens == greedy(model, ids, 16)


def test_the_merged_model_in_plain_transformers(short, tmp_path):
    model, tokenizer = short
    save_merged(model, tmp_path / "merged", tokenizer, dtype="float32", verify=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    again = AutoTokenizer.from_pretrained(tmp_path / "merged")
    for messages in CONVERSATIONS[:2]:
        ids = rendered_ids(tokenizer, messages)
        assert rendered_ids(again, messages) == ids
        with torch.no_grad():
            ours, theirs = (m(input_ids=torch.tensor([ids])).logits for m in (model, plain))
        assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4


def test_the_adapter_in_plain_peft(short, tmp_path):
    model, tokenizer = short
    save_merged(model, tmp_path / "adapter", tokenizer, save_method="lora")
    with model.disable_adapter():
        save_merged(model.get_base_model(), tmp_path / "base", dtype="float32", verify=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter").eval()
    ids = torch.tensor([rendered_ids(tokenizer, CONVERSATIONS[0])])
    with torch.no_grad():
        ours, theirs = (m(input_ids=ids).logits for m in (model, loaded))
    assert ((ours - theirs).norm() / theirs.norm()).item() < 1e-4
