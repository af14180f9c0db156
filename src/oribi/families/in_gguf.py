"""How a family lies in a GGUF file: the facts of one row of the family table, as llama.cpp reads and computes it."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

# a decoder's field, set by oribi: layers, from the first on, to which a tower for images adds what its own layers gave
DEEPSTACK_LAYERS = "num_deepstack_layers"


@dataclass(frozen=True)
class InGGUF:
    """How a family is stored in a GGUF file, and what llama.cpp computes; the decoder's own flags are not repeated here.

    Args:
        architecture: llama.cpp's name. Files of an architecture are read as its first row; those that say how far its layers
            see, as the first row with windows in a period.
        names: a part's role as in `Family.names` -> llama.cpp's name for it, where it is not the usual one.
        splits_gate_up: the checkpoint's one gate_up_proj is two tensors of the file.
        joins_gate_up: gate and up of each expert are one matrix of the file; it reads files that have two, as well.
        interleaved_rope: llama.cpp rotates neighbouring pairs; where the checkpoint rotates halves, rows of q and k are reordered.
        biases: the biases that it reads: of q, k and v, or of every linear layer.
        rope_factors: the kinds of RoPE that it reads from tensors of frequency factors.
        partial_rope: it rotates as many dimensions of a head as the file says; otherwise all.
        rope_sections: the file says how many pairs of a head turn by the time, the height and the width of a picture's token.
        head: "tied": it reads no output tensor; "separate": it needs one even where the embeddings are tied.
        window_period: every `window_period`-th layer sees everything and the others slide; 0: no windows.
        window_layers: windows exist only in models with this many layers, and such models always have them; 0: in all.
        window_tokens: windows are this long whatever a file says; 0: as it says.
        window_key_required: it loads no file without the window's key, whose value it ignores.
        one_rope_base: sliding layers rotate with the base of the others, unscaled.
        output_norm_eps: the epsilon of the norms after attention and the MLP, whatever a config says.
        yarn_log_mul: it reads YaRN's betas and mscale_all_dim, and takes mscale to be 1; otherwise it computes with YaRN's defaults.
        truncates_yarn: it rounds the range of YaRN's dimensions to whole ones, where a config of the family says not to.
        no_rope_period: every `no_rope_period`-th layer has no RoPE; 0: all have.
        derived_head_dim: a head has hidden_size / num_attention_heads dimensions; the config has no field for it.
        original_context_field: the config has original_max_position_embeddings outside `rope_parameters`.
        normalises: it divides the weights of a token's experts by their sum; None: where a file says so.
        attention_softcap: it reads attn_logit_softcapping.
        stripping_names: a model whose general.name holds one of these, whatever its architecture, was trained with the
            whitespace after control tokens swallowed.
        layers_of_27b: queries are scaled by head_dim ** -0.5, but in a model with this many layers by
            (hidden_size / num_attention_heads) ** -0.5.
        heads_by_layer: it reads one number of key/value heads per layer, 0 where tokens are mixed by something else.
        lists_layers: it reads which layers slide from a list, how large heads are from a key per kind, and the width of each
            layer's MLP.
        pieces: its name of the family's tokenizer where that is SentencePiece's.
        last_norm: its name of the norm after the last layer.
        layers_of_70b: in a model with this many layers whose heads share values, values get more bits.
    """

    architecture: str
    names: Mapping[str, str] = field(default_factory=dict)
    splits_gate_up: bool = False
    joins_gate_up: bool = False
    interleaved_rope: bool = False
    biases: Literal["qkv", "all"] = "qkv"
    rope_factors: tuple[Literal["llama3", "longrope", "proportional"], ...] = ()
    partial_rope: bool = False
    rope_sections: bool = False
    head: Literal["tied", "separate"] | None = None
    window_period: int = 0
    window_layers: int = 0
    window_tokens: int = 0
    window_key_required: bool = False
    one_rope_base: bool = False
    output_norm_eps: float | None = None
    yarn_log_mul: bool = False
    truncates_yarn: bool = False
    no_rope_period: int = 0
    derived_head_dim: bool = False
    original_context_field: bool = False
    normalises: bool | None = True
    attention_softcap: bool = False
    stripping_names: tuple[str, ...] = ()
    layers_of_27b: int = 0
    layers_of_70b: int = 0
    heads_by_layer: bool = False
    lists_layers: bool = False
    pieces: Literal["llama", "gemma4"] = "llama"
    last_norm: str = "output_norm"
