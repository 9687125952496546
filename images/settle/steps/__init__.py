"""The steps, one module and one script of the same name each."""
