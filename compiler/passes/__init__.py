"""The stages from canonical to memory: each a function from one program to the next."""
