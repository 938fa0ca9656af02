"""`python -m mantle` is the `mantle` command."""

from mantle.cli.main import main

main()
