"""Which quantisation each tensor of a GGUF file gets: llama.cpp's mixes and its fallbacks.

A method names a mix: a default type, and more bits for the tensors whose errors cost most (attention's values, the
MLP's down projection, the head). Layers near both ends, and every third between, count as costly.

Source: llama.cpp's `llama-quantize`, whose files these mixes match type by type.
"""

import re
from dataclasses import dataclass

from gguf import GGML_QUANT_SIZES, LlamaFileType
from transformers import PretrainedConfig

from oribi.errors import ConfigError
from oribi.families.layer_fields import config_of_layer
from oribi.gguf.file import Type
from oribi.gguf.names import KERNELS, family_in_gguf
from oribi.text import one_of

_MXFP4 = "mxfp4_moe"  # whose type is that of the experts' weights alone


@dataclass(frozen=True)
class Method:
    """A quantisation method.

    Args:
        name: of the method.
        words: its size and purpose.
        kl: mean KL divergence from the trained model, in nats, above which a file is refused.
        instead: what to take where it loses too much; "" where it loses nothing that counts.
    """

    name: str
    words: str
    kl: float
    instead: str = ""

    @property
    def default(self) -> Type:
        """The type that most tensors get."""
        return Type.Q8_0 if self.name == _MXFP4 else Type[re.sub("_[SML]$", "", self.name.upper())]

    @property
    def file_type(self) -> int:
        """llama.cpp's number of the mix."""
        return LlamaFileType["ALL_F32" if self.name == "f32" else f"MOSTLY_{self.name.upper()}"]


METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("f32", "float32, exact and twice as large as the model", 0.002),
        Method("f16", "16 bits per weight, almost exact", 0.005),
        Method("bf16", "bfloat16, as most checkpoints are", 0.02),
        Method("q8_0", "8.5 bits per weight, almost indistinguishable from f16", 0.03),
        Method("q6_k", "6.6 bits, close to q8_0", 0.06, "q8_0"),
        Method("q5_k_m", "5.7 bits, recommended where memory allows", 0.15, "q6_k or q8_0"),
        Method("q5_k_s", "5.5 bits", 0.15, "q6_k or q8_0"),
        Method("q4_k_m", "4.9 bits, recommended", 0.3, "q5_k_m or q8_0"),
        Method("q4_k_s", "4.6 bits", 0.3, "q5_k_m or q8_0"),
        Method("q3_k_l", "4.3 bits", 0.5, "q4_k_m, q5_k_m or q8_0"),
        Method("q3_k_m", "3.9 bits, loses quality", 0.5, "q4_k_m, q5_k_m or q8_0"),
        Method("q3_k_s", "3.5 bits, loses quality", 0.5, "q4_k_m, q5_k_m or q8_0"),
        Method("q2_k", "3.2 bits, loses much quality", 0.5, "q4_k_m, q5_k_m or q8_0"),
        Method(_MXFP4, "4.25 bits for experts, as gpt-oss is released, and q8_0 for the rest", 0.3, "q8_0"),
        Method("q5_1", "6 bits, an older type", 0.15, "q6_k or q8_0"),
        Method("q5_0", "5.5 bits, an older type", 0.2, "q6_k or q8_0"),
        Method("q4_1", "5 bits, an older type", 0.3, "q5_k_m or q8_0"),
        Method("q4_0", "4.5 bits, an older type", 0.5, "q5_k_m or q8_0"),
    )
}
ALIASES = {
    "q4_k": "q4_k_m",
    "q5_k": "q5_k_m",
    "q3_k": "q3_k_m",
    "mxfp4": _MXFP4,
    "fast_quantized": "q8_0",
    "quantized": "q4_k_m",
}
_NEED_IMATRIX = re.compile(r"i?q[1-4]_(x?x?s|m|nl|xs)|iq\w+")
# the type to use where rows are not a multiple of a superblock's 256 values
_FALLBACK = {Type.Q2_K: Type.Q4_0, Type.Q3_K: Type.Q4_0, Type.Q4_K: Type.Q5_0, Type.Q5_K: Type.Q5_1, Type.Q6_K: Type.Q8_0}  # fmt: skip
_FLOATS = (Type.F32, Type.F16, Type.BF16)


def mix_of(method: str) -> Method:
    """A method by its name, in any case; "not_quantized" is f16.

    Raises:
        ConfigError: there is none of that name.
    """
    name = method.lower()
    name = {"not_quantized": "f16", **ALIASES}.get(name, name)
    if name in METHODS:
        return METHODS[name]
    reason = ""
    if _NEED_IMATRIX.fullmatch(name):
        reason = f" ({name} needs an importance matrix, which oribi does not compute)"
    raise ConfigError(f"quantization_method = {method!r}{reason}; {one_of(name, METHODS)}")


def print_quantization_methods() -> None:
    """Print every method with its size and purpose."""
    for method in METHODS.values():
        print(f"{method.name:8} {method.words}")


class Mix:
    """Types of one file's tensors, by their names in the file.

    Args:
        method: the mix.
        config: the model's config.
        names: names of all tensors of the file.
    """

    def __init__(self, method: Method, config: PretrainedConfig, names: list[str]) -> None:
        self.method = method
        self.layers = config.num_hidden_layers
        self.queries_per_value = config.num_attention_heads // config_of_layer(config, 0).num_key_value_heads
        self.tied = "output.weight" not in names
        # layers that have values of their own, in order
        self.with_values = sorted(
            int(name.split(".")[1]) for name in names if re.fullmatch(r"blk\.\d+\.attn_(v|qkv)\.weight", name)
        )
        # llama.cpp recognises the 70B model, whose heads share values, by its number of layers
        self.is_70b = self.layers == family_in_gguf(config)[1].layers_of_70b and self.queries_per_value > 1

    def type_of(self, name: str, shape: tuple[int, ...]) -> Type:
        """The type of the tensor `name` of `shape` [N, K] or [N]."""
        if len(shape) < 2 or name.endswith((".bias", "_norm.weight", "ffn_gate_inp.weight", *KERNELS)):
            return Type.F32
        default = self.method.default
        if default in _FLOATS:
            return default
        if self.method.name == _MXFP4 and name.endswith("_exps.weight"):
            return _fitting(Type.MXFP4, shape[-1])
        if name == "per_layer_model_proj.weight":  # which llama-quantize leaves as the 16-bit file has it
            return Type.F16
        match = re.fullmatch(r"(?:blk\.(\d+)\.)?([\w.]+)\.weight", name)
        layer, part = int(match[1] or 0), re.sub("_(exps|shexp)$", "", match[2])
        if part == "output" or (part.endswith("token_embd") and self.tied):
            wanted = self._head(shape[-1])
        else:
            wanted = self._of_layer(part, layer)
        return _fitting(wanted, shape[-1])

    def _head(self, row: int) -> Type:
        default = self.method.default
        if default == Type.Q8_0 or row % GGML_QUANT_SIZES[default][0]:
            return Type.Q8_0
        return Type.Q6_K

    def _of_layer(self, part: str, layer: int) -> Type:
        default, part, layers = self.method.default, "attn_v" if part == "attn_qkv" else part, self.layers
        if part == "attn_v":  # counted among its like
            layer, layers = self.with_values.index(layer), len(self.with_values)
        costly = Type.Q6_K if _costly(layer, layers) else default
        more_bits = {
            "q2_k": {
                "attn_v": Type.Q4_K if self.queries_per_value >= 4 else Type.Q3_K,
                "ffn_down": Type.Q3_K,
                "attn_output": Type.Q3_K,
            },
            "q3_k_m": {
                "attn_v": Type.Q5_K if layer < 2 else Type.Q4_K,
                "ffn_down": Type.Q5_K if layer < layers // 16 else Type.Q4_K,
                "attn_output": Type.Q4_K,
            },
            "q3_k_l": {"attn_v": Type.Q5_K, "ffn_down": Type.Q5_K, "attn_output": Type.Q5_K},
            "q4_k_s": {
                "attn_v": Type.Q5_K if layer < 4 else default,
                "ffn_down": Type.Q5_K if layer < layers // 8 else default,
            },
            "q4_k_m": {"attn_v": costly, "ffn_down": costly},
            "q5_k_m": {"attn_v": costly, "ffn_down": costly},
        }
        wanted = more_bits.get(self.method.name, {}).get(part, default)
        if part == "attn_v" and self.is_70b and wanted in (Type.Q3_K, Type.Q4_K):
            return Type.Q5_K
        return wanted


def _costly(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def _fitting(wanted: Type, row: int) -> Type:
    """The type itself, or llama.cpp's fallback where rows of `row` values do not fill its blocks."""
    if row % GGML_QUANT_SIZES[wanted][0] == 0:
        return wanted
    wanted = _FALLBACK.get(wanted, wanted)
    return wanted if row % GGML_QUANT_SIZES[wanted][0] == 0 else Type.F16
