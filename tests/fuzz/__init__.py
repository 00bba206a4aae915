"""Broken inputs for every reader: seeded, each input read in a process with bounds on time and memory."""
