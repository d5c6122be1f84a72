"""Which backend runs each op, decided in one place and told on request."""
