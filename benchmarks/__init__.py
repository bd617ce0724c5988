"""What things cost, measured: each module prints figures, and the command line that gives them again."""
