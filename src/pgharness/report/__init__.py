"""Reports: one pass over a run's views and their analysis, one document, and files of it in each format asked for.

`gathering.gather` reads the database and computes, `files` makes files of that. A report of the same rows is the same,
byte for byte.
"""
