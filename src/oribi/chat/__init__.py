"""What a tokenizer and its chat template say; knows no model and no data.

`template` renders within `limits`, `rendering` finds out what a template writes, and `ends` is the one home of which token ends
an answer. `layout` and `masking` tell which characters of a `conversation` are trained. `tokenizer` loads and repairs a
tokenizer; `named_templates` sets the templates in `templates/`.
"""
