"""Packed layers and the backends that execute them. Imports neither calibration nor methods nor healing."""
