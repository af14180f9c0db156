"""GGUF files, read and written: container, names, metadata, tokenizer, quantisation, and llama.cpp as their reader."""
