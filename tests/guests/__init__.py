"""Guests for tests and the demo, built from Debian's packages once and kept in the cache: `tiny` and `debian`."""
