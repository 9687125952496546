"""Helpers for tests that need a guest or a libvirt: `world`, `libvirt`, `tiny`, `debian`."""
