"""SmolLM2 quantised by oribi diverges from itself no more than SmolLM2 quantised by llama.cpp.

Its rows of 576 are no multiple of a superblock, so its files hold few K types. Here each tensor is cut into rows of 256
instead, and gets the type that the method gives it in a model whose rows fit, as most models' do. The weights come from a
4-bit file: noise of a twentieth of their spread takes them off its grid, on which some types are exact.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from gguf.quants import dequantize

from oribi.gguf.mixes import METHODS, Mix, Type
from oribi.gguf.names import tensors_to_write
from oribi.gguf.quantize import encode
from oribi.models.load import load_model
from oribi.train.measures import GENERAL_TEXT
from tests.gguf.shortened import write_shortened
from tests.gguf.test_quantize import quantize_in_llama_cpp

pytestmark = pytest.mark.slow
pytest.importorskip("xllamacpp", reason="it carries llama.cpp's quantiser")
ROOT = Path(__file__).parents[2]
TOKENS = {"six layers": 128, "whole": 256}  # of each of ten texts
# with these every K type is written and the commonest of the older ones; tests/gguf/test_quantize.py compares each type alone
MIXES = ("q2_k", "q3_k_l", "q4_k_m", "q4_0")


class Judge:
    """A model, and the mean KL of its next token's distribution from what it is with other weights."""

    def __init__(self, model, ids: torch.Tensor) -> None:
        self.model, self.ids = model, ids
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.dim() == 2}
        self.logprobs = self.answers()

    def answers(self) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([self.model(input_ids=row[None]).logits[0].log_softmax(-1) for row in self.ids])

    def divergence(self, method: str, quantiser) -> float:
        """KL after every matrix went through `quantiser` and back."""
        names = tensors_to_write(self.model.config, list(self.weights))
        mix = Mix(METHODS[method], self.model.config, [tensor.name for tensor in names])
        with torch.no_grad(), ThreadPoolExecutor(2) as pool:
            types = {tensor.source: mix.type_of(tensor.name, (1, 256)) for tensor in names}
            parts = pool.map(
                lambda name: through(quantiser, self.weights[name].view(-1, 256), types[name]), types
            )
            for name, values in zip(types, parts):
                parameter = self.model.get_parameter(name)
                parameter.copy_(values.view(parameter.shape))
        answers = self.answers()
        return F.kl_div(answers, self.logprobs, log_target=True, reduction="none").sum(-1).mean().item()


def through(quantiser, rows: torch.Tensor, type: Type) -> torch.Tensor:
    parts = rows.split(1 << 14)  # the reader's temporary arrays stay small
    return torch.cat([torch.from_numpy(np.asarray(dequantize(quantiser(p, type), type))) for p in parts])


@pytest.fixture(scope="module")
def judge(request, smollm2_file, tmp_path_factory):
    path = smollm2_file
    if request.param == "six layers":
        path = write_shortened(path, tmp_path_factory.mktemp("six") / path.name, layers=6)
    model, tokenizer = load_model(str(path), dtype=torch.float32, load_in_4bit=False)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05 * parameter.std(), alpha=parameter.dim() - 1)
    files = [ROOT / "LICENSE", *sorted((ROOT / "examples" / "data").glob("*"))]
    third = len(GENERAL_TEXT) // 3
    texts = [
        GENERAL_TEXT,
        GENERAL_TEXT[third:],
        GENERAL_TEXT[2 * third :],
        *(file.read_text() for file in files),
    ]
    return Judge(
        model.eval(), torch.tensor([tokenizer(text)["input_ids"][: TOKENS[request.param]] for text in texts])
    )


# the most used in every run, on a model whose layers get both of its types; the whole model and the others in `make test-all`
@pytest.mark.parametrize(
    ("judge", "method"),
    [("six layers", "q4_k_m"), *(pytest.param("whole", method, marks=pytest.mark.long) for method in MIXES)],
    indirect=["judge"],
)
def test_a_method_loses_no_more_than_in_llama_cpp(method, judge):
    ours = judge.divergence(method, encode)
    theirs = judge.divergence(method, quantize_in_llama_cpp)
    print(f"{method}: KL {ours:.5f}, llama.cpp's {theirs:.5f}, ratio {ours / theirs:.3f}")
    assert ours <= 1.05 * theirs
