"""What is shown of the results, made from their JSON alone: nothing here needs torch."""
