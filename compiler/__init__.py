"""From traced graphs to plans and machine code; `driver` runs the stages."""
