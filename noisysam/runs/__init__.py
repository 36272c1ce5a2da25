"""One run as data: its configuration, its problem, its record."""
