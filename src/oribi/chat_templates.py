"""Unsloth's place for chat templates, for scripts that import from it; the names are `oribi`'s own."""

from oribi import __getattr__ as __getattr__
