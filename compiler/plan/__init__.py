"""What compiler and runtime share: plans, dimensions, element types, errors."""
