"""What is trained, on what and how."""
