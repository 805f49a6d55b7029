"""Studies: what was measured, and the code that measured it."""
