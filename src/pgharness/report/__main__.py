"""The process in which a report is made: `python -m pgharness.report`, started by a worker."""

from pgharness.report.desk import compute

if __name__ == "__main__":
    compute()
