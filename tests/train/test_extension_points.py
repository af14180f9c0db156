"""What a user puts in the way of a step is never skipped, and each setting decides for its own rows."""

import itertools
import re

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, PromptTuningConfig, TaskType, get_peft_model
from transformers import Trainer

from oribi.errors import ConfigError, ModelError
from oribi.train import step as step_module
from oribi.train.arguments import adopt
from oribi.train.graphs import ModelWatch, StepGraphs, changed_step
from oribi.train.trainer import SFTTrainer
from tests.models.tiny import tiny_config, tiny_pair
from tests.train.conftest import some_conversations

IDS = torch.randint(5, 120, (2, 9), generator=torch.Generator().manual_seed(2))


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def replayed(monkeypatch):
    """Steps that a GPU would record run through StepGraphs here, each as its first, unrecorded run."""
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(step_module, "reason_against", lambda *given: None)
    monkeypatch.setattr(StepGraphs, "_record", lambda self, *given: None)
    calls = []
    real = StepGraphs.__call__
    monkeypatch.setattr(StepGraphs, "__call__", lambda self, *given: calls.append(1) or real(self, *given))
    return calls


class TenTimes(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (10 * loss, outputs) if return_outputs else 10 * loss


class OwnInputs(SFTTrainer):
    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs(inputs)


class OwnAutocast(SFTTrainer):
    def compute_loss_context_manager(self):
        return super().compute_loss_context_manager()


def test_steps_are_recorded_where_nothing_is_the_users(make, replayed):
    make().train()
    assert replayed


def test_a_loss_of_the_users_is_called_where_steps_would_be_recorded(make, replayed):
    plain, tenfold, smoothed = make(), make(cls=TenTimes), make(label_smoothing_factor=0.3)
    for trainer in (plain, tenfold, smoothed):
        trainer.train()
    assert losses_of(tenfold)[0] == pytest.approx(10 * losses_of(plain)[0], rel=1e-5)
    assert losses_of(smoothed)[0] != pytest.approx(losses_of(plain)[0], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_stops_replaying_steps_when_a_hook_is_added(make, load, caplog):
    seen = []

    class Later(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            if state.global_step == 4:
                self.recorded = any(trainer.step_runner._recorded.values())
                mlp = trainer.model.get_base_model().model.layers[1].mlp
                mlp.register_forward_hook(lambda *given: seen.append(state.global_step))

    later = Later()
    rows = Dataset.from_list([{"text": "the red fox runs"}] * 64)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 6}
    loaded = load(device_map="cuda", dtype="bfloat16")
    trainer = make(rows, {"callbacks": [later]}, model=loaded, **sizes)
    trainer.train()
    assert later.recorded
    assert seen == [4, 4, 5, 5]
    assert "has a hook" in caplog.text
    tenfold = make(rows, cls=TenTimes, model=load(device_map="cuda", dtype="bfloat16"), **sizes)
    tenfold.train()
    assert losses_of(tenfold)[0] == pytest.approx(10 * losses_of(trainer)[0], rel=1e-2)


def add_hook(trainer):
    trainer.model.get_base_model().model.layers[1].mlp.register_forward_hook(lambda *given: None)


def add_gradient_hook(trainer):
    next(p for p in trainer.model.parameters() if p.requires_grad).register_hook(lambda grad: grad)


def replace_forward(trainer):
    layer = trainer.model.get_base_model().model.layers[0]
    layer.forward = layer.forward


def own_module(trainer):
    class Mine(torch.nn.Identity):
        pass

    trainer.model.get_base_model().model.layers[0].mine = Mine()


def scale(trainer):
    next(m for m in trainer.model.modules() if hasattr(m, "set_scale")).set_scale("default", 3.0)


def freeze(trainer):
    next(p for p in trainer.model.parameters() if p.requires_grad).requires_grad_(False)


def own_loss_function(trainer):
    trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch=None: outputs.logits.mean()


LATER = {
    "has a hook": add_hook,
    "hook on its gradient": add_gradient_hook,
    "forward of .* was replaced": replace_forward,
    "switched, scaled": scale,
    "frozen or unfrozen": freeze,
    "compute_loss_func is given": own_loss_function,
}


@pytest.mark.parametrize("said", LATER)
def test_what_is_added_between_two_steps_ends_the_replay_with_the_reason(make, replayed, caplog, said):
    change = LATER[said]

    class Later(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            if state.global_step == 1:
                change(trainer)
                self.before = len(replayed)

    later = Later()
    trainer = make(extra={"callbacks": [later]}, max_steps=3)
    trainer.train()
    assert later.before == len(replayed) > 0
    warned = [
        record.getMessage()
        for record in caplog.records
        if "no CUDA graphs from step 2 on" in record.getMessage()
    ]
    assert len(warned) == 1
    assert re.search(said, warned[0])


def test_each_reason_of_the_trainer_and_of_the_model_is_said(make, load):
    for cls, said in (
        (TenTimes, "compute_loss is"),
        (OwnInputs, "_prepare_inputs is"),
        (OwnAutocast, "context_manager is"),
    ):
        assert said in changed_step(make(cls=cls))
    assert changed_step(make()) is None
    assert "torch_empty_cache_steps" in changed_step(make(torch_empty_cache_steps=1))
    trainer = make()
    assert ModelWatch(trainer.model).reason() is None
    own_module(trainer)
    assert "is a Mine of your own" in ModelWatch(trainer.model).reason()
    watch = ModelWatch(make().model)
    with torch.autograd.detect_anomaly(check_nan=False):
        assert "anomaly" in watch.reason()
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *given: None)
    try:
        assert watch.hooked()
        assert "all modules" in watch.reason()
    finally:
        handle.remove()
    assert not watch.hooked()


@pytest.mark.parametrize(
    "path", ["self_attn", "mlp", "mlp.down_proj", "mlp.down_proj.lora_A.default", "post_attention_layernorm"]
)
def test_a_hook_inside_a_layer_sees_training_forwards(load, path):
    """The layer that is differentiated by hand calls none of its modules."""
    model = load()[0].train()
    batch = {"input_ids": IDS, "labels": IDS}
    plain = model(**batch).loss
    seen = []
    module = model.get_base_model().model.layers[1].get_submodule(path)
    module.register_forward_hook(lambda *given: seen.append(1))
    assert model(**batch).loss.item() == pytest.approx(plain.item(), rel=1e-5)
    assert seen


def test_a_norm_clipped_by_the_user_is_not_clipped_again(make):
    class OwnClipping(SFTTrainer):
        def _clip_grad_norm(self, model):
            return torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)

    assert make(cls=OwnClipping).create_optimizer().max_grad_norm is None
    assert make().create_optimizer().max_grad_norm == 1.0


def test_an_optimizer_class_of_the_users_is_taken(make):
    given = {"optimizer_cls_and_kwargs": (torch.optim.SGD, {"lr": 0.1})}
    assert type(make(extra=given).create_optimizer()) is torch.optim.SGD


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("activation_offloading", True),
        ("chat_template_path", "template.jinja"),
        ("eos_token", "</s>"),
        ("packing_strategy", "wrapped"),
        ("truncation_mode", "keep_end"),
        ("pad_token", "<pad>"),
        ("router_aux_loss_coef", 0.01),
        ("use_liger_kernel", True),
    ],
)
def test_settings_of_trl_that_are_not_done_are_refused(make, load, name, value):
    with pytest.raises(ConfigError, match=f"{name} = {value!r}"):
        make(packing=True, **{name: value})


def test_no_load_balancing_loss_is_what_oribi_does(make, load, capsys):
    assert make(router_aux_loss_coef=0.0).args.router_aux_loss_coef == 0
    model, tokenizer = load()
    model.config.output_router_logits = True
    make(model=(model, tokenizer))
    assert "output_router_logits in the model's config has no effect" in capsys.readouterr().out


def prompt_rows(conversational: bool) -> Dataset:
    row = {"prompt": "why: ", "completion": "because"}
    if conversational:
        row = {
            "prompt": [{"role": "user", "content": "why"}],
            "completion": [{"role": "assistant", "content": "because"}],
        }
    return Dataset.from_list([row] * 2)


ROWS = {
    "messages": (some_conversations(2), "assistant_only_loss"),
    "instruction": (
        Dataset.from_list([{"instruction": "why", "output": "because"}] * 2),
        "assistant_only_loss",
    ),
    "prompt": (prompt_rows(False), "completion_only_loss"),
    "conversational prompt": (prompt_rows(True), "completion_only_loss"),
    "text": (Dataset.from_list([{"text": "the fox"}] * 2), None),
}


@pytest.mark.parametrize("kind", ROWS)
def test_each_setting_decides_for_its_own_rows(make, load, kind):
    rows, decides = ROWS[kind]
    loaded = load()
    for assistant, completion in itertools.product((None, True, False), repeat=2):
        settings = {"assistant_only_loss": assistant, "completion_only_loss": completion}
        row = make(rows, model=loaded, **settings).train_dataset[0]
        whole = row["labels"] == row["input_ids"]
        assert whole == (decides is None or settings[decides] is False), settings
        assert any(label != -100 for label in row["labels"])


@pytest.mark.parametrize("kind", ["prompt", "messages"])
def test_defaults_of_trls_config_are_not_the_users_word(make, kind):
    config = {"use_cpu": True, "bf16": False}
    rows = ROWS[kind][0]
    adopted, own = make(rows, config=trl.SFTConfig, **config), make(rows)
    assert adopted.train_dataset[0]["labels"] == own.train_dataset[0]["labels"]
    assert (
        adopt(trl.SFTConfig(output_dir="x", completion_only_loss=False, **config)).completion_only_loss
        is False
    )


class DropsBounds:
    def __call__(self, examples):
        longest = max(len(example["input_ids"]) for example in examples)
        ids = torch.tensor([e["input_ids"] + [0] * (longest - len(e["input_ids"])) for e in examples])
        return {"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}


def test_packs_go_to_no_collator_that_drops_their_bounds(make, load):
    loaded = load()
    collator = trl.trainer.sft_trainer.DataCollatorForLanguageModeling
    for settings in ({"packing": True}, {"padding_free": True}, {"eval_packing": True}):
        extra = {"data_collator": DropsBounds(), "eval_dataset": some_conversations(4)}
        with pytest.raises(ConfigError, match="do not say where documents begin"):
            make(extra=extra, model=loaded, **settings)
    make(extra={"data_collator": DropsBounds()}, model=loaded)
    # one that gives positions stays
    flat = collator(0, padding_free=True)
    assert make(extra={"data_collator": flat}, model=loaded, packing=True).data_collator is flat


def test_a_collator_that_makes_its_own_labels_is_refused_unless_all_is_trained(make, load):
    model, tokenizer = load()
    given = {"data_collator": transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)}
    with pytest.raises(ConfigError, match="makes labels of its own"):
        make(extra=given, model=(model, tokenizer))
    make(ROWS["text"][0], extra=given, model=(model, tokenizer)).train()
    padded = {"data_collator": transformers.DataCollatorWithPadding(tokenizer)}
    make(extra=padded, model=(model, tokenizer)).train()


@pytest.mark.parametrize(
    "settings",
    [
        {"per_device_eval_batch_size": 4},
        {"per_device_eval_batch_size": 2, "packing": True},
        {"eval_packing": True},
        {"padding_free": False},
        {"train_sampling_strategy": "group_by_length"},
    ],
)
def test_metrics_and_predictions_see_each_example_in_order(make, settings):
    held_out = some_conversations(7)
    found = {}

    def metrics(prediction):
        found["labels"] = prediction.label_ids
        return {"rows": float(len(prediction.predictions))}

    extra = {
        "eval_dataset": held_out,
        "compute_metrics": metrics,
        "preprocess_logits_for_metrics": lambda logits, labels: logits.argmax(-1),
    }
    trainer = make(extra=extra, **settings)
    plain = make(extra={"eval_dataset": held_out}, **settings).evaluate()["eval_loss"]
    result = trainer.evaluate()
    assert result["eval_rows"] == 7
    assert result["eval_loss"] == pytest.approx(plain, rel=1e-5)
    decode = trainer.processing_class.decode
    answers = [row["messages"][1]["content"] + "<|im_end|>" for row in held_out]
    assert [decode([i for i in row if i != -100]) for row in found["labels"]] == answers
    late = make(extra={"eval_dataset": held_out}, **settings)
    assert len(late.predict(late.eval_dataset).predictions) == 7


def test_losses_count_in_evaluation_as_in_training(make):
    seen = []

    def summed(outputs, labels, num_items_in_batch=None):
        seen.append(num_items_in_batch)
        logits, targets = outputs.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
        return torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch

    rows = some_conversations(4)
    sizes = {
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 1,
    }
    trainer = make(
        rows, {"eval_dataset": rows, "compute_loss_func": summed}, max_steps=1, learning_rate=0.0, **sizes
    )
    evaluated = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert losses_of(trainer)[0] == pytest.approx(evaluated, rel=1e-4)
    assert evaluated == pytest.approx(
        make(rows, {"eval_dataset": rows}, **sizes).evaluate()["eval_loss"], rel=1e-4
    )
    assert None not in seen


def test_a_loss_of_the_users_reads_logits_while_training(make):
    class ReadsLogits(SFTTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            outputs = model(**inputs)
            logits, targets = outputs.logits[:, :-1].flatten(0, 1).float(), inputs["labels"][:, 1:].flatten()
            loss = torch.nn.functional.cross_entropy(logits, targets, reduction="sum") / num_items_in_batch
            return (loss, outputs) if return_outputs else loss

    plain, own = make(), make(cls=ReadsLogits)
    plain.train()
    own.train()
    assert losses_of(own) == pytest.approx(losses_of(plain), rel=1e-4)


def test_logits_of_a_training_forward_are_formed_when_they_are_read(load):
    model = load()[0].train()
    expected = model(input_ids=IDS).logits
    reads = {
        "attribute": lambda out: out.logits,
        "key": lambda out: out["logits"],
        "get": lambda out: out.get("logits"),
        "index": lambda out: out[1],
        "tuple": lambda out: out.to_tuple()[1],
        "items": lambda out: dict(out.items())["logits"],
    }
    for name, read in reads.items():
        out = model(input_ids=IDS, labels=IDS)
        assert torch.equal(out["loss"], out.loss)
        assert torch.equal(out[0], out.loss)
        assert "_compute" in vars(out), name  # nothing was formed for the loss
        torch.testing.assert_close(read(out), expected, msg=name)
        assert list(out.keys())[:2] == ["loss", "logits"]
    model(input_ids=IDS, labels=IDS).logits.mean().backward()
    assert model(input_ids=IDS, labels=IDS, output_logits=False).logits is None
    loss, logits = model(input_ids=IDS, labels=IDS, return_dict=False)[:2]
    assert loss.dim() == 0
    torch.testing.assert_close(logits, expected)


def test_a_plain_trainer_forms_no_logits(load, tmp_path, monkeypatch):
    model, _ = load()
    base = model.get_base_model()
    monkeypatch.setattr(type(base), "head_logits", lambda *given: pytest.fail("logits were formed"))
    rows = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 2
    args = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    Trainer(model, args, train_dataset=rows).train()


def test_keywords_that_ask_for_nothing_known_are_refused(load):
    model = load()[0].eval()
    with pytest.raises(ModelError, match="'atention_mask': did you mean attention_mask"):
        model(input_ids=IDS, atention_mask=torch.ones_like(IDS))
    with pytest.raises(ModelError, match="never forms its probabilities"):
        model(input_ids=IDS, output_attentions=True)
    with pytest.raises(ModelError, match="'pixel_values'"):
        model.get_base_model().model(input_ids=IDS, pixel_values=IDS)
    model(
        input_ids=IDS,
        output_attentions=False,
        output_router_logits=None,
        token_type_ids=IDS,
        return_loss=False,
    )
    assert len(model(input_ids=IDS, output_hidden_states=True).hidden_states) == 3
    assert isinstance(model.get_base_model().model(input_ids=IDS, return_dict=False), tuple)


def test_compiled_models_are_refused_in_words_and_caches_of_fixed_size_are_replaced(make, load):
    model, tokenizer = load()
    with pytest.raises(ConfigError, match="torch_compile = True: oribi's layers run kernels"):
        make(model=(model, tokenizer), torch_compile=True)
    with pytest.raises(ConfigError, match="went through torch.compile"):
        make(model=(torch.compile(model), tokenizer))
    cache = transformers.StaticCache(model.config, 32)
    with pytest.raises(ModelError, match="StaticCache has a fixed size"):
        model.eval()(input_ids=IDS, past_key_values=cache)
    expected = model.generate(IDS, max_new_tokens=2, do_sample=False)
    for kind in (
        "static",
        "offloaded_static",
        "sliding_window",
        "hybrid",
    ):  # the last is in Gemma's checkpoints
        for beams in (1, 2):
            found = model.generate(
                IDS, max_new_tokens=2, do_sample=False, cache_implementation=kind, num_beams=beams
            )
            assert torch.equal(found, expected) or (beams == 2 and found.shape == expected.shape)


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma2", "gemma3_text", "granite"])
def test_embeddings_of_the_module_are_those_of_the_model(family):
    """Soft prompts, attribution and prompt tuning take what `get_input_embeddings()` gives."""
    ours, theirs = (model.eval() for model in tiny_pair(tiny_config(family)))
    embeds = ours.get_input_embeddings()(IDS)
    torch.testing.assert_close(embeds, theirs.get_input_embeddings()(IDS))
    torch.testing.assert_close(ours(inputs_embeds=embeds).logits, ours(input_ids=IDS).logits)
    torch.testing.assert_close(
        ours(inputs_embeds=embeds).logits, theirs(inputs_embeds=embeds).logits, rtol=1e-4, atol=1e-4
    )
    answers = [m.generate(inputs_embeds=embeds, max_new_tokens=4, do_sample=False) for m in (ours, theirs)]
    assert torch.equal(*answers)
    config = PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=3)
    tuned = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        tuned.append(get_peft_model(model, config).eval())
    torch.testing.assert_close(
        tuned[0](input_ids=IDS).logits, tuned[1](input_ids=IDS).logits, rtol=1e-4, atol=1e-4
    )


def test_a_scaled_embedding_stays_scaled_when_it_is_resized_or_trained():
    ours, theirs = (model.eval() for model in tiny_pair(tiny_config("gemma")))
    for model in (ours, theirs):
        model.resize_token_embeddings(130, mean_resizing=False)
    torch.testing.assert_close(ours.get_input_embeddings()(IDS), theirs.get_input_embeddings()(IDS))
    config = LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"])
    for model in (ours, theirs):
        torch.manual_seed(0)
        adapted = get_peft_model(model, config)
        with torch.no_grad():
            adapted.get_input_embeddings().lora_embedding_B["default"].normal_()
    torch.testing.assert_close(ours.get_input_embeddings()(IDS), theirs.get_input_embeddings()(IDS))
    config = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    whole = [get_peft_model(model.eval(), config) for model in tiny_pair(tiny_config("gemma"))]
    torch.testing.assert_close(*(model.get_input_embeddings()(IDS) for model in whole))
