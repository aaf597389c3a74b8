"""`python -m graphopt.cli`."""

from graphopt.cli.app import main

main()
