"""A token that ends answers and that the base never learned is said before training; a learned one is not."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken

from oribi.models.untrained import untrained_token
from tests.save.tiny_export import byte_level_tokenizer, export_config, tiny_model

RESERVED = [f"<|reserved_special_token_{i}|>" for i in range(16)]


def base(tied: bool = False, reserved: int = 16):
    """A model whose reserved tokens' rows were only ever pushed away, all in one direction, and its tokenizer."""
    tokenizer = byte_level_tokenizer()
    tokenizer.add_tokens([AddedToken(name, special=True) for name in RESERVED[:reserved]])
    model = tiny_model(export_config("llama", vocab_size=len(tokenizer), tie_word_embeddings=tied))
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(64, generator=generator)
    with torch.no_grad():
        for token in tokenizer.convert_tokens_to_ids(RESERVED[:reserved]):
            model.lm_head.weight[token] = common + 0.05 * torch.randn(64, generator=generator)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    return model.requires_grad_(False), tokenizer, end, common


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda row, common, other: row.zero_(), "is zero"),
        (lambda row, common, other: row.mul_(1e-8), "is zero"),
        (lambda row, common, other: row.copy_(other), "that of a reserved token"),
        (lambda row, common, other: row.copy_(common), "like those of the reserved tokens"),
        (lambda row, common, other: row.copy_(0.5 * common), "like those of the reserved tokens"),
    ],
)
def test_an_end_that_was_never_trained_is_found(tied, change, words):
    model, tokenizer, end, common = base(tied)
    assert untrained_token(model, tokenizer, end) is None  # random, as different as any that was learned
    with torch.no_grad():
        other = model.lm_head.weight[tokenizer.convert_tokens_to_ids(RESERVED[3])].clone()
        change(model.lm_head.weight[end], common, other)
    assert words in untrained_token(model, tokenizer, end)


def test_rows_without_a_token_are_reserved_too():
    model, tokenizer, end, _ = base()
    wider = tiny_model(export_config("llama", vocab_size=len(tokenizer) + 4)).requires_grad_(False)
    with torch.no_grad():
        wider.lm_head.weight[-4:] = 0.1
        wider.lm_head.weight[end] = 0.1
    assert "that of a reserved token" in untrained_token(wider, tokenizer, end)


def test_a_learned_end_among_like_tokens_is_not_suspected():
    model, tokenizer, end, common = base()
    with torch.no_grad():  # all rows of the head share a direction, as those of large models do
        model.lm_head.weight += 2 * common
    assert untrained_token(model, tokenizer, end) is None


@pytest.mark.parametrize(
    "settings", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["q_proj", "lm_head"]}]
)
def test_where_the_row_is_trained_nothing_is_said(settings):
    model, tokenizer, end, _ = base()
    with torch.no_grad():
        model.lm_head.weight[end] = 0
    assert untrained_token(model, tokenizer, end) is not None
    tuned = get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], **settings}))
    assert untrained_token(tuned.get_base_model(), tokenizer, end) is None


def test_the_warning_comes_before_training_and_names_the_token(tmp_path, capsys):
    from oribi.train.arguments import SFTConfig
    from oribi.train.trainer import SFTTrainer

    model, tokenizer, end, _ = base()
    rows = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}] * 2
    tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    for learned in (True, False):
        if not learned:
            with torch.no_grad():
                model.lm_head.weight[end] = 0
        arguments = SFTConfig(output_dir=str(tmp_path), max_length=64)
        SFTTrainer(tuned, arguments, train_dataset=rows, processing_class=tokenizer)
        said = "".join(capsys.readouterr())
        assert ("'<|im_end|>' ends the answers of this data" in said) is not learned
        assert ("modules_to_save: [embed_tokens, lm_head]" in said) is not learned
