"""The command line: one file for each command, flags in, one call out."""

import time

# From here `fjft bench` counts: the time until the first step is what a user waits.
STARTED = time.perf_counter()
