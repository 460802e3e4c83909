"""Programs beside the four stages, and what the stages print and draw."""
