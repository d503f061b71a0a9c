"""What is made of several runs: one table, and one page."""
