"""Level 2: kernels, their text form, checker and interpreter."""
