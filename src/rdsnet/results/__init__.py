"""What was found: given to others and back, matched with the truth, measured."""
