"""Studies of many runs: study files, plans, sweeps, tuning."""
