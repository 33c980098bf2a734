"""Tells what a run takes before it is paid for, by the compiler of its hardware."""
