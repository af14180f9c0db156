"""The families of models that oribi's decoder runs: what a row can say (family, in_gguf), the rows (table), and what follows from
a row and a config (sizes, layer_fields)."""

from oribi.families.family import Family
from oribi.families.table import (
    FAMILIES,
    MOST_LAYERS,
    activation_of,
    config_of_row,
    family_of,
    row_name,
    row_of,
)

__all__ = [
    "FAMILIES",
    "MOST_LAYERS",
    "Family",
    "activation_of",
    "config_of_row",
    "family_of",
    "row_name",
    "row_of",
]
