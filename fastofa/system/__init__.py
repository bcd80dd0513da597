"""The machine: files, devices, processes, signals, errors, progress."""
