"""The command line: one file for each command, flags in, one call out."""
