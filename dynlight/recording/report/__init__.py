"""What is made of a run's rows: summary, tables, page."""
