"""What a tokenizer's chat template says. `template` renders it within limits; nothing here knows a model or a data set."""
