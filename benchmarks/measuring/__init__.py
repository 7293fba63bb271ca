"""Time and memory, and what they were measured on."""
