"""Bytes and floating-point operations of a model, a layer and a training step, and what follows from them: plans and estimates."""
