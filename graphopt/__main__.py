"""`python -m graphopt`."""

from graphopt.cli.app import main

main()
