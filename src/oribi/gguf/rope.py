"""Rotary position embeddings in a GGUF file, written and read: the keys of metadata and the tensors of frequency factors.

R rotary dimensions of a head.
"""

import math
from typing import Any

import gguf
import torch
from transformers import AutoConfig, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from oribi.errors import ModelError
from oribi.families import row_of
from oribi.families.in_gguf import InGGUF
from oribi.families.sizes import head_dim_of, rope_base
from oribi.gguf.file import GGUFFile
from oribi.gguf.names import ROPE_FACTORS

_SCALING = {
    "linear": gguf.RopeScalingType.LINEAR,
    "yarn": gguf.RopeScalingType.YARN,
    "longrope": gguf.RopeScalingType.LONGROPE,
}
_BETAS = {"beta_fast": 32.0, "beta_slow": 1.0}  # YaRN's own
_PROPORTIONAL = "proportional"
_STANDS_STILL = 1e30  # what a frequency is divided by, so that no text is long enough to turn it
_CPU = torch.device("cpu")
# a key of oribi's own, of a model that rounds YaRN's range in a family whose released models do not
_TRUNCATES = "oribi.rope.yarn_truncate"


def global_rope(config: PretrainedConfig) -> dict[str, Any]:
    """RoPE parameters of the layers that see everything."""
    return config.rope_parameters.get("full_attention", config.rope_parameters)


def add_rope(writer: gguf.GGUFWriter, config: PretrainedConfig, facts: InGGUF, head_dim: int) -> None:
    """Write the keys of RoPE."""
    rope = global_rope(config)
    kind, theta = rope_base(config, rope)
    writer.add_rope_dimension_count(rotary_dim(rope, head_dim))
    writer.add_rope_freq_base(theta)
    local = config.rope_parameters.get("sliding_attention")
    if isinstance(local, dict) and not facts.one_rope_base:
        writer.add_rope_freq_base_swa(local["rope_theta"])
    if kind in _SCALING:
        writer.add_rope_scaling_type(_SCALING[kind])
    if kind in ("linear", "yarn"):
        writer.add_rope_scaling_factor(rope["factor"])
    if kind in ("yarn", "longrope"):
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        factor = _attention_factor(rope, config.max_position_embeddings / original, original)
        if factor is not None:
            writer.add_rope_scaling_attn_factors(factor)
    if kind == "yarn":
        writer.add_rope_scaling_yarn_beta_fast(rope.get("beta_fast") or _BETAS["beta_fast"])
        writer.add_rope_scaling_yarn_beta_slow(rope.get("beta_slow") or _BETAS["beta_slow"])
        if facts.truncates_yarn and rope.get("truncate", True):
            writer.add_bool(_TRUNCATES, True)
        if facts.yarn_log_mul and rope.get("mscale") and rope.get("mscale_all_dim"):
            writer.add_rope_scaling_yarn_log_mul(rope["mscale_all_dim"])
    if (beta := _query_scale(config, rope)) is not None:
        writer.add_attn_temperature_scale(beta)
        if kind not in ("yarn", "longrope"):
            writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def rotary_dim(rope: dict[str, Any], head_dim: int) -> int:
    """Dimensions of a head that RoPE's frequencies are numbered over; of the proportional kind all, some of which stand still."""
    return (
        head_dim
        if rope["rope_type"] == _PROPORTIONAL
        else int(head_dim * rope.get("partial_rotary_factor", 1.0))
    )


def _query_scale(config: PretrainedConfig, rope: dict[str, Any]) -> float | None:
    """By what queries grow with their position."""
    family = row_of(config)
    return (rope.get("llama_4_scaling_beta") or None) if family.query_scale_by_position else None


def _attention_factor(rope: dict[str, Any], stretch: float, original: int) -> float | None:
    """The factor of cos and sin, without YaRN's default, which llama.cpp applies itself; None where that is all."""
    factor = rope.get("attention_factor")
    if rope["rope_type"] == "yarn":
        default = yarn_factor(rope["factor"])
        return None if factor in (None, default) else factor / default
    if factor is None:
        stretch = rope.get("factor") or stretch
        factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
    return factor


def rope_tensors(config: PretrainedConfig) -> dict[str, torch.Tensor]:
    """Frequency factors by tensor name: what each frequency of plain RoPE is divided by, [R / 2] float32."""
    rope = global_rope(config)
    if _PROPORTIONAL in row_of(config).gguf.rope_factors:
        head_dim = head_dim_of(config)
        turning = int(rope.get("partial_rotary_factor", 1.0) * head_dim // 2)
        factors = torch.full((head_dim // 2,), _STANDS_STILL)
        factors[:turning] = rope.get("factor") or 1.0
        return {ROPE_FACTORS[_PROPORTIONAL]: factors}
    if rope["rope_type"] == "longrope":
        return {
            ROPE_FACTORS[length]: torch.tensor(rope[f"{length}_factor"], dtype=torch.float32)
            for length in ("long", "short")
        }
    if rope["rope_type"] == "llama3":
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, _CPU)
        exponents = torch.arange(len(scaled), dtype=torch.float32) / len(scaled)
        return {ROPE_FACTORS["llama3"]: rope["rope_theta"] ** -exponents / scaled}
    return {}


def rope_refusals(config: PretrainedConfig, facts: InGGUF) -> list[str]:
    """What llama.cpp would compute differently, one clause each: what it does instead."""
    rope, refused = global_rope(config), []
    kind, _ = rope_base(config, rope)
    if kind in ("llama3", "longrope", _PROPORTIONAL) and kind not in facts.rope_factors:
        refused.append(f"no {kind} RoPE")
    if _PROPORTIONAL in facts.rope_factors and kind not in ("default", _PROPORTIONAL):
        refused.append(f"full_attention layers have plain or {_PROPORTIONAL} RoPE, not {kind}")
    mscales = {rope.get(name) or None for name in ("mscale", "mscale_all_dim")}
    # one of them alone is not read; what llama.cpp makes of both is told by a key for the second, and the first is 1
    has_key = facts.yarn_log_mul and rope.get("mscale") == 1 and rope.get("attention_factor") is None
    truncates = rope.get("truncate", True) or facts.truncates_yarn
    if kind == "yarn" and ((None not in mscales and not has_key) or not truncates):
        refused.append("YaRN without mscale and truncate=false")
    betas = [rope.get(name) or usual for name, usual in _BETAS.items()]
    if kind == "yarn" and not facts.yarn_log_mul and betas != list(_BETAS.values()):
        refused.append(f"YaRN with beta_fast 32 and beta_slow 1, not {betas[0]:g} and {betas[1]:g}")
    partial = rope.get("partial_rotary_factor", 1.0)
    if partial != 1.0 and kind != _PROPORTIONAL and not facts.partial_rope:
        refused.append(f"all dimensions of a head are rotated, not {partial} of them")
    local = config.rope_parameters.get("sliding_attention")
    if isinstance(local, dict) and local["rope_type"] != "default":
        refused.append("sliding layers have plain RoPE")
    if facts.one_rope_base and isinstance(local, dict) and local["rope_theta"] != rope["rope_theta"]:
        refused.append(f"sliding layers have the base of the others, {rope['rope_theta']:g}")
    return refused


def read_rope(file: GGUFFile, head_dim: int, facts: InGGUF) -> dict[str, Any]:
    """`rope_parameters` of a config, of the layers that see everything."""
    rope: dict[str, Any] = {
        "rope_type": "default",
        "rope_theta": float(file.value("{arch}.rope.freq_base", 10000.0)),
    }
    rotary = file.value("{arch}.rope.dimension_count") or head_dim
    if rotary != head_dim:
        rope["partial_rotary_factor"] = rotary / head_dim
    if sections := file.value("{arch}.rope.dimension_sections"):
        rope |= {"mrope_section": sections[:3], "mrope_interleaved": True}
    kind, factor = _scaling(file)
    original = file.value("{arch}.rope.scaling.original_context_length")
    if kind in ("linear", "yarn"):
        rope |= {"rope_type": kind, "factor": factor}
        if original:
            rope["original_max_position_embeddings"] = original
        if kind == "yarn":
            rope |= _read_yarn(file, facts, factor)
    if beta := file.value("{arch}.attention.temperature_scale"):
        rope |= {"llama_4_scaling_beta": float(beta), "original_max_position_embeddings": original}
    if ROPE_FACTORS["long"] in file.tensors:
        rope |= _longrope(
            _factors(file, "long"),
            _factors(file, "short"),
            original,
            factor=file.number("context_length") / original,
            attention_factor=float(file.value("{arch}.rope.scaling.attn_factor", 1.0)),
        )
    elif _PROPORTIONAL in facts.rope_factors and ROPE_FACTORS[_PROPORTIONAL] in file.tensors:
        rope |= _read_proportional(file)
    elif ROPE_FACTORS["llama3"] in file.tensors:
        rope |= _read_llama3(file, rope["rope_theta"], rotary)
    return rope


def _scaling(file: GGUFFile) -> tuple[str, float]:
    """The kind of scaling and its factor, as llama.cpp takes them: a factor without a kind is linear, by its older key too.

    Raises:
        ModelError: a kind that no file should have, or cos and sin are multiplied where no config can say so.
    """
    factor = float(file.value("{arch}.rope.scaling.factor") or file.value("{arch}.rope.scale_linear") or 1.0)
    kind = file.value("{arch}.rope.scaling.type") or ("none" if factor == 1.0 else "linear")
    name = f"{file.path}: {file.architecture}.rope.scaling"
    if kind not in ("none", *_SCALING):
        raise ModelError(f"{name}.type = {kind!r}; llama.cpp knows none, {', '.join(_SCALING)}")
    multiplied = file.value("{arch}.rope.scaling.attn_factor", 1.0)
    if multiplied != 1.0 and kind in ("none", "linear") and ROPE_FACTORS["long"] not in file.tensors:
        raise ModelError(
            f"{name}.attn_factor = {multiplied:g}, by which llama.cpp multiplies cos and sin; oribi does so with YaRN and LongRoPE "
            f"alone, and this file's scaling is {kind!r}"
        )
    return kind, factor


def _read_yarn(file: GGUFFile, facts: InGGUF, factor: float) -> dict[str, Any]:
    """What a config says of YaRN besides its factor."""
    rope: dict[str, Any] = {}
    if facts.truncates_yarn and not file.value(_TRUNCATES, False):
        rope["truncate"] = False
    usual = yarn_factor(factor)
    if facts.yarn_log_mul:  # other architectures compute with YaRN's defaults whatever a file says
        for field in ("beta_fast", "beta_slow"):
            if (beta := file.value(f"{{arch}}.rope.scaling.yarn_{field}")) is not None:
                rope[field] = float(beta)
        if mscale := file.value("{arch}.rope.scaling.yarn_log_multiplier"):
            rope |= {"mscale": 1.0, "mscale_all_dim": float(mscale)}
            usual /= yarn_factor(factor, float(mscale))
    if (multiplied := file.value("{arch}.rope.scaling.attn_factor", 1.0)) != 1.0:
        rope["attention_factor"] = multiplied * usual
    return rope


def yarn_factor(factor: float, mscale: float = 1.0) -> float:
    """By what YaRN multiplies cos and sin where contexts are `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _factors(file: GGUFFile, kind: str) -> list[float]:
    return file.read(ROPE_FACTORS[kind], torch.float32).tolist()


def _read_proportional(file: GGUFFile) -> dict[str, Any]:
    """Parameters of the proportional kind: so many frequencies turn, divided by one factor, and the rest stand still."""
    factors = _factors(file, _PROPORTIONAL)
    turning = [factor for factor in factors if factor < _STANDS_STILL / 2]
    if len(set(turning)) > 1 or factors[: len(turning)] != turning:
        raise ModelError(
            f"{file.path}: {ROPE_FACTORS[_PROPORTIONAL]} holds factors of another kind than proportional"
        )
    rope: dict[str, Any] = {"rope_type": _PROPORTIONAL, "partial_rotary_factor": len(turning) / len(factors)}
    return rope | ({"factor": turning[0]} if turning and turning[0] != 1.0 else {})


def _longrope(long: list[float], short: list[float], original: int, **factors: float) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "long_factor": long,
        "short_factor": short,
        "original_max_position_embeddings": original,
        **factors,
    }


def _read_llama3(file: GGUFFile, theta: float, rotary: int) -> dict[str, Any]:
    """Parameters of the llama3 kind whose factors are those of the file, which keeps only the factors."""
    factors = _factors(file, "llama3")
    found = torch.tensor(factors)
    if bool((found == 1).all()):
        return {}
    plain = 1.0 / theta ** (torch.arange(0, rotary, 2, dtype=torch.float32) / rotary)
    context = file.number("context_length")
    factor = round(found.max().item(), 4)  # float32 arithmetic left its trace in the file
    for original in (8192, int(context / factor)):
        candidate = {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": original,
        }
        probe = AutoConfig.for_model(
            "llama", head_dim=rotary, max_position_embeddings=max(context, original + 1),
            rope_parameters={**candidate, "rope_theta": theta},
        )  # fmt: skip
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](probe, _CPU)
        if torch.allclose(plain / scaled, found, rtol=1e-3):
            return candidate
    return _longrope(factors, factors, context, factor=1.0, attention_factor=1.0)
