"""What the runs say. Each analysis takes plain data and returns plain records."""
