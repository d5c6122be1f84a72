"""One module a verb: `Options` (a frozen dataclass, its fields are the flags) and `run(options, console) -> dict`."""
