"""Access to the machine: files, devices, processes, signals, errors and progress."""
