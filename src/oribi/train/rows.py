"""The part of the trainer that prepares rows and makes batches of them."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from datasets import Dataset, IterableDataset
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.trainer_utils import PredictionOutput

from oribi.chat.ends import turn_end_id
from oribi.data.collate import PackCollator, PaddedCollator
from oribi.data.encoding import UNTRAINED
from oribi.data.packing import pack
from oribi.data.prepare import PreparedData, prepare_dataset
from oribi.errors import ConfigError, DataError
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.untrained import untrained_token
from oribi.models.unwrap import base_model
from oribi.text import say, say_notes
from oribi.train.arguments import SFTConfig, row_readers
from oribi.train.batches import GroupedByLength, TellsTrainedRows, rank_loader
from oribi.train.guard import require_targets
from oribi.train.setup import temporarily

# these pad a batch into a rectangle and keep given labels: the same loss as one row without padding, for more work
STOCK_PADDERS = (transformers.DataCollatorForSeq2Seq, transformers.DataCollatorWithPadding)
START_BATCHES = 64  # at most, from which EVA begins; it mostly needs fewer
NO_ROWS = (
    "the training stream has no rows. A stream that was read already may be at its end: give one that begins anew at every "
    "pass, as IterableDataset.from_generator makes them. If it filters its rows, all of them were filtered out"
)


class RowsTrainer(Trainer):
    """transformers' `Trainer` with oribi's data preparation and batches.

    Attributes:
        data_reports: what preparation found, for "train" and each evaluation set.
        rows: training rows before packing.
    """

    data_reports: dict[str, Any]
    rows: Any
    own_loss: bool
    _prepared: list[Dataset | IterableDataset]
    _packs: list[tuple[Dataset, Dataset]]  # packed rows, and the examples that they were made of
    _formatting_func: Callable | None

    def _prepare_data(
        self, args: SFTConfig, base: nn.Module, tokenizer: Any, train_dataset: Any, eval_dataset: Any
    ) -> tuple[Any, Any]:
        """Training and evaluation rows as the trainer keeps them, with what there is to say about them."""
        if args.process_index == 0:
            warn_of_same_rows(train_dataset, eval_dataset)
        if prepares_data(args):
            train_dataset = self._prepare_dataset(train_dataset, tokenizer, args, "train")
            if isinstance(eval_dataset, dict):
                eval_dataset = {
                    name: self._prepare_dataset(rows, tokenizer, args, name)
                    for name, rows in eval_dataset.items()
                }
            elif eval_dataset is not None:
                eval_dataset = self._prepare_dataset(eval_dataset, tokenizer, args, "eval")
                keep_held_out_rows(base, eval_dataset)
        if args.process_index == 0:
            warn_of_untrained_ends(base, tokenizer, self.data_reports.get("train"))
        if isinstance(train_dataset, IterableDataset):
            # accelerate would join the batches of several processes along their rows, which breaks packs
            args.accelerator_config.dispatch_batches = False
            if next(iter(train_dataset), None) is None:
                raise DataError(NO_ROWS)
        return train_dataset, eval_dataset

    def _prepare_dataset(
        self, dataset: Any, tokenizer: Any, args: SFTConfig, name: str
    ) -> Dataset | IterableDataset:
        """One data set as prepared rows or packs; what this trainer prepared already is returned as it is."""
        if any(dataset is one for one in self._prepared):
            return dataset
        prepared = dataset
        if not isinstance(dataset, PreparedData):
            prepared = prepare_dataset(
                dataset,
                tokenizer,
                max_seq_length=args.max_length,
                **trained_parts(args),
                text_field=args.dataset_text_field,
                formatting_func=self._formatting_func,
                overlong=args.overlong,
                turns=args.turns,
                num_proc=args.dataset_num_proc,
                progress=not args.disable_tqdm,
                # what is not used of a stream shows only while it is read
                announce=print if isinstance(dataset, IterableDataset) and args.process_index == 0 else None,
            )
        if args.process_index == 0 and all(
            report is not prepared.report for report in self.data_reports.values()
        ):
            say(str(prepared.report))
        self.data_reports[name] = prepared.report
        result = prepared.dataset
        require_targets(result, name)
        if name == "train":
            if args.shuffle_dataset:
                result = result.shuffle(seed=args.seed)
            self.rows = result
        packs = args.packing if name == "train" or args.eval_packing is None else args.eval_packing
        if packs:
            if isinstance(result, IterableDataset):
                raise ConfigError(
                    "packing = True needs the whole data set, and this one is a stream; set packing = False"
                )
            examples, result = result, pack(result, args.max_length, seed=args.seed)
            self._packs.append((result, examples))
        self._prepared.append(result)
        return result

    def _set_signature_columns_if_needed(self) -> None:
        # bounds of the documents in a pack; what else rows have beside ids and labels is for people
        self._signature_columns = ["input_ids", "labels", "seq_lengths"]

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        return super().evaluate(self._evaluation_rows(eval_dataset, "eval"), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> PredictionOutput:
        return super().predict(self._evaluation_rows(test_dataset, "test"), *args, **kwargs)

    def _evaluation_rows(self, dataset: Any, name: str) -> Any:
        """Rows that a call brings, prepared; a name of an evaluation set is kept."""
        if not prepares_data(self.args) or dataset is None or isinstance(dataset, str):
            return dataset
        if isinstance(dataset, dict):
            return {one: self._evaluation_rows(rows, one) for one, rows in dataset.items()}
        return self._prepare_dataset(dataset, self.processing_class, self.args, name)

    def _get_dataloader(
        self, dataset: Any, *args: Any, is_training: bool = False, **kwargs: Any
    ) -> DataLoader:
        if is_training and self.own_loss and not isinstance(self.data_collator, TellsTrainedRows):
            tells = TellsTrainedRows(self.data_collator, base_model(self.model).config.vocab_size)
            with temporarily(self, data_collator=tells):
                return self._get_dataloader(dataset, *args, is_training=is_training, **kwargs)
        build = super()._get_dataloader
        streams = isinstance(dataset, torch.utils.data.IterableDataset)
        # without a count of targets, a row of which nothing is trained would make a mean of nothing
        counted = self.model_accepts_loss_kwargs or self.compute_loss_func is not None
        shared = self.args.world_size > 1 and not (
            self.accelerator.split_batches or self.is_deepspeed_enabled
        )
        context = self.args.context_parallel
        if not (shared and counted and (is_training or streams or context > 1)):
            return build(dataset, *args, is_training=is_training, **kwargs)
        with temporarily(
            self.accelerator,
            prepare=partial(
                rank_loader, self.accelerator, self.args.gradient_accumulation_steps, context, is_training
            ),
        ):
            return build(dataset, *args, is_training=is_training, **kwargs)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        args = self.args
        step_rows = args.train_batch_size * args.gradient_accumulation_steps * row_readers(args)
        return GroupedByLength(sampler, step_rows, args.seed if args.data_seed is None else args.data_seed)


def batches_for_start(rows: Any, trained: int, seed: int) -> list[dict[str, torch.Tensor]]:
    """Rows from which pairs begin (EVA), in an order of the seed, as rectangles with attention_mask.

    Args:
        rows: prepared, before packing. trained: the fewest trained tokens of a batch.

    Raises:
        ConfigError: all rows together have fewer.
    """
    if not isinstance(rows, IterableDataset):
        rows = rows.shuffle(seed=seed)
    groups: list[list[dict[str, Any]]] = []
    group: list[dict[str, Any]] = []
    count = 0
    for row in rows:
        group.append({"input_ids": row["input_ids"], "labels": row["labels"]})
        count += sum(label != UNTRAINED for label in row["labels"])
        if count >= trained:
            groups.append(group)
            group, count = [], 0
        if len(groups) == START_BATCHES:
            break
    if not groups:
        raise ConfigError(
            f"init_lora_weights='eva': the rows have {count} trained tokens, and its pairs need {trained}; lower lora_r, or use True"
        )
    return [PaddedCollator(0)(group) for group in groups]


def prepares_data(args: SFTConfig) -> bool:
    """Whether the trainer prepares its rows; if not, the collator takes them as they are."""
    return not (args.dataset_kwargs or {}).get("skip_prepare_dataset")


def trained_parts(args: SFTConfig) -> dict[str, Any]:
    """What the labels of messages cover, and those of prompt with completion; each follows its own setting."""
    return {
        "train_on": "everything" if args.assistant_only_loss is False else "responses",
        "completion_only": args.completion_only_loss is not False,
    }


def choose_collator(
    collator: Any, args: SFTConfig, base: nn.Module, tokenizer: Any, rows: Any, evaluated: Any
) -> Any:
    """How the examples of a batch are joined.

    Args:
        collator: the caller's, or None.
        args: of the trainer. base: the bare model. tokenizer: its pad token fills rectangles.
        rows: prepared training rows. evaluated: prepared evaluation rows, or a dict of them, or None.

    Raises:
        ConfigError: the caller's collator would train other tokens, or let documents of a row see each other.
    """
    known = known_collator(collator, rows)
    chosen = make_collator(args, base, tokenizer) if known is None else known
    for part in (rows, *(evaluated.values() if isinstance(evaluated, dict) else [evaluated])):
        require_positions(chosen, part, args)
    return chosen


def known_collator(collator: Any, rows: Dataset | IterableDataset | None) -> Any:
    """The caller's collator, or None where oribi's gives the same loss for less work.

    Args:
        collator: what the trainer was given. rows: the prepared rows that it is to join.

    Raises:
        ConfigError: it would train other tokens than the prepared labels say.
    """
    if collator is None or type(collator) in STOCK_PADDERS or collator is transformers.default_data_collator:
        return None
    if type(collator) is not transformers.DataCollatorForLanguageModeling:
        return collator
    if not collator.mlm and isinstance(rows, Dataset) and "labels" in rows.column_names:
        few = rows.select(range(min(len(rows), 100)))
        if all(row["labels"][1:] == row["input_ids"][1:] for row in few):
            return None  # plain text, of which every token is trained either way
    raise ConfigError(
        "DataCollatorForLanguageModeling makes labels of its own, of every token or of masked ones, in place of the prepared "
        "ones, which leave prompts out. Leave out data_collator; to train on every token, set assistant_only_loss = False "
        "and completion_only_loss = False"
    )


def require_positions(collator: Any, rows: Any, args: SFTConfig) -> None:
    """Make sure that documents which lie in one row cannot see each other.

    Args:
        collator: makes the batches. rows: prepared rows, or packs of them. args: padding_free = True joins rows as well.

    Raises:
        ConfigError: the collator drops the documents' bounds.
    """
    if not isinstance(rows, Dataset) or isinstance(collator, (PackCollator, PaddedCollator)):
        return
    packs = "seq_lengths" in rows.column_names
    if not len(rows) or not (packs or args.padding_free):
        return
    what = "packing = True" if packs else "padding_free = True"
    examples = [dict(rows[i]) for i in range(min(len(rows), max(args.per_device_train_batch_size, 2)))]
    try:
        batch = collator(examples)
    except (TypeError, ValueError, KeyError, RuntimeError) as error:
        raise ConfigError(f"{what}, and {type(collator).__name__} fails on such rows: {error}") from error
    positions = batch.get("position_ids")
    told = positions is not None and len(positions) == 1 and batch.get("attention_mask") is None
    if batch.get("cu_seq_lens_q") is None and not told:
        raise ConfigError(
            f"{what}, and batches of {type(collator).__name__} do not say where documents begin: they would see each other. "
            "Leave out data_collator, or let it make one row with position_ids that restart at 0 and without attention_mask"
        )


def pads(args: SFTConfig, base: nn.Module) -> bool:
    """Whether the examples of a batch become a rectangle."""
    # transformers' classes see the documents of a joined row as one text unless flash attention runs them
    return args.padding_free is False or (
        args.padding_free is None and not isinstance(base, DecoderForCausalLM)
    )


def unpack_rectangles(args: SFTConfig, base: nn.Module) -> None:
    """Leave `packing` where examples become rectangles, which cannot keep the documents of a pack apart."""
    if pads(args, base) and (args.packing or args.eval_packing):
        why = "padding_free = False" if args.padding_free is False else f"{type(base).__name__} runs unfused"
        say_notes([f"packing is off: {why}, and padded rows cannot keep the documents of a pack apart"])
        args.packing, args.eval_packing = False, None


def make_collator(args: SFTConfig, base: nn.Module, tokenizer: Any) -> PackCollator | PaddedCollator:
    """How the examples of a batch become one: a row without padding, or a rectangle where that is asked for."""
    pad_id = getattr(tokenizer, "pad_token_id", None)
    pad_id = 0 if pad_id is None else pad_id
    if pads(args, base):
        return PaddedCollator(pad_id, pad_to_multiple_of=args.pad_to_multiple_of)
    multiple = args.pad_to_multiple_of
    if multiple is None and args.packing and base.device.type == "cuda":
        multiple = args.max_length  # packs are almost full, and rows of one length can be replayed as a graph
    return PackCollator(pad_to_multiple_of=multiple, pad_token_id=pad_id)


def warn_of_untrained_ends(base: nn.Module, tokenizer: Any, report: Any) -> None:
    """Say, before training, which token that ends answers the base model never learned, and what to do.

    Args:
        base: the model under PEFT's wrapper.
        tokenizer: of the run.
        report: of the training data; None where it came prepared.
    """
    vocabulary = tokenizer.get_vocab()
    ends = {vocabulary.get(name) for name in getattr(report, "end_tokens", None) or ()}
    if not ends and hasattr(tokenizer, "chat_template"):
        ends = {turn_end_id(tokenizer)}
    for end in ends - {None}:
        why = untrained_token(base, tokenizer, end)
        if why is not None:
            say(
                f"oribi: warning: {tokenizer.convert_ids_to_tokens(end)!r} ends the answers of this data, and the base model "
                f"never learned it: {why}. LoRA on the layers does not change that row, so the model will not stop by itself. "
                "Train the rows too (modules_to_save: [embed_tokens, lm_head]), start from the instruct model, or take a "
                "chat template whose end the base knows"
            )


def warn_of_same_rows(trained: Any, evaluated: Any) -> None:
    """Say it where a trainer evaluates on the rows that it trains on."""
    parts = evaluated if isinstance(evaluated, dict) else {"eval_dataset": evaluated}
    for name, rows in parts.items():
        same_rows = (
            isinstance(rows, Dataset)
            and isinstance(trained, Dataset)
            and rows._fingerprint == trained._fingerprint
        )
        if rows is not None and (rows is trained or same_rows):
            say(
                f"oribi: {name} holds the rows of train_dataset, so its loss does not show how the model does on other rows"
            )


def keep_held_out_rows(base: nn.Module, rows: Dataset | IterableDataset) -> None:
    """Leave a few evaluation rows on the model, for exports to be compared on."""
    if hasattr(base, "oribi") and isinstance(rows, Dataset):
        base.oribi.held_out = [
            {name: row[name] for name in ("input_ids", "labels") if name in row}
            for row in rows.select(range(min(len(rows), 32)))
        ]
