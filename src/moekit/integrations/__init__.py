"""Doors into other libraries. Each is a module that is imported by name, so that none is loaded unasked."""
