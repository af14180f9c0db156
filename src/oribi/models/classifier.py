"""A sequence classifier, or reward model, of any family of the table: scores of labels in place of the next token's logits.

B rows, S tokens per row, D hidden size, N labels. Names, pooling and losses are those of transformers' classes
(`LlamaForSequenceClassification` and the like), so a saved classifier loads there.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PretrainedConfig
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from oribi.errors import ModelError
from oribi.models.decoder import CACHE, DecoderModel, build
from oribi.models.labels import PROBLEMS
from oribi.models.pretrained import DecoderPreTrainedModel
from oribi.models.wrapper import classifier_class
from oribi.tensors import TensorSource

_SEED = 3407  # of a head that the checkpoint does not hold


class DecoderForSequenceClassification(DecoderPreTrainedModel):
    """A classifier of any family of the table; `build_classifier` makes one."""

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = DecoderModel(config)
        self.score = nn.Linear(config.hidden_size, config.num_labels, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        return_dict: bool | None = None,
        **inputs: Any,
    ) -> SequenceClassifierOutputWithPast | tuple:
        """Loss and scores of a batch, read at each row's last token that is not the padding token.

        Args:
            input_ids: [B, S] int64, padded on either side with `config.pad_token_id`.
            attention_mask: [B, S] of 0 and 1.
            labels: [B] int64 numbers of labels; [B] floats of a regression; [B, N] floats of 0 and 1 of several labels.
            num_items_in_batch: what the summed loss is divided by; None divides by this batch's labels.
            return_dict: False gives a tuple.
            inputs: others of `DecoderForCausalLM.forward`. The scores of inputs_embeds are those of the last place.

        Returns:
            loss (scalar or None), logits [B, N], the cache, hidden_states.

        Raises:
            ModelError: an argument is unknown, or several rows are given and no padding token is set.
        """
        outputs = self.model(input_ids=input_ids, attention_mask=attention_mask, return_dict=True, **inputs)
        hidden = outputs.last_hidden_state
        rows = torch.arange(len(hidden), device=hidden.device)
        hidden = hidden[rows, self._last_places(input_ids, len(hidden))]
        logits = self.score(hidden.to(self.score.weight.dtype))  # a head that is trained is float32
        output = SequenceClassifierOutputWithPast(
            loss=None if labels is None else self._loss(logits, labels.to(logits.device), num_items_in_batch),
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE: getattr(outputs, CACHE)},
        )
        return output if self._returns_dict(return_dict) else output.to_tuple()

    def _last_places(self, input_ids: torch.Tensor | None, rows: int) -> torch.Tensor | int:
        """Index [B] of each row's last token other than padding; of a row that is all padding the first, as in transformers."""
        pad = self.config.pad_token_id
        if pad is None and rows > 1:
            raise ModelError(
                "model.config.pad_token_id is not set, so the ends of several rows are not known; set it to the tokenizer's"
            )
        if pad is None or input_ids is None:
            return -1
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return (places * (input_ids != pad)).argmax(-1)

    def _loss(
        self, logits: torch.Tensor, labels: torch.Tensor, divisor: torch.Tensor | int | None
    ) -> torch.Tensor:
        problem = self.config.problem_type
        if problem is None:
            whole = labels.dtype in (torch.int64, torch.int32)
            problem = PROBLEMS[2] if self.num_labels == 1 else PROBLEMS[0] if whole else PROBLEMS[1]
            self.config.problem_type = problem
        logits = logits.float()
        if problem == "single_label_classification":
            labels = labels.view(-1)
            total = F.cross_entropy(logits, labels, reduction="sum")
            count = (labels != -100).sum()
        else:
            logits = logits.squeeze(-1) if self.num_labels == 1 else logits
            labels = labels.view(logits.shape).float()
            loss = F.mse_loss if problem == "regression" else F.binary_cross_entropy_with_logits
            total, count = loss(logits, labels, reduction="sum"), labels.numel()
        return total / (count if divisor is None else divisor)


def build_classifier(
    config: PretrainedConfig, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "meta"
) -> DecoderForSequenceClassification:
    """A classifier for a config that holds labels; arguments as of `decoder.build`.

    Raises:
        ModelError: the table has no row for this config, or transformers no classifier, which exports need.
    """
    return build(
        config, dtype=dtype, device=device, kind=DecoderForSequenceClassification,
        name=classifier_class(config).__name__,
    )  # fmt: skip


class WithScore:
    """A checkpoint as a classifier reads it: without the head of a language model, and with scores where it has none.

    Args:
        source: the checkpoint.
        config: holds the labels.

    Raises:
        ModelError: the checkpoint has scores for other labels.
    """

    NAME = "score.weight"

    def __init__(self, source: TensorSource, config: PretrainedConfig) -> None:
        self._source = source
        self._shape = (config.num_labels, config.hidden_size)
        self._std = getattr(config, "initializer_range", 0.02)
        stored = source.shapes().get(self.NAME)
        self.is_new = stored is None
        if stored is not None and tuple(stored) != self._shape:
            raise ModelError(
                f"the checkpoint is a classifier of {stored[0]} labels, and {config.num_labels} are asked for; leave "
                "num_labels, id2label and label2id out, or start from a model without scores"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        stored = {k: v for k, v in self._source.shapes().items() if not k.startswith("lm_head.")}
        return stored | {self.NAME: self._shape}

    def read(self, name: str, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        if name != self.NAME or not self.is_new:
            return self._source.read(name, device, dtype)
        generator = torch.Generator().manual_seed(_SEED)
        return (torch.randn(self._shape, generator=generator) * self._std).to(device=device, dtype=dtype)

    def close(self) -> None:
        self._source.close()
