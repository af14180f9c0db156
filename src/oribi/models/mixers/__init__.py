"""What mixes the tokens of a layer: one file per mixer, each a module that `models.core.Mixer` describes."""

from transformers import PretrainedConfig

from oribi.families import Family
from oribi.models.core import Mixer
from oribi.models.mixers.attention import Attention
from oribi.models.mixers.gated_delta import GatedDelta
from oribi.models.mixers.shared_attention import SharedAttention
from oribi.models.mixers.short_conv import ShortConv

# in the words of `Family.mixers`
MIXERS: dict[str, type] = {
    "attention": Attention,
    "gated_delta": GatedDelta,
    "shared_attention": SharedAttention,
    "short_conv": ShortConv,
}


def mixer_of(config: PretrainedConfig, family: Family, index: int) -> Mixer:
    """The mixer of a layer, without weights of its own yet.

    Args:
        config, family: of the model. index: of the layer.
    """
    return MIXERS[family.mixer(config, index)](config, family, index)
