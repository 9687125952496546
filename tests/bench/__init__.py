"""Figures: how fast, how much processor, how much memory, beside other tools. `./dev bench`."""
