"""Level 1: tensor graphs, their builder, text form, checker and export."""
