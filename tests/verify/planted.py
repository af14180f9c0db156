"""An export and ten others that are each wrong in one way, as GGUF files or checkpoints."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from oribi.save.gguf import save_gguf
from oribi.save.merged import save_merged
from tests.save.tiny_export import TEMPLATE, VOCAB, adapted, byte_level_tokenizer, export_config, tiny_model

END = "<|close|>"  # a name that llama.cpp does not take for an end of its own accord
FAULTS = (
    "wrong base", "missing adapter", "other template", "doubled BOS", "wrong stop", "truncated vocabulary", "swapped layers",
    "older adapter", "wrong scale", "other quantisation",
)  # fmt: skip
_SIZES = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


def tokenizer(template: str = TEMPLATE, eos: str = END) -> PreTrainedTokenizerFast:
    """The byte-level tokenizer with another end of turns."""
    spec = byte_level_tokenizer().backend_tokenizer.to_str().replace("<|im_end|>", END)
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(spec), eos_token=eos, pad_token="<|endoftext|>", bos_token="<|im_start|>",
        unk_token="<|endoftext|>", chat_template=template.replace("<|im_end|>", END),
    )  # fmt: skip


def tuned(seed: int = 0, vocab_size: int = VOCAB, strength: float = 1.0):
    """A tiny model, its projections small so that rounding stays small, with an adapter that changes its answers."""
    plain = tiny_model(export_config("llama", vocab_size=VOCAB, **_SIZES), seed)
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "_proj" in name:
                parameter.mul_(0.2)
    model = adapted(plain)
    if vocab_size != VOCAB:
        model.get_base_model().resize_token_embeddings(vocab_size, mean_resizing=False)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(strength)
    return model


def faulty(fault: str):
    """The model and the tokenizer of a fault."""
    if fault == "wrong base":
        return tuned(seed=9), tokenizer()
    if fault == "missing adapter":
        return tuned(strength=0.0), tokenizer()
    if fault == "other template":
        return tuned(), tokenizer(TEMPLATE.replace("<|im_start|>assistant", "<|im_start|>bot"))
    if fault == "doubled BOS":
        return tuned(), tokenizer("{{ bos_token }}" + TEMPLATE)
    if fault == "wrong stop":
        return tuned(), tokenizer(eos="<|endoftext|>")
    if fault == "truncated vocabulary":
        return tuned(vocab_size=VOCAB - 64), tokenizer()
    if fault == "wrong scale":
        return tuned(strength=2.0), tokenizer()
    model = tuned()
    if fault == "swapped layers":
        layers = model.get_base_model().model.layers
        layers[0], layers[1] = layers[1], layers[0]
    if fault == "older adapter":
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name:
                    parameter.add_(torch.empty(parameter.shape).normal_(0, 0.08, generator=generator))
    return model, tokenizer()


def write_gguf(folder: Path, fault: str | None = None) -> Path:
    """The GGUF file of an export that is right, with its probes, or has one fault."""
    form = "q4_k_m" if fault == "other quantisation" else "f16"
    model, tokens = (tuned(), tokenizer()) if fault is None else faulty(fault)
    verify = "report" if fault is None else False
    file = Path(save_gguf(model, folder, tokens, form, name="tiny", verify=verify)["gguf_files"][0])
    if fault == "wrong stop":
        _without_end(file)
    return file


def write_checkpoint(folder: Path, fault: str | None = None) -> Path:
    """The merged checkpoint of the same."""
    model, tokens = (tuned(), tokenizer()) if fault is None else faulty(fault)
    form = "merged_4bit" if fault == "other quantisation" else "merged_16bit"
    save_merged(model, folder, tokens, form, verify="report" if fault is None else False)
    if fault == "wrong stop":
        (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    return folder


def _without_end(file: Path) -> None:
    """Another token in place of the end of turns in a file's metadata."""
    from gguf import GGUFReader

    reader = GGUFReader(file, "r+")
    for key in ("tokenizer.ggml.eot_token_id", "tokenizer.ggml.eos_token_id"):
        field = reader.fields.get(key)
        if field is not None:
            field.parts[field.data[0]][0] = 0
    reader.data.flush()


@contextmanager
def llama_server(file: Path) -> Iterator[str]:
    """llama.cpp's own server on a file; gives its address with /v1."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.hostnames, params.port = ["127.0.0.1"], 0
    params.model.path, params.n_ctx, params.n_parallel, params.n_gpu_layers = str(file), 512, 1, 0
    params.cpuparams.n_threads, params.warmup, params.verbosity = 1, False, 0
    server = xllamacpp.Server(params)
    try:
        yield f"{server.listening_address}/v1"
    finally:
        del server
