"""Many runs: study files, plans, sweeps, tuning."""
