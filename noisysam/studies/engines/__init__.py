"""Engines: what trains the cells of a study, one at a time or many."""
