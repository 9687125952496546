"""The target's hardware as modaliases, found without booting a kernel on it."""
