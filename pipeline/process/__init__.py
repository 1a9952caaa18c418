"""What a process needs to behave: progress, stopping, faults, memory, files; no torch."""
