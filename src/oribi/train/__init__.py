"""Steps 5 and 6: how to train, and training.

`arguments` are the settings and `setup` fits them to the model and the data; `trainer` is the `SFTTrainer`, built from `step`
(one optimizer step, with `graphs` and `smaller_steps`), `evaluate` and `resumable` (`position`, `resume`, `fingerprint`,
`checkpoints`). `batches` and `shards` serve several processes, `guard` and `progress` watch a run, `report` sums it up.
"""
