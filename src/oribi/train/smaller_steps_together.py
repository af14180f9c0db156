"""Out of memory in one process of several that gather each layer together: none of them may leave the others waiting.

The process that is short goes on gathering, without computing, to the end of its optimizer step. There all processes agree to
throw the step away and to run it again in smaller parts, each in equally many.
"""

from collections.abc import Callable
from typing import Any

import torch

from oribi.errors import EndedElsewhere, TrainingError
from oribi.models.decoder import DecoderForCausalLM
from oribi.models.unwrap import bare_name
from oribi.train.smaller_steps import Inputs, SmallerSteps, cut

# how a process's step went
DONE, SHORT, HOPELESS = range(3)


class SmallerStepsTogether(SmallerSteps):
    """Runs micro-batches of a sharded model, in parts once memory was short in any process.

    Args:
        run, restart, plans: as of `SmallerSteps`.
        base: the model, sharded.
        is_last: whether the micro-batch that runs is the last one of its optimizer step.
        least: the least of a number of each process, in all of them.
        agree: what each process found, in all of them.
        is_first: whether this process speaks for all.
    """

    def __init__(
        self,
        run: Callable[[Inputs, Any], torch.Tensor],
        restart: Callable[[], None],
        plans: bool,
        base: DecoderForCausalLM,
        is_last: Callable[[], bool],
        least: Callable[[int], int],
        agree: Callable[[Any], list[Any]],
        is_first: bool,
    ) -> None:
        super().__init__(run, restart, plans)
        self._shards, self._is_last = base.model.shards, is_last
        self._least, self._agree, self._is_first = least, agree, is_first
        self._device, self._first_trained = base.device, first_trained_layer(base)
        self._is_short = False
        self._owed: list[
            int
        ] = []  # micro-batches of this step whose loss was not known when the caller asked

    def __call__(self, step: int, inputs: Inputs, targets: Any) -> torch.Tensor:
        if step != self._step:
            self._step, self._taken, self._owed, self._is_short = step, [], [], False
        self._taken.append(inputs)
        loss = self._try(inputs, targets)
        if not self._is_last():
            self._owed += [len(self._taken) - 1] * self._is_short
            return loss
        while self._any_is_short():
            self._is_short = False
            self._make_smaller(step)
            losses = [self._try(batch, targets) for batch in self._taken]
            loss = losses[-1]
            for index in self._owed:
                loss = loss + losses[index]
        return loss

    def _say_smaller(self, step: int) -> None:
        if self._is_first:  # all of them run smaller parts
            super()._say_smaller(step)

    def _try(self, inputs: Inputs, targets: Any) -> torch.Tensor:
        """Loss of a micro-batch; zero where memory was short, now or earlier in the step.

        Every process gathers the layers for as many parts, however many documents it has.
        """
        loss = torch.zeros((), device=self._device)
        parts = cut(inputs, self.parts)
        for index in range(self.parts):
            self._shards.begin_pass()
            if index < len(parts) and not self._is_short:
                try:
                    loss = loss + self._run(parts[index], targets)
                except torch.OutOfMemoryError:
                    self._is_short = True
            # outside the handler: its traceback holds the activations
            if index >= len(parts) or self._is_short:
                self._shards.finish_pass(self._first_trained)
        return torch.zeros_like(loss) if self._is_short else loss

    def _any_is_short(self) -> bool:
        """Whether the step has to run again; asked by all processes at its end.

        Raises:
            TrainingError: it would not help one of them.
        """
        problem = self._problem() if self._is_short else None
        state = DONE if not self._is_short else SHORT if problem is None else HOPELESS
        worst = -self._least(-state)
        if worst == HOPELESS:
            said = self._agree(problem)
            if problem is not None:
                raise TrainingError(problem)
            rank = next(rank for rank, other in enumerate(said) if other is not None)
            raise EndedElsewhere(f"process {rank} failed, which ends the training: {said[rank]}")
        return worst == SHORT


def first_trained_layer(base: DecoderForCausalLM) -> int:
    """The layer at which a backward ends: the first one behind which nothing is trained."""
    norm = f"model.{base.model.norm_name}."
    trained = [bare_name(name) for name, p in base.named_parameters() if p.requires_grad]
    before = [n for n in trained if not n.startswith(("model.layers.", "lm_head.", norm))]
    indices = [int(name.split(".")[2]) for name in trained if name.startswith("model.layers.")]
    return 0 if before else min(indices, default=len(base.model.layers))
