"""Generation by oribi's own loop: how the next token is chosen, what is held from token to token, one token's step, the loop.

`request` reads what `generate` asks for, or says why transformers' loop has to do it; `loop` does it.
"""
