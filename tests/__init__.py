"""Tests, the guests they start, and the demo. Run by `./dev`, which prepares everything."""
