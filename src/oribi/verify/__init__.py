"""`oribi verify`: whether a file, a folder or a server answers as the trained model, and if not, what is wrong with it.

peers.py says what can be asked of whatever answers; local.py asks files and folders, server.py an address. weights.py, prompts.py
and samples.py turn what was said into findings; call.py is the sequence.
"""
