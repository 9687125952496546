"""Kernel modules of one release: tables, matching, closure, the store of extra ones, the plan."""
