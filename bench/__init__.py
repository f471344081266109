"""Measurements: the one tool that makes them (`harness`), what a record says (`record`), and what is measured."""
