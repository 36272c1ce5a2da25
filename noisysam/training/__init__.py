"""One run as a process: from a configuration to its result."""
