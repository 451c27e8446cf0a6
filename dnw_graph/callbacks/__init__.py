"""Callbacks for any Lightning run: attach rules to its optimiser, watch and record its wirings, count its cost."""
