"""Runners: one step program, executed in different ways.."""
