"""Tokens are drawn with the probabilities that transformers' processors leave, each of them and all together."""

import pytest
import torch
from scipy.stats import chisquare
from transformers import GenerationConfig

from oribi.models.decoding import sampling
from oribi.models.decoding.sampling import read_choice
from oribi.models.decoding.state import DecodingState
from tests.models.test_decoding import ours, padded, some_prompts, theirs, tiny  # noqa: F401 (fixtures)

SETTINGS = [
    {},
    {"temperature": 0.6},
    {"top_k": 12},
    {"top_p": 0.8},
    {"min_p": 0.05},
    {"repetition_penalty": 1.8},
    {"suppress_tokens": [0, 3, 7]},
    {
        "temperature": 1.4,
        "top_k": 30,
        "top_p": 0.9,
        "min_p": 0.01,
        "repetition_penalty": 1.3,
        "min_new_tokens": 4,
    },
]
DRAWS = 50_000


def processors_of(model, prompt, **settings):
    config = GenerationConfig(**{"do_sample": True, "top_k": 0, **settings})
    config._eos_token_tensor = torch.tensor([2])
    return model._get_logits_processor(config, prompt.shape[1], prompt, device="cpu")


def shares_agree(drawn: torch.Tensor, probabilities: torch.Tensor) -> None:
    """A chi-square test of tokens against the probabilities that they should have."""
    counts = torch.bincount(drawn, minlength=len(probabilities)).double()
    expected = probabilities.double() / probabilities.double().sum() * counts.sum()
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    rest = torch.stack([counts[~common].sum(), expected[~common].sum()])
    observed, wanted = counts[common], expected[common]
    if rest[1] >= 5:
        observed, wanted = torch.cat([observed, rest[:1]]), torch.cat([wanted, rest[1:]])
    if len(wanted) == 1:  # one token takes it all
        return
    wanted *= observed.sum() / wanted.sum()
    assert chisquare(observed.numpy(), wanted.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("vocab_size", "rounded"), [(64, False), (64, True), (1200, True)])
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s) or "none")
def test_draws_have_the_probabilities_of_transformers(settings, rounded, vocab_size):
    """Of rounded logits many are equal; between these top-p decides by any order, so that only their sums are known."""
    torch.manual_seed(11)
    logits = torch.randn(1, vocab_size) * 3
    logits = logits.round() if rounded else logits
    prompt = torch.randint(0, vocab_size, (1, 12))
    processors = processors_of(tiny(vocab_size=vocab_size), prompt, **settings)
    expected = processors(prompt, logits.clone()).softmax(-1)[0]
    choice = read_choice(True, processors, prompt.shape[1])
    state = DecodingState([], 1, 0, 1, vocab_size, torch.float32, torch.device("cpu"))
    state.seen.scatter_(1, prompt, True)
    drawn = torch.cat([choice.tokens(logits.expand(1000, -1), state) for _ in range(DRAWS // 1000)])
    if rounded:
        alike = torch.stack([logits[0], state.seen[0].float()]).unique(dim=1, return_inverse=True)[1]
        drawn, expected = alike[drawn], torch.zeros(int(alike.max()) + 1).index_add_(0, alike, expected)
    shares_agree(drawn, expected)


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.7, "repetition_penalty": 1.2}, {"min_new_tokens": 6}]
)
def test_draws_among_all_tokens_are_those_of_transformers(settings, ours, theirs):  # noqa: F811
    """So a training on rollouts is the one that it would be on transformers' loop."""
    model, prompts = tiny(), padded(some_prompts(6))
    found = []
    for generate in (ours, theirs):
        torch.manual_seed(4)
        ends = {"eos_token_id": list(range(3, 30)), "pad_token_id": 0}
        found.append(
            generate(model, **prompts, do_sample=True, top_k=0, max_new_tokens=12, **ends, **settings)
        )
        found.append(torch.rand(1))
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])  # and the random numbers go on alike


@pytest.mark.parametrize("settings", SETTINGS[1:], ids="+".join)
def test_equal_seeds_agree_and_other_seeds_do_not(settings, ours):  # noqa: F811
    model, prompts = tiny(), padded(some_prompts(4))
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(
            ours(
                model,
                **prompts,
                do_sample=True,
                max_new_tokens=10,
                eos_token_id=2,
                **{"top_k": 0, **settings},
            )
        )
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_generated_tokens_have_the_model_s_probabilities(ours):  # noqa: F811
    """The first two tokens of many rows, so that the cache, the ends and leaving rows out are part of it."""
    model, prompt = tiny(vocab_size=16, eos_token_id=5).requires_grad_(False), torch.tensor([[3, 9, 4]])
    torch.manual_seed(3)
    out = ours(
        model,
        input_ids=prompt,
        do_sample=True,
        top_k=0,
        num_return_sequences=20_000,
        max_new_tokens=2,
        pad_token_id=0,
    )[:, 3:]
    first = model(input_ids=prompt).logits[0, -1].softmax(-1)
    shares_agree(out[:, 0], first)
    token = int(first.index_fill(0, torch.tensor([5]), 0.0).argmax())
    second = model(input_ids=torch.tensor([[3, 9, 4, token]])).logits[0, -1].softmax(-1)
    shares_agree(out[out[:, 0] == token, 1], second)
    assert (out[out[:, 0] == 5, 1] == 0).all()


@pytest.mark.parametrize("top_p", [0.5, 0.95, 0.9999])
def test_top_p_alone_looks_at_all_tokens_where_few_do_not_hold_it(top_p, monkeypatch):
    torch.manual_seed(0)
    model, prompt = tiny(vocab_size=3000), torch.zeros(1, 1, dtype=torch.int64)
    processors = processors_of(model, prompt, top_p=top_p)
    kept = processors(prompt, logits := torch.randn(2, 3000)) > -torch.inf
    state = DecodingState([], 2, 0, 1, 0, torch.float32, torch.device("cpu"))
    found = torch.zeros_like(kept)

    def watched(scores):
        ids = watched.ids if watched.ids is not None else torch.arange(3000).expand(2, -1)
        found.scatter_(1, ids, scores > -torch.inf)
        return torch.zeros(2, dtype=torch.int64)

    whole = sampling._candidates

    def candidates(scores, processor):
        result = whole(scores, processor)
        watched.ids = result[1]
        return result

    monkeypatch.setattr(sampling, "draw", watched)
    monkeypatch.setattr(sampling, "_candidates", candidates)
    read_choice(True, processors, 1).tokens(logits, state)
    assert torch.equal(found, kept)
    assert (watched.ids is None) == (top_p > 0.9)
