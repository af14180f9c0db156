"""Processes without a wrapper around the model: gradients equal one process, and what one of them meets ends or stops all."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from oribi.errors import EndedElsewhere, TrainingError
from oribi.kernels.adamw import FlatAdamW
from oribi.kernels.adamw_step import CONTROL_WORDS
from oribi.selftest.processes import run_together
from oribi.selftest.subject import Subject, write_small_model
from oribi.train import exchange
from oribi.train.exchange import Exchange
from tests.train.several_processes import OPTIMIZERS, USUAL, first_gradients
from tests.trust.runs import trainer_in

posix = pytest.mark.skipif(sys.platform == "win32", reason="torch.distributed with gloo is tested on POSIX")


@dataclass
class Ran:
    """What two processes found, and the trainings of one on the same rows."""

    folder: Path
    found: list[dict]
    one: dict[str, tuple[dict[str, torch.Tensor], list[float]]]


@pytest.fixture(scope="module")
def ran(tmp_path_factory) -> Ran:
    """All in one start of two processes."""
    small, folder = tmp_path_factory.mktemp("small"), tmp_path_factory.mktemp("two")
    model = str(
        write_small_model(small, num_hidden_layers=3)
    )  # two are whole at a time where processes share them
    run_together(["-m", "tests.train.several_processes", model, str(folder)], threads=1)
    one = {
        name: first_gradients(
            trainer_in(Subject(model, "cpu"), folder / f"one-{name}", **{**USUAL, "optim": optimizer})
        )
        for name, optimizer in OPTIMIZERS.items()
    }
    return Ran(folder, [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)], one)


@posix
@pytest.mark.slow
class TestTwoProcesses:
    @pytest.mark.parametrize("optimizer", OPTIMIZERS)
    def test_gradients_and_losses_are_those_of_one_process(self, ran, optimizer):
        """With unequal numbers of targets, accumulation, and other weights to begin with in the second process."""
        gradients, losses = ran.one[optimizer]
        for rank in range(2):
            assert ran.found[rank][optimizer] == pytest.approx(losses, rel=1e-6)
            own = torch.load(ran.folder / f"{optimizer}-{rank}.pt")
            assert set(own) == set(gradients)
            for name, gradient in gradients.items():
                assert (own[name] - gradient).norm() <= 1e-6 * gradient.norm(), name

    def test_one_process_that_is_short_of_memory_cuts_its_batches_alone(self, ran):
        assert [found["parts"] for found in ran.found] == [1, 2]
        for found in ran.found:
            assert found["short"] == pytest.approx(ran.one["flat"][1], rel=1e-6)

    @pytest.mark.parametrize(
        ("where", "parts"), [("alone", [1, 2]), ("forward", [2, 2]), ("backward", [2, 2])]
    )
    def test_a_process_short_of_memory_in_a_sharded_step_lets_all_repeat_it_where_they_gather_layers_together(
        self, ran, where, parts
    ):
        gradients, losses = ran.one["flat"]
        assert [found[f"parts {where}"] for found in ran.found] == parts
        for rank, found in enumerate(ran.found):
            assert found[f"sharded {where}"] == pytest.approx(losses, rel=1e-6)
            own = torch.load(ran.folder / f"sharded {where}-{rank}.pt")
            assert all((own[name] - g).norm() <= 1e-6 * g.norm() for name, g in gradients.items())

    def test_a_sharded_step_that_fits_in_no_parts_ends_all_with_the_message_of_the_one_that_is_short(
        self, ran
    ):
        first, second = (found["sharded always"] for found in ran.found)
        assert (second[0], first[0]) == ("TrainingError", "EndedElsewhere")
        assert second[1].startswith("a document of ")
        assert first[1] == f"process 1 failed, which ends the training: {second[1]}"
        assert first[2] == second[2] == 1

    def test_a_value_that_is_not_finite_in_one_process_stops_both_alike(self, ran):
        first, second = (found["broken"] for found in ran.found)
        assert first == second
        assert first[0] == "TrainingError"
        assert "the loss is nan at step 2" in first[1]

    def test_a_signal_to_one_process_stops_both_after_the_same_step(self, ran):
        assert [found["stopped"][0] for found in ran.found] == ["KeyboardInterrupt", "SystemExit"]
        assert [found["stopped"][2] for found in ran.found] == [2, 2]
        assert ran.found[0]["saved"] == ["checkpoint-2"]

    def test_other_frozen_weights_in_one_process_are_found_before_the_first_step(self, ran):
        for found in ran.found:
            assert found["other"][0] == "TrainingError"
            assert "process 1 loaded other weights than process 0: 1 tensors differ" in found["other"][1]
            assert "model.norm.weight" in found["other"][1]

    def test_a_step_that_exchanges_nothing_is_refused(self, ran):
        for found in ran.found:
            assert "OwnStep.training_step has to call super().training_step" in found["own"][1]

    def test_a_process_that_fails_ends_the_other_with_its_message(self, ran):
        assert ran.found[1]["failed"][:2] == ["ValueError", "these rows are not what they seem\nat all"]
        assert ran.found[0]["failed"][:2] == [
            "EndedElsewhere",
            "process 1 failed, which ends the training: these rows are not what they seem",
        ]


@pytest.fixture
def group(tmp_path):
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def connected(timeout: float = 60.0) -> Exchange:
    weight = torch.nn.Parameter(torch.ones(300))
    return Exchange([weight], FlatAdamW([weight]), torch.device("cpu"), timeout)


@posix
def test_waiting_ends_with_the_time_limit_or_anothers_failure(group, monkeypatch):
    monkeypatch.setattr(exchange, "LOOK_SECONDS", 0.01)
    one = connected(timeout=0.05)
    with pytest.raises(TrainingError, match="process 0 waited 0 s for the other processes in step 0"):
        one._wait(lambda: False)
    one.rank = 1
    assert one.failure(ValueError("why\nso")).args == ("why\nso",)
    one.rank = 0
    with pytest.raises(EndedElsewhere, match="process 1 failed, which ends the training: why$"):
        one._wait(lambda: False)
    gone = connected()
    assert isinstance(gone.failure(RuntimeError("Connection closed by peer [127.0.0.1]")), EndedElsewhere)


@posix
def test_control_words_travel_behind_the_gradients(group):
    one = connected()
    one._parameters[0].grad[:] = 3.0
    one.begin_step()
    one.reduce(stop=True)
    assert one.is_reduced
    assert torch.equal(one._parameters[0].grad, torch.full((300,), 3.0))
    assert one.asked_to_stop(now=True)
    one._optimizer.step()
    assert not one._optimizer._flats[0].grads.any()
    one.reduce(stop=False)
    assert not one.asked_to_stop(now=True)
    (buffer,) = one._optimizer.shared_buffers()
    assert buffer.data_ptr() == one._optimizer._flats[0].grads.data_ptr()
    assert len(buffer) == len(one._optimizer._flats[0].grads) + CONTROL_WORDS


@posix
def test_on_a_gpu_the_words_of_the_step_before_are_read_unless_something_waits_anyway(group):
    one = connected()
    one._device = SimpleNamespace(type="cuda")
    for step, (stop, before, now) in enumerate(
        [(False, False, False), (True, False, True), (False, True, False)]
    ):
        one._words[step % 2][:] = float(stop)
        one.reduced_steps = step + 1
        assert one.asked_to_stop(now=True) == now
        assert one.asked_to_stop(now=False) == before


@posix
def test_a_process_that_all_others_wait_for_is_named_once(group, caplog):
    one = connected()
    one.processes = 4
    for _ in range(2 * exchange.MEASURED_STEPS):
        one._compare_times([0.1, 0.1, 0.15, 0.1])
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("process 2 computes 1.5 times as long per step as the usual one (100 ms)")


@posix
def test_gradients_that_no_process_has_stay_absent_and_portions_keep_dtypes_apart(group, monkeypatch):
    parameters = [torch.nn.Parameter(torch.ones(n, dtype=t)) for n, t in
                  ((5, torch.float32), (7, torch.float32), (3, torch.bfloat16), (4, torch.float32))]  # fmt: skip
    monkeypatch.setattr(exchange, "PORTION_BYTES", 40)
    one = Exchange(parameters, torch.optim.SGD(parameters, lr=0.1), torch.device("cpu"), 60)
    for index, parameter in enumerate(parameters[:3]):
        parameter.grad = torch.full_like(parameter, index + 1.0)
    one.reduce(stop=False)
    assert parameters[3].grad is None
    assert [p.grad.unique().tolist() for p in parameters[:3]] == [[1.0], [2.0], [3.0]]
