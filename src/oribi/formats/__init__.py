"""How checkpoints hold quantised weights for servers: FP8, FP4 and packed integers.

`codecs` is the arithmetic of each format in both directions, `packed` reads a checkpoint's weights through it, and `settings`
says what a config.json's quantization_config means. Loading and export both ask here.
"""
