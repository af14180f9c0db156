"""Files and folders as other programs read them: GGUF files in llama.cpp, checkpoints in transformers, adapters in PEFT."""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoConfig, AutoTokenizer

from oribi.errors import ExportError, ModelError
from oribi.gguf.coded import CodedSource
from oribi.gguf.llama_cpp import LlamaCpp
from oribi.gguf.source import GGUFSource
from oribi.models.adapter_files import read_record
from oribi.models.checkpoint_tensors import expected_shapes
from oribi.models.decoder import build
from oribi.models.expert_tensors import Stacked, expert_modules, unstacked
from oribi.models.files import HubOptions, Location, locate
from oribi.models.plain_peft import quiet_libraries
from oribi.models.quantization import Quantization
from oribi.models.quantize import fits_nf4, rounded_to_nf4
from oribi.models.unfused import from_checkpoint, packed_weights, require_exact_nf4
from oribi.models.wrapper import automatic
from oribi.save.probe_file import Messages, Place, Probe, ProbeFile, Said
from oribi.save.probes import pack_rows, rendered_ids
from oribi.save.reference import likeliest, logits_by_document
from oribi.save.trained import LoadedModel
from oribi.verify.peers import ChatAnswer, PeerError, along_answer

_CONTEXT = 1024  # tokens of a prompt and its answer, at most
_TOP = 20


class InLlamaCpp:
    """A GGUF file in llama.cpp.

    Args:
        path: the file.
        probes: knows the texts of tokens.
        adapter: LoRA adapter as GGUF.

    Raises:
        ExportError: llama.cpp does not load it, or is not installed.
    """

    name, by_text = "llama.cpp", False

    def __init__(self, path: Path, probes: ProbeFile, adapter: Path | None = None) -> None:
        self._texts = probes.texts
        self._program = LlamaCpp(path, _CONTEXT, adapter)
        self.vocabulary = len(GGUFSource(path).value("tokenizer.ggml.tokens", ())) or None

    def said(self, probes: Sequence[Probe]) -> Said:
        return [along_answer(self._continue, probe, self._texts) for probe in probes]

    def _continue(self, ids: list[int], tokens: int) -> list[tuple[int, Place]]:
        try:
            found = self._program.generate(ids, tokens, top=_TOP)
        except ExportError as error:
            raise PeerError(str(error)) from error
        return [(token, place or {}) for token, place in zip(found.tokens, found.logprobs)]

    def prompt_ids(self, messages: Messages) -> list[int]:
        return self._program.tokenize(self._program.render(messages), add_special=True)

    def chat(self, probe: Probe) -> ChatAnswer | None:
        return None

    def ends(self, token: int, prompt: list[int]) -> bool:
        return len(self._program.generate(prompt, 3, forced=token).tokens) == 1

    def takes(self, token: int) -> bool:
        return True  # `vocabulary` is known

    def close(self) -> None:
        self._program.close()


class InTransformers:
    """A checkpoint's folder in plain transformers, or an adapter's in plain PEFT.

    Args:
        folder: of either.
        base: folder or name of the adapter's base; None takes the one that it names.

    Raises:
        ModelError: it cannot be loaded.
    """

    by_text = False

    def __init__(self, folder: Path, base: str | None = None) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        settings = folder / "adapter_config.json"
        self.name = "PEFT" if settings.is_file() else "transformers"
        self._folder = folder
        with quiet_libraries(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                if settings.is_file():
                    named = json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"]
                    plain = self._base(base or named)
                    self._model = PeftModel.from_pretrained(plain, str(folder)).eval()
                else:
                    self._model = self._load(folder)
                has_tokenizer = any(folder.glob("tokenizer*"))
                self._tokenizer = AutoTokenizer.from_pretrained(folder) if has_tokenizer else None
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                raise ModelError(
                    f"{self.name} does not load {folder}: {' '.join(str(error).split())[:300]}"
                ) from error
        self.vocabulary = self._model.get_input_embeddings().weight.shape[0]

    def _load(self, folder: Path) -> Any:
        """A checkpoint; weights that are quantised for servers have their values, without what rounds activations there."""
        config, location = AutoConfig.from_pretrained(folder), Location("checkpoint", folder, str(folder))
        packed, dtype = packed_weights(location, config), config.dtype or torch.float32
        loaded = from_checkpoint(automatic(config), location, config, dtype, packed).to(self._device).eval()
        require_exact_nf4(loaded, str(folder), self._device)
        return loaded

    @torch.no_grad()
    def _base(self, name: str) -> Any:
        """The base, its linear layers rounded to NF4 where the adapter was trained on those values."""
        location = locate(name, HubOptions(local_files_only=True))
        model, record = self._load(location.directory), read_record(self._folder)
        if record is not None and record.base.train_for is not None:
            return _with_values_of_gguf(model, record.base.train_for)
        if (
            record is None
            or not record.base.weights.startswith("nf4")
            or hasattr(model.config, "quantization_config")
        ):
            return model
        packed = Quantization(skip=record.kept_in_16bit)
        for path, layer in model.named_modules():
            if isinstance(layer, torch.nn.Linear) and packed.covers(path) and fits_nf4(layer, self._device):
                layer.weight.copy_(rounded_to_nf4(layer.weight.data, record.base.weights == "nf4"))
        return model

    def said(self, probes: Sequence[Probe]) -> Said:
        rows = pack_rows([probe.ids + probe.answer[:-1] for probe in probes], "the probes")
        most = max(id for row in rows.documents for id in row)
        if most >= self.vocabulary:
            raise PeerError(f"it has {self.vocabulary} tokens, and the probes have token {most}")
        places, start = [], 0
        for probe in probes:
            places += range(start + len(probe.ids) - 1, start + len(probe.ids) - 1 + len(probe.answer))
            start += len(probe.ids) + len(probe.answer) - 1
        keep = torch.tensor(places, device=self._device)
        logits = logits_by_document(self._model, rows, keep)
        return [likeliest(part) for part in logits.split([len(probe.answer) for probe in probes])]

    def prompt_ids(self, messages: Messages) -> list[int] | None:
        if self._tokenizer is None:
            return None
        if not self._tokenizer.chat_template:
            raise PeerError("its tokenizer has no chat template")
        return rendered_ids(self._tokenizer, messages, prompt=True)

    def chat(self, probe: Probe) -> ChatAnswer | None:
        return None

    def ends(self, token: int, prompt: list[int]) -> bool:
        """Whether transformers' `generate` stops at it: by generation_config.json, of an adapter by its tokenizer."""
        found = getattr(self._model, "generation_config", None)
        ids = getattr(found, "eos_token_id", None)
        stops = set(ids if isinstance(ids, list) else [ids])
        if self.name == "PEFT" and self._tokenizer is not None:
            stops.add(self._tokenizer.eos_token_id)
        return token in stops

    def takes(self, token: int) -> bool:
        return token < self.vocabulary

    def close(self) -> None:
        self._model = None


@torch.no_grad()
def _with_values_of_gguf(model: Any, method: str) -> Any:
    """A base with the values of its GGUF file, which an adapter of `train_for` was trained on.

    Raises:
        ModelError: its tensors have other names than those of the text decoder.
    """
    config = model.config.get_text_config()
    decoder = build(config)  # which says how transformers' class stacks experts
    own, expected = unstacked(LoadedModel(model), decoder), expected_shapes(decoder)
    if missing := expected.keys() - own.shapes().keys():
        raise ModelError(
            f"the base's GGUF values are not known of {type(model).__name__}, which has no {min(missing)}"
        )
    coded = CodedSource(own, config, expected, method)
    whole = Stacked(coded, expert_modules(decoder))
    tied = {"lm_head.weight"} if model.config.tie_word_embeddings else set()
    for name, weight in model.named_parameters():
        if name in whole.shapes().keys() - tied:
            weight.copy_(whole.read(name, weight.device, weight.dtype))
    return model
