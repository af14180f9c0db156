"""STEP 4: rows to token ids and exact labels, packs and batches. Knows no model and no kernel.

A row goes through `sources` (files, folders, hub names, lists; `readers` read the files), `conversations` (which format it is;
`converters` read it) and `encoding`; `preparation` is the pass over all rows, `prepare` the call and its cache, `report` what
became of them. `packing` and `collate` make batches, `view` shows them.
"""
