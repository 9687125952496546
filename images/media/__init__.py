"""The forms in which one build is delivered; each medium is one module."""
