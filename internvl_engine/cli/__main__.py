"""python -m internvl_engine.cli: the command where it is not on the path."""

from . import main

main()
