"""What must survive the process: one SQLite file, written by one thread. See `extproc.journal.writer`."""
