"""The demo: a guest is protected every few seconds, damaged, and brought back. `./dev demo [--tiny] [--json]`."""
