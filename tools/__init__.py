"""Programs beside the four stages."""
