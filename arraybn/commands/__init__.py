"""The commands of ``python -m arraybn``: one module each, with `HELP`, `add_arguments(parser)` and `run(arguments)`."""
