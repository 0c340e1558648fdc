"""Engines: how messages reach ClientApps. `local`: warm worker processes on this machine."""
