"""New host keys for SSH, made by the client itself: their private parts are never in an image."""

from __future__ import annotations

from images.settle.step import Step

__all__ = ["STEP"]

STEP = Step(
    name="ssh-keys", phase="identity", order=30, description="the SSH server gets host keys of its own; the old ones go"
)  # fmt: skip
