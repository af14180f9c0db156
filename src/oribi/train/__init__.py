"""Steps 5 and 6: how to train, and training.

`arguments` are the settings and `setup` fits them to the model; `trainer` is the `SFTTrainer`, built from `step` (one optimizer
step, with `graphs`, `step_shapes`, `ahead` and `smaller_steps`), `rows` (data and batches), `evaluate` and `resumable` (`position`, `resume`,
`fingerprint`, `checkpoints`). Several processes are connected by `several` and `exchange`, get their rows from `batches`, and may
share frozen weights by `shards` and `whole`. `guard` and `progress` watch a run, `report` sums it up.
"""
