"""`python -m oribi` is the command `oribi`."""

from oribi.cli import main

main()
