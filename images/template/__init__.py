"""The generic image, made before any request, and the initrd that is customised from it."""
