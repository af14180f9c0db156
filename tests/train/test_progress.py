"""What a run prints: plain lines now and then, and no warnings that a user could do nothing about."""

import io
import warnings

import pytest
from rich.console import Console

import oribi.train.progress as progress_module
from oribi import FastLanguageModel, SFTConfig, SFTTrainer
from oribi.train.progress import LINE_SECONDS, Progress, fitting


@pytest.fixture
def told(monkeypatch):
    """Lines that a run of steps prints, each so many seconds after the one before."""

    def run(steps: int, seconds: float) -> list[str]:
        now = [0.0]
        monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
        printed = io.StringIO()
        progress = Progress(console=Console(file=printed, width=200))
        state = type("State", (), {"global_step": 0, "max_steps": steps, "is_world_process_zero": True})()
        progress.on_train_begin(None, state, None)
        for step in range(1, steps + 1):
            now[0] += seconds
            state.global_step = step
            progress.on_log(None, state, None, logs={"loss": 1.0, "tokens_per_second": 1.0})
        return printed.getvalue().splitlines()

    return run


def test_a_pipe_gets_the_first_the_last_and_a_line_now_and_then(told):
    quick = told(steps=100, seconds=1.0)
    assert quick[0].startswith("step 1/100 ")
    assert quick[-1].startswith("step 100/100 ")
    assert len(quick) == 1 + 99 // LINE_SECONDS + 1
    slow = told(steps=5, seconds=LINE_SECONDS + 1)
    assert [line.split()[1] for line in slow] == ["1/5", "2/5", "3/5", "4/5", "5/5"]


def test_evaluations_are_always_told(told, monkeypatch):
    printed = io.StringIO()
    progress = Progress(console=Console(file=printed, width=200))
    state = type("State", (), {"global_step": 3, "max_steps": 9, "is_world_process_zero": True})()
    for loss in (0.5, 0.25):
        progress.on_log(None, state, None, logs={"eval_loss": loss})
    assert printed.getvalue().splitlines() == ["step 3  eval_loss 0.5000", "step 3  eval_loss 0.2500"]


def test_loading_training_and_saving_meet_nothing_deprecated(tiny_folder, conversations, tmp_path):
    """transformers 5.23 warns of names that it had before; PEFT and TRL ask the model for them."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        model, tokenizer = FastLanguageModel.from_pretrained(
            str(tiny_folder), max_seq_length=128, dtype="float32"
        )
        model = FastLanguageModel.get_peft_model(model, r=4)
        arguments = SFTConfig(output_dir=str(tmp_path), max_steps=1, save_strategy="no")
        trainer = SFTTrainer(model, arguments, train_dataset=conversations, processing_class=tokenizer)
        trainer.train()
        FastLanguageModel.for_training(FastLanguageModel.for_inference(model))
        model.save_pretrained_merged(str(tmp_path / "adapter"), tokenizer, save_method="lora")


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_has_both_of_transformers_names(load, name):
    model, _ = load()
    decoder = model.get_base_model()
    if not hasattr(decoder, f"{name}_enable"):
        pytest.skip("this transformers has the older name only")
    getattr(model, f"{name}_enable")()
    assert getattr(decoder, f"is_{name}")
    assert all(layer.gradient_checkpointing for layer in decoder.model.layers)
    getattr(model, f"{name}_disable")()
    assert not getattr(decoder, f"is_{name}")
    assert not any(layer.gradient_checkpointing for layer in decoder.model.layers)
    if name == "activation_checkpointing":
        assert SFTConfig(activation_checkpointing=True).gradient_checkpointing
    assert not SFTConfig().gradient_checkpointing
    assert SFTConfig(gradient_checkpointing=True).gradient_checkpointing


def test_a_narrow_terminal_keeps_step_loss_and_time_left():
    state = type("State", (), {"global_step": 123, "max_steps": 4567, "is_world_process_zero": True})()
    progress = Progress(console=Console(file=io.StringIO()))
    parts = progress._describe(
        state, {"loss": 1.5, "learning_rate": 2e-4, "tokens_per_second": 12345, "mfu": 0.5}
    )
    assert fitting(parts, 200) == "  ".join(parts.values())
    for width in (60, 80, 100):
        line = fitting(parts, width)
        assert len(line) <= width
        assert line.startswith("step 123/4567  loss 1.5000  ")
        assert "left " in line
