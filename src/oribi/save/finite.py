"""Trained weights that are no numbers reach no file."""

import torch
from torch import nn

from oribi.errors import ExportError


def first_non_finite(model: nn.Module) -> str | None:
    """Name of the first trained parameter that holds a nan or an infinity; None if all are finite."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not torch.isfinite(parameter).all():
            return name
    return None


def require_finite(model: nn.Module) -> None:
    """Stop before trained weights with nan or infinity are written.

    Raises:
        ExportError: a trained parameter is not finite.
    """
    bad = first_non_finite(model)
    if bad is not None:
        raise ExportError(
            f"{bad} holds values that are not finite, so nothing is written. Go on from the last checkpoint with a lower "
            "learning_rate"
        )
