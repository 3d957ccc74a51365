"""The process in which an analysis is computed: `python -m pgharness.analysis`, started by a worker."""

from pgharness.analysis.desk import compute

if __name__ == "__main__":
    compute()
