"""What transformers' `generate` calls of a model to take tokens: oribi's own loop where it can, else transformers'."""

import logging
from functools import lru_cache

from oribi.models.decoding.loop import continue_prompts
from oribi.models.decoding.request import read_request
from oribi.models.decoding.state import rows_that_fit

logger = logging.getLogger(__name__)


class GeneratesByItself:
    """Before `GenerationMixin` among the bases of a decoder for causal language modelling."""

    def rows_that_fit(self, length: int) -> int:
        """Rows of so many tokens that may be generated together in the memory that is free now."""
        return rows_that_fit(
            self.model.layers, length, self.config.vocab_size, self.model.last_norm.weight.dtype, self.device
        )

    def _sample(
        self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=False, streamer=None,
        **model_kwargs: object,
    ) -> object:  # fmt: skip
        """Tokens one at a time, greedily or drawn."""
        request = read_request(
            self, input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus, streamer, model_kwargs
        )  # fmt: skip
        if not isinstance(request, str):
            return continue_prompts(self, request)
        say_once(request)
        return super()._sample(
            input_ids, logits_processor, stopping_criteria, generation_config, synced_gpus=synced_gpus, streamer=streamer,
            **model_kwargs,
        )  # fmt: skip

    def _beam_search(self, *args: object, **kwargs: object) -> object:
        say_once("num_beams asks for a search over beams")
        return super()._beam_search(*args, **kwargs)

    def _assisted_decoding(self, *args: object, **kwargs: object) -> object:
        say_once("drafted tokens are to be checked (assistant_model, prompt_lookup_num_tokens)")
        return super()._assisted_decoding(*args, **kwargs)


@lru_cache(maxsize=64)
def say_once(reason: str) -> None:
    """Logs why transformers' loop generates, the first time in a process that this is the reason."""
    logger.warning("generate: transformers' own loop, which is slower, because %s", reason)
