"""What takes long: run by `./dev soak`."""
