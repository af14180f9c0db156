"""NEFTune: noise on the embeddings while training. B rows, S tokens a row, D hidden size."""

import torch
from torch import nn


class EmbeddingNoise:
    """Adds uniform noise to what an embedding gives in training, scaled by each document's own length.

    The size is alpha / sqrt(length * D). transformers' version takes the length of the row, so that documents which
    are joined into one row would get less noise than alone.
    Source: Jain et al. 2023, "NEFTune: Noisy Embeddings Improve Instruction Finetuning", arXiv 2310.05914.

    Args:
        embedding: the model's input embedding.
        alpha: size of the noise, 5 to 15 in the paper.
    """

    def __init__(self, embedding: nn.Module, alpha: float) -> None:
        self.alpha = alpha
        self.lengths: torch.Tensor | None = None
        self._hook = embedding.register_forward_hook(self._add)

    def measure(self, inputs: dict[str, torch.Tensor]) -> None:
        """Take the documents' lengths of the next batch: cu_seq_lens_q [docs + 1] or attention_mask [B, S]."""
        ids = inputs["input_ids"]
        if inputs.get("cu_seq_lens_q") is not None:
            lengths = inputs["cu_seq_lens_q"].diff()
            # the size is known, and saying so spares a synchronisation
            self.lengths = lengths.repeat_interleave(lengths, output_size=ids.numel()).view(*ids.shape, 1)
        elif inputs.get("attention_mask") is not None:
            self.lengths = inputs["attention_mask"].sum(1)[:, None, None]
        else:
            self.lengths = torch.full((1, 1, 1), ids.shape[1], device=ids.device)

    def remove(self) -> None:
        """Leave the embedding as it was."""
        self._hook.remove()

    def _add(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if not module.training or self.lengths is None:
            return output
        size = self.alpha / torch.sqrt(self.lengths.to(torch.float32) * output.shape[-1])
        return output + ((torch.rand_like(output, dtype=torch.float32) * 2 - 1) * size).to(output.dtype)
