"""Loops that know their phases."""
