"""New tokens for a model: rows in the tokenizer and the embeddings, initialised so that training starts sensibly."""

from collections.abc import Sequence

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from oribi.errors import ConfigError


def add_new_tokens(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    new_tokens: Sequence[str] = (),
    method: str = "mean",
    interpolation: float = 0.5,
) -> None:
    """Adds tokens to the tokenizer and gives each a row in the embeddings and the head; call before `get_peft_model`.

    Rows that a checkpoint keeps spare beyond its tokenizer are used first. The new rows are trained along with LoRA and
    saved with the adapter.

    Args:
        model: as loaded, without LoRA.
        tokenizer: its tokenizer; grows.
        new_tokens: strings that become one token each; those that are one already are skipped.
        method: "mean": every new row is the mean of the trained rows. "interpolation": between that mean and the mean of
            the rows of the pieces that the token was spelled with.
        interpolation: share of the pieces' mean, 0 to 1.

    Raises:
        ConfigError: the model has LoRA already, or an argument is out of range.
    """
    if isinstance(model, PeftModel):
        raise ConfigError("add_new_tokens must come before get_peft_model: LoRA is on the model already")
    if method not in ("mean", "interpolation"):
        raise ConfigError(f"method is {method!r}; allowed are 'mean' and 'interpolation'")
    if not 0 <= interpolation <= 1:
        raise ConfigError(f"interpolation is {interpolation}; it must be 0 to 1")
    vocab = tokenizer.get_vocab()
    fresh = [token for token in dict.fromkeys(new_tokens) if token not in vocab]
    if not fresh:
        return
    pieces = {token: tokenizer(token, add_special_tokens=False).input_ids for token in fresh}
    trained = len(tokenizer)
    tokenizer.add_tokens(fresh)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in fresh}
    tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
    with torch.no_grad():
        for table in tables:
            mean = table[:trained].float().mean(0)
            for token, index in ids.items():
                row = mean
                if method == "interpolation" and pieces[token]:
                    row = torch.lerp(mean, table[pieces[token]].float().mean(0), interpolation)
                table[index] = row.to(table.dtype)
    model.oribi.new_token_ids = tuple(sorted({*model.oribi.new_token_ids, *ids.values()}))
    model.oribi.notes.append(f"{len(fresh)} tokens added ({method}): {', '.join(map(repr, fresh[:6]))}")
