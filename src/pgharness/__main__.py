"""`python -m pgharness` is `pgharness`."""

from pgharness.cli import main

main()
