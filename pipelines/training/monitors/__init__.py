"""What watches the loss of each step and may ask to go back: one file for each monitor."""
