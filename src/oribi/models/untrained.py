"""Whether a base model ever learned a token: a row of the head that is like those of reserved tokens never was trained.

A base model's vocabulary often has the tokens of its chat version. With LoRA on the layers the head stays as it is: if the
token that ends a turn has the row of a reserved token, its logit is theirs, and no training makes the model stop.
D hidden, V vocabulary.
"""

import re
from typing import Any

import torch
from torch import nn

_RESERVED = re.compile(
    r"reserved|unused|dummy|placeholder|\bextra_?id|\[control_\d+\]|^<\|?(spare|empty|free)", re.IGNORECASE
)
_FEWEST = 8  # reserved tokens from which a common direction can be told
_COMPARED = 1024  # reserved and ordinary rows, at most
_ZERO = 1e-3  # of an ordinary row's length
_ALIKE, _APART = 0.9, 0.1  # cosine with the reserved rows' mean, and by how much ordinary rows stay below


def untrained_token(model: nn.Module, tokenizer: Any, token: int) -> str | None:
    """Why a token's row of the head looks as if it was never trained; None if it does not, or training changes it.

    Args:
        model: as it will be trained.
        tokenizer: names the reserved tokens.
        token: its id.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    frozen = weight is not None and not any(p.requires_grad for p in head.parameters())
    # PEFT's wrappers train a copy, an update or single rows
    if not frozen or weight.dim() != 2 or token >= len(weight) or type(head) is not nn.Linear:
        return None
    if any(p.requires_grad for p in model.get_input_embeddings().parameters()):
        return None  # tied, or trained on purpose
    names = tokenizer.convert_ids_to_tokens(range(min(len(tokenizer), len(weight))))
    special = set(tokenizer.added_tokens_decoder)
    reserved = [
        i for i, name in enumerate(names) if name is not None and i != token and _RESERVED.search(name)
    ]
    reserved += [i for i in range(len(names), len(weight)) if i != token]  # rows without a token
    ordinary = [i for i in range(len(names)) if i not in special and i not in set(reserved) and i != token]
    ordinary = ordinary[:: max(len(ordinary) // _COMPARED, 1)]
    if not ordinary:
        return None
    return _verdict(*(_rows(weight, ids) for ids in ([token], reserved[:_COMPARED], ordinary)))


def _rows(weight: torch.Tensor, ids: list[int]) -> torch.Tensor:
    return weight[torch.tensor(ids, dtype=torch.long, device=weight.device)].detach().float()


def _verdict(row: torch.Tensor, reserved: torch.Tensor, ordinary: torch.Tensor) -> str | None:
    """What is wrong with row [1, D] beside reserved [R, D] and ordinary [O, D] rows."""
    if row.norm() <= _ZERO * ordinary.norm(dim=-1).median():
        return "its row of the head is zero"
    if len(reserved) and bool((reserved == row).all(-1).any()):
        return "its row of the head is that of a reserved token"
    if len(reserved) < _FEWEST:
        return None
    direction = nn.functional.normalize(nn.functional.normalize(reserved, dim=-1).mean(0), dim=0)
    alike, own, others = (nn.functional.normalize(x, dim=-1) @ direction for x in (reserved, row, ordinary))
    common = alike.quantile(0.1).item()
    if common > _ALIKE and own.item() >= common and others.quantile(0.99).item() < common - _APART:
        return "its row of the head is like those of the reserved tokens"
    return None
