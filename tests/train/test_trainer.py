"""SFTTrainer: what it trains on, what it divides by, and what it leaves as it found it."""

import dataclasses
import json
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    DataCollatorForSeq2Seq,
    GPT2Config,
    GPT2LMHeadModel,
    TrainerCallback,
    TrainingArguments,
)

import oribi
from oribi.compat.responses_only import train_on_responses_only
from oribi.compat.trainer_names import UnslothTrainer, UnslothTrainingArguments, unsloth_train
from oribi.data.collate import PackCollator, PaddedCollator
from oribi.data.prepare import prepare_dataset
from oribi.errors import ConfigError, DataError, OribiError
from oribi.kernels.adamw import FlatAdamW
from oribi.train.arguments import SFTConfig, adopt
from oribi.train.trainer import SFTTrainer

SEQUENTIAL = {"train_sampling_strategy": "sequential", "lr_scheduler_type": "constant", "warmup_steps": 0}


@pytest.fixture
def make(load, tmp_path):
    """A trainer on the tiny model; keywords go to SFTConfig, `extra` to SFTTrainer."""

    def make_trainer(rows, extra=None, model=None, folder="run", **settings) -> SFTTrainer:
        model, tokenizer = load() if model is None else model
        settings = {
            "max_steps": 3,
            "learning_rate": 1e-3,
            "disable_tqdm": True,
            "save_strategy": "no",
            **settings,
        }
        args = SFTConfig(output_dir=str(tmp_path / folder), **settings)
        return SFTTrainer(model, args, train_dataset=rows, tokenizer=tokenizer, **(extra or {}))

    return make_trainer


def trained(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def assert_same(left: dict, right: dict, **tolerance) -> None:
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(
            left[name], right[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_training_lowers_the_loss_and_logs_every_step(make, conversations, tmp_path):
    trainer = make(conversations, max_steps=20, learning_rate=5e-3)
    stats = trainer.train()
    losses = losses_of(trainer)
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5
    assert stats.metrics["train_runtime"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines[:20]] == list(range(1, 21))
    assert {"loss", "learning_rate", "tokens_per_second", "grad_norm", "num_tokens"} <= lines[0].keys()


def test_one_process_trains_on_one_of_several_gpus(load, conversations, tmp_path, caplog):
    model, tokenizer = load()
    args = SFTConfig(output_dir=str(tmp_path), max_steps=1, disable_tqdm=True, save_strategy="no")
    assert args.n_gpu == 0
    args._n_gpu = 2  # what transformers finds where two are visible
    with caplog.at_level(logging.INFO, logger="oribi.train.setup"):
        trainer = SFTTrainer(model, args, train_dataset=conversations, tokenizer=tokenizer)
    assert "torchrun --nproc-per-node 2" in caplog.text
    trainer.train()
    assert trainer.model_wrapped is trainer.model
    assert len(losses_of(trainer)) == 1


def test_a_checkpoint_asks_nobody_whether_the_vocabulary_grew(make, conversations, monkeypatch):
    trainer = make(conversations, max_steps=1, save_strategy="steps", save_steps=1)

    def asked(*_):
        raise AssertionError("PEFT asked the hub")

    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", asked)
    trainer.model.peft_config["default"].base_model_name_or_path = "/nowhere/model.gguf"
    trainer.train()
    assert "save_pretrained" not in vars(trainer.model)
    (saved,) = Path(trainer.args.output_dir).glob("checkpoint-1/adapter_model.safetensors")
    assert saved.stat().st_size


def test_rows_show_ids_and_exact_labels(make, conversations):
    trainer = make(conversations)
    tokenizer, row = trainer.processing_class, trainer.train_dataset[3]
    labels = [i for i in row["labels"] if i != -100]
    answer = conversations[3]["messages"][1]["content"]
    assert tokenizer.decode(labels) == answer + "<|im_end|>"
    assert tokenizer.decode(row["input_ids"]).startswith("<|im_start|>user\n")
    assert trainer.data_reports["train"].rows_kept == 24


def test_asking_for_every_message_trains_every_token(make, conversations):
    trainer = make(conversations, assistant_only_loss=False)
    row = trainer.train_dataset[0]
    assert row["labels"] == row["input_ids"]


def test_a_step_does_not_depend_on_how_its_batch_is_cut(make, load, conversations):
    """Six examples as one batch, as six, and as three pairs: the loss is divided by the targets of the whole step."""
    results = []
    for batch, accumulation in ((6, 1), (1, 6), (2, 3)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        trainer = make(
            conversations.select(range(6)), optim="adamw_torch", max_steps=1, **sizes, **SEQUENTIAL
        )
        trainer.train()
        results.append((losses_of(trainer)[0], trained(trainer.model)))
    for loss, weights in results[1:]:
        assert loss == pytest.approx(results[0][0], rel=1e-5)
        assert_same(weights, results[0][1], rtol=1e-4, atol=2e-6)


def test_packs_rows_and_rectangles_train_the_same(make, conversations):
    rows = conversations.select(range(8))
    whole = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 2, **SEQUENTIAL}
    joined, padded = make(rows, **whole), make(rows, padding_free=False, **whole)
    packed = make(rows, packing=True, **whole)
    assert isinstance(joined.data_collator, PackCollator)
    assert isinstance(padded.data_collator, PaddedCollator)
    assert len(packed.train_dataset) < 8
    for trainer in (joined, padded, packed):
        trainer.train()
    assert losses_of(padded) == pytest.approx(losses_of(joined), rel=1e-5)
    assert losses_of(packed) == pytest.approx(losses_of(joined), rel=1e-5)


def test_lora_stays_float32_and_the_model_keeps_its_forward(make, load, conversations):
    model, tokenizer = load()
    before = trained(model)
    trainer = make(conversations, model=(model, tokenizer))
    assert model.get_base_model().is_loaded_in_4bit
    assert_same(trained(trainer.model), before, rtol=0, atol=0)
    assert {p.dtype for p in trained(trainer.model).values()} == {torch.float32}
    assert "forward" not in vars(model.get_base_model())
    assert "get_output_embeddings" not in vars(model.get_base_model())


WITHOUT_TRL = """
import json, socket, sys
sys.modules["trl"] = None  # imports of it fail
def refuse(*arguments, **keywords):
    raise AssertionError(f"network: {arguments}")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
import oribi
from datasets import Dataset
model, tokenizer = oribi.FastLanguageModel.from_pretrained(sys.argv[1], dtype="float32", max_seq_length=128)
args = oribi.SFTConfig(output_dir=sys.argv[2], max_steps=2, disable_tqdm=True, save_strategy="no")
rows = Dataset.from_list([{"text": "the red fox runs"}] * 8)
trainer = oribi.SFTTrainer(oribi.FastLanguageModel.get_peft_model(model, r=4), args, train_dataset=rows, tokenizer=tokenizer)
trainer.train()
print(json.dumps([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
"""


def test_training_needs_neither_trl_nor_the_network(tiny_folder, tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRL, str(tiny_folder), str(tmp_path)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    losses = json.loads(done.stdout.splitlines()[-1])
    assert len(losses) == 2
    assert losses[1] < losses[0]


def test_fields_of_trls_config_are_taken_with_their_meaning(make, conversations):
    """Every field exists here; one that oribi does not honour is refused or named."""
    names = {f.name for f in dataclasses.fields(trl.SFTConfig)}
    assert names <= {f.name for f in dataclasses.fields(SFTConfig)}
    config = SFTConfig(pad_to_multiple_of="auto", loss_type="chunked_nll")
    assert (config.pad_to_multiple_of, config.loss_type) == (None, "nll")
    assert SFTConfig(pad_to_multiple_of="64").pad_to_multiple_of == 64
    texts = Dataset.from_list([{"text": f"the fox {i}"} for i in range(9)])
    plain, shuffled = make(texts).train_dataset, make(texts, shuffle_dataset=True).train_dataset
    assert shuffled["input_ids"] != plain["input_ids"]
    assert sorted(shuffled["input_ids"]) == sorted(plain["input_ids"])


def test_what_is_not_used_is_named_once(make, conversations, caplog, tmp_path):
    make(conversations, model_init_kwargs={"revision": "main"}, dataset_kwargs={"add_special_tokens": False})
    theirs = trl.DPOConfig(output_dir=str(tmp_path), beta=0.3, bf16=False, report_to="none", use_cpu=True)
    adopt(theirs)
    for said in (
        "model_init_kwargs is not used",
        "dataset_kwargs: add_special_tokens",
        "does not use: beta = 0.3",
    ):
        assert caplog.text.count(said) == 1, said


def test_a_model_outside_the_table_trains_on_its_own_loss(make, load, conversations, capsys):
    """It divides by the targets of the whole step, and its adapter stays in float32."""
    tokenizer = load(lora=False)[1]
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "n_positions": 128, "n_embd": 32, "n_layer": 1, "n_head": 2}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(**sizes, **dropout, bos_token_id=0, eos_token_id=0)
    model = GPT2LMHeadModel(config)
    lora = LoraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)
    sizes = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "packing": True,
    }
    trainer = make(conversations, {"peft_config": lora}, model=(model, tokenizer), **sizes, **SEQUENTIAL)
    assert "packing is off: GPT2LMHeadModel runs unfused" in capsys.readouterr().out
    rows = PaddedCollator(0)(list(trainer.train_dataset.select(range(6))))
    with torch.no_grad():
        expected = trainer.model.eval()(**rows).loss.item()
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(expected, rel=1e-5)
    assert {p.dtype for p in trained(trainer.model).values()} == {torch.float32}
    with pytest.raises(ConfigError, match="has an adapter already"):
        make(conversations, {"peft_config": lora}, model=(trainer.model, tokenizer))


def test_arguments_come_out_of_the_constructor_as_they_went_in(make, conversations):
    args = make(conversations, packing=True, padding_free=None, assistant_only_loss=True).args
    assert (args.packing, args.padding_free, args.assistant_only_loss) == (True, None, True)
    assert args.max_length == 128  # of the model


def test_older_keywords_of_the_trainer_are_arguments(make, conversations, load, tmp_path):
    model, tokenizer = load()
    rows = Dataset.from_dict({"story": ["the red fox " * 40] * 4})
    trainer = SFTTrainer(
        model=model,
        tokenizer=tokenizer,
        train_dataset=rows,
        dataset_text_field="story",
        max_seq_length=32,
        dataset_num_proc=2,
        packing=False,
        args=TrainingArguments(output_dir=str(tmp_path), max_steps=1, report_to="none"),
    )
    assert [len(row["input_ids"]) for row in trainer.train_dataset] == [32] * 4
    assert isinstance(trainer.args, SFTConfig)
    assert trainer.args.dataset_num_proc == 2


BOTH = {
    "messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
    "text": "the red fox",
}
TEXT, ANSWER = "the red fox<|im_end|>", "a<|im_end|>"


@pytest.mark.parametrize(
    ("where", "field", "trained"),
    [
        ("nowhere", None, ANSWER),
        ("arguments", "text", TEXT),
        ("keyword", "text", TEXT),
        ("TRL's arguments", None, ANSWER),  # these train prompts, too
        ("TRL's arguments", "story", TEXT),
    ],
)
def test_messages_go_before_text_unless_the_script_asks_for_it(load, tmp_path, where, field, trained):
    model, tokenizer = load()
    asked = {} if field is None else {"dataset_text_field": field}
    rows = Dataset.from_list([BOTH | {"story": BOTH["text"]}] * 2)
    kind = trl.SFTConfig if where == "TRL's arguments" else SFTConfig
    given = {} if where == "keyword" else asked
    args = kind(output_dir=str(tmp_path), max_steps=1, report_to="none", use_cpu=True, bf16=False, **given)
    keywords = asked if where == "keyword" else {}
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer, **keywords)
    labels = [label for label in trainer.train_dataset[0]["labels"] if label != -100]
    said = tokenizer.decode(labels)
    assert (trained in said, "red fox" in said) == (True, trained == TEXT)
    unused = trainer.data_reports["train"].unused_columns
    assert ("messages" in unused, "text" in unused) == (trained == TEXT, field != "text")


def test_contradictions_are_refused(make, load, conversations, tmp_path):
    model, tokenizer = load()
    with pytest.raises(ConfigError, match="tokenizer and processing_class"):
        SFTTrainer(model, train_dataset=conversations, tokenizer=tokenizer, processing_class=load()[1])
    with pytest.raises(ConfigError, match="tokenizer is missing"):
        SFTTrainer(model, train_dataset=conversations)
    with pytest.raises(ConfigError, match="train_dataset is missing"):
        SFTTrainer(model, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="quantization_config is not taken here"):
        SFTTrainer(model, train_dataset=conversations, tokenizer=tokenizer, quantization_config={})
    with pytest.raises(ConfigError, match="max_seq_length and max_length name one setting and differ"):
        oribi.SFTConfig(max_length=64, max_seq_length=32)
    with pytest.raises(ConfigError, match="warmup_ratio = 1.5"):
        oribi.SFTConfig(warmup_ratio=1.5)
    with pytest.raises(ConfigError, match="loss_type = 'dft'"):
        make(conversations, loss_type="dft")
    with pytest.raises(ConfigError, match="fp16 = True, but the model was loaded in bfloat16"):
        make(conversations, fp16=True, model=load(dtype="bfloat16"))
    with pytest.raises(ConfigError, match="bf16 = True, but the model was loaded in float16"):
        make(conversations, bf16=True, model=load(dtype="float16"))


def test_a_stock_padder_becomes_one_row_and_an_own_collator_stays(make, load, conversations):
    model, tokenizer = load()
    collator = DataCollatorForSeq2Seq(tokenizer=tokenizer)
    trainer = make(conversations, {"data_collator": collator}, model=(model, tokenizer))
    assert isinstance(trainer.data_collator, PackCollator)
    own = PaddedCollator(0)
    assert make(conversations, {"data_collator": own}).data_collator is own


@pytest.mark.parametrize(
    ("optim", "bits"), [("adamw_8bit", 8), ("paged_adamw_32bit", 32), ("adamw_torch", None)]
)
def test_optimizers_by_name(make, conversations, optim, bits):
    trainer = make(conversations, optim=optim)
    optimizer = trainer.create_optimizer()
    if bits is None:
        assert type(optimizer) is torch.optim.AdamW
    else:
        assert isinstance(optimizer, FlatAdamW)
        assert optimizer.bits == bits


def test_the_flat_optimizer_clips_as_torch_does(make, conversations):
    norms, weights = [], []
    for optim in ("paged_adamw_32bit", "adamw_torch"):
        trainer = make(conversations, optim=optim, max_grad_norm=0.05, **SEQUENTIAL)
        trainer.train()
        norms.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
        weights.append(trained(trainer.model))
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert min(norms[0]) > 0.05
    assert_same(*weights, rtol=1e-4, atol=1e-5)


def test_evaluation_counts_every_target_once(make, load, conversations):
    """The evaluation loss is the mean over all targets, however unequal the batches are."""
    model, tokenizer = load()
    held_out = conversations.select(range(7))
    trainer = make(
        conversations, {"eval_dataset": held_out}, model=(model, tokenizer), per_device_eval_batch_size=3
    )
    found = trainer.evaluate()["eval_loss"]
    rows = list(
        prepare_dataset(held_out, tokenizer, max_seq_length=128, announce=None, progress=False).dataset
    )
    with torch.no_grad():
        expected = model.eval()(**PackCollator()(rows)).loss.item()
    assert found == pytest.approx(expected, rel=1e-5)
    assert trainer.evaluate(conversations)["eval_loss"] != pytest.approx(
        expected, rel=1e-3
    )  # rows not yet prepared


def test_metrics_of_logits_get_logits(make, conversations):
    seen = {}

    def count(prediction):
        seen["shape"] = prediction.predictions.shape
        return {"seen": 1.0}

    trainer = make(
        conversations,
        {"eval_dataset": conversations.select(range(2)), "compute_metrics": count},
        per_device_eval_batch_size=2,
    )
    assert trainer.evaluate()["eval_seen"] == 1.0
    assert seen["shape"][-1] == 512


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch"])
def test_a_resumed_run_ends_bit_for_bit_as_one_that_never_stopped(make, conversations, optim):
    settings = {
        "optim": optim, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2, "warmup_steps": 2, "neftune_noise_alpha": 5.0,
    }  # fmt: skip
    whole = make(conversations, folder="whole", **settings)
    whole.train()
    resumed = make(conversations, folder="resumed", **settings)
    resumed.train(resume_from_checkpoint=str(whole.args.output_dir) + "/checkpoint-3")
    assert resumed.state.global_step == 6
    assert_same(trained(resumed.model), trained(whole.model), rtol=0, atol=0)
    assert losses_of(resumed)[-3:] == losses_of(whole)[-3:]


def test_embeddings_learn_at_their_own_rate(make, load, conversations):
    from oribi.lora.attach import attach_lora

    model, tokenizer = load(lora=False)
    model = attach_lora(model, r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens", "lm_head"])
    trainer = make(
        conversations,
        model=(model, tokenizer),
        embedding_learning_rate=1e-5,
        learning_rate=1e-3,
        weight_decay=0.1,
    )
    groups = {group["lr"]: group["params"] for group in trainer.create_optimizer().param_groups}
    assert set(groups) == {1e-3, 1e-5}
    assert {p.shape for p in groups[1e-5]} == {(512, 64)}
    assert len(groups[1e-3]) == 4  # A and B of two layers
    assert all(p.dtype == torch.float32 for p in groups[1e-5])


def test_an_adapted_head_is_trained(make, load, conversations):
    from oribi.lora.attach import attach_lora

    model, tokenizer = load(lora=False)
    model = attach_lora(model, r=4, target_modules=["q_proj", "lm_head"], use_gradient_checkpointing=False)
    before = trained(model)
    trainer = make(conversations, model=(model, tokenizer))
    trainer.train()
    moved = [name for name, p in trained(model).items() if not torch.equal(p, before[name])]
    assert any("lm_head" in name and "lora_B" in name for name in moved)


def test_noise_is_that_of_each_document_and_ends_with_training(make, conversations):
    """NEFTune's noise has size alpha / sqrt(length * D) with the length of a document, not of the row it lies in."""
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(trainer._noise.lengths.flatten().tolist())

    trainer = make(
        conversations, {"callbacks": [Watch()]}, neftune_noise_alpha=8.0, max_steps=1, **SEQUENTIAL
    )
    embedding = trainer.model.get_input_embeddings()
    ids = torch.tensor([[5, 6, 7]])
    clean = embedding(ids)
    trainer.train()
    rows = [len(row["input_ids"]) for row in trainer.train_dataset.select(range(6, 8))]
    assert seen == [[float(n) for n in rows for _ in range(n)]]
    trainer.model.train()
    assert torch.equal(embedding(ids), clean)


def test_noise_of_an_embedding_is_bounded_by_its_size():
    from oribi.train.step import EmbeddingNoise

    embedding = torch.nn.Embedding(10, 16)
    noise = EmbeddingNoise(embedding, alpha=8.0)
    ids = torch.arange(6)[None] % 10
    noise.measure({"input_ids": ids, "cu_seq_lens_q": torch.tensor([0, 4, 6], dtype=torch.int32)})
    added = (embedding(ids) - embedding.weight[ids]).abs().amax(-1)[0]
    bound = 8.0 / torch.tensor([4 * 16.0] * 4 + [2 * 16.0] * 2).sqrt()
    assert torch.all(added <= bound)
    assert torch.all(added > 0.5 * bound)
    embedding.eval()
    assert torch.equal(embedding(ids), embedding.weight[ids])


def test_a_loss_that_is_no_number_stops_the_run(make, conversations):
    trainer = make(conversations)
    with torch.no_grad():
        next(p for n, p in trainer.model.named_parameters() if "lora_A" in n).fill_(math.nan)
    with pytest.raises(OribiError, match="the loss is nan at step 1"):
        trainer.train()


def test_data_that_trains_nothing_stops_before_training(make, conversations):
    rows = Dataset.from_dict({"input_ids": [[5, 6, 7]] * 2, "labels": [[-100] * 3] * 2})
    with pytest.raises(DataError, match="no token"):
        make(rows)
    trainer = make(conversations)
    trainer.train_dataset = rows
    with pytest.raises(DataError, match="no token of the train data would be trained"):
        trainer.train()
    trainer.train_dataset = rows.select([])
    with pytest.raises(DataError, match="no rows left"):
        trainer.train()


def test_responses_only_narrows_the_labels_of_a_trainer(make, load, conversations):
    model, tokenizer = load()
    texts = [tokenizer.apply_chat_template(row["messages"], tokenize=False) for row in conversations]
    trainer = make(Dataset.from_dict({"text": texts}), model=(model, tokenizer))
    assert -100 not in trainer.train_dataset[0]["labels"]
    trainer = train_on_responses_only(trainer)
    row = trainer.train_dataset[3]
    assert tokenizer.decode([i for i in row["labels"] if i != -100]).startswith(
        conversations[3]["messages"][1]["content"]
    )
    trainer.train()
    assert len(losses_of(trainer)) == 3


def test_a_step_runner_takes_the_place_of_forward_and_backward(make, conversations):
    trainer, calls = make(conversations, max_steps=2, gradient_accumulation_steps=3), []

    def runner(model, inputs, targets):
        calls.append(int(targets))
        loss = model(**inputs, num_items_in_batch=targets).loss
        loss.backward()
        return loss.detach()

    trainer.step_runner = runner
    trainer.train()
    assert len(calls) == 6
    assert calls[0] == calls[1] == calls[2] != 0


def test_a_step_without_targets_is_no_error(make):
    ids = [[5, 6, 7, 8]] * 4
    rows = Dataset.from_dict({"input_ids": ids, "labels": [[-100] * 4] * 2 + [[-100, 6, 7, 8]] * 2})
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "max_steps": 2}
    trainer = make(rows, dataset_kwargs={"skip_prepare_dataset": True}, **sizes, **SEQUENTIAL)
    trainer.train()
    losses = losses_of(trainer)
    assert losses[0] == 0.0
    assert losses[1] > 0


def test_arguments_of_other_libraries_are_taken_over(tmp_path):
    theirs = trl.SFTConfig(
        output_dir=str(tmp_path), max_length=99, bf16=False, learning_rate=3e-5, report_to="none"
    )
    ours = adopt(theirs)
    assert (ours.max_length, ours.learning_rate, ours.gradient_checkpointing) == (99, 3e-5, True)
    assert adopt({"max_steps": 7}).max_steps == 7
    assert adopt(ours) is ours


def test_scripts_for_other_libraries_find_their_names(load, conversations, tmp_path):
    model, tokenizer = load()
    args = UnslothTrainingArguments(
        output_dir=str(tmp_path), max_steps=1, embedding_learning_rate=1e-5, bf16=True, disable_tqdm=True
    )
    trainer = UnslothTrainer(model=model, tokenizer=tokenizer, train_dataset=conversations, args=args)
    assert unsloth_train(trainer).global_step == 1


def test_a_streamed_data_set_trains_and_is_not_packed(make, conversations):
    stream = conversations.to_iterable_dataset()
    with pytest.raises(ConfigError, match="packing = True needs the whole data set"):
        make(stream, packing=True)
    trainer = make(stream, max_steps=2)
    trainer.train()
    assert len(losses_of(trainer)) == 2
