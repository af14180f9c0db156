"""Writes the generated pages: `python docs/generate.py [PAGE ...]`. A test compares them with what is committed.

They are committed, so that they can be read without building the site and a review shows what a change does to them.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import wrap
from typing import Any

import typer
from transformers import AutoConfig

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from model_sizes import NAMES, architecture, config_of  # noqa: E402
from run_files import CARDS, MODELS, file_name, run_files  # noqa: E402

from oribi.cli import build_command  # noqa: E402
from oribi.config import ALIASES, SETTINGS, RunConfig  # noqa: E402
from oribi.config_advice import WHEN_TO_CHANGE  # noqa: E402
from oribi.config_file import GROUPS  # noqa: E402
from oribi.config_setting import SOURCE_KEYS, STAGES, Setting  # noqa: E402
from oribi.families import FAMILIES, Family, family_of, row_name  # noqa: E402
from oribi.gguf.metadata import WITH_PROJECTOR  # noqa: E402
from oribi.memory.estimate import Training, estimate_run  # noqa: E402
from oribi.memory.fit import largest_batch, largest_context  # noqa: E402
from oribi.memory.gpus import gpu_named  # noqa: E402
from oribi.memory.speed import step_time  # noqa: E402
from oribi.models.open import decoder_config  # noqa: E402
from oribi.text import short_count  # noqa: E402
from tests.docs.test_settings import OTHERWISE, python_calls, shown  # noqa: E402
from tests.models.public_configs import PUBLIC  # noqa: E402
from tests.save.test_adapter_files import WRAPPERS  # noqa: E402

MARK = "<!-- written by docs/generate.py; change what it reads, then run it -->"
ROW, BATCH = 2048, 8
REQUIRED = ("model", "dataset")


def table(heads: list[str], rows: list[list[Any]]) -> list[str]:
    """A Markdown table."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return ["", *(f"| {' | '.join(row)} |" for row in [heads, ["---"] * len(heads), *cells])]


# --- models


# fields of a row that `properties` puts into words, and some that only say where the checkpoint differs in names
DESCRIBED = (
    "norms", "norm_offset", "qk_norm", "qk_norm_field", "unread", "windows", "softcaps", "fused_projections", "attention_bias", "mlp_bias", "embedding_scale",
    "multipliers", "without_rope", "attention_scale", "attention_scale_power", "rope_by_layer_type", "names", "mixers",
    "norm_eps", "activation", "adjusts_mlp", "config_fields", "output_bias", "qk_norm_after_rope", "interleaved_rope",
    "query_scale_by_position", "rope_alpha", "kv_sharing", "wide_mlp", "keys_as_values", "value_norm", "layer_scalar",
    "per_layer_inputs", "output_gate", "last_norm_offset", "centred_norms", "output_norm_eps", "qk_norm_weights", "query_factor",
    "embedding_norm", "logit_scale", "sinks",
)  # fmt: skip


def properties(family: Family) -> str:
    """What sets a family apart, in words."""
    found = {
        f"{family.norms} norms": family.norms not in ("pre", "parallel"),
        "attention and MLP side by side": family.norms == "parallel",
        "norms around the mean": family.centred_norms,
        f"q and k normalised per {family.qk_norm}{' after RoPE' * family.qk_norm_after_rope}": family.qk_norm,
        "sliding windows where the config has them": family.windows,
        "attention sinks": family.sinks,
        "gated delta rule in some layers": "gated_delta" in family.mixers.values(),
        "gated attention": family.output_gate,
        "soft caps": family.softcaps is True,
        "a soft cap of the logits": family.softcaps == "final",
        "fused projections": bool(family.fused_projections),
        "biases of q, k and v": family.attention_bias == "qkv",
        "neighbouring dimensions rotated": family.interleaved_rope,
        "queries scaled by position": family.query_scale_by_position,
        "scaled embeddings": family.embedding_scale,
        "normalised embeddings": family.embedding_norm,
        "scaled logits": family.logit_scale is not None,
        "multipliers": family.multipliers,
        "layers without RoPE": family.without_rope is not None,
        "RoPE stretched for good": family.rope_alpha,
        "keys and values shared between layers, whose MLPs may be wider": family.kv_sharing,
        "keys that are values, which are normalised": family.keys_as_values,
        "scaled layers with inputs of their own": family.layer_scalar,
        "layers that mix tokens by a short convolution": "short_conv" in family.mixers.values(),
    }
    told = [name for name, holds in found.items() if holds]
    told += [name.replace("_", " ") for name in family.flags() if name not in DESCRIBED]
    return ", ".join(told) or "-"


def multimodal() -> list[list[str]]:
    """A row for each multimodal type whose merges are tested: its decoder, what runs it, and where its projector comes from."""
    rows = []
    for kind, settings in WRAPPERS.items():
        config = AutoConfig.for_model(kind, **settings)
        text, fused = config.get_text_config(), family_of(decoder_config(config, [])) is not None
        made = "`convert_hf_to_gguf.py --mmproj`" if kind in WITH_PROJECTOR else "-"
        gguf = made if fused and FAMILIES[text.model_type].gguf else "no GGUF"
        rows.append([f"`{kind}`", f"`{text.model_type}`", "fused" if fused else "unfused", gguf])
    return rows


def models_page() -> str:
    lines = [
        "# Models",
        MARK,
        "",
        "oribi's own decoder runs the families below with hand-written backward passes (**fused**). A checkpoint of one of these",
        "families trains whatever its size, whoever fine-tuned it, and whether its name says so or not: `model_type` in its",
        "`config.json` decides. `oribi inspect model NAME` shows what oribi makes of a checkpoint, without reading its weights.",
        "",
        "## Families",
    ]
    sizes: dict[str, list[str]] = {}
    for name in NAMES:
        sizes.setdefault(row_name(config_of(name)), []).append(short_count(architecture(name).parameters))
    lines += table(
        ["model_type", "sizes listed below", "fused", "GGUF", "what sets it apart"],
        [
            [
                f"`{name.removesuffix('+experts')}`" + " with `enable_moe_block`" * name.endswith("+experts"),
                ", ".join(sizes.get(name, [])) or "-",
                "yes",
                f"`{family.gguf.architecture}`" if family.gguf else "no",
                properties(family),
            ]
            for name, family in FAMILIES.items()
        ],
    )
    lines += [
        "",
        "A family with an entry under *GGUF* is read from and written to GGUF files, under llama.cpp's name for it.",
        "",
        "Tests compare every family with transformers on small random models: logits, loss and all gradients, packed documents with",
        "each document alone, cached with uncached generation, adapters in plain PEFT, merges in transformers, and GGUF files in",
        "llama.cpp. Of published weights they load SmolLM2-135M alone.",
        "",
        *wrap(
            f"The same is tested with small models whose `config.json` is modelled on those of {', '.join(PUBLIC)}.",
            127,
        ),
        "",
        "## Quantised checkpoints",
        "",
        "Checkpoints that come quantised for servers are dequantised exactly while they load, one weight at a time, and are then in NF4",
        "or, with `load_in_4bit: false`, in 16 bits: `quant_method` `fp8` (blocks as Qwen3-FP8 has them, or one scale per tensor as in",
        "Ministral 3), `compressed-tensors` (FP8 and INT8 per tensor, channel or block; integers of 2, 4 or 8 bits in groups, with zero",
        "points and group indices; NVFP4; MXFP4) and `modelopt` (FP8, NVFP4). A line says so, and that NF4 rounds once more: where there is",
        "a 16-bit original, take that. Each scale of a weight is used, or the checkpoint is refused by the tensor's name; scales of",
        "activations and of the cache are not used, because training does not round these. Merges into such a base are in 16 bits, or",
        "`fp8` or `w4a16` again. Values equal those of compressed-tensors 0.20.1 and of transformers to the bit in 16 bits.",
        "`*-bnb-4bit` checkpoints stay as they are packed. AWQ, GPTQ and other formats are refused with the name of the original.",
        "",
        "## Multimodal checkpoints",
        "",
        "Their text decoder is trained, on texts. Towers for images and sound, projectors and layers that draft tokens (`mtp.*`) are",
        "not read while training, and are copied as they are into `merged_16bit` and `merged_4bit`, with the processor's files: the",
        "merged model loads in the checkpoint's own class and still sees pictures. Adapters have the names of that class. A GGUF file",
        "holds the text model; the projector is a separate file, which llama.cpp's script writes from the checkpoint. Tested types:",
    ]
    lines += table(["model_type", "text decoder", "runs", "projector as GGUF"], multimodal())
    lines += [
        "",
        "## Other models",
        "",
        "Every other causal language model of transformers trains through its own class with NF4 and PEFT, **unfused**: slower, with",
        "more memory, and without GGUF files. A note at loading says so, and says which weights stay in 16 bits; weights of experts",
        "do.",
        "",
        "## What 4 bits cost",
        "",
        "`oribi inspect model NAME --four-bits` runs the 16-bit weights, one layer in memory at a time, and compares them with NF4 on",
        "oribi's own texts or on `--texts FILE`: the divergence of the next token as a whole, how much of it each kind of layers saves if",
        "it stays in 16 bits and what that costs in memory, and the layers that NF4 moves most. `keep_in_16bit: [o_proj, layers.0]`",
        "keeps layers out of NF4; `keep_in_16bit: auto` measures first and keeps the kinds that save most per byte, within a quarter",
        "of the packed model's size.",
        "",
        "## Sizes",
        "",
        "Parameters, the weights in NF4, and the adapter of rank 16 on all linear layers.",
    ]
    rows = []
    for name in NAMES:
        made = architecture(name)
        training = Training(made, RunConfig(model=name))
        rows.append(
            [
                f"`{name}`",
                f"`{made.config.model_type}`",
                short_count(made.parameters),
                f"{made.weight_bytes(load_in_4bit=True) / 2**30:.1f} GiB",
                short_count(training.trainable),
                f"{made.config.max_position_embeddings:,}",
            ]
        )
    lines += table(["model", "family", "parameters", "in NF4", "trained", "positions"], rows)
    return ended(lines)


# --- config


def allowed(setting: Setting) -> str:
    """What a setting may be."""
    if setting.choices:
        return ", ".join(f"`{choice}`" for choice in setting.choices) + " or `pissa_niter_N`" * bool(
            setting.pattern
        )
    if setting.sources:
        keys = ", ".join(f"`{key}`" for key in SOURCE_KEYS)
        return f"{setting.allowed()}; of a mapping the keys {keys}"
    return "`true`, `false`" if setting.kind is bool else setting.allowed()


def default_of(name: str, setting: Setting) -> str:
    """The default in a config file, and those of the stages that have another one."""
    if name in REQUIRED:
        return "none, it has to be given"
    found: dict[str, list[str]] = {}
    for stage, value in setting.stages.items():
        found.setdefault(shown(value), []).append(stage)
    of_stages = [f"`{value}` for {', '.join(stages)}" for value, stages in found.items()]
    if "sft" not in setting.used_by:
        return f"{'; '.join(of_stages)}; other stages refuse it"
    return "; ".join([f"`{shown(setting.default)}`", *of_stages])


def in_python(name: str, setting: Setting) -> str:
    """The calls that take a setting, with the default of each."""
    cells = []
    for one, call, argument, default in python_calls():
        if one != name:
            continue
        reason = OTHERWISE.get((call, name), (None, ""))[1]
        value = "" if repr(default).startswith("<") else f"={shown(default)}"
        cell = f"`{call}({argument}{value})`" + (f" ({reason})" if reason else "")
        differs = not reason and value and shown(default) != shown(setting.default)
        cells.append(f"**{cell}**" if differs else cell)
    return ", ".join(cells) or "-"


def by_stage(setting: Setting) -> list[str]:
    """Its defaults in other stages than supervised fine-tuning, and the stages that use it where not all do."""
    stages, used_by = getattr(setting, "stages", None) or {}, getattr(setting, "used_by", ())
    some = used_by and used_by != STAGES
    found = [f"- **Only for:** {', '.join(f'`stage: {one}`' for one in used_by)}"] if some else []
    values = [f"`{stage}` {shown(value)}" for stage, value in stages.items()]
    return [*found, *([f"- **Default by stage:** {', '.join(values)}"] if values else [])]


def config_page() -> str:
    lines = [
        "# Config",
        MARK,
        "",
        "Every key of a run file. Each key is also a flag: `--learning_rate 1e-4`. `oribi init` writes a file with the keys that",
        "matter for your model and GPU, `oribi train CONFIG --check` shows all values in force, and `oribi init --schema FILE` writes",
        "a JSON schema by which editors complete and check keys.",
        "",
        "The calls in Python keep the defaults that scripts for TRL and Unsloth expect. **Bold** marks those that differ.",
    ]
    groups: dict[str, list[str]] = {}
    for name in SETTINGS:
        group = GROUPS.get(name) or list(groups)[-1]
        groups.setdefault(group, []).append(f"[`{name}`](#{name})")
    lines += table(
        ["group", "keys"],
        [[group.removeprefix("the ").capitalize(), ", ".join(names)] for group, names in groups.items()],
    )
    for name, setting in SETTINGS.items():
        if name in GROUPS:
            lines += ["", f"## {GROUPS[name].removeprefix('the ').capitalize()}"]
        others = [f"`{alias}`" for alias, key in ALIASES.items() if key == name]
        lines += [
            "",
            f"### `{name}`",
            "",
            f"{setting.help}.",
            "",
            f"- **Default:** {default_of(name, setting)}",
            f"- **In Python:** {in_python(name, setting)}",
            f"- **Allowed:** {allowed(setting)}",
            *by_stage(setting),
            f"- **When to change it:** {WHEN_TO_CHANGE[name]}",
            *([f"- **Also read as:** {', '.join(others)}"] if others else []),
        ]
    return ended(lines)


# --- command line


def verbs(command: Any, words: str = "oribi") -> Iterator[tuple[str, Any]]:
    """Every command with the words that call it."""
    for name, one in getattr(command, "commands", {}).items():
        if hasattr(one, "commands"):
            yield from verbs(one, f"{words} {name}")
        else:
            yield f"{words} {name}", one


def option_row(parameter: Any) -> list[str]:
    names = ", ".join(f"`{name}`" for name in [*parameter.opts, *parameter.secondary_opts])
    default = parameter.default
    plain = isinstance(default, (int, float, str, Path)) and not isinstance(default, bool)
    help = (parameter.help or "").strip()
    return [names, f"`{default}`" if plain else "", help]


def cli_page() -> str:
    lines = [
        "# Command line",
        MARK,
        "",
        "`oribi train --help` and its like show the same. Results go to standard output and everything else to standard error; `--json` prints",
        "JSON lines. Exit codes: 0 success, 1 error (with a message), 2 bad arguments, 130 interrupted.",
    ]
    for words, command in verbs(typer.main.get_command(build_command())):
        arguments = [p for p in command.params if p.param_type_name == "argument"]
        options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
        usage = [f"{p.name.upper()}{'...' if p.nargs == -1 else ''}" for p in arguments]
        usage = [one if p.required else f"[{one}]" for one, p in zip(usage, arguments, strict=True)]
        lines += ["", f"## {words}", "", "```text", " ".join([words, *usage, "[OPTIONS]"]), "```", ""]
        paragraphs = [" ".join(part.split()) for part in command.help.strip().split("\n\n")]
        lines += ["\n\n".join(paragraphs)]
        if arguments:
            lines += table(
                ["argument", "meaning"],
                [
                    [f"`{p.name.upper()}`", (p.help or "").replace("[required]", "").strip()]
                    for p in arguments
                ],
            )
        if options:
            lines += table(["option", "default", "meaning"], [option_row(p) for p in options])
    return ended(lines)


# --- memory by card


def memory_page() -> str:
    lines = [
        "# Memory by card",
        MARK,
        "",
        "What fits on a GPU of 8 to 80 GB, by the functions of `oribi estimate`: QLoRA with rank 16 on all linear layers (rank 8 in",
        f"models with experts), `adamw_8bit`, `gradient_checkpointing: auto`, rows of {ROW:,} tokens and 64 GiB of free host memory.",
        "",
        "- **least** is the peak memory of one row with `gradient_checkpointing: memory`.",
        "- **rows** is the largest `per_device_train_batch_size`.",
        "- **longest row** is the longest context of a single row, up to the positions of the model.",
        f"- **seconds** is the time of an optimizer step of {BATCH} rows. Only the H100 was measured; times of other cards assume the",
        "  same fraction of their data sheets. See [benchmarks](../benchmarks.md#estimates) for estimates beside measurements.",
        "",
        "The shapes are those of the models' published configs. `oribi estimate config.yaml --gpu NAME` answers for your own run.",
        "Below each table stand the run files of `examples/configs` for that card; a test checks that they fit.",
    ]
    trained = [(name, architecture(name)) for name in NAMES]
    for size, (card, _, _) in CARDS.items():
        gpu = gpu_named(card)
        rows = []
        for name, made in trained:
            config = RunConfig(model=name, max_seq_length=ROW, per_device_train_batch_size=1)
            training = Training(made, config)
            if training.adapted_stacks:
                config.lora_r = 8
                training = Training(made, config)
            most = largest_batch(training, gpu.memory_bytes)
            if not most:
                continue
            least = training.estimate(ROW, ROW, gpu.memory_bytes, least=True).peak
            per_device = max(n for n in (1, 2, 4, 8) if n <= most)
            config.per_device_train_batch_size = min(per_device, 2)
            config.gradient_accumulation_steps = BATCH // config.per_device_train_batch_size
            seconds = step_time(training, estimate_run(training, gpu), gpu).seconds
            rows.append(
                [
                    f"`{name}`",
                    f"{least / 2**30:.1f} GiB",
                    most,
                    f"{largest_context(training, gpu.memory_bytes):,}",
                    f"{seconds:.1f}",
                ]
            )
        lines += ["", f"## {size} GB: {card}", "", f"{gpu.memory_gib:g} GiB for programs."]
        lines += table(["model", "least", "rows", "longest row", "seconds"], rows)
        files = ", ".join(f"`{file_name(name, size)}`" for name in MODELS[size])
        lines += ["", f"Run files: {files}."]
    return ended(lines)


def ended(lines: list[str]) -> str:
    return "\n".join(line.rstrip() for line in lines) + "\n"


PAGES: dict[str, Callable[[], str]] = {
    "models.md": models_page,
    "config.md": config_page,
    "cli.md": cli_page,
    "guides/memory-by-card.md": memory_page,
}

if __name__ == "__main__":
    wanted = sys.argv[1:] or [*PAGES, "run files"]
    for page in wanted:
        if page in PAGES:
            (HERE / page).write_text(PAGES[page](), encoding="utf-8")
    if "run files" in wanted:
        folder = HERE.parent / "examples" / "configs"
        folder.mkdir(exist_ok=True)
        for file, text in run_files().items():
            (folder / file).write_text(text, encoding="utf-8")
