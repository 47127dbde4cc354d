"""`python -m hfprune_fast` is `hfprune`."""

from hfprune_fast.cli import main

main()
