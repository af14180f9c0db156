"""Opening a model without its weights: from a name to its files, config, tokenizer and generation settings.

Loading, planning memory, preparing data and every command that shows a model ask here, so that all see one model.
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig
from transformers import GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from oribi.chat.tokenizer import OBJECTS, PROCESSOR_FILES, Repaired, load_tokenizer, repair
from oribi.errors import ModelError
from oribi.families import family_of
from oribi.families.in_gguf import DEEPSTACK_LAYERS
from oribi.formats.settings import MXFP4_METHOD, PackedFormat, method_of
from oribi.gguf.source import GGUFSource
from oribi.gguf.tokenizer import SUPPRESSED
from oribi.gguf.tokenizer_reading import rebuild_tokenizer, require_same_tokens
from oribi.models.adapter_config import read_adapter_config
from oribi.models.adapter_files import AdapterRecord, read_record
from oribi.models.config_file import check_decoder, read_config, read_generation, stored_quantization
from oribi.models.files import HubOptions, Location, locate, read_json, stored_settings
from oribi.models.rope import trained_positions


@dataclass(frozen=True)
class OpenedAdapter:
    """A LoRA adapter's small files.

    Args:
        location: where they are.
        settings: adapter_config.json.
        record: oribi.json; None where another program wrote the adapter.
    """

    location: Location
    settings: PeftConfig
    record: AdapterRecord | None

    @property
    def has_tokenizer(self) -> bool:
        return any(self.location.directory.glob("tokenizer*"))


@dataclass
class OpenedModel:
    """A model as its small files describe it.

    Args:
        location: where the weights are: a checkpoint or a GGUF file, that of the base for an adapter.
        hub: how the hub is asked for them.
        whole: config.json as it is, or the config that a GGUF file's metadata make.
        config: of what is loaded: the text decoder of a multimodal model where the family table has it, else `whole`.
        generation: how the model is meant to answer.
        gguf: the opened GGUF file.
        adapter: the adapter that the name stands for.
        notes: what was decided, one line each.
    """

    location: Location
    hub: HubOptions
    whole: PretrainedConfig
    config: PretrainedConfig
    generation: GenerationConfig
    gguf: GGUFSource | None = None
    adapter: OpenedAdapter | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def fused(self) -> bool:
        """Whether oribi's decoder runs it."""
        return family_of(self.config) is not None

    @property
    def is_part(self) -> bool:
        """Whether `config` is that of the text decoder of a multimodal model."""
        return type(self.config) is not type(self.whole)

    def stored(self) -> dict[str, Any] | PackedFormat | None:
        """How the checkpoint's weights are quantised, as `stored_quantization` says; None for a GGUF file.

        None also stands for experts in MXFP4 (`keeps_mxfp4`), which are told by their tensors.

        Raises:
            ModelError: in a way that oribi does not read.
        """
        return None if self.gguf is not None or self.keeps_mxfp4 else stored_quantization(self.location)

    @property
    def keeps_mxfp4(self) -> bool:
        """Whether the checkpoint has stacks of experts in MXFP4, whose codes oribi's decoder keeps."""
        if self.gguf is not None:
            return any("MXFP4" in kinds for kinds in self.gguf.stack_types.values())
        settings = stored_settings(self.location.directory)
        return settings is not None and self.fused and method_of(settings) == MXFP4_METHOD

    @property
    def config_file(self) -> Path:
        """The file that `whole` was read from."""
        return self.location.file or self.location.directory / "config.json"

    def read_tokenizer(self) -> tuple[PreTrainedTokenizerBase, Any]:
        """The tokenizer before any repair, and the chat template of the base's own, which an adapter may replace.

        The tokenizer is the adapter's, or the base's with the chat template that the adapter's record names.

        Raises:
            ModelError: there is none, or it cannot be read.
        """
        tokenizer = self._base_tokenizer()
        template = tokenizer.chat_template
        if self.adapter is None:
            return tokenizer, template
        if self.adapter.has_tokenizer:
            return self._load_tokenizer(self.adapter.location.directory), template
        record = self.adapter.record
        if record is not None and record.chat_template not in (None, template):
            tokenizer.chat_template = record.chat_template
            self.notes.append("chat template: the one that the adapter was trained with")
        return tokenizer, template

    def repair_tokenizer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int | None = None,
        max_seq_length: int | None = None,
    ) -> Repaired:
        """Repairs a tokenizer of `read_tokenizer` in place, as every use of the model does.

        Args:
            tokenizer: as stored.
            vocab_size: rows of the embeddings; None: as many as the loaded model will have.
            max_seq_length: longest example in tokens; None: the model's positions.

        Raises:
            ModelError: no token ends a text.
        """
        text = self.config.get_text_config()
        if vocab_size is None:
            vocab_size = getattr(text, "vocab_size", None) or len(tokenizer)
            if self.adapter is not None and self.adapter.has_tokenizer:
                vocab_size = max(vocab_size, len(tokenizer))
        if max_seq_length is None:
            max_seq_length = trained_positions(text)
        repaired = repair(tokenizer, vocab_size, self.generation, max_seq_length=max_seq_length)
        self.notes += repaired.notes
        return repaired

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer that training sees.

        Raises:
            ModelError: there is none, or it cannot be read or repaired.
        """
        return self.repair_tokenizer(self.read_tokenizer()[0]).tokenizer

    def _base_tokenizer(self) -> PreTrainedTokenizerBase:
        directory = self.location.directory
        if self.gguf is not None and not (directory / "tokenizer.json").is_file():
            return rebuild_tokenizer(self.gguf.file)
        tokenizer = self._load_tokenizer(directory)
        if self.gguf is not None:
            require_same_tokens(self.gguf.file, tokenizer, str(directory / "tokenizer.json"))
            self.notes.append("tokenizer: read from the tokenizer.json beside the GGUF file")
        return tokenizer

    def _load_tokenizer(self, directory: Path) -> PreTrainedTokenizerBase:
        for name in OBJECTS:
            if (directory / name).is_file():
                read_json(directory / name)  # names the file that is damaged
        tokenizer = load_tokenizer(directory, trust_remote_code=self.hub.trust_remote_code, notes=self.notes)
        if not tokenizer.chat_template:
            self._take_processors_template(tokenizer, directory)
        return tokenizer

    def _take_processors_template(self, tokenizer: PreTrainedTokenizerBase, directory: Path) -> None:
        for file in (directory / name for name in PROCESSOR_FILES if (directory / name).is_file()):
            template = read_json(file).get("chat_template")
            if isinstance(template, str) and template:
                tokenizer.chat_template = template
                self.notes.append(f"chat template: the processor's, from {file.name}")
                return


def open_model(name: str, hub: HubOptions | None = None, gguf_file: str | None = None) -> OpenedModel:
    """Opens a model; of a hub name only the small files are fetched.

    Args:
        name: a directory, a .gguf file, a LoRA adapter (its base is opened), a training run, or owner/name on the hub.
        hub: how the hub is asked. A base is asked for in the revision that its adapter names.
        gguf_file: which GGUF file of a directory or repository to take.

    Raises:
        ModelError: there is no such model, or its files are damaged, hostile or contradict each other.
    """
    hub = HubOptions() if hub is None else hub
    location = locate(name, hub, gguf_file)
    notes, adapter, gguf = list(location.notes), None, None
    if location.kind == "adapter":
        adapter = OpenedAdapter(location, read_adapter_config(location), read_record(location.directory))
        hub = replace(hub, revision=adapter.settings.revision, subfolder="")
        location = _locate_base(adapter, hub)
        notes += location.notes
    if location.kind == "gguf":
        gguf = GGUFSource(location.file)
        whole = gguf.config
        check_decoder(location.file, whole, notes)
    else:
        whole = read_config(location, trust_remote_code=hub.trust_remote_code, notes=notes)
    config = decoder_config(whole, notes)
    generation = read_generation(location.directory) if gguf is None else None
    if generation is None:
        generation = GenerationConfig.from_model_config(config)
    if gguf is not None:
        ends = [config.eos_token_id, gguf.value("tokenizer.ggml.eot_token_id")]
        generation.eos_token_id = [end for end in dict.fromkeys(ends) if end is not None]
        generation.suppress_tokens = gguf.value(SUPPRESSED)
    return OpenedModel(location, hub, whole, config, generation, gguf, adapter, notes)


# multimodal classes of transformers 5.24 that leave out their text decoder's logit_scale: what is trained on a decoder with it
# would not be what they compute
_WITHOUT_LOGIT_SCALE = ("aya_vision", "cohere2_vision")


def decoder_config(whole: PretrainedConfig, notes: list[str]) -> PretrainedConfig:
    """A copy of the config of what is loaded from a checkpoint.

    Args:
        whole: of the checkpoint. notes: gets a line where it is of a part.
    """
    config = copy.deepcopy(whole)
    text = getattr(config, "text_config", None)
    if family_of(config) is not None:
        config.__dict__.pop(
            "quantization_config", None
        )  # read from `whole`; the decoder's linear layers have their own
    not_apart = family_of(config) is not None or config.model_type in _WITHOUT_LOGIT_SCALE
    if text is None or not_apart or family_of(text) is None:
        return config
    text.__dict__.pop("quantization_config", None)
    notes.append(f"{config.model_type}: the text decoder is loaded; images and sound are not supported")
    for part in (text, config):  # the whole's, which some parts have not
        text.tie_word_embeddings = getattr(
            part, "tie_word_embeddings", getattr(text, "tie_word_embeddings", False)
        )
    if layers := getattr(getattr(config, "vision_config", None), "deepstack_visual_indexes", None):
        setattr(text, DEEPSTACK_LAYERS, len(layers))  # what a GGUF file says of the decoder
    return text


def _locate_base(adapter: OpenedAdapter, hub: HubOptions) -> Location:
    """The model that an adapter was trained on, as its adapter_config.json names it."""
    name, file = adapter.location.name, adapter.location.directory / "adapter_config.json"
    base = adapter.settings.base_model_name_or_path
    if not base or not isinstance(base, str):
        raise ModelError(
            f"{file} names no base_model_name_or_path; put the folder of the model there, or its name on the hub"
        )
    advice = f"Put the folder of the model, or its name on the hub, in base_model_name_or_path of {file}"
    trained_on = adapter.record.base.files if adapter.record is not None else ()
    try:
        found = locate(base, hub, next((file for file in trained_on if file.endswith(".gguf")), None))
    except ModelError as error:
        raise ModelError(f"{name} is an adapter on {base!r}: {error}. {advice}") from error
    if found.kind == "adapter":
        raise ModelError(f"{name} is an adapter on {base!r}, which is an adapter itself. {advice}")
    note = f"{name} is an adapter on {base}"
    if Path(base).expanduser().exists() and not Path(base).is_absolute():
        note += f", found at {found.directory.resolve()}"
    return replace(found, notes=(note, *found.notes))
